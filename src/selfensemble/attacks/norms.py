"""Geometry of the threat models: L-inf, L2 and L1 balls, within the box [0, 1] of images."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ..ensemble.checks import is_number

Norm = Literal["linf", "l2", "l1"]
_ORDER = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
_TINY = 1e-12
_HALVINGS = 25
_SMALLEST = torch.finfo(torch.float32).tiny


def check_norm(norm: str, known: tuple[str, ...] = get_args(Norm)) -> None:
    """Raise a ValueError that lists the known norms unless `norm` is one of them."""
    if norm not in known:
        raise ValueError(f"norm must be one of {', '.join(known)}, got {norm!r}")


def check_eps(eps: float, norm: str, inputs: Tensor, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
    """Raise a ValueError unless `0 < eps <=` the diameter of the box of the inputs, in their units."""
    if not is_number(eps):
        raise TypeError(f"eps must be a number, got {eps!r}: 8 / 255 without quotes, say")
    low, high = bounds
    largest = (high - low) * largest_eps(norm, math.prod(inputs.shape[1:]))
    if not (math.isfinite(eps) and 0 < eps <= largest):
        raise ValueError(
            f"eps must be above 0 and at most {largest:g}, the {norm} diameter of [{low:g}, {high:g}] "
            f"images of this size, got {eps:g}; L-inf distances are fractions of the pixel range, e.g. 8/255"
        )


def largest_eps(norm: str, pixels: int) -> float:
    """Distance between an all-black and an all-white image."""
    return {"linf": 1.0, "l2": math.sqrt(max(1, pixels)), "l1": float(max(1, pixels))}[norm]


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped to multiply (B, ...)."""
    return values.reshape(-1, *([1] * (like.dim() - 1)))


def enclosing_radius(eps: float, norm: str, other: str, pixels: int) -> float:
    """Radius of the smallest ball of the norm `other` around a ball of `norm` of radius `eps`.

    Args:
        eps, norm: the ball inside.
        other: norm of the ball around it.
        pixels: numbers of an image.
    """
    return float(eps * pixels ** max(0.0, 1 / _ORDER[other] - 1 / _ORDER[norm]))


def size(change: Tensor, norm: str) -> Tensor:
    """(B,) norms of (B, ...)."""
    norms: Tensor = torch.linalg.vector_norm(change.flatten(1), _ORDER[norm], dim=1)
    return norms


def dual_size(gradient: Tensor, norm: str) -> Tensor:
    """(B,) dual norms: the largest first-order gain of a step of size 1."""
    if norm == "l2":  # squares of large and small numbers leave the range of float32
        largest = gradient.abs().flatten(1).amax(dim=1).clamp(min=_SMALLEST)
        return largest * size(gradient / per_image(largest, gradient), "l2")
    return size(gradient, {"linf": "l1", "l1": "linf"}[norm])


def unit_l2(gradient: Tensor) -> Tensor:
    """Gradients of Euclidean length 1, however small they are; zero stays zero."""
    largest = gradient.abs().flatten(1).amax(dim=1)
    scaled = gradient / per_image(largest.clamp(min=_SMALLEST), gradient)
    return scaled / per_image(size(scaled, "l2").clamp(min=_TINY), gradient)


def steepest(gradient: Tensor, norm: str, share: Tensor | float = 0.05) -> Tensor:
    """Directions of norm 1 along which the loss grows fastest.

    For L1 that would be one pixel; the step goes equally over the `share` of the pixels with the
    largest gradients instead (Tramer & Boneh, NeurIPS 2019, section 3).
    """
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        return unit_l2(gradient)
    flat = gradient.abs().flatten(1)
    count = flat.shape[1]
    keep = torch.as_tensor(share, device=gradient.device, dtype=torch.float32).expand(len(flat)) * count
    rank = count - keep.long().clamp(1, count)
    threshold = flat.sort(dim=1).values.gather(1, rank[:, None])
    sparse = gradient.sign() * (gradient.abs() >= per_image(threshold.squeeze(1), gradient))
    return sparse / per_image(sparse.abs().flatten(1).sum(dim=1).clamp(min=_TINY), gradient)


def movable(gradient: Tensor, images: Tensor) -> Tensor:
    """The gradient without what points out of the box [0, 1] where `images` are at its end."""
    return torch.where(gradient > 0, images < 1, images > 0) * gradient


