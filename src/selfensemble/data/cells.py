"""Images of a source before they are decoded."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Cells:
    """Undecoded images and labels, and the names of the classes where the data tell them."""

    rows: Iterable[tuple[dict[str, Any] | None, Any]]
    classes: list[str] | None
