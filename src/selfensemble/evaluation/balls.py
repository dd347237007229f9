"""Attacked images brought into a ball around their originals, and into the range of the inputs."""

import torch
from torch import Tensor

from ..attacks.norms import per_image, project, size
from ..data.images import in_bounds

Bounds = tuple[float, float]
UNIT: Bounds = (0.0, 1.0)


def within(found: Tensor, x: Tensor, norm: str, eps: float, farther: bool, bounds: Bounds = UNIT) -> Tensor:
    """Attacked images brought into a ball: those that lie beyond it are projected onto it.

    Args:
        found, x: attacked and original images, within the bounds.
        norm, eps: the ball, in the units of the bounds.
        farther: take each image inside on in its direction as far as the ball and the bounds allow. The
            nearest image that fools a random network lies where half of its answers are right; an attack that
            can move farther fools more.
        bounds: of the inputs.
    """
    if bounds != UNIT:
        length = eps / (bounds[1] - bounds[0])
        return in_bounds(within(in_units(found, bounds), in_units(x, bounds), norm, length, farther), bounds)
    change = found - x
    distance = size(change, norm)
    beyond = distance > eps * (1 + 1e-5)
    if farther:
        factor = torch.where(distance > 0, eps / distance.clamp(min=1e-12), 1.0).clamp(min=1.0)
        found = (x + per_image(factor, change) * change).clamp(0, 1)
    if not beyond.any():
        return found
    return torch.where(per_image(beyond, x), x + project(change, norm, eps, x), found)


def in_units(images: Tensor, bounds: Bounds) -> Tensor:
    """Images within the bounds as images in [0, 1]; of those in [0, 1] the same."""
    low, high = bounds
    return images if bounds == UNIT else ((images - low) / (high - low)).clamp(0.0, 1.0)
