"""Fast Adaptive Boundary attack: the nearest adversarial image, by projections onto linearised boundaries.

Source: Croce & Hein, Minimally distorted adversarial examples with a fast adaptive boundary attack,
ICML 2020; its targeted form from Reliable evaluation of adversarial robustness, ICML 2020.
"""

from collections.abc import Callable
from functools import partial
from typing import Unpack

import torch
from torch import Tensor, nn

from ..ensemble.checks import check_count
from .averaging import Noise, NoiseOptions
from .driver import run_attack
from .expectation import Oracle
from .leads import fooled
from .losses import margin
from .minimum_norm import FIRST_STEP, GAMMA, follow_boundary
from .nearest import Nearest
from .norms import Norm, check_eps, check_norm, dual_size, largest_eps, per_image, random_start, size
from .targets import wrong_classes
from .units import in_own_units

_START = {"linf": 0.3, "l2": 1.0, "l1": 5.0}  # radius of restarts where nothing is known, as published
_TINY = 1e-12
_LEAD_IN, _LEAST = 20, 5  # steps of FMN before the first run, or none
# Of images (A, ...) and their indices (A,): values (A,), above 0 beyond the boundary, and gradients.
Boundary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@in_own_units("eps")
def fab(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    norm: Norm = "linf",
    steps: int = 100,
    restarts: int = 1,
    targets: int | None = None,
    eps: float | None = None,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    max_batch: int | None = None,
    **noise: Unpack[NoiseOptions],
) -> Tensor:
    """FAB: the nearest adversarial image found, by alternating steps to the boundary and to the image.

    A step linearises the difference of two expected logits and moves to where it changes sign. It costs
    `eot` gradients for every wrong class, with `targets` or `targeted` only `eot`, and `eot` forwards.
    Of a random model the `steps * eot` draws of a run are spent in fewer steps, each of about as many draws
    as there are steps, unless `eot` is more. An image counts as adversarial if the mean softmax of these
    draws and `confirm_draws` fresh ones say so: raise that for images that hold. Where no randomness is
    found, twenty steps of `fmn`, a fifth of the gradients at most, find where the first run begins (the
    paper's begins at the image, and stays with the boundary nearest there), and halvings end the search.

    Args:
        targeted: reach `labels`, across the boundary between the wanted class and the likeliest other.
        norm: "linf", "l2" or "l1", of the distance that is made small.
        steps: steps of a run; fewer of a random model, see above.
        restarts: runs; all but the first begin at random, at half the smallest distance known (at most
            half of `eps`).
        targets: None: each step heads for the nearest of all boundaries. A number: FAB-T, a run against
            each of that many of the likeliest wrong classes (AutoAttack takes 9).
        eps: an image found within this distance leaves the batch; saves time, but such images are not
            the nearest ones. Images found farther away are returned too.
        alpha_max: largest weight of the step from the original image.
        eta: how far beyond the boundary a step goes; 1 is onto it.
        beta: an adversarial image goes back towards the original, to this share of its distance.
        model, inputs, labels, max_batch, noise: see `pgd`.

    Returns:
        (B, C, H, W) in [0, 1], the original image where none was found or it needs no change; judge them
        on fresh noise.

    Raises:
        ValueError, TypeError: inputs, labels or settings that cannot be attacked.
    """
    _check_runs(steps, restarts, targets, targeted)
    _check_numbers(inputs, norm, eps, alpha_max, eta, beta)

    def run(oracle: Oracle, x: Tensor, y: Tensor) -> Tensor:
        count, keep = oracle.share_out(steps), _Near(oracle, x, y, targeted, norm, eps)
        each = 1 if targeted or targets is not None else oracle.classes - 1  # gradients of a step
        boundaries = _boundaries(oracle, x, y, targeted, targets, norm)
        _walks(keep, norm, boundaries, each, count, restarts, partial(_walk, keep, alpha_max, eta, beta))
        return keep.refined()

    return run_attack(model, inputs, labels, run, Noise(**noise), max_batch)


def _walks(
    keep: "_Near",
    norm: Norm,
    boundaries: list[Boundary],
    each: int,
    steps: int,
    restarts: int,
    walk: Callable[[Boundary, Tensor, int], None],
) -> None:
    """All runs of that many steps: against each boundary as many as `restarts`."""
    first = steps - _lead_in(keep, norm, each, steps)
    for number, boundary in enumerate(boundaries):
        for restart in range(restarts):
            is_first = number == restart == 0
            start = keep.start() if restart else keep.known() if is_first else keep.x
            walk(boundary, start, first if is_first else steps)


