"""Gaussian noise on a grid that holds 8-bit images, so that adding it to one is exact.

Sums of floating-point numbers are rounded, and how depends on the image: the last bits of a noisy pixel may
give away the image under any noise, and a network that reads them answers images apart that smoothing says it
cannot. On a grid there is nothing to round. With a pixel and the noise in steps of the grid, both integers,
noisy images of two images are shifts of each other; and as a pixel is on the grid, rounding the sum of it and
normal noise is adding rounded noise. So the network behind this layer is one behind *exact* normal noise,
with rounding to the grid as its first layer, and what is proven of normal noise is true of it.

Source: Voracek and Hein, Sound randomized smoothing in floating-point arithmetic, ICLR 2023, whose grid is
that of the image.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .layer import GaussianNoise
from .operators import added
from .streams import Sampling, Source, random_source

LEVELS = 255  # the largest value of a pixel
FINE = 16  # steps of the grid from one value to the next
_REACH = 8.3  # standard deviations beyond which there is no noise: less than 2^-53 lies there
_LARGEST = 490  # std at which sums are below 2^24 steps, up to which float32 holds all integers
_SLIP = 2.0**-51  # of the distribution function at a border of the grid: 53 random bits, and ndtri


class GridNoise(GaussianNoise):
    """Adds `N(0, std^2)` noise, rounded to multiples of 1/4080, to images of 8 bits in [0, 1].

    Images are rounded to 8 bits; gradients are those of noise that is added. Draws are independent of each
    other, and not those of `GaussianNoise` with the same seed.

    Args:
        std, layer, sampling: see `GaussianNoise`.

    Shape: (B, ...) float32 or float64, to the same.
    """

    def __init__(
        self, std: float | Sequence[float], *, layer: int = 0, sampling: Sampling = "per_image"
    ) -> None:
        super().__init__(std, layer=layer, sampling=sampling)
        if float(np.max(self.std)) > _LARGEST:
            raise ValueError(
                f"noise on the grid of 8-bit images is exact up to a std of {_LARGEST}, got {std}"
            )

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"noise on a grid needs float32 images, got {inputs.dtype}")
        pixels = inputs * LEVELS
        pixels = pixels + (pixels.round() - pixels).detach()
        if self.is_active:
            source = random_source(self.layer, self.sampling == "shared" and not self.training, inputs.device)
            pixels = added(pixels, self._noise(pixels.detach(), source))
        return pixels / LEVELS

    def _noise(self, pixels: Tensor, source: Source) -> Tensor:
        """In units of `pixels`, with a first dimension of draws where images share it."""
        if source.draw.antithetic:
            raise ValueError("noise on a grid is not drawn in opposite pairs: leave antithetic out")
        count = source.count if source.shared else len(pixels)
        chance = torch.empty((count, *pixels.shape[1:]), dtype=torch.float64, device=pixels.device)
        if source.shared:
            source.check_batch(len(pixels))
            for part, generator in source.split(chance):
                part.uniform_(generator=generator)
        else:
            chance.uniform_(generator=source.generator())
        std = torch.as_tensor(self.std, dtype=torch.float64, device=pixels.device) * (LEVELS * FINE)
        std = std.view(-1, *[1] * (pixels.dim() - 2)) if std.dim() else std
        steps = torch.special.ndtri(chance.clamp_(min=2.0**-54)).mul_(std).round_()
        noise: Tensor = steps.div_(FINE).to(pixels.dtype)
        return noise


def distance_from_normal(numbers: int, std: float) -> float:
    """Bound of the total variation between the noise of an image and normal noise rounded to the grid.

    It is that of one number times all of them. Of one, the distribution functions differ at each border of
    the grid by 2^-51 at most: random numbers are multiples of 2^-53, and `ndtri` is right to 1e-15 of its
    value.

    Args:
        numbers: of an image, channels times pixels.
        std: the largest of the noise, of images in [0, 1].
    """
    borders = math.ceil(2 * _REACH * std * LEVELS * FINE) + 2
    return numbers * borders * _SLIP
