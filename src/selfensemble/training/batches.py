"""The images of a training run, and its batches: in which order, by which process, on which device."""

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..data.images import ImageData, as_inputs, split_validation
from ..data.sources import load_data
from ..data.streaming import Look, StoredReader, Streamed, prepared
from ..data.torch_datasets import from_dataset
from ..noise.streams import stream_seed
from ..runtime.packages import needs
from .augmentation import augmentation, mixing
from .photos import PhotoChanges, rand_augment
from .recipe import Recipe
from .sections import DataSection

with needs("selfensemble[train]"):
    from accelerate import Accelerator

_ON_DEVICE = 2**31  # bytes of images that an accelerator keeps
# Of a step: numbers of images that lie where `Batches.device` says, or decoded images and their labels.
Batch = Tensor | tuple[Tensor, Tensor]


class Batches:
    """Training, validation and test images of a recipe.

    Args:
        recipe: of the run.
        accelerator: whose processes share each batch.
        given: training and test images instead of the recipe's.

    Attributes:
        train, test: all images of both splits.
        train_indices, validation_indices: numbers of the training images to learn from and to validate on.
        size: images of a batch, of all processes together.
        in_epoch: batches of an epoch.

    Raises:
        ValueError: training and test images differ in shape, are too few, or have pixels beyond [0, 1].
    """

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, given: tuple[ImageData, ImageData] | None = None
    ) -> None:
        self._seed, self._accelerator, self._config = recipe.seed, accelerator, recipe.data
        self.train, self.test = _load(recipe.data, recipe.seed, accelerator, given)
        self._images, self._labels = self.train.images, self.train.labels
        if recipe.data.photos is not None and recipe.data.photos.rand_augment:
            rand_augment(recipe.data.photos, self.train.shape[0])  # an error now, rather than in a worker
        if recipe.data.photos is not None and isinstance(self._images, Tensor):
            everything = torch.arange(len(self._images), device="cpu")
            self._images = Streamed(
                StoredReader(self._images.cpu()), everything, self.train.shape, self._images.dtype,
                recipe.data.workers,
            )  # fmt: skip
        self.streams = isinstance(self._images, Streamed)
        if not self.streams and self._images.nbytes <= _ON_DEVICE:
            device = accelerator.device
            self._images, self._labels = self._images.to(device), self._labels.to(device)
        self.train_indices, self.validation_indices = split_validation(
            len(self.train), recipe.data.validation, recipe.seed
        )
        passes = accelerator.num_processes * recipe.train.accumulate
        self.size = _shared(recipe.train.batch_size, len(self.train_indices), passes)
        self.in_epoch = len(self.train_indices) // self.size
        images_4d = recipe.train.channels_last and len(self.train.shape) == 3
        self.format = torch.channels_last if images_4d else torch.contiguous_format
        self._augment, self._mix = augmentation(recipe.data), mixing(recipe.data.mixup)

    @property
    def device(self) -> torch.device:
        """Where the images lie."""
        device: torch.device = self._images.device
        return device

    def epoch(self, epoch: int, first: int) -> Generator[Batch, None, None]:
        """This process's share of the batches of an epoch, from number `first` on."""
        order = self.order(epoch)
        mine = [self.numbers(order, number) for number in range(first, self.in_epoch)]
        if not self.streams:
            yield from mine
            return
        photos = self._config.photos
        look: Look = prepared
        if photos is not None:
            look = PhotoChanges(photos, self.train.shape, stream_seed(self._seed, epoch, 4))
        found = self._images.groups(mine, look, seed=stream_seed(self._seed, epoch, 3))
        for images, index in zip(found, mine, strict=True):
            yield images, self._labels[index]

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

    def batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The images of a batch, augmented, (B, C, H, W) in `data.bounds`, and their labels (B,)."""
        device, bounds = self._accelerator.device, self._config.bounds
        if isinstance(batch, Tensor):
            inputs, labels = as_inputs(self._images[batch], bounds).to(device), self._labels[batch]
        else:
            images, labels = batch
            _check_range(images, self.train.name, bounds)
            inputs = as_inputs(images.to(device), bounds)  # a quarter of the way as bytes
        inputs = self._mix(self._augment(inputs))
        return inputs.contiguous(memory_format=self.format), labels.to(device)


def given_data(train: Any, test: Any, data: str | None) -> tuple[ImageData, ImageData] | None:
    """What was passed as data, if anything was: `ImageData`, or torch data sets.

    Raises:
        ValueError: one split alone, or a source as well.
        TypeError: it is neither.
    """
    if train is None and test is None:
        return None
    if train is None or test is None or data is not None:
        raise ValueError("pass both train_data and test_data, or data alone")

    def of(found: Any, split: str) -> ImageData:
        if isinstance(found, ImageData):
            return found
        return from_dataset(found, f"{type(found).__name__} (given in Python, {split})")

    return of(train, "train"), of(test, "test")


def _load(
    config: DataSection, seed: int, accelerator: Accelerator, given: tuple[ImageData, ImageData] | None
) -> tuple[ImageData, ImageData]:
    if given is not None:
        train, test = given
    else:
        with accelerator.main_process_first():
            train = load_data(config.source, "train", **config.reading())
            like_train = config.reading() | ({"channels": train.shape[0]} if _is_decoded(train) else {})
            test = load_data(config.source, "test", **like_train)
    train, test = train.within(config.bounds), test.with_classes(train.classes).within(config.bounds)
    if config.images is not None:
        train, test = (part.sample(config.images, seed) for part in (train, test))
    if train.shape != test.shape:
        raise ValueError(
            f"training inputs are {train.shape}, test inputs {test.shape} (channels, height, width): "
            "convert them to one kind, or set data.size"
        )
    for part in (train, test):
        if isinstance(part.images, Tensor):
            _check_range(part.images, part.name, config.bounds)
    return _with_workers(train, config.workers), _with_workers(test, config.workers)


def _is_decoded(data: ImageData) -> bool:
    """Whether its images come from files, which can be had in another number of channels."""
    return data.images.dtype == torch.uint8 and data.shape[0] in (1, 3) and data.name != "digits"


def _with_workers(data: ImageData, workers: int | None) -> ImageData:
    if workers is None or not isinstance(data.images, Streamed):
        return data
    return replace(data, images=replace(data.images, workers=workers))


def _check_range(images: Tensor, name: str, bounds: tuple[float, float]) -> None:
    """Pixels that are no bytes are taken as they are.

    Raises:
        ValueError: they are not within the bounds.
    """
    if images.dtype == torch.uint8 or len(images) == 0:
        return
    low, high = (float(each) for each in images.aminmax())
    if not (low >= bounds[0] and high <= bounds[1]):
        raise ValueError(
            f"pixels of {name} go from {low:g} to {high:g}, networks here are trained on [{bounds[0]:g}, "
            f"{bounds[1]:g}]: scale them, give uint8, put mean and std into model.normalize, or set "
            "data.bounds to the range that they can have (-1 and 1 of waveforms)"
        )


def _shared(wanted: int, images: int, parts: int) -> int:
    """The batch size of all processes together, a multiple of their number and that of their passes."""
    batch = min(wanted, images)
    if images < 2 * parts:
        raise ValueError(
            f"{images} training images are too few: pass more (data.images, data.validation say how many)"
        )
    if batch < 2 * parts:
        raise ValueError(
            f"a batch of {batch} cannot be shared by {parts} process(es) and passes: batch norm needs two "
            "images in each; raise train.batch_size"
        )
    return batch - batch % parts
