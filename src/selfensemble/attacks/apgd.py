"""Auto-PGD: gradient ascent that sets its own step size, and its targeted form.

Sources: Croce & Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks, ICML 2020, algorithm 1; for L1, Mind the box, ICML 2021, algorithm 2.
"""

from collections.abc import Callable
from functools import partial
from typing import Unpack

import torch
from torch import Tensor, nn

from ..ensemble.checks import check_count
from .averaging import Noise, NoiseOptions
from .driver import run_attack
from .expectation import Estimate, Oracle
from .keeper import Keeper
from .losses import LossName, check_loss, targeted_dlr
from .norms import (
    Norm,
    check_eps,
    check_norm,
    movable,
    per_image,
    project,
    random_start,
    size,
    steepest,
)  # fmt: skip
from .targets import Order, check_order, wrong_classes
from .units import in_own_units

_ALPHA = 0.75  # share of the new step in a momentum step
_L1_DECREASE, _L1_SMALLEST = 1.5, 10.0
PointLoss = Callable[[Tensor, Tensor], Tensor]  # indices (A,) of the images and logits (A, K) to (A,)


@in_own_units("eps")
def apgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    norm: Norm = "linf",
    eps: float = 8 / 255,
    steps: int = 100,
    restarts: int = 1,
    loss: LossName = "ce",
    rho: float = 0.75,
    early_stop: bool = False,
    max_batch: int | None = None,
    **noise: Unpack[NoiseOptions],
) -> Tensor:
    """Auto-PGD. The expected loss over `eot` draws accepts iterates and halves the step size.

    Of a random model the best iterate by those means and the last one are compared on fresh draws.

    Args:
        model, inputs, labels, targeted, norm, eps, steps, restarts, early_stop, max_batch, noise: see `pgd`.
        loss: "ce", "dlr", "margin" or "probability-margin".
        rho: share of the steps that must raise the loss, or else the step size is halved.

    Returns:
        (B, C, H, W) in the ball and in [0, 1]; judge them on fresh noise.
    """
    objective = check_loss(loss)
    _check(norm, eps, inputs, steps, restarts, rho)

    def run(oracle: Oracle, x: Tensor, y: Tensor) -> Tensor:
        keep = Keeper(oracle, x, y, targeted)
        for _ in range(restarts):

            def at(indices: Tensor, logits: Tensor) -> Tensor:
                return objective(logits, y[indices], targeted)

            _ascend(keep, at, norm=norm, eps=eps, steps=steps, rho=rho, stop=early_stop)
        return keep.best

    return run_attack(model, inputs, labels, run, Noise(**noise), max_batch)


@in_own_units("eps")
def apgd_targeted(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    norm: Norm = "linf",
    eps: float = 8 / 255,
    steps: int = 100,
    targets: int = 9,
    order: Order = "likely",
    rho: float = 0.75,
    early_stop: bool = False,
    max_batch: int | None = None,
    **noise: Unpack[NoiseOptions],
) -> Tensor:
    """APGD-T: leave the true class by heading for each of the likeliest wrong ones, with targeted DLR.

    Args:
        labels: the true classes; `targeted=True` is refused, for `apgd` with `targeted` does that.
        targets: how many wrong classes are tried.
        order: "likely" for the likeliest first, as published, or "near" for those that a linear network would
            reach first (MALT); see `wrong_classes`.
        model, inputs, norm, eps, steps, rho, early_stop, max_batch, noise: see `apgd`.
    """
    if targeted:
        raise ValueError(
            "apgd_targeted takes the true labels; to reach wanted classes use apgd(targeted=True)"
        )
    check_count("targets", targets)
    check_order(order)
    _check(norm, eps, inputs, steps, 1, rho)

    def run(oracle: Oracle, x: Tensor, y: Tensor) -> Tensor:
        keep = Keeper(oracle, x, y, False)
        for goal in wrong_classes(oracle, x, y, targets, order, norm).T:

            def at(indices: Tensor, logits: Tensor, goal: Tensor = goal) -> Tensor:
                return targeted_dlr(logits, y[indices], goal[indices])

            _ascend(keep, at, norm=norm, eps=eps, steps=steps, rho=rho, stop=early_stop)
        return keep.best

    return run_attack(model, inputs, labels, run, Noise(**noise), max_batch)


def _check(norm: str, eps: float, inputs: Tensor, steps: int, restarts: int, rho: float) -> None:
    check_norm(norm)
    check_eps(eps, norm, inputs)
    check_count("steps", steps)
    check_count("restarts", restarts)
    if not 0 <= rho <= 1:
        raise ValueError(f"rho must be in [0, 1], got {rho}")


def _ascend(
    keep: Keeper, loss: PointLoss, *, norm: str, eps: float, steps: int, rho: float, stop: bool
) -> None:
    """One run from a random start; the keeper takes what it finds."""
    active = keep.candidates(stop)
    if len(active) == 0:
        return
    run = _Run(keep.x[active], norm, eps, steps, rho, keep.oracle.generator)
    for step in range(steps + 1):
        images = run.x + run.change
        estimate = keep.oracle.gradient(images, partial(loss, active))
        run.note(estimate, step)
        stay = keep.visit(active, images, estimate, stop=stop, step=step)
        if not stay.all():
            active = active[stay]
            run.select(stay)
        if len(active) == 0:
            return
        if step < steps:
            run.step(step)
    for change in (run.best, run.change) if keep.oracle.is_random else (run.best,):
        keep.finish(active, run.x + change, partial(loss, active))


