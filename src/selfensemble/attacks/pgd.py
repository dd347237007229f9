"""Gradient ascent within a ball: the fast gradient method and projected gradient descent.

Sources: Goodfellow et al., ICLR 2015 (FGSM); Madry et al., ICLR 2018 (PGD); Tramer & Boneh, NeurIPS 2019
(sparse steps for L1).
"""

import math
from typing import Unpack

import torch
from torch import Tensor, nn

from ..ensemble.checks import check_count
from .averaging import Noise, NoiseOptions
from .driver import run_attack
from .expectation import Oracle
from .keeper import Keeper
from .losses import Loss, LossName, check_loss, of_labels
from .norms import Norm, ascent, check_eps, check_norm, project, random_start
from .units import in_own_units


@in_own_units("eps")
def fgsm(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    norm: Norm = "linf",
    eps: float = 8 / 255,
    loss: LossName = "ce",
    max_batch: int | None = None,
    **noise: Unpack[NoiseOptions],
) -> Tensor:
    """One step of length `eps` along the steepest direction; see `pgd`. Cheap and weak."""
    return pgd(
        model, inputs, labels, targeted=targeted, norm=norm, eps=eps, loss=loss, steps=1, step_size=eps,
        random_starts=False, max_batch=max_batch, **noise,
    )  # fmt: skip


@in_own_units("eps", "step_size")
def pgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    norm: Norm = "linf",
    eps: float = 8 / 255,
    steps: int = 50,
    step_size: float | None = None,
    restarts: int = 1,
    random_starts: bool = True,
    loss: LossName = "ce",
    early_stop: bool = False,
    max_batch: int | None = None,
    **noise: Unpack[NoiseOptions],
) -> Tensor:
    """Projected gradient descent on the loss, expected over noise.

    Of the last iterates of the restarts, the one kept leads most in mean probability on fresh draws;
    where no randomness is found, of all iterates the one of the largest loss.

    Args:
        model: a classifier; of a `SelfEnsemble`, single draws are attacked.
        inputs: (B, C, H, W) in [0, 1].
        labels: (B,) integers, true classes, or wanted ones if `targeted`.
        targeted: reach `labels` rather than leave them.
        norm: "linf", "l2" or "l1".
        eps: radius of the ball, in [0, 1] pixels.
        steps: gradient steps a restart.
        step_size: of every step; None for steps that fall linearly to 0 from `12 eps / steps`, for L2
            from `20 eps / steps`, at most `eps`: constant steps end around the maximum, not in it.
        restarts: runs from a new random start.
        random_starts: begin within the ball rather than at the image (the first restart).
        loss: "ce", "margin", "dlr" or "probability-margin".
        early_stop: an image leaves the batch once a success is confirmed; saves time, but stops at the
            first success rather than the largest loss.
        max_batch: images attacked at a time; None for all. Memory does not depend on `eot`.
        noise: `eot`, `average`, `confirm_draws`, `frozen`, `seed`; see `Noise`.

    Returns:
        (B, C, H, W) in the ball and in [0, 1]; judge them on fresh noise.

    Raises:
        ValueError, TypeError: inputs, labels or settings that cannot be attacked.
    """
    check_norm(norm)
    check_eps(eps, norm, inputs)
    objective = check_loss(loss)
    check_count("restarts", restarts)
    lengths = _lengths(norm, eps, check_count("steps", steps), step_size)

    def run(oracle: Oracle, x: Tensor, y: Tensor) -> Tensor:
        keep = Keeper(oracle, x, y, targeted)
        for restart in range(restarts):
            begin_anywhere = random_starts or restart > 0
            _ascend(keep, objective, norm, eps, lengths, begin_anywhere, early_stop)
        return keep.best

    return run_attack(model, inputs, labels, run, Noise(**noise), max_batch)


def _lengths(norm: Norm, eps: float, steps: int, step_size: float | None) -> list[float]:
    """Lengths of the steps, see `pgd`."""
    if step_size is not None:
        if not (step_size > 0 and math.isfinite(step_size)):
            raise ValueError(f"step_size must be finite and > 0, got {step_size}")
        return [step_size] * steps
    travel = 20.0 if norm == "l2" else 12.0  # in eps; on the sphere steps also have to turn
    return [min(1.0, travel / steps) * eps * (1 - step / steps) for step in range(steps)]


def _ascend(
    keep: Keeper,
    objective: Loss,
    norm: Norm,
    eps: float,
    lengths: list[float],
    begin_anywhere: bool,
    early_stop: bool,
) -> None:
    """One run, a step for each of `lengths`; `keep` takes what it finds."""
    active = keep.candidates(early_stop)
    change = torch.zeros_like(keep.x[active])
    if begin_anywhere:
        change = random_start(keep.x[active], norm, eps, keep.oracle.generator)
    for step, length in enumerate(lengths):
        if len(active) == 0:
            break
        images = keep.x[active]
        climbed = of_labels(objective, keep.y[active], keep.targeted)
        estimate = keep.oracle.gradient(images + change, climbed)
        stay = keep.visit(active, images + change, estimate, stop=early_stop, step=step)
        change = project(change + ascent(estimate.gradient, norm, length, images + change), norm, eps, images)
        active, change = active[stay], change[stay]
    keep.finish(active, keep.x[active] + change, of_labels(objective, keep.y[active], keep.targeted))
