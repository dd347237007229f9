"""What there is in a source: every image decoded once, so that none fails later, and its label read.

What was found is kept, and looked up as long as the files stay as they are.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..runtime.files import cache_dir, write_json
from ..runtime.packages import needs
from .decoding import assumed, in_8_bits, is_grey, reason, size_upright, undecoded
from .labels import class_names, number_names
from .rows import Cell, Rows

_VERSION = 2
_AHEAD = 32  # images that are read at a time


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found, row by row.

    Attributes:
        labels: whole numbers, or anything else that tells classes apart; None of an image without.
        sizes: (width, height) upright; None of an image that cannot be used.
        grey: whether there are no colours.
        bad: why an image cannot be used, by its row.
        assumed: what is taken for granted of an image, by its row, see `decoding.assumed`.
    """

    labels: list[Any]
    sizes: list[tuple[int, int] | None]
    grey: list[bool]
    bad: dict[int, str]
    assumed: dict[int, str]

    def numbers(self, rows: Rows) -> tuple[Tensor, list[str]]:
        """(N,) the number of the class of each row that can be used, -1 for others; and their names.

        Raises:
            ValueError: an image without a label, or one of a class that the training split lacks.
        """
        usable = [place for place in range(len(self.labels)) if place not in self.bad]
        labels = {place: self.labels[place] for place in usable}
        for place, label in labels.items():
            if label is None or (isinstance(label, int) and label < 0):
                raise ValueError(
                    f"image {rows.name(place)} of {rows.source} has no label: choose a labelled split, or "
                    "name "
                    "the column of labels (data.label_column, --label-column)"
                )
        classes = rows.classes
        beside = rows.training() if classes is None and rows.training is not None else None
        training = None if beside is None else {_plain(label) for label in beside} - {None}
        known = [*labels.values(), *(training or ())]
        if classes is None and all(isinstance(label, int) for label in known):
            classes = number_names(max(known, default=-1), len(known), rows.source)
        elif classes is None:
            labels = {place: str(label) for place, label in labels.items()}
            theirs = None if training is None else {str(label) for label in training}
            classes = class_names(labels.values(), theirs, rows.source)
            places = {name: number for number, name in enumerate(classes)}
            labels = {place: places[label] for place, label in labels.items()}
        numbers = torch.full((len(self.labels),), -1, dtype=torch.int64, device="cpu")
        for place, label in labels.items():
            numbers[place] = label
        return numbers, classes


def _plain(label: Any) -> Any:
    """Whole numbers as int, missing labels as None."""
    if isinstance(label, float):
        return None if not math.isfinite(label) else int(label) if label.is_integer() else label
    return int(label) if isinstance(label, bool) else label


def survey(rows: Rows) -> Survey:
    """Look at all rows, or at what is known of them from before."""
    with needs("selfensemble[data]"):
        import PIL

    key = json.dumps([_VERSION, PIL.__version__, rows.identity])
    path = cache_dir() / "surveys" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        sizes = [None if each is None else (each[0], each[1]) for each in known["sizes"]]
        bad = {int(place): why for place, why in known["bad"].items()}
        assumed = {int(place): what for place, what in known["assumed"].items()}
        return Survey(known["labels"], sizes, known["grey"], bad, assumed)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        found, passing = _look_at_all(rows)
        if passing:
            return found
    if all(each is None or isinstance(each, int | str | float) for each in found.labels):  # not bytes, say
        known = {"labels": found.labels, "sizes": found.sizes, "grey": found.grey, "bad": found.bad}
        known["assumed"] = found.assumed
        write_json(path, known)
    return found


def _look_at_all(rows: Rows) -> tuple[Survey, bool]:
    """What there is, and whether some of it failed for a reason that may pass."""
    found, passing = Survey([], [], [], {}, {}), False
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for group in _groups(rows.each()):
            for (_, label), seen in zip(group, pool.map(_look, (cell for cell, _ in group)), strict=True):
                if isinstance(seen, _Bad):
                    found.bad[len(found.labels)] = seen.why
                    passing |= seen.passing
                elif seen[2]:
                    found.assumed[len(found.labels)] = seen[2]
                found.sizes.append(None if isinstance(seen, _Bad) else seen[0])
                found.grey.append(not isinstance(seen, _Bad) and seen[1])
                found.labels.append(_plain(label))
    return found, passing


def _groups(each: Iterable[tuple[Cell, Any]]) -> Iterator[list[tuple[Cell, Any]]]:
    iterator = iter(each)
    while group := list(islice(iterator, _AHEAD)):
        yield group


@dataclass(frozen=True, slots=True)
class _Bad:
    """Why an image cannot be used, and whether that may pass without a change of its file."""

    why: str
    passing: bool = False


def _look(cell: Cell) -> tuple[tuple[int, int], bool, str] | _Bad:
    """Size and greyness of an image, and what is taken for granted of it, or why it cannot be used."""
    if cell is None:
        return _Bad("missing")
    try:
        image = undecoded(cell)
        size, grey = size_upright(image), is_grey(image)
        if image.format == "JPEG":
            image.draft(None, (1, 1))  # all of the file is read, at an eighth of the size
        image.load()
        in_8_bits(image)
        return size, grey, assumed(image)
    except Exception as error:  # Pillow raises many kinds for damaged files
        # Pillow's own have no number; who may read a file is part of what it is known again by.
        system = (
            isinstance(error, OSError) and error.errno is not None and not isinstance(error, PermissionError)
        )
        return _Bad(reason(error), system or isinstance(error, MemoryError | ImportError))
