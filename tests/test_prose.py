"""Plain English: no phrase of the list below in anything that people read.

That is the README and the other pages at the root, the documentation with its decisions, the report, help
texts, docstrings, error messages, YAML files and issue forms. The list holds what was once written here and
reads as archaic, indirect or translated.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import selfensemble.__main__  # noqa: F401  (loads the commands)
from selfensemble.cli.base import app

ROOT = Path(__file__).parents[1]
DOCS, SRC = ROOT / "docs", ROOT / "src" / "selfensemble"
INSTEAD = {
    r"answer(s|ed)? (rightly|wrongly)": "classified correctly; gets a wrong answer",
    r"rightly": "correctly",
    r"in front of": "before",
    r"anew": "again",
    r"somebody": "someone",
    r"whoever": "an attacker who; if you",
    r"who asks|asks again": "the persistent attacker; each query sees fresh noise",
    r"meets? (other|the|always|no|fresh)": "sees; faces; uses",
    r"(the )?process lives": "liveness",
    r"doubts? (it|a model)": "check the evaluation",
    r"so many": "that many",
    r"in place of": "instead of",
    r"com(e|es|ing) along": "included",
    r"in any case": "so; anyway",
    r"likewise": "in the same way",
    r"hence": "so",
    r"g(o|oes|oing) on (with|where|from)": "continue",
    r"may go": "can move; within a distance",
    r"of (yours|like)": "your; similar",
    r"of (a|its|their|one's) own, ": "its own",
    r"stands? (beside|below|in one|in the|in this|at the)": "is",
    r"to either side": "±",
    r"for ever": "forever",
    r"cannot do without": "needs",
    r"stands? open": "is open",
    r"past the published": "beyond the published",
    r"behind (every|each)": "after every",
    r"(at test time|in training) alone": "only at test time",
    r"argue about the matter": "criticise ideas rather than people",
    r"digits come": "digits are included",
    r"as compared with": "compared with",
    r"thereof|therein|wherein|whereof|hitherto|lest|upon": "plain words",
}
LISTED = re.compile(
    "|".join(rf"(?P<_{n}>\b(?:{phrase.replace(' ', chr(92) + 's+')})\b)" for n, phrase in enumerate(INSTEAD)),
    re.IGNORECASE,
)


def complaints(place: str, text: str) -> Iterator[str]:
    """Each listed phrase of a text, with its line and what to write instead."""
    for match in LISTED.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        instead = list(INSTEAD.values())[int(str(match.lastgroup)[1:])]
        yield f"{place}:{line}: {match[0]!r}: write {instead!r}"


def without_code(text: str) -> str:
    """Markdown with its lines kept and its code emptied, but for the comments in blocks of code."""

    def comments(block: re.Match[str]) -> str:
        return "\n".join(line.partition("# ")[2] for line in block[0].split("\n"))

    text = re.sub(r"^```.*?^```", comments, text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]+`", "``", text)


def pages() -> list[Path]:
    """What people read: pages and notebooks, the template of the report, the page of the server."""
    written = [*ROOT.glob("*.md"), *ROOT.glob(".github/**/*.yml"), *DOCS.rglob("*.md"), *SRC.rglob("*.yaml")]
    outside = [
        "zoo/README.md",
        "src/selfensemble/report/template.html",
        "src/selfensemble/serving/static/index.html", "src/selfensemble/serving/static/page.js",
    ]  # fmt: skip
    return sorted([*(ROOT / name for name in outside), *(DOCS / "tutorials").glob("*.ipynb"), *written])


def commands(command: Any, name: str) -> Iterator[tuple[str, str]]:
    """Each help text of a command of click, its options and its subcommands, with its name."""
    yield name, command.help or ""
    for parameter in command.params:
        yield f"{name} {parameter.name}", str(getattr(parameter, "help", None) or "")
    for each, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{name} {each}")


def strings(code: str) -> Iterator[tuple[int, str]]:
    """Docstrings, messages and other texts of a module, with the line where each begins."""
    within: set[ast.AST] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.JoinedStr):
            within.update(node.values)
            parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in within:
            yield node.lineno, node.value


@pytest.mark.parametrize("module", sorted(SRC.rglob("*.py")), ids=lambda path: str(path.relative_to(SRC)))
def test_docstrings_and_messages_are_in_plain_english(module: Path) -> None:
    place = str(module.relative_to(ROOT))
    found = strings(module.read_text(encoding="utf-8"))
    assert [each for at, text in found for each in complaints(f"{place}:{at}", without_code(text))] == []


def test_messages_are_found_in_code() -> None:
    code = '"""Made anew."""\nraise ValueError(f"{x} is in "\n    "front of it")  # anew\n'
    found = [each for at, text in strings(code) for each in complaints(f"m:{at}", text)]
    assert found == ["m:1:1: 'anew': write 'again'", "m:2:1: 'in front of': write 'before'"]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_in_plain_english(page: Path) -> None:
    assert list(complaints(str(page.relative_to(ROOT)), without_code(page.read_text(encoding="utf-8")))) == []


def test_help_texts_are_in_plain_english() -> None:
    texts = list(commands(typer.main.get_command(app), "selfensemble"))
    assert len(texts) > 100
    assert [found for name, text in texts for found in complaints(name, text)] == []


def test_a_phrase_is_found_with_its_line_and_what_to_write() -> None:
    text = without_code("One line.\n```\nanew  # likewise\n```\nNoise enters in front\nof every `anew`.")
    assert list(complaints("page.md", text)) == [
        "page.md:3: 'likewise': write 'in the same way'", "page.md:5: 'in front\\nof': write 'before'",
    ]  # fmt: skip