class _Run:
    """State of one run on A images: where it is, how long its steps are, what was best."""

    _per_image = (
        "x", "change", "previous", "best", "best_gradient", "gradient", "best_loss", "checked_loss",
        "length", "rises", "reduced", "share", "sparsity", "loss",
    )  # fmt: skip

    def __init__(
        self, x: Tensor, norm: str, eps: float, steps: int, rho: float, generator: torch.Generator
    ) -> None:
        self.x, self.norm, self.eps, self.rho = x, norm, eps, rho
        self.change = self.previous = self.best = _on_the_ball(x, norm, eps, generator)
        self.gradient = self.best_gradient = torch.zeros_like(x)
        self.loss = self.best_loss = self.checked_loss = x.new_full((len(x),), -torch.inf)
        self.length = x.new_full((len(x),), eps if norm == "l1" else 2 * eps)
        self.rises, self.reduced = (
            torch.zeros_like(self.length),
            torch.ones_like(self.length, dtype=torch.bool),
        )
        # For L1: the share of the pixels that a step moves, and how many the best image has moved.
        self.share = x.new_full((len(x),), 0.2)
        self.sparsity = x.new_full((len(x),), float(x[:1].numel()))
        if norm == "l1":
            self.period, self.shortest, self.shrink = max(1, int(0.04 * steps)), 0, 0
        else:
            self.period = max(1, int(0.22 * steps))
            self.shortest, self.shrink = max(1, int(0.06 * steps)), max(1, int(0.03 * steps))
        self.since_check = 0

    def select(self, stay: Tensor) -> None:
        """Continue with these images only."""
        for name in self._per_image:
            setattr(self, name, getattr(self, name)[stay])

    def note(self, estimate: Estimate, step: int) -> None:
        """Enter the loss and the gradient at the present images; at a checkpoint, set the step size."""
        self.rises = self.rises + (estimate.loss > self.loss) if step > 1 else torch.zeros_like(self.rises)
        self.loss, self.gradient = estimate.loss, estimate.gradient
        better = self.loss > self.best_loss
        where = per_image(better, self.x)
        self.best = torch.where(where, self.change, self.best)
        self.best_gradient = torch.where(where, self.gradient, self.best_gradient)
        self.best_loss = torch.where(better, self.loss, self.best_loss)
        if step == 0:
            self.checked_loss = self.best_loss
            return
        self.since_check += 1
        if self.since_check < self.period:
            return
        back = self._check_l1() if self.norm == "l1" else self._check()
        where = per_image(back, self.x)
        self.change = torch.where(where, self.best, self.change)
        self.gradient = torch.where(where, self.best_gradient, self.gradient)
        self.since_check, self.rises = 0, torch.zeros_like(self.rises)
        self.period = max(self.period - self.shrink, self.shortest, 1)

    def _check(self) -> Tensor:
        """Halve the step where too few steps rose or the best stands still; such images go back to it."""
        stuck = ~self.reduced & (self.checked_loss >= self.best_loss)
        halve = (self.rises <= self.period * self.rho) | stuck
        self.length = torch.where(halve, self.length / 2, self.length)
        self.reduced, self.checked_loss = halve, self.best_loss
        return halve

    def _check_l1(self) -> Tensor:
        """Where the best image became sparser, start over with sparser steps; elsewhere shorten the step."""
        now = (self.best.abs().flatten(1) > 0).sum(dim=1).to(self.length.dtype)
        sparser = now < 0.95 * self.sparsity
        shorter = (self.length / _L1_DECREASE).clamp(min=self.eps / _L1_SMALLEST)
        self.length = torch.where(sparser, torch.full_like(shorter, self.eps), shorter)
        self.share, self.sparsity = now / self.x[:1].numel() / _L1_DECREASE, now
        return sparser

    def step(self, number: int) -> None:
        """Move to the next images."""
        gradient = movable(self.gradient, self.x + self.change) if self.norm == "l1" else self.gradient
        ahead = per_image(self.length, self.x) * steepest(gradient, self.norm, self.share)
        new = project(self.change + ahead, self.norm, self.eps, self.x)
        if self.norm != "l1" and number > 0:
            mixed = self.change + _ALPHA * (new - self.change) + (1 - _ALPHA) * (self.change - self.previous)
            new = project(mixed, self.norm, self.eps, self.x)
        self.previous, self.change = self.change, new


def _on_the_ball(x: Tensor, norm: str, eps: float, generator: torch.Generator) -> Tensor:
    """Random changes on the surface of the ball, brought into the box."""
    change = random_start(x, norm, eps, generator)
    longest = size(change, norm).clamp(min=1e-12)
    return project(change * per_image(eps / longest, x), norm, eps, x)
