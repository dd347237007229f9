"""Attacked images as files hold them: 256 levels a pixel."""

import io
from pathlib import Path

import torch
from torch import Tensor

from ..attacks.norms import per_image, size
from ..data.images import ImageData, in_bounds
from ..runtime.files import atomic_write
from ..runtime.packages import needs
from .balls import UNIT, Bounds, in_units
from .shards import CLEAN, Shards

_HALVINGS = 12
_CHANNELS = (1, 3, 4)  # grey, colour, colour and opacity


def in_8_bits(
    found: Tensor, x: Tensor, norm: str | None = None, eps: float | None = None, bounds: Bounds = UNIT
) -> Tensor:
    """Attacked images rounded to 256 levels, within the ball.

    Where rounding leaves the ball, the change is made a little shorter before it is rounded.

    Args:
        found, x: (B, ...) attacked and original images, within the bounds.
        norm, eps: the ball, in the units of the bounds; None for none.
        bounds: of the inputs, black and white of the files.

    Returns:
        (B, ...) the nearest of 256 levels between the bounds. Of an original that has others all of them may
        lie outside of the ball: then it takes their place.
    """
    if bounds != UNIT:
        length = None if eps is None else eps / (bounds[1] - bounds[0])
        return in_bounds(in_8_bits(in_units(found, bounds), in_units(x, bounds), norm, length), bounds)

    def rounded(share: Tensor) -> Tensor:
        return ((x + per_image(share, x) * (found - x)).clamp(0.0, 1.0) * 255).round() / 255

    low, high = x.new_zeros(len(x)), x.new_ones(len(x))
    best = rounded(high)
    if norm is None or eps is None:
        return best
    radius = eps * (1 + 1e-5)
    inside = size(best - x, norm) <= radius
    best = torch.where(per_image(inside, x), best, x)
    if inside.all():
        return best
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        images = rounded(middle)
        fits = size(images - x, norm) <= radius
        best = torch.where(per_image(fits & ~inside, x), images, best)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return best


def check_png(data: ImageData) -> None:
    """Raise a ValueError unless PNG holds such images as they are."""
    if len(data.shape) != 3 or data.shape[0] not in _CHANNELS:
        raise ValueError(f"PNG holds images (C, H, W) of 1, 3 or 4 channels, not {data.shape}")
    if data.images.dtype != torch.uint8:
        raise ValueError(f"PNG holds 256 levels, and {data.name} has floating-point numbers")


def write_images(shards: Shards, folder: Path, bounds: Bounds = UNIT) -> None:
    """PNG files of all attacked images: `ENTRY/IMAGE.png`, numbered as in the table of a run."""
    with needs("selfensemble[report]"):
        from PIL import Image

    for plan in shards.plans:
        for start in shards.starts if plan.key != CLEAN else ():
            for row, image in enumerate(in_units(shards.read(start, plan.key).adversarial, bounds)):
                levels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(2).numpy()
                file = io.BytesIO()
                Image.fromarray(levels).save(file, "png")
                atomic_write(folder / plan.key / f"{start + row:07d}.png", file.getvalue())
