"""Labels as everything here computes with them: class numbers in int64, beside the images."""

from collections.abc import Collection

import torch
from torch import Tensor

_INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def class_numbers(
    labels: Tensor, images: int, *, device: torch.device, classes: int | None = None, look: bool = True
) -> Tensor:
    """Labels of any integer type, on any device, as int64 on `device`.

    Args:
        labels: (B,).
        images: B.
        device: where they are wanted.
        classes: K, if it is known.
        look: whether to look at the values, which waits for their device.

    Raises:
        TypeError: they are no tensor.
        ValueError: another type, shape or range; the message says what to do.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype not in _INTEGERS or tuple(labels.shape) != (images,):
        raise ValueError(
            f"labels must be int64, or other integers, of shape ({images},): the number of the class of each "
            f"image; got {labels.dtype} {tuple(labels.shape)}"
        )
    if labels.device.type == "meta" and (look or device.type != "meta"):
        raise ValueError("labels are on the meta device, where tensors have no values: make them on the CPU")
    numbers = labels.to(torch.int64).to(device)
    if not look or images == 0:
        return numbers
    if (low := int(numbers.min())) < 0:
        raise ValueError(f"labels must be class numbers >= 0, got {low}")
    if classes is not None and (high := int(numbers.max())) >= classes:
        raise ValueError(f"labels must be below {classes}, the number of classes; got {high}")
    return numbers


_NUMBERS = 100_000  # classes that no more than ten times as many as images may be


def number_names(most: int, images: int, source: str) -> list[str]:
    """Names of the classes 0 to `most`, where labels are numbers.

    Raises:
        ValueError: numbers so large that they stand for something else.
    """
    if most >= max(_NUMBERS, 10 * images):
        raise ValueError(
            f"the labels of {source} go up to {most:,} for {images:,} images, which would make as many "
            "classes: number the classes from 0, or write their names"
        )
    return [str(number) for number in range(most + 1)]


def class_names(own: Collection[str], training: Collection[str] | None, source: str) -> list[str]:
    """The names of the classes, in the order of their numbers, where labels are names.

    A network is trained by the numbers of the training split: a test split that lacks a class keeps them.

    Args:
        own: of the images themselves.
        training: of the training split, where these are of a test split beside it.
        source: for the error.

    Raises:
        ValueError: the training split lacks a class.
    """
    if training is None:
        return sorted(set(own))
    if alone := sorted(set(own) - set(training)):
        folded = {name.casefold(): name for name in training}
        twins = [f"{name} (there: {folded[name.casefold()]})" if name.casefold() in folded else name
                 for name in alone]  # fmt: skip
        raise ValueError(
            f"the test split of {source} has classes that its training split lacks, so that they have no "
            f"numbers: {', '.join(twins[:5])}{', ...' * (len(twins) > 5)}; remove or rename them, "
            "or cut both splits out of one (the same name for both)"
        )
    return sorted(set(training))
