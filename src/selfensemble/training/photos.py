"""Random changes of photos, each on its own, by the workers that decode them.

What becomes of a photo depends on the seed and its number alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.decoding import as_tensor, plain
from ..data.streaming import Reader
from ..noise.streams import stream_seed
from ..runtime.errors import MissingPackage
from ..runtime.random_state import seeded_generators
from .sections import PhotoSection

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
        image = plain(reader.photo(place), channels)
        box = random_part(image.size, self.config, np.random.default_rng(own))
        pixels = as_tensor(image.resize((width, height), _bicubic(), box=box))
        if not (self.config.jitter or self.config.rand_augment):
            return pixels
        with seeded_generators(own), torch.no_grad():
            changed = pixels.float().div(255).unsqueeze(0)
            for change in changes(self.config, channels):
                changed = change(changed)
        return changed[0].clamp(0, 1).mul(255).round().to(torch.uint8)


def _bicubic() -> Any:
    from PIL import Image

    return Image.Resampling.BICUBIC


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


@cache
def changes(config: PhotoSection, channels: int) -> list[Callable[[Tensor], Tensor]]:
    """Changes of colours and form, of (1, C, H, W) in [0, 1].

    Raises:
        MissingPackage: kornia is not there.
        ValueError: they are for photos in colour.
    """
    if not (config.jitter or config.rand_augment):
        return []
    if channels != 3:
        raise ValueError("jitter and rand_augment change colours, these images are grey: leave them out")
    try:
        from kornia.augmentation import ColorJitter
        from kornia.augmentation.auto import RandAugment
    except ImportError as error:
        raise MissingPackage(
            "data.photos.jitter and rand_augment need kornia: pip install selfensemble[photos]"
        ) from error
    found: list[Callable[[Tensor], Tensor]] = []
    if config.rand_augment:
        found.append(RandAugment(n=config.rand_augment, m=max(1, min(config.magnitude, 29))))
    if config.jitter:
        found.append(ColorJitter(config.jitter, config.jitter, config.jitter, 0.0))
    return found
