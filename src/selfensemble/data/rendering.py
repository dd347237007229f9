"""From rows to images: which of them, of which shape, decoded at once or as they are needed."""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from .caching import memory_mapped
from .decoding import open_image, prepare_image, told
from .images import ImageData, Split
from .order import test_part
from .reading import Reading
from .rows import Rows
from .streaming import CellReader, Streamed
from .survey import Survey, survey

_SMALL = 128  # pixels of a side up to which images are decoded once and for all
_SHOWN = 3  # of what is wrong


def images_of(rows: Rows, split: Split, reading: Reading) -> ImageData:
    """One split of a source, as it is to be read.

    Raises:
        ValueError: no image can be used, or what there is leaves open how.
    """
    found = survey(rows)
    numbers, classes = found.numbers(rows)
    places = (numbers >= 0).nonzero().squeeze(1)
    skipped = (*rows.skipped, *(f"{rows.name(place)}: {why}" for place, why in found.bad.items()))
    if len(places) == 0:
        raise ValueError(f"no images in {rows.source}{_among(skipped)}")
    if len(places) < len(numbers) / 2:
        raise ValueError(f"most images of {rows.source} cannot be used{_among(skipped)}")
    labels = {str(label) for label in found.labels if label is not None}
    lost = labels - {str(found.labels[place]) for place in places.tolist()}
    if lost and rows.classes is None:
        raise ValueError(
            f"no image of class {min(lost)} of {rows.source} can be used{_among(skipped)}: fix or remove it"
        )
    if skipped:
        text = f"{len(skipped)} images of {rows.source} cannot be used and are left out{_among(skipped)}"
        warnings.warn(text, stacklevel=3)
    cut = None
    if rows.cut:
        cut = reading.test_share, reading.split_seed
        names = [rows.name(place) for place in places.tolist()]
        of_test = test_part(names, numbers[places], *cut)
        places = places[of_test if split == "test" else ~of_test]
        if len(places) == 0:
            raise ValueError(f"too few images in {rows.source} to cut off a {split} split")
    notes = told(found.assumed.get(place, "") for place in places.tolist())
    channels = reading.channels or _channels(rows, found, places)
    size = reading.sides or _one_size(rows, found, places)
    if reading.stream or (reading.stream is None and max(size) > _SMALL):
        reader = CellReader(rows.source, rows.cells(), channels, size, reading.centre)
        images: Tensor | Streamed = Streamed(reader, places, (channels, *size))
    else:
        identity = [rows.identity, split, cut, channels, size, reading.centre]
        identity += [sorted(found.bad)] if found.bad else []  # another time other images may fail
        images = memory_mapped(identity, lambda: _decoded(rows, places, channels, size, reading.centre))
    return ImageData(
        rows.source,
        images,
        numbers[places],
        tuple(classes),
        cut=cut,
        skipped=(*skipped, *rows.others),
        unusable=len(skipped),
        notes=tuple(notes),
        revision=rows.revision,
    )


def _decoded(
    rows: Rows, places: Tensor, channels: int, size: tuple[int, int], centre: float
) -> Iterator[Tensor]:
    wanted = set(places.tolist())
    for place, (cell, _) in enumerate(rows.each()):
        if place in wanted:
            image = open_image(cell, rows.source, rows.name(place))
            yield prepare_image(image, channels, size, centre)


def _channels(rows: Rows, found: Survey, places: Tensor) -> int:
    """Greys among colours are colours, too; a few colours among greys leave open what is meant."""
    grey = torch.tensor(found.grey, device="cpu")[places]
    if grey.all():
        return 1
    colours = int((~grey).sum())
    if 2 * colours < len(places):
        first = rows.name(int(places[~grey][0]))
        raise UnclearError(
            f"{rows.source} mixes grey and colour images ({colours} of {len(places)} are in colour, {first} "
            "first): convert them to one kind, or say which (data.channels, --channels: 1 or 3)"
        )
    return 3


def _one_size(rows: Rows, found: Survey, places: Tensor) -> tuple[int, int]:
    """(H, W) that all images have."""
    sizes = {found.sizes[place]: place for place in reversed(places.tolist())}
    if len(sizes) > 1:
        (one, _), (other, place) = sorted(sizes.items(), key=lambda each: each[1])[:2]
        assert one is not None
        assert other is not None
        raise UnclearError(
            f"images of {rows.source} differ in size ({other[0]}x{other[1]}, {rows.name(place)}, and "
            f"{one[0]}x{one[1]}): set a size, e.g. --size {min(one)} (data.size={min(one)} in a recipe)"
        )
    (one,) = sizes
    assert one is not None
    return one[1], one[0]


class UnclearError(ValueError):
    """Images of several sizes or kinds, and nobody has said which they are to have."""


def _among(skipped: tuple[str, ...]) -> str:
    if not skipped:
        return ""
    more = f" and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
    return f" ({'; '.join(skipped[:_SHOWN])}{more})"
