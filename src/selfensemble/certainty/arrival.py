"""How the pixels of an image arrive at the first noise, and what noise there is worth on them.

Views (another order or shape), zero padding, a scale and an offset for each pixel, several copies of a pixel:
what holds one pixel, or none, in each of its elements is found out by images that spell the pixels' numbers.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..noise.levels import Std

_BASE = 16  # of the digits that a pixel's number is spelt in
_OFF = 0.02  # of a digit, that a value may lie beside one


class PixelMap(NamedTuple):
    """What stands in each element at the first noise: `slope * pixel + constant`.

    Attributes:
        source: (n,) int64, the number of the pixel among those of the batch; 0 where slope is 0.
        slope: (n,) float64; 0 for constants, such as zeros around an image.
        shape: of what arrives, of n elements.
    """

    source: Tensor
    slope: Tensor
    shape: torch.Size


def pixel_map(arrive: Callable[[Tensor], Tensor], images: Tensor, low: float, high: float) -> PixelMap | None:
    """How pixels arrive; None where something else than one pixel stands in an element.

    Args:
        arrive: gives what arrives of a batch of images; deterministic.
        images: (B, ...) of the kind that is meant; its values are not looked at.
        low, high: the bounds of pixels.
    """

    def sent(shares: Tensor) -> Tensor:
        pixels = (low + (high - low) * shares.double()).view(images.shape)
        # In two steps: not every device has float64.
        return arrive(pixels.to(images.dtype).to(images.device)).detach().cpu().double().flatten()

    count = images.numel()
    numbers, dark = torch.arange(count, device="cpu"), torch.zeros(count, device="cpu")
    offset, end = sent(dark), sent(dark + 1)
    span = end - offset
    held = span != 0
    source, unit = torch.zeros(len(span), dtype=torch.int64, device="cpu"), 1
    while unit < count:
        share = _shares(sent((numbers // unit % _BASE) / (_BASE - 1)), offset, span, held)
        digits = None if share is None else share * (_BASE - 1)
        if digits is None or not bool(((digits - digits.round()).abs() < _OFF).all()):
            return None
        source[held] += digits.round().long() * unit
        unit *= _BASE
    if len(span) == 0 or (bool(held.any()) and int(source.max()) >= count):
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    chance = torch.rand(count, generator=generator, dtype=torch.float32, device="cpu").to(images.dtype)
    exact = (low + (high - low) * chance.double()).to(images.dtype).double()
    slope = span / (high - low)
    affine = slope * (exact[source] - low) + offset
    tolerance = 1e-5 * float(span.abs().max())
    if not torch.allclose(sent(chance), affine, rtol=1e-5, atol=tolerance):
        return None
    return PixelMap(source, slope, arrive(images).shape)


def _shares(arrived: Tensor, offset: Tensor, span: Tensor, held: Tensor) -> Tensor | None:
    """Of the way from dark to bright, of the elements that hold pixels; None where a constant is none."""
    if len(arrived) != len(span) or not torch.equal(arrived[~held], offset[~held]):
        return None
    return (arrived - offset)[held] / span[held]


def pixel_levels(found: PixelMap, std: Std, images: Tensor) -> Tensor:
    """What noise on what arrives is worth on each pixel: `1 / sqrt(sum of (slope / std)^2)` over its copies.

    A change of a pixel by d moves what arrives of it by `slope * d`; divided by the noise's std there, the
    squares add up, for each element holds one pixel. Inf for pixels that do not arrive, 0 for those without.

    Args:
        found: how pixels arrive.
        std: of the noise; one level, or one a channel of what arrives.
        images: (B, ...) that arrived.

    Returns:
        Of the shape of `images`, float64.
    """
    levels = torch.as_tensor(np.asarray(std), dtype=torch.float64, device="cpu")
    levels = levels.view(-1, *[1] * (len(found.shape) - 2)) if levels.dim() else levels
    squares = (found.slope / levels.expand(found.shape).flatten()).nan_to_num(0.0, torch.inf) ** 2
    held = found.slope != 0
    total = torch.zeros(images.numel(), dtype=torch.float64, device="cpu")
    total.index_add_(0, found.source[held], squares[held])
    return total.rsqrt().view(images.shape)


def keeps_images(found: PixelMap, images: Tensor) -> bool:
    """Whether what arrives of image k stands at place k, where noise that a batch shares is its own."""
    if found.shape[0] != len(images):
        return False
    held = found.slope != 0
    place = torch.arange(len(found.slope), device="cpu") // (len(found.slope) // len(images))
    image = found.source // (images.numel() // len(images))
    return torch.equal(place[held], image[held])
