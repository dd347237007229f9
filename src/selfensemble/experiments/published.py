"""The authors' own curves (Liu et al., ECCV 2018), as they recorded them; see `published.json`."""

import json
from importlib import resources
from typing import Any, NamedTuple


class Curve(NamedTuple):
    """Accuracy and RMS L2 by strength c of one network of the paper."""

    c: list[float]
    accuracy: list[float]
    rms_l2: list[float]


def published_curve(family: str, defense: str) -> Curve | None:
    """The curve of a defense in the paper, or None where it has none."""
    for row in _file()["rows"]:
        if (row["network"], row["defense"]) == (family, defense):
            return Curve(row["c"], row["accuracy"], row["rms_l2"])
    return None


def citation() -> str:
    """Where the curves come from, and how they were measured."""
    content = _file()
    return f"{content['citation']}. {content['about']}"


def _file() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        (resources.files(__package__) / "published.json").read_text(encoding="utf-8")
    )
    return content