def ascent(
    gradient: Tensor, norm: str, length: Tensor | float, images: Tensor, share: Tensor | float = 0.05
) -> Tensor:
    """Changes of norm `length` along which the loss grows fastest, from images in the box.

    For L1 pixels that are at the end of the box, or would be moved beyond it, leave their part to others: at
    least the `share` of the pixels with the largest gradients, and as many as the length needs.

    Args:
        gradient: (B, ...).
        norm: of the changes.
        length: (B,) or a number.
        images: (B, ...) in [0, 1], where the step begins.
        share: (B,) or a number, see `steepest`.
    """
    lengths = torch.as_tensor(length, dtype=images.dtype, device=images.device).expand(len(images))
    if norm != "l1":
        return per_image(lengths, images) * steepest(gradient, norm)
    slope = gradient.flatten(1)
    room = torch.where(slope > 0, 1 - images.flatten(1), images.flatten(1)).clamp(min=0) * (slope != 0)
    order = torch.where(room > 0, slope.abs(), -1.0).argsort(dim=1, descending=True)
    ordered = room.gather(1, order)
    count = (
        torch.as_tensor(share, dtype=images.dtype, device=images.device).expand(len(images)) * room.shape[1]
    )
    rank = torch.arange(room.shape[1], device=images.device)
    before = ordered.cumsum(dim=1) - ordered
    chosen = (rank < count.clamp(min=1)[:, None]) | (before < lengths[:, None])
    room = torch.zeros_like(room).scatter(1, order, torch.where(chosen, ordered, 0.0))
    bottom, top = torch.zeros_like(lengths), torch.ones_like(lengths)
    for _ in range(_HALVINGS):  # of the level up to which all of them move, where there is room
        middle = (bottom + top) / 2
        short = torch.minimum(room, middle[:, None]).sum(dim=1) < lengths
        bottom, top = torch.where(short, middle, bottom), torch.where(short, top, middle)
    return (slope.sign() * torch.minimum(room, top[:, None])).view_as(images)


def project(change: Tensor, norm: str, eps: Tensor | float, inputs: Tensor) -> Tensor:
    """Bring `inputs + change` into [0, 1] and within `eps` of `inputs`; returns the change.

    L-inf and L1 are exact projections. For L2 the image is scaled into the ball and then clamped, which
    can only bring it nearer. `eps`: a number or (B,).
    """
    if isinstance(eps, Tensor):
        radius = eps.to(change.device, change.dtype).expand(len(change))
    else:
        radius = change.new_full((len(change),), eps)  # filled on the device, which nobody waits for
    low, high = -inputs, 1 - inputs
    if norm == "linf":
        bound = per_image(radius, change)
        return change.clamp(-bound, bound).clamp(low, high)
    if norm == "l2":
        factor = (radius / size(change, "l2").clamp(min=_TINY)).clamp(max=1.0)
        return (change * per_image(factor, change)).clamp(low, high)
    return _project_l1(change, radius, low, high)


def _project_l1(change: Tensor, radius: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Onto the L1 ball and the box at once: soft thresholding, then clamping; bisection finds the level.

    Source: Croce & Hein, Mind the box, ICML 2021, proposition 2.1 (there by sorting).
    """

    def at(level: Tensor) -> Tensor:
        soft = change.sign() * (change.abs() - per_image(level, change)).clamp(min=0)
        return soft.clamp(low, high)

    bottom = torch.zeros_like(radius)
    inside = size(at(bottom), "l1") <= radius
    top = change.abs().flatten(1).amax(dim=1)
    for _ in range(40):
        middle = (bottom + top) / 2
        too_long = size(at(middle), "l1") > radius
        bottom, top = torch.where(too_long, middle, bottom), torch.where(too_long, top, middle)
    return at(torch.where(inside, torch.zeros_like(top), top))


def random_start(inputs: Tensor, norm: str, eps: float, generator: torch.Generator) -> Tensor:
    """Changes uniform in the ball of radius `eps`, brought into the box; drawn where the generator is."""
    values = torch.empty(inputs.shape, dtype=torch.float32, device=generator.device)
    if norm == "linf":
        uniform = values.uniform_(-eps, eps, generator=generator).to(inputs.device, inputs.dtype)
        return project(uniform, norm, eps, inputs)
    if norm == "l2":
        direction = values.normal_(generator=generator)
    else:
        signs = torch.empty_like(values).uniform_(-1, 1, generator=generator).sign()
        direction = signs * values.exponential_(generator=generator)
    direction = direction.to(inputs.device, inputs.dtype)
    radius = torch.rand(len(inputs), generator=generator, device=generator.device, dtype=torch.float32)
    radius = radius.to(inputs.device, inputs.dtype)
    radius = eps * radius ** (1 / max(1, inputs[:1].numel()))
    unit = direction / per_image(size(direction, norm).clamp(min=_TINY), direction)
    return project(unit * per_image(radius, direction), norm, eps, inputs)
