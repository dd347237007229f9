"""The images of a training run, and its batches: in which order, by which process, on which device."""

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.images import ImageData, split_validation
from ..data.sources import load_data
from ..noise.streams import stream_seed
from .augmentation import augmentation
from .recipe import DataSection, Recipe

_ON_DEVICE = 2**31  # bytes of images that an accelerator keeps


class Batches:
    """Training, validation and test images of a recipe.

    Args:
        recipe: of the run.
        accelerator: whose processes share each batch.

    Attributes:
        train, test: all images of both splits.
        train_indices, validation_indices: numbers of the training images to learn from and to validate on.
        size: images of a batch, of all processes together.
        in_epoch: batches of an epoch.

    Raises:
        ValueError: training and test images differ in shape, or are too few.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        self._seed, self._accelerator = recipe.seed, accelerator
        self.train, self.test = _load(recipe.data, recipe.seed, accelerator)
        self._images, self._labels = self.train.images, self.train.labels
        if self._images.nbytes <= _ON_DEVICE:
            device = accelerator.device
            self._images, self._labels = self._images.to(device), self._labels.to(device)
        self.train_indices, self.validation_indices = split_validation(
            len(self.train), recipe.data.validation, recipe.seed
        )
        self.size = _shared(recipe.train.batch_size, len(self.train_indices), accelerator.num_processes)
        self.in_epoch = len(self.train_indices) // self.size
        self.format = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
        self._augment = augmentation(recipe.data)

    @property
    def device(self) -> torch.device:
        """Where the images lie."""
        device: torch.device = self._images.device
        return device

    def order(self, epoch: int) -> Tensor:
        """The numbers of the images in the order of an epoch, (N,)."""
        generator = torch.Generator("cpu").manual_seed(stream_seed(self._seed, epoch, 1))
        place = torch.randperm(len(self.train_indices), generator=generator, device="cpu")
        return self.train_indices[place]

    def numbers(self, order: Tensor, number: int) -> Tensor:
        """Which images this process has of a batch of an epoch, where the images lie."""
        batch = order[number * self.size : (number + 1) * self.size]
        mine = batch[self._accelerator.process_index :: self._accelerator.num_processes]
        return mine.to(self.device)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The images of these numbers, augmented, (B, C, H, W) in [0, 1], and their labels (B,)."""
        device = self._accelerator.device
        inputs = self._augment((self._images[index].float() / 255).to(device))
        return inputs.contiguous(memory_format=self.format), self._labels[index].to(device)


def _load(config: DataSection, seed: int, accelerator: Accelerator) -> tuple[ImageData, ImageData]:
    with accelerator.main_process_first():
        train = load_data(config.source, "train", size=config.size)
        test = load_data(config.source, "test", size=config.size)
    test = test.with_classes(train.classes)
    if config.images is not None:
        train, test = (part.sample(config.images, seed) for part in (train, test))
    shapes = [tuple(part.images.shape[1:]) for part in (train, test)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"training images are {shapes[0]}, test images {shapes[1]} (channels, height, width): "
            "convert them to one kind, or set data.size"
        )
    return train, test


def _shared(wanted: int, images: int, processes: int) -> int:
    """The batch size of all processes together, a multiple of their number."""
    batch = min(wanted, images)
    if batch < 2 * processes:
        raise ValueError(
            f"a batch of {batch} cannot be shared by {processes} process(es): batch norm needs two "
            "images in each; raise train.batch_size"
        )
    return batch - batch % processes
