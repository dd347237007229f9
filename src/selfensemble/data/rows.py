"""Images of a source before they are decoded."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# A cell of an image column as the datasets library has it: bytes, or the path of a file.
Cell = dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Rows:
    """Undecoded images and labels.

    Attributes:
        source: where they come from.
        identity: what they are known again by; JSON.
        each: all of them with their labels, in order, from the first one on.
        cells: the images, to be taken in any order.
        classes: names of the classes, where the data tell them.
        training: labels of the training split, where these are of a test split beside it and the data tell
            no names of classes; None of it where it has no such column.
        names: of the images, for people and for the cut; their numbers where there are none.
        cut: whether they are of both splits together.
        skipped: images that were left out so far, and why.
        others: what lies beside them and is none.
        revision: of a data set of the Hub.
    """

    source: str
    identity: list[Any]
    each: Callable[[], Iterable[tuple[Cell, Any]]]
    cells: Callable[[], Sequence[Cell]]
    classes: list[str] | None = None
    training: Callable[[], Iterable[Any] | None] | None = None
    names: Sequence[str] | None = None
    cut: bool = False
    skipped: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    revision: str | None = None

    def name(self, place: int) -> str:
        """For people."""
        return f"number {place}" if self.names is None else self.names[place]


def pick_column(
    wanted: str | None, known: Sequence[str], columns: Sequence[str], kind: str, source: str
) -> str:
    """The name of a column: the one that was asked for, or the first known one.

    Args:
        wanted: asked for.
        known: candidates, best first.
        columns: all that there are.
        kind: "image" or "label", for the error.
        source: for the error.

    Raises:
        ValueError: there is no such column, or none that is known.
    """
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"{source} has no column {wanted!r}; it has {', '.join(columns)}")
        return wanted
    found = [name for name in known if name in columns]
    if not found:
        raise ValueError(
            f"{source} needs an image column and a label column, found {', '.join(columns)}: name the {kind} "
            f"column (data.{kind}_column, --{kind}-column)"
        )
    return found[0]
