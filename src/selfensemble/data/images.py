"""Images and labels as everything here takes them."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .labels import class_numbers

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class ImageData:
    """One split of a data set.

    Attributes:
        name: where it came from.
        images: (N, C, H, W) uint8, memory-mapped where it was decoded from files.
        labels: (N,) int64, beside the images; other integers become that.
        classes: names of the K classes.

    Raises:
        ValueError, TypeError: labels that are no numbers of these classes, one an image.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        images = self.images
        labels = class_numbers(self.labels, len(images), device=images.device, classes=len(self.classes))
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Images as float32 in [0, 1]."""
        return self.images[index].float() / 255

    def sample(self, count: int, seed: int) -> "ImageData":
        """At most `count` of the images, drawn by `seed`, in their order."""
        if count >= len(self):
            return self
        order = _shuffled(len(self), seed)[:count].sort().values
        return replace(self, images=self.images[order], labels=self.labels[order])

    def with_classes(self, classes: tuple[str, ...]) -> "ImageData":
        """The same images, their labels numbered as in `classes` (a split may lack some of them).

        Raises:
            ValueError: a class of these images is not among `classes`.
        """
        if classes == self.classes:
            return self
        unknown = [name for name in self.classes if name not in classes]
        if unknown:
            raise ValueError(
                f"{self.name} has classes that the model does not know: {', '.join(unknown[:5])}; "
                "pass data with the classes it was trained on"
            )
        numbers = torch.tensor([classes.index(name) for name in self.classes], device=self.labels.device)
        return replace(self, labels=numbers[self.labels], classes=classes)


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