def _lead_in(keep: "_Near", norm: Norm, each: int, steps: int) -> int:
    """Find where the first run of `steps` of `each` gradients begins; how many of them that costs it."""
    gradients = min(_LEAD_IN, each * steps // 5)
    if gradients < _LEAST or keep.oracle.is_random:
        return 0
    follow_boundary(keep, gradients - 1, FIRST_STEP[norm], GAMMA)
    return -(-gradients // each)


def _check_runs(steps: int, restarts: int, targets: int | None, targeted: bool) -> None:
    check_count("steps", steps)
    check_count("restarts", restarts)
    if targets is not None:
        check_count("targets", targets)
        if targeted:
            raise ValueError("targets is the number of wrong classes tried; with targeted=True there is one")


def _check_numbers(
    inputs: Tensor, norm: str, eps: float | None, alpha_max: float, eta: float, beta: float
) -> None:
    check_norm(norm)
    if eps is not None:
        check_eps(eps, norm, inputs)
    for name, number, low, high in (
        ("alpha_max", alpha_max, 0.0, 1.0), ("eta", eta, 1.0, 2.0), ("beta", beta, 0.0, 1.0)
    ):  # fmt: skip
        if not low <= number <= high:
            raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {number}")


class _Near(Nearest):
    """The nearest images, and what of it decides where FAB goes on."""

    def __init__(
        self, oracle: Oracle, x: Tensor, y: Tensor, targeted: bool, norm: str, eps: float | None
    ) -> None:
        super().__init__(oracle, x, y, targeted, norm)
        self.eps = eps

    def wanting(self, active: Tensor) -> Tensor:
        """(len(active),) which images stay: those that are not yet near enough."""
        if not self.oracle.may_shrink:
            return torch.ones(len(active), dtype=torch.bool, device=active.device)
        return self.distance[active] > (self.eps or 0.0)

    def known(self) -> Tensor:
        """The nearest images, or the last iterates where there is none."""
        found = (self.distance > 0) & self.distance.isfinite()
        return torch.where(per_image(found, self.x), self.best, self.last)

    def start(self) -> Tensor:
        """Random images at half the best distance, or half of `eps`."""
        radius = min(_START[self.norm], largest_eps(self.norm, self.x[:1].numel()))
        radius = radius if self.eps is None else self.eps
        change = random_start(self.x, self.norm, radius, self.oracle.generator)
        known = torch.isfinite(self.distance) if self.eps is None else self.distance < self.eps
        length = torch.where(known, self.distance, torch.full_like(self.distance, radius)) / 2
        change = change * per_image(length / size(change, self.norm).clamp(min=_TINY), change)
        return (self.x + change).clamp(0.0, 1.0)

    def adversarial(self, active: Tensor, images: Tensor) -> Tensor:
        """Take note of images; (len(active),) whether they fool the model, confirmed where nearer."""
        estimate = self.oracle.evaluate(images, lambda z: z[:, 0])
        nearer = size(images - self.x[active], self.norm) < self.distance[active]
        claimed = fooled(estimate.probabilities, self.y[active], self.targeted)
        return torch.where(nearer, self.visit(active, images, estimate), claimed)


def _boundaries(
    oracle: Oracle, x: Tensor, y: Tensor, targeted: bool, targets: int | None, norm: str
) -> list[Boundary]:
    """What the runs head for: the wanted class, each of some wrong classes, or the nearest wrong class."""

    def wanted(images: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        estimate = oracle.gradient(images, lambda z: margin(z, y[active], True))
        return estimate.loss, estimate.gradient

    def towards(goal: Tensor) -> Boundary:
        def boundary(images: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
            theirs, own = goal[active, None], y[active, None]
            estimate = oracle.gradient(images, lambda z: (z.gather(1, theirs) - z.gather(1, own)).squeeze(1))
            return estimate.loss, estimate.gradient

        return boundary

    def nearest(images: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = images.new_zeros(len(images)), torch.zeros_like(images)
        least = torch.full_like(value, torch.inf)
        for rank in range(oracle.classes - 1):
            now, slope = towards(rank + (rank >= y).long())(images, active)
            length = now.abs() / dual_size(slope, norm).clamp(min=_TINY)
            nearer = length < least
            least, value = torch.where(nearer, length, least), torch.where(nearer, now, value)
            gradient = torch.where(per_image(nearer, images), slope, gradient)
        return value, gradient

    if targeted:
        return [wanted]
    if targets is None:
        return [nearest]
    return [towards(goal) for goal in wrong_classes(oracle, x, y, targets, "likely", norm).T]


def _walk(
    keep: _Near, alpha_max: float, eta: float, beta: float, boundary: Boundary, images: Tensor, steps: int
) -> None:
    """One run from `images` (B, ...); `keep` takes what it finds."""
    active = torch.arange(len(keep.x), device=keep.x.device)
    stay = keep.wanting(active)
    for _ in range(steps):
        if not stay.all():
            active, images = active[stay], images[stay]
        if len(active) == 0:
            return
        original = keep.x[active]
        value, gradient = boundary(images, active)
        there = value + ((original - images) * gradient).flatten(1).sum(dim=1)
        near = to_hyperplane(images, gradient, value, keep.norm)
        far = to_hyperplane(original, gradient, there, keep.norm)
        lengths = size(near, keep.norm).clamp(min=1e-8), size(far, keep.norm).clamp(min=1e-8)
        alpha = per_image((lengths[0] / (lengths[0] + lengths[1])).clamp(max=alpha_max), images)
        images = ((1 - alpha) * (images + eta * near) + alpha * (original + eta * far)).clamp(0.0, 1.0)
        found = keep.adversarial(active, images)
        images = torch.where(per_image(found, images), original + beta * (images - original), images)
        stay = keep.wanting(active)


def to_hyperplane(points: Tensor, gradient: Tensor, value: Tensor, norm: str) -> Tensor:
    """The smallest changes after which an affine function is 0 and the points are still in [0, 1].

    Every pixel moves in the direction that brings the function nearer to 0, until it reaches the box: for
    L-inf all by the same length, for L2 in proportion to the gradient, for L1 one after another, the
    largest gradient first. Lengths follow from sorting the pixels by where they reach the box.

    Args:
        points: (B, ...) in [0, 1].
        gradient: (B, ...) of the function.
        value: (B,) of the function at the points.
        norm: "linf", "l2" or "l1", in which the change is smallest.

    Returns:
        (B, ...) changes; where the box does not reach the hyperplane, those that come nearest to it.
    """
    uphill = gradient * -per_image(value.sign(), gradient)
    weight = uphill.abs().flatten(1)
    room = torch.where(uphill > 0, 1 - points, points).flatten(1) * (weight > 0)
    scale = weight.amax(dim=1, keepdim=True).clamp(min=1e-30)
    weight, need = weight / scale, value.abs()[:, None] / scale
    if norm == "l1":
        order = weight.argsort(dim=1, descending=True, stable=True)
        first, gain = weight.gather(1, order), (weight * room).gather(1, order)
        before = gain.cumsum(dim=1) - gain
        used = torch.minimum((need - before).clamp(min=0), gain) / first.clamp(min=_TINY)
        moves = torch.zeros_like(weight).scatter(1, order, torch.minimum(used, room.gather(1, order)))
    else:
        pace = weight if norm == "l2" else torch.ones_like(weight)
        # At time t a pixel has moved min(room, t * pace).
        until = torch.where(weight > 0, room / pace.clamp(min=_TINY), torch.zeros_like(room))
        times, order = until.sort(dim=1)
        gain, rate = (weight * room).gather(1, order), (weight * pace).gather(1, order)
        reached = gain.cumsum(dim=1) + times * (rate.sum(dim=1, keepdim=True) - rate.cumsum(dim=1))
        blocked = torch.zeros_like(weight, dtype=torch.bool).scatter(1, order, reached < need)
        # Sums over the two kinds of pixels anew: running sums only had to tell them apart.
        left = need - (weight * room * blocked).sum(dim=1, keepdim=True)
        time = left.clamp(min=0) / (weight * pace * ~blocked).sum(dim=1, keepdim=True).clamp(min=_TINY)
        moves = torch.where(blocked, room, torch.minimum(room, time * pace))
    return uphill.sign() * moves.reshape(points.shape)
