"""Random changes of photos, each on its own, by the workers that decode them.

What becomes of a photo depends on the seed and its number alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from torch import Tensor

from ..data.decoding import as_tensor, plain
from ..data.streaming import Reader
from ..noise.streams import stream_seed
from ..runtime.packages import needs
from ..runtime.random_state import seeded_generators
from .sections import PhotoSection

with needs("selfensemble[train]"):
    from PIL import Image, ImageEnhance

_TRIES = 10


@dataclass(frozen=True, slots=True)
class PhotoChanges:
    """A part of each photo, cut out at random and resized, and its colours and form changed.

    Attributes:
        config: how much.
        shape: (C, H, W) of the results.
        seed: of everything random.
    """

    config: PhotoSection
    shape: tuple[int, ...]
    seed: int

    def __call__(self, reader: Reader, place: int, number: int) -> Tensor:
        """(C, H, W) uint8, of photo `number` of a split."""
        channels, height, width = self.shape
        own = stream_seed(self.seed, number % 2**20, number // 2**20)
        generator = np.random.default_rng(own)
        image = plain(reader.photo(place), channels)
        box = random_part(image.size, self.config, generator)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        if self.config.rand_augment:
            with seeded_generators(own):
                image = rand_augment(self.config, channels)(image)
        return as_tensor(jittered(image, self.config.jitter, generator))


def random_part(
    size: tuple[int, int], config: PhotoSection, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a random part of an image of `size` (width, height).

    Area and proportions are drawn uniformly, the latter by their logarithm; where the part does not fit ten
    times, it is the largest in the centre whose proportions are allowed.

    Source: Szegedy et al., Going deeper with convolutions, CVPR 2015, section 6.
    """
    width, height = size
    low, high = config.ratio
    for _ in range(_TRIES):
        area = width * height * generator.uniform(*config.scale)
        proportion = math.exp(generator.uniform(math.log(low), math.log(high)))
        across, down = round(math.sqrt(area * proportion)), round(math.sqrt(area / proportion))
        if 0 < across <= width and 0 < down <= height:
            left, top = generator.integers(width - across + 1), generator.integers(height - down + 1)
            return float(left), float(top), float(left + across), float(top + down)
    side, rise = min(width, height * high), min(height, width / low)
    return (width - side) / 2, (height - rise) / 2, (width + side) / 2, (height + rise) / 2


def jittered(image: Image.Image, most: float, generator: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation multiplied by a factor within `most` of 1 each, in random order."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for place in generator.permutation(len(kinds)) if most else ():
        image = kinds[place](image).enhance(float(generator.uniform(1 - most, 1 + most)))
    return image


@cache
def rand_augment(config: PhotoSection, channels: int) -> Callable[[Image.Image], Image.Image]:
    """The changes of RandAugment, which take numpy's and Python's global numbers.

    Raises:
        MissingPackage: timm is not there.
        ValueError: they are for photos in colour.
    """
    if channels != 3:
        raise ValueError("rand_augment changes colours, these images are grey: leave it out")
    with needs("selfensemble[photos]"):
        from timm.data.auto_augment import rand_augment_transform
    name = f"rand-m{config.magnitude}-n{config.rand_augment}-mstd0.5-inc1"
    changes: Callable[[Image.Image], Image.Image] = rand_augment_transform(
        name, {"img_mean": (128, 128, 128)}
    )
    return changes
