"""The L2 attack of Carlini and Wagner, as the paper ran it and tuned.

Both minimise `||x' - x||^2 + c * f(x')` over w, where x' = (tanh(w) + 1) / 2 keeps pixels in [0, 1] and
f is the margin of the logits of noisy forward passes.

Sources: Carlini & Wagner, Towards Evaluating the Robustness of Neural Networks, S&P 2017; Liu et al.
2018, section 4.1, and the authors' code.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Unpack

import torch
from torch import Tensor, nn

from ..ensemble.checks import check_count
from .driver import run_attack
from .expectation import Estimate, Noise, NoiseOptions, Oracle
from .losses import margin
from .nearest import Nearest

# The box that tanh spans reaches this far beyond [0, 1], and the image is clamped into [0, 1]. Without
# it a black or white pixel has w = +-inf and gradient 0, and never moves.
_BOX_MARGIN = 0.01


class _TanhBox:
    """The change of variables: x' = clamp(0.5 + (0.5 + m) tanh(w), 0, 1)."""

    def __init__(self, inputs: Tensor) -> None:
        self.scale = 0.5 + _BOX_MARGIN
        self.w = torch.atanh((inputs - 0.5) / self.scale)

    def image(self) -> Tensor:
        return (0.5 + self.scale * self.w.tanh()).clamp(0.0, 1.0)

    def chain(self, gradient: Tensor) -> Tensor:
        """Gradient with respect to w; the clamp counts as the identity, so that nothing freezes."""
        return gradient * self.scale * (1 - self.w.tanh().square())


def _descend(
    oracle: Oracle,
    inputs: Tensor,
    labels: Tensor,
    *,
    c: Tensor,
    targeted: bool,
    kappa: float,
    steps: int,
    lr: float,
    decay: bool = False,
    visit: Callable[[Tensor, Estimate], None] | None = None,
) -> Tensor:
    """Adam on w for `steps`; `visit(image, estimate)` sees every iterate; returns the last one.

    `decay`: the learning rate falls linearly to 0, so that the last steps resolve small distances.
    """
    box = _TanhBox(inputs)
    optimizer = torch.optim.Adam([box.w], lr=lr)

    def gain(logits: Tensor) -> Tensor:
        return c * margin(logits, labels, targeted).clamp(max=kappa)

    for step in range(steps):
        if decay:
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        image = box.image()
        estimate = oracle.gradient(image, gain)
        if visit is not None:
            visit(image, estimate)
        box.w.grad = box.chain(2 * (image - inputs) - estimate.gradient)
        # Adam makes its count of steps at the first, names no device, and wants it on the CPU.
        with torch.device("cpu") if step == 0 else nullcontext():
            optimizer.step()
    return box.image()


def _check(steps: int, lr: float) -> None:
    check_count("steps", steps)
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be finite and > 0, got {lr}")


def cw_l2_paper(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    c: float = 0.03,
    steps: int = 300,
    lr: float = 1e-3,
    max_batch: int | None = None,
    **noise: Unpack[NoiseOptions],
) -> Tensor:
    """C&W exactly as in the paper: fixed c, kappa 0, last iterate, one noise draw a step.

    Weak against randomised defenses: one draw a step is a noisy gradient, and a fixed c depends on the
    scale of the logits. It is here to compare with published curves. Two things differ from the
    authors' code: it attacks the network in eval mode (theirs in training mode, which also changes the
    network), and pixels at 0 or 1 can move.

    Args:
        model: a classifier; of a `SelfEnsemble`, single draws are attacked.
        inputs: (B, C, H, W) in [0, 1].
        labels: (B,) integers, true classes, or wanted ones if `targeted`.
        targeted: reach `labels` rather than leave them.
        c: weight of the margin.
        steps: Adam steps.
        lr: Adam's learning rate in tanh space.
        max_batch: images attacked at a time; None for all.
        noise: see `Noise`; the paper's attack is `eot=1`.

    Returns:
        (B, C, H, W) the last iterates; judge them on fresh noise.

    Raises:
        ValueError, TypeError: inputs, labels or settings that cannot be attacked.
    """
    _check(steps, lr)
    if not (c >= 0 and math.isfinite(c)):
        raise ValueError(f"c must be finite and >= 0, got {c}")

    def run(oracle: Oracle, x: Tensor, y: Tensor) -> Tensor:
        strength = x.new_full((len(x),), c)
        return _descend(oracle, x, y, c=strength, targeted=targeted, kappa=0.0, steps=steps, lr=lr)

    return run_attack(model, inputs, labels, run, Noise(**noise), max_batch)


