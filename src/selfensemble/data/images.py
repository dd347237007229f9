"""Images and labels as everything here takes them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .labels import class_numbers
from .order import is_shuffled, mixed_order
from .streaming import StoredReader, Streamed

Split = Literal["train", "test"]
_COPIED = 2**28  # bytes of images of which a part is copied rather than looked up
# Numbers of a batch of inputs: images of 32x32 are taken by the hundred, photos by the dozen.
BATCH_NUMBERS = 2**22


@dataclass(frozen=True, slots=True)
class ImageData:
    """One split of a data set.

    Attributes:
        name: where it came from.
        images: (N, C, H, W), or (N, ...) of inputs of any other shape, such as waveforms (N, C, T): uint8,
            or floating point that networks get as it is. A tensor, memory-mapped where it was decoded from
            files, or images that are decoded where they are indexed.
        labels: (N,) int64, beside the images; other integers become that.
        classes: names of the K classes.
        drawn: the seed of the order that the images are in; None for the order that they are stored in.
        cut: where train and test split were cut out of the same images: the share of the test split, and
            the seed.
        skipped: files that are not among the images, and why.
        unusable: how many of those, the first, are images that cannot be used; the others are none.
        notes: what was taken for granted of some images, and of how many.
        revision: of a data set of the Hub: the commit, or what was asked for where the Hub was not reached.
        bounds: that black and white of uint8 images become, see `within`.

    Raises:
        ValueError, TypeError: labels that are no numbers of these classes, one an image, or images that are
            neither uint8 nor floating point.
    """

    name: str
    images: Any  # a Tensor, or a Streamed, which is indexed like one
    labels: Tensor
    classes: tuple[str, ...]
    drawn: int | None = None
    cut: tuple[float, int] | None = None
    skipped: tuple[str, ...] = ()
    unusable: int = 0
    notes: tuple[str, ...] = ()
    revision: str | None = None
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        images = self.images
        if not (images.dtype == torch.uint8 or images.dtype.is_floating_point):
            raise ValueError(
                f"images must be uint8 (0 to 255), or floating point as the network takes them; got "
                f"{images.dtype}: convert them"
            )
        labels = class_numbers(self.labels, len(images), device=images.device, classes=len(self.classes))
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input: (C, H, W) of images."""
        return tuple(self.images.shape[1:])

    def inputs(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Images as float32: uint8 within the bounds, others as they are."""
        return as_inputs(self.images[index], self.bounds)

    def batches(self, indices: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels of the images `indices`, up to `size` at a time, decoded ahead by workers."""
        groups = indices.split(size)
        if isinstance(self.images, Streamed):
            found = self.images.groups(groups)
        else:
            found = (self.images[group] for group in groups)
        for images, group in zip(found, groups, strict=True):
            yield as_inputs(images, self.bounds), self.labels[group]

    def within(self, bounds: tuple[float, float] | None) -> "ImageData":
        """The same images for a network whose inputs have these bounds; None for [0, 1].

        Images of 256 levels are scaled, black to the lower bound and white to the upper; floating point is
        what the network takes, and stays.
        """
        return replace(self, bounds=bounds or (0.0, 1.0))

    def subset(self, index: Tensor) -> "ImageData":
        """Some of the images; of a large set they are looked up where they are asked for."""
        images = self.images
        if isinstance(images, Tensor) and images.nbytes > _COPIED and images.device.type == "cpu":
            everything = torch.arange(len(images), device="cpu")
            images = Streamed(StoredReader(images), everything, self.shape, images.dtype)
        chosen = images.subset(index) if isinstance(images, Streamed) else images[index]
        return replace(self, images=chosen, labels=self.labels[index])

    def sample(self, count: int, seed: int) -> "ImageData":
        """At most `count` of the images, drawn by `seed`, in their order."""
        if count >= len(self):
            return self
        return self.subset(_shuffled(len(self), seed)[:count].sort().values)

    def in_random_order(self, seed: int = 0, *, sorted_by_class: bool = False) -> "ImageData":
        """The same images, so that the first n stand for all of them, as do the last.

        Those that are stored in a random order stay as they are. Others, such as folders sorted by class,
        come in one drawn by `seed`, in which each beginning has its share of every class.

        Args:
            seed: of the order.
            sorted_by_class: whether they are known to be; otherwise their labels are looked at.
        """
        if self.drawn is not None or not (sorted_by_class or not is_shuffled(self.labels)):
            return self
        order = mixed_order(self.labels.cpu(), seed).to(self.labels.device)
        return replace(self.subset(order), drawn=seed)

    def with_classes(self, classes: tuple[str, ...]) -> "ImageData":
        """The same images, their labels numbered as in `classes` (a split may lack some of them).

        Raises:
            ValueError: a class of these images is not among `classes`, or several have its name.
        """
        if classes == self.classes:
            return self
        counts = Counter(classes) | Counter(self.classes)
        if several := [name for name in self.classes if counts[name] > 1]:
            raise ValueError(
                f"{self.name} cannot be matched by names of classes, several are called {several[0]}: "
                "pass data whose classes are those of the model, in its order"
            )
        unknown = [name for name in self.classes if name not in classes]
        if unknown:
            raise ValueError(
                f"{self.name} has classes that the model does not know: {', '.join(unknown[:5])}; "
                "pass data with the classes it was trained on"
            )
        numbers = torch.tensor([classes.index(name) for name in self.classes], device=self.labels.device)
        return replace(self, labels=numbers[self.labels], classes=classes)


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of images that follow each other, (N, C, H, W) on the CPU, made where they are indexed.

    Attributes:
        data: whose.
        count: N.
        start: number of the first.
    """

    data: ImageData
    count: int
    start: int = 0

    def __len__(self) -> int:
        return self.count

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.count, *self.data.shape))

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        chosen = torch.arange(self.count, device="cpu")[index] + self.start
        return self.data.inputs(chosen.to(self.data.labels.device)).cpu()

    def parts(self) -> Iterator[Tensor]:
        """All of them, some at a time, decoded ahead by workers."""
        indices = torch.arange(self.start, self.start + self.count, device=self.data.labels.device)
        for inputs, _ in self.data.batches(indices, batch_size(self.count, self.data.shape)):
            yield inputs.cpu()

    def split(self, size: int) -> Iterator[Tensor]:
        """All of them, `size` at a time, as a tensor is split."""
        held = torch.empty((0, *self.data.shape), dtype=torch.float32, device="cpu")
        for part in self.parts():
            held = torch.cat([held, part])
            while len(held) >= size:
                yield held[:size]
                held = held[size:]
        if len(held):
            yield held


def as_inputs(images: Tensor, bounds: tuple[float, float] | None = None) -> Tensor:
    """Images as float32: uint8 from 0 to 255 within the bounds (None for [0, 1]), others as they are."""
    if images.dtype != torch.uint8:
        return images.float()
    return in_bounds(images.float() / 255, bounds)


def in_bounds(images: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Images in [0, 1] with black and white at the bounds; None for [0, 1]."""
    if bounds is None or bounds == (0.0, 1.0):
        return images
    low, high = bounds
    return (low + (high - low) * images).clamp(low, high)


def batch_size(most: int, shape: tuple[int, ...]) -> int:
    """How many inputs of a shape to take at a time: `most` small ones, fewer large ones."""
    return max(1, min(most, BATCH_NUMBERS // max(1, torch.Size(shape).numel())))


def _shuffled(count: int, seed: int) -> Tensor:
    """The numbers up to `count`, in an order drawn by `seed`."""
    return torch.randperm(count, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def split_validation(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of a training and a validation part of `count` images, drawn by `seed`."""
    if not 0 <= fraction < 1:
        raise ValueError(f"the validation fraction must be in [0, 1), got {fraction}")
    order = _shuffled(count, seed)
    held_out = round(count * fraction)
    return order[held_out:].sort().values, order[:held_out].sort().values
