"""Text that users write: UTF-8, in YAML or JSON; what is wrong is said with its place."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

from .packages import needs


def read_text(path: Path) -> str:
    """The text of a file that a user wrote, whatever the locale: YAML and JSON are UTF-8.

    Raises:
        ValueError: it is not; the message says what to do.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def utf8(text: str) -> bytes:
    """The text to be written, with names of files in it that are no text to this process.

    In a locale of ASCII those in other letters are not, and come out as what they are in UTF-8.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode()


def parsed_yaml(text: str, what: str, wanted: str = "selfensemble[cli]") -> Any:
    """What stands in a text in YAML.

    Args:
        text: to read.
        what: it is, for the error.
        wanted: what to install where PyYAML is missing.

    Raises:
        ValueError: it is none; the message begins with `what` and says where.
    """
    with needs(wanted):
        import yaml

    try:
        return copy.deepcopy(_values(text))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f": see line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{what} is not valid YAML{place}") from error


@functools.lru_cache(200)
def _values(text: str) -> Any:
    """Experiments read the same recipes, and set the same values in them, again and again."""
    import yaml

    return yaml.safe_load(text)


def read_json(path: Path, mend: str) -> Any:
    """What stands in a file of JSON.

    Args:
        path: an existing file.
        mend: what to do about a damaged one, for the error.

    Raises:
        ValueError: it is damaged; the message says where, and `mend`.
    """
    try:
        return parsed_json(path.read_bytes(), str(path))
    except ValueError as error:
        raise ValueError(f"{error}, the file is damaged: {mend}") from error


def parsed_json(text: str | bytes, what: str) -> Any:
    """What stands in a text in JSON.

    Raises:
        ValueError: it is none; the message begins with `what` and says where.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not JSON (line {error.lineno}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, numbers of thousands of digits
        raise ValueError(f"{what} is not JSON") from error
