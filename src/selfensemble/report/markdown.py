"""Text of users in Markdown, as text."""

import re
import shlex

_MARKUP = re.compile(r"[\\`*\[\]<>|]|:(?=\w+:)|^[#+-]|\b_|_\b")


def plain(text: str) -> str:
    """`text` on a line, with a backslash before what would be markup (`:x:` of emoji among it)."""
    return _MARKUP.sub(lambda found: f"\\{found.group()}", " ".join(text.split()))


def code(text: str) -> str:
    """`text` as inline code, in as many backticks as it takes."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{ticks}{pad}{' '.join(text.split())}{pad}{ticks}"


def word(name: str) -> str:
    """A name as one word of a shell's command."""
    return shlex.quote(name)
