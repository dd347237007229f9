"""Fast minimum-norm attacks: DDN and FMN.

Sources: Rony et al., Decoupling Direction and Norm for efficient gradient-based L2 adversarial attacks,
CVPR 2019; Pintor et al., Fast Minimum-norm adversarial attacks through adaptive norm constraints,
NeurIPS 2021.
"""

import math
from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor, nn

from ..ensemble.checks import check_count
from .averaging import NoiseOptions, of_nearest
from .driver import run_attack
from .expectation import Oracle
from .leads import fooled
from .losses import margin, of_labels, soft_margin, temperature_of
from .nearest import Nearest
from .norms import Norm, check_norm, dual_size, largest_eps, per_image, project, size, unit_l2
from .units import in_own_units

FIRST_STEP: dict[Norm, float] = {"linf": 1.0, "l2": 1.0, "l1": 2.0}  # L2 lengths, in fmn
GAMMA = 0.05
_PER_DRAW = 16  # steps for each draw of a step, of a random model


@in_own_units("initial_norm")
def ddn(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    steps: int = 100,
    gamma: float = 0.05,
    initial_norm: float = 1.0,
    max_batch: int | None = None,
    **noise: Unpack[NoiseOptions],
) -> Tensor:
    """Decoupled direction and norm: the L2 norm shrinks by `gamma` after a success, else grows by it.

    A step's own draws steer the norm; an image is kept only when fresh draws confirm it. The loss is the
    cross-entropy at a temperature of an eighth of each original's margin, so that no scale of the logits
    matters. Of several draws it is that of their mean probabilities, unless `average` says otherwise.

    Args:
        model, inputs, labels, targeted, max_batch, noise: see `pgd`.
        steps: gradient steps; their length falls from 1 to 0.01 by half a cosine. The draws of a random
            model's are spent in fewer steps of more draws each (200 in 50 of 4), and up to a fifth of them at
            the end, at the same distance.
        gamma: relative change of the norm in a step, in (0, 1); larger at first where steps are fewer.
        initial_norm: L2 norm after the first step.

    Returns:
        (B, C, H, W) the nearest confirmed images; where none was found, the original image.
    """
    check_count("steps", steps)
    if not (0 < gamma < 1 and initial_norm > 0 and math.isfinite(initial_norm)):
        raise ValueError(f"need 0 < gamma < 1 and initial_norm > 0, got {gamma} and {initial_norm}")

    def run(oracle: Oracle, x: Tensor, y: Tensor) -> Tensor:
        count, nearest = oracle.share_out(steps, _PER_DRAW), Nearest(oracle, x, y, targeted, "l2")
        nearest.turns = min(nearest.turns, count // 5)
        active, last = nearest.active(), count - nearest.turns
        images, own = x[active], y[active]
        first_gamma = _as_far(gamma, steps / count)
        change, norm = torch.zeros_like(images), images.new_full((len(images),), initial_norm)
        climbed = _climbed(oracle, images, own, targeted)
        for step in range(last + 1 if len(active) else 0):
            estimate = oracle.gradient(images + change, climbed)
            nearest.visit(active, images + change, estimate)
            if step == last:
                break
            success = fooled(estimate.probabilities, own, targeted)
            if step > 0:
                pace = _half_cosine(first_gamma, gamma, step, last)
                norm = torch.where(success, norm * (1 - pace), norm * (1 + pace))
            change = change + _half_cosine(1.0, 0.01, step, last) * unit_l2(estimate.gradient)
            change = change * per_image(norm / size(change, "l2").clamp(min=1e-12), change)
            change = (images + change).clamp(0.0, 1.0) - images
        return nearest.refined()

    return run_attack(model, inputs, labels, run, of_nearest(noise), max_batch)


@in_own_units("step_size")
def fmn(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    norm: Norm = "l2",
    steps: int = 100,
    step_size: float | None = None,
    gamma: float = 0.05,
    max_batch: int | None = None,
    **noise: Unpack[NoiseOptions],
) -> Tensor:
    """Fast minimum norm: ascent within a ball whose radius follows the boundary; for the loss see `ddn`.

    Args:
        model, inputs, labels, targeted, max_batch, noise: see `pgd`.
        norm: "linf", "l2" or "l1": the distance to be small.
        steps: gradient steps; of a random model fewer of more draws each, and the last of them at the same
            distance, see `ddn`.
        step_size: L2 length of the first step, by default 1, for L1 2; it falls to 1/100 by half a cosine.
        gamma: relative change of the radius in the first step; it falls to 0.001.

    Returns:
        (B, C, H, W) the nearest confirmed images; where none was found, the original image.
    """
    check_norm(norm)
    check_count("steps", steps)
    length = FIRST_STEP[norm] if step_size is None else step_size
    if not (0 < gamma < 1 and length > 0 and math.isfinite(length)):
        raise ValueError(f"need 0 < gamma < 1 and step_size > 0, got {gamma} and {length}")

    def run(oracle: Oracle, x: Tensor, y: Tensor) -> Tensor:
        count, nearest = oracle.share_out(steps, _PER_DRAW), Nearest(oracle, x, y, targeted, norm)
        nearest.turns = min(nearest.turns, count // 5)
        follow_boundary(nearest, count - nearest.turns, length, _as_far(gamma, steps / count))
        return nearest.refined()

    return run_attack(model, inputs, labels, run, of_nearest(noise), max_batch)


def follow_boundary(nearest: Nearest, steps: int, length: float, gamma: float) -> None:
    """The steps of `fmn`, which end at the boundary; `nearest` takes note of what they find."""
    oracle, norm, active = nearest.oracle, nearest.norm, nearest.active()
    images, own = nearest.x[active], nearest.y[active]
    change = torch.zeros_like(images)
    largest = largest_eps(norm, images[:1].numel())
    radius, smallest = images.new_full((len(images),), largest), images.new_full((len(images),), largest)
    found = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    climbed = _climbed(oracle, images, own, nearest.targeted)
    for step in range(steps + 1 if len(active) else 0):
        estimate = oracle.gradient(images + change, climbed)
        nearest.visit(active, images + change, estimate)
        if step == steps:
            break
        shrink = _half_cosine(gamma, 0.001, step, steps)
        success, now = fooled(estimate.probabilities, own, nearest.targeted), size(change, norm)
        found |= success
        # Of a random model the smallest distance of a success is that of its luckiest draws.
        smallest = torch.where(success & oracle.exact, torch.minimum(smallest, now), smallest)
        # Until the boundary was crossed once: a little farther than a linear model would need.
        ahead = now + estimate.loss.abs() / dual_size(estimate.gradient, norm).clamp(min=1e-12)
        inside, outside = radius * (1 - shrink), torch.where(found, radius, ahead) * (1 + shrink)
        radius = torch.where(success, torch.minimum(inside, smallest), outside).clamp(max=largest)
        change = change + _half_cosine(length, length / 100, step, steps) * unit_l2(estimate.gradient)
        change = project(change, norm, radius, images)


def _climbed(oracle: Oracle, images: Tensor, labels: Tensor, targeted: bool) -> Callable[[Tensor], Tensor]:
    """The soft margin (see there), at a temperature in proportion to the margin of the original images."""
    if len(images) == 0:
        return of_labels(margin, labels, targeted)
    first = oracle.evaluate(images, of_labels(margin, labels, targeted))
    temperature = temperature_of(first.loss)
    return lambda logits: soft_margin(logits, labels, targeted, temperature)


def _as_far(gamma: float, times: float) -> float:
    """With which fewer steps reach as far as that many times more with `gamma`; a half at most."""
    return max(gamma, min(0.5, 1.0 - float((1.0 - gamma) ** times)))


def _half_cosine(first: float, last: float, step: int, steps: int) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2
