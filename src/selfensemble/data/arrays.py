"""Arrays of images and labels in an npz file."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .images import ImageData, Split
from .labels import class_names, number_names
from .order import test_part
from .reading import Reading

_IMAGES = ("images", "image", "x", "X", "data", "arr_0")
_DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError)
_LABELS = ("labels", "label", "y", "Y", "target", "arr_1")


def arrays(file: Path, split: Split, reading: Reading) -> ImageData:
    """The arrays `SPLIT_images` and `SPLIT_labels`, `x_SPLIT` and `y_SPLIT`, or ones of both splits.

    Raises:
        FileNotFoundError: there is no such split.
        ValueError: arrays of other shapes or types than images and labels have.
    """
    with _opened(file) as found:
        columns: list[tuple[str, ...]] = [
            (reading.image_column,) if reading.image_column else _IMAGES,
            (reading.label_column,) if reading.label_column else _LABELS,
        ]
        # Labels of one name of the split do not belong to images of another, which may come without.
        pairs = [[_key(found.files, known, (name,)) for known in columns] for name in reading.names(split)]
        keys: list[str | None] = next((pair for pair in pairs if None not in pair), [None, None])
        cut = reading.cuts
        if None in keys and any(
            _key(found.files, columns[0], reading.names(each)) for each in ("train", "test")
        ):
            raise FileNotFoundError(
                f"no {split} split in {file}: it has {', '.join(found.files)}; data.{split}_split, "
                f"--{split}-split name another"
            )
        if None in keys:
            reading.check_cut(split, str(file))
        if None in keys:
            keys, cut = [next((key for key in known if key in found.files), None) for known in columns], True
        if keys[0] is None or keys[1] is None:
            raise ValueError(
                f"{file} needs an array of images and one of labels, found {', '.join(found.files)}: name "
                "them "
                "(data.image_column, data.label_column)"
            )
        trained = _key(found.files, columns[1], reading.names("train"))
        trained = trained if split == "test" and not cut else None
        pixels, labels = _read(file, found, keys[0]), _read(file, found, keys[1])
        training = None if trained is None else _read(file, found, trained)
    images = as_images(pixels, str(file), reading.shape)
    numbers, classes = _classes(labels, str(file), training)
    if len(images) != len(numbers):
        raise ValueError(f"{file} has {len(images)} images and {len(numbers)} labels: they must be as many")
    check_wanted(tuple(images.shape[1:]), reading, str(file))
    data = ImageData(str(file), images, numbers, classes)
    return cut_off(data, split, reading) if cut else data


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    with file.open("rb") as stream:  # numpy leaves its own open where the file is damaged
        yield _archive(file, stream)


def _archive(file: Path, stream: BinaryIO) -> Any:
    try:
        found = np.load(stream, allow_pickle=False)
    except (*_DAMAGES, ValueError) as error:  # numpy takes what it does not know for a pickle
        raise ValueError(f"{file} is no npz file, or damaged: write or download it again") from error
    if not isinstance(found, np.lib.npyio.NpzFile):
        raise ValueError(
            f"{file} is one array under the name of an npz file: save images and labels with np.savez"
        )
    return found


def _read(file: Path, found: Any, key: str) -> Any:
    try:
        return found[key]
    except _DAMAGES as error:
        raise ValueError(f"{file} is damaged ({error}): write or download it again") from error
    except ValueError as error:
        raise ValueError(f"{file} holds pickled objects, which are never read: save plain arrays") from error


def cut_off(data: ImageData, split: Split, reading: Reading) -> ImageData:
    """The part of a split, of images that are of both."""
    reading.check_cut(split, data.name)
    names = [str(number) for number in range(len(data))]
    of_test = test_part(names, data.labels, reading.test_share, reading.split_seed)
    part = data.subset((of_test if split == "test" else ~of_test).nonzero().squeeze(1))
    if len(part) == 0:
        raise ValueError(f"too few images in {data.name} to cut off a {split} split")
    return ImageData(
        data.name, part.images, part.labels, data.classes, cut=(reading.test_share, reading.split_seed)
    )


def check_wanted(shape: tuple[int, ...], reading: Reading, source: str) -> None:
    """Arrays are taken as they are.

    Raises:
        ValueError: another shape is wanted.
    """
    if reading.sides not in (None, shape[1:]) or reading.channels not in (None, shape[0]):
        raise ValueError(
            f"{source} gives arrays of shape {shape} (channels, height, width), which are taken as they are: "
            "leave size and channels out, or give PIL images"
        )


def as_images(pixels: Any, source: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) as the last of them; floating point as float32.

    Args:
        pixels: an array.
        source: for errors.
        shape: of one input, which is then taken as it is. Without it arrays of two dimensions, or of five
            and more, are taken as they are, since they are no images.

    Raises:
        ValueError: it cannot be told where the channels are.
    """
    images = torch.as_tensor(pixels, device="cpu")
    images = images.float() if images.is_floating_point() else images
    if tuple(images.shape[1:]) == shape or images.dim() in (2, 5):
        return images
    if images.dim() == 3:
        return images.unsqueeze(1)
    if images.dim() != 4:
        raise ValueError(
            f"{source}: inputs have the shape {tuple(images.shape)}, not (N, C, H, W) or (N, H, W, C) of "
            "images, (N, T) or (N, C, T) of waveforms"
        )
    _, first, middle, last = images.shape
    in_front, behind = first in (1, 3), last in (1, 3)
    if in_front == behind:
        in_front, behind = middle == last != first, first == middle != last
    if in_front == behind:
        raise ValueError(
            f"{source}: images of shape {tuple(images.shape)} leave open where the channels are: give a "
            "torch "
            "Dataset of tensors (C, H, W)"
        )
    return images if in_front else images.permute(0, 3, 1, 2).contiguous()


def _key(names: list[str], known: tuple[str, ...], splits: tuple[str, ...]) -> str | None:
    """The name of an array of a split."""
    for split in splits:
        for name in known:
            for key in (f"{split}_{name}", f"{name}_{split}"):
                if key in names:
                    return key
    return None


def _classes(labels: Any, source: str, training: Any = None) -> tuple[Tensor, tuple[str, ...]]:
    """(N,) class numbers, and names of the classes, of the training split beside them too."""
    labels, training = _in_a_row(labels), None if training is None else _in_a_row(training)
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"{source}: labels have the shape {labels.shape}, not (N,): one class number an image"
        )
    if labels.dtype.kind in "US":
        own, numbers = np.unique(labels.astype(str), return_inverse=True)
        theirs = None if training is None else set(training.astype(str).tolist())
        classes = class_names(own.tolist(), theirs, source)
        places = np.array([classes.index(name) for name in own.tolist()], dtype=np.int64)
        return torch.from_numpy(places[numbers]), tuple(classes)
    if labels.dtype.kind not in "iub" or labels.min() < 0:
        raise ValueError(f"{source}: labels must be class numbers >= 0 or names, got {labels.dtype}")
    numbers, most = labels.astype(np.int64), int(labels.max())
    if training is not None and training.dtype.kind in "iub" and training.size:
        most = max(most, int(training.max()))
    return torch.from_numpy(numbers), tuple(number_names(most, len(numbers), source))


def _in_a_row(labels: Any) -> Any:
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