def cw_l2(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    kappa: float = 0.0,
    steps: int = 300,
    lr: float | None = None,
    initial_c: float = 1.0,
    binary_search_steps: int = 6,
    max_batch: int | None = None,
    **noise: Unpack[NoiseOptions],
) -> Tensor:
    """C&W with binary search over c and the nearest confirmed image kept for each image.

    Each search step starts at the image, and its learning rate falls linearly to 0. An iterate counts
    as a success when the mean softmax of its own draws gives a wrong class *and* fresh draws confirm it.
    Images that need no attack, and those whose c is known to 1 %, leave the batch.

    Args:
        model, inputs, labels, targeted, steps, max_batch: see `cw_l2_paper`.
        lr: Adam's first learning rate in tanh space; by default 0.01, and more for fewer than 100 steps.
        kappa: confidence, the margin of logits to aim beyond.
        initial_c: where the search over c starts; then 10 times more until it succeeds, then bisection.
        binary_search_steps: values of c tried for each image.
        noise: `eot`, `average`, `confirm_draws`, `frozen`, `seed`; see `Noise`.

    Returns:
        (B, C, H, W) the nearest confirmed images; where none was found, the original image.
    """
    check_count("steps", steps)
    rate = 0.01 * max(1.0, 100 / steps) if lr is None else lr
    _check(steps, rate)
    check_count("binary_search_steps", binary_search_steps)
    if not (kappa >= 0 and initial_c > 0 and math.isfinite(kappa) and math.isfinite(initial_c)):
        raise ValueError(f"need kappa >= 0 and initial_c > 0, got {kappa} and {initial_c}")

    def run(oracle: Oracle, x: Tensor, y: Tensor) -> Tensor:
        nearest = Nearest(oracle, x, y, targeted, "l2")
        c, low = x.new_full((len(x),), initial_c), x.new_zeros(len(x))
        high = torch.full_like(c, torch.inf)
        for _ in range(binary_search_steps):
            active = nearest.active()
            if oracle.may_shrink:
                active = active[((high - low) > 0.01 * low)[active]]
            if len(active) == 0:
                break
            strength = c[active]
            found = _try(nearest, active, strength, kappa=kappa, steps=steps, lr=rate)
            high[active] = torch.where(found, torch.minimum(high[active], strength), high[active])
            low[active] = torch.where(found, low[active], torch.maximum(low[active], strength))
            c = torch.where(high.isinf(), c * 10, (low + high) / 2)
        return nearest.refined()

    return run_attack(model, inputs, labels, run, Noise(**noise), max_batch)


def _try(nearest: Nearest, active: Tensor, c: Tensor, *, kappa: float, steps: int, lr: float) -> Tensor:
    """One value of c for each of the images `active`; (len(active),) whether there was a success."""
    found = torch.zeros(len(active), dtype=torch.bool, device=active.device)

    def visit(image: Tensor, estimate: Estimate) -> None:
        # A success counts for the search over c even where an earlier c came nearer.
        found.logical_or_(nearest.visit(active, image, estimate, asked=~found))

    _descend(
        nearest.oracle, nearest.x[active], nearest.y[active], c=c, targeted=nearest.targeted, kappa=kappa,
        steps=steps, lr=lr, decay=True, visit=visit,
    )  # fmt: skip
    return found
