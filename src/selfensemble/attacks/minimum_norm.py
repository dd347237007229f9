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
from .driver import run_attack
from .expectation import Noise, NoiseOptions, Oracle
from .leads import fooled
from .losses import margin, of_labels, soft_margin
from .nearest import Nearest
from .norms import Norm, check_norm, dual_size, largest_eps, per_image, project, size, unit_l2
from .units import in_own_units

_SOFT = 8.0  # temperatures that the margin of an original image is


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
    matters.

    Args:
        model, inputs, labels, targeted, max_batch, noise: see `pgd`.
        steps: gradient steps; their length falls from 1 to 0.01 by half a cosine. Of a random model up to 20
            of them, at most a fifth, are the last, at the same distance.
        gamma: relative change of the norm in a step, in (0, 1).
        initial_norm: L2 norm after the first step.

    Returns:
        (B, C, H, W) the nearest confirmed images; where none was found, the original image.
    """
    check_count("steps", steps)
    if not (0 < gamma < 1 and initial_norm > 0 and math.isfinite(initial_norm)):
        raise ValueError(f"need 0 < gamma < 1 and initial_norm > 0, got {gamma} and {initial_norm}")

    def run(oracle: Oracle, x: Tensor, y: Tensor) -> Tensor:
        nearest = Nearest(oracle, x, y, targeted, "l2")
        nearest.turns = min(nearest.turns, steps // 5)
        active, last = nearest.active(), steps - nearest.turns
        images, own = x[active], y[active]
        change, norm = torch.zeros_like(images), images.new_full((len(images),), initial_norm)
        climbed = _climbed(oracle, images, own, targeted)
        for step in range(last + 1 if len(active) else 0):
            estimate = oracle.gradient(images + change, climbed)
            nearest.visit(active, images + change, estimate)
            if step == last:
                break
            success = fooled(estimate.probabilities, own, targeted)
            if step > 0:
                norm = torch.where(success, norm * (1 - gamma), norm * (1 + gamma))
            change = change + _half_cosine(1.0, 0.01, step, last) * unit_l2(estimate.gradient)
            change = change * per_image(norm / size(change, "l2").clamp(min=1e-12), change)
            change = (images + change).clamp(0.0, 1.0) - images
        return nearest.refined()

    return run_attack(model, inputs, labels, run, Noise(**noise), max_batch)


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
        steps: gradient steps; of a random model up to 20 of them, at most a fifth, at the same distance.
        step_size: L2 length of the first step, by default 1, for L1 2; it falls to 1/100 by half a cosine.
        gamma: relative change of the radius in the first step; it falls to 0.001.

    Returns:
        (B, C, H, W) the nearest confirmed images; where none was found, the original image.
    """
    check_norm(norm)
    check_count("steps", steps)
    length = {"linf": 1.0, "l2": 1.0, "l1": 2.0}[norm] if step_size is None else step_size
    if not (0 < gamma < 1 and length > 0 and math.isfinite(length)):
        raise ValueError(f"need 0 < gamma < 1 and step_size > 0, got {gamma} and {length}")

    def run(oracle: Oracle, x: Tensor, y: Tensor) -> Tensor:
        nearest = Nearest(oracle, x, y, targeted, norm)
        nearest.turns = min(nearest.turns, steps // 5)
        active, last = nearest.active(), steps - nearest.turns
        images, own = x[active], y[active]
        change = torch.zeros_like(images)
        largest = largest_eps(norm, images[:1].numel())
        radius, smallest = images.new_full((len(images),), largest), images.new_full((len(images),), largest)
        found = torch.zeros(len(images), dtype=torch.bool, device=x.device)
        climbed = _climbed(oracle, images, own, targeted)
        for step in range(last + 1 if len(active) else 0):
            estimate = oracle.gradient(images + change, climbed)
            nearest.visit(active, images + change, estimate)
            if step == last:
                break
            shrink = _half_cosine(gamma, 0.001, step, last)
            success, now = fooled(estimate.probabilities, own, targeted), size(change, norm)
            found |= success
            # Of a random model the smallest distance of a success is that of its luckiest draws.
            smallest = torch.where(success & oracle.exact, torch.minimum(smallest, now), smallest)
            # Until the boundary was crossed once: a little farther than a linear model would need.
            ahead = now + estimate.loss.abs() / dual_size(estimate.gradient, norm).clamp(min=1e-12)
            inside, outside = radius * (1 - shrink), torch.where(found, radius, ahead) * (1 + shrink)
            radius = torch.where(success, torch.minimum(inside, smallest), outside).clamp(max=largest)
            change = change + _half_cosine(length, length / 100, step, last) * unit_l2(estimate.gradient)
            change = project(change, norm, radius, images)
        return nearest.refined()

    return run_attack(model, inputs, labels, run, Noise(**noise), max_batch)


def _climbed(oracle: Oracle, images: Tensor, labels: Tensor, targeted: bool) -> Callable[[Tensor], Tensor]:
    """The soft margin (see there), at a temperature in proportion to the margin of the original images."""
    if len(images) == 0:
        return of_labels(margin, labels, targeted)
    first = oracle.evaluate(images, of_labels(margin, labels, targeted))
    temperature = (first.loss.abs() / _SOFT).clamp(min=1e-20)
    return lambda logits: soft_margin(logits, labels, targeted, temperature)


def _half_cosine(first: float, last: float, step: int, steps: int) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2
