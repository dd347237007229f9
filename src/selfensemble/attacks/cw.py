"""The L2 attack of Carlini and Wagner, as the paper ran it and tuned.

Both minimise `||x' - x||^2 - c * f(x')`, where f is the margin of the logits of noisy forward passes: the
paper by Adam over w, where x' = (tanh(w) + 1) / 2 keeps pixels in [0, 1].

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
from .averaging import Noise, NoiseOptions
from .driver import run_attack
from .expectation import Oracle
from .losses import margin, of_labels, soft_margin, temperature_of
from .nearest import Nearest
from .norms import largest_eps, per_image, size
from .units import in_own_units

_TRAVEL = 8.0  # how far all steps together reach, in distances of a linear network
_GROWTH = 4.0  # of c until it succeeds, and of its fall while it does
_LARGEST = 1e30  # c that float32 holds with whatever it multiplies
_LONGER = 1.5  # of the steps, each time c grows
_MEAN, _SQUARE = 0.9, 0.99  # Adam's decays
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


def _check(steps: int, lr: float) -> None:
    check_count("steps", steps)
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be finite and > 0, got {lr}")


@in_own_units()
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
        box = _TanhBox(x)
        optimizer = torch.optim.Adam([box.w], lr=lr)
        for step in range(steps):
            image = box.image()
            gradient = oracle.gradient(image, _gain(x.new_full((len(x),), c), y, targeted, 0.0)).gradient
            box.w.grad = box.chain(2 * (image - x) - gradient)
            # Adam makes its count of steps at the first, names no device, and wants it on the CPU.
            with torch.device("cpu") if step == 0 else nullcontext():
                optimizer.step()
        return box.image()

    return run_attack(model, inputs, labels, run, Noise(**noise), max_batch)


@in_own_units("lr")
def cw_l2(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    kappa: float = 0.0,
    steps: int = 300,
    lr: float | None = None,
    initial_c: float = 4.0,
    binary_search_steps: int = 6,
    max_batch: int | None = None,
    **noise: Unpack[NoiseOptions],
) -> Tensor:
    """C&W with binary search over c and the nearest confirmed image kept for each image.

    Nothing depends on the scale of the logits or of distances: c is counted in `2 |f| / ||grad f||^2` and
    steps in `|f| / ||grad f||` of each image, what a linear network would want at its boundary. Each value
    of c begins at the image, with steps that fall linearly to 0. An iterate counts as a success when the mean
    softmax of its own draws gives a wrong class *and* fresh draws confirm it. Until an iterate has what the
    attack wants, it climbs the soft margin of `ddn`, for the margin stays with the class that is likeliest at
    the image; where `kappa` is above 0, the margin. Images that need no attack, and those whose c is known
    to 1 %, leave the batch. The search ends on the line through the nearest success, or through the last
    iterate: see `Lines.crossings`.

    Args:
        model, inputs, labels, targeted, steps, max_batch: see `cw_l2_paper`.
        lr: L2 length of the first step; by default 16 / steps of the distance said above, and 1.5 times as
            much each time c becomes 4 times as large.
        kappa: margin of logits to aim at: above 0, the nearest of the iterates whose every draw shows it is
            returned, wherever the boundary is.
        initial_c: where the search over c starts; then 4 times more until it succeeds, or a quarter until it
            fails, then geometric bisection.
        binary_search_steps: values of c tried for each image. Of a random model up to 20 of the last one's
            steps, at most half, turn the change without making it longer.
        noise: `eot`, `average`, `confirm_draws`, `frozen`, `seed`; see `Noise`.

    Returns:
        (B, C, H, W) the nearest confirmed images; where none was found, the original image.
    """
    _check(steps, 1.0 if lr is None else lr)
    check_count("binary_search_steps", binary_search_steps)
    if not (kappa >= 0 and initial_c > 0 and math.isfinite(kappa) and math.isfinite(initial_c)):
        raise ValueError(f"need kappa >= 0 and initial_c > 0, got {kappa} and {initial_c}")

    def run(oracle: Oracle, x: Tensor, y: Tensor) -> Tensor:
        nearest = Nearest(oracle, x, y, targeted, "l2")
        nearest.turns = 0 if kappa else min(nearest.turns, binary_search_steps * steps // 10, steps // 2)
        _search(nearest, initial_c, binary_search_steps, kappa=kappa, steps=steps, lr=lr)
        return nearest.refined() if kappa == 0 else nearest.best

    return run_attack(model, inputs, labels, run, Noise(**noise), max_batch)


def _search(
    nearest: Nearest, initial_c: float, searches: int, *, kappa: float, steps: int, lr: float | None
) -> None:
    """Binary search over c, and what each of them found."""
    c, length, temperature = _natural(nearest, kappa)
    c, length = (
        (initial_c * c).clamp(max=_LARGEST),
        2 * _TRAVEL / steps * length if lr is None else torch.full_like(c, lr),
    )
    low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
    for number in range(searches):
        left = steps - nearest.turns if number == searches - 1 else steps
        active = nearest.active()
        if nearest.oracle.may_shrink:
            active = active[((high - low) > 0.01 * low)[active]]
        if len(active) == 0:
            return
        tried = c[active]
        labels, targeted = nearest.y[active], nearest.targeted
        gain = (
            _gain(tried, labels, targeted, kappa)
            if kappa
            else _soft_gain(tried, labels, targeted, temperature[active])
        )
        found = _try(nearest, active, tried, length[active], gain, kappa=kappa, steps=left)
        high[active] = torch.where(found, torch.minimum(high[active], tried), high[active])
        low[active] = torch.where(found, low[active], torch.maximum(low[active], tried))
        if lr is None:
            length = torch.where(high.isinf(), _LONGER * length, length)
        bisected = torch.where(low > 0, (low * high).sqrt(), high / _GROWTH)
        c = torch.where(high.isinf(), c * _GROWTH, bisected).clamp(max=_LARGEST)


def _gain(c: Tensor, labels: Tensor, targeted: bool, kappa: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: c * margin(logits, labels, targeted).clamp(max=kappa)


def _soft_gain(c: Tensor, labels: Tensor, targeted: bool, temperature: Tensor) -> Callable[[Tensor], Tensor]:
    """The soft margin until the attack has what it wants: which class is nearest shows on the way only."""

    def gain(logits: Tensor) -> Tensor:
        reached = margin(logits, labels, targeted) > 0
        soft = soft_margin(logits, labels, targeted, temperature)
        return c * torch.where(reached, torch.zeros_like(soft), soft)

    return gain


def _natural(nearest: Nearest, kappa: float) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) of a linear network: c whose objective ends at margin kappa, the distance there, a temperature."""
    c, length, temperature = (nearest.x.new_ones(len(nearest.x)) for _ in range(3))
    active = nearest.active()
    if len(active):
        labels, targeted = nearest.y[active], nearest.targeted
        estimate = nearest.oracle.gradient(nearest.x[active], of_labels(margin, labels, targeted))
        # Logits may be so large or small that squares leave the range of float32.
        slope, room = estimate.gradient.flatten(1).norm(dim=1), (estimate.loss - kappa).abs()
        distance, strength = room / slope, 2 * (room / slope) / slope
        usable = (distance > 0) & strength.isfinite() & (strength > 0)
        c[active] = torch.where(usable, strength, torch.ones_like(strength))
        length[active] = torch.where(usable, distance, torch.ones_like(distance))
        temperature[active] = temperature_of(estimate.loss)
    return c, length.clamp(max=largest_eps("l2", nearest.x[:1].numel())), temperature


def _try(
    nearest: Nearest,
    active: Tensor,
    c: Tensor,
    length: Tensor,
    gain: Callable[[Tensor], Tensor],
    *,
    kappa: float,
    steps: int,
) -> Tensor:
    """One value of c for each of the images `active`; (len(active),) whether there was a success.

    Adam, with one second moment for all pixels of an image: sizes of pixels' gradients are kept, which are
    what the nearest image is about, and lengths of steps are L2. The box is kept by clamping: where the tanh
    of the paper is flat, at black and white, pixels hardly move.
    """
    origin = nearest.x[active]
    found = torch.zeros(len(active), dtype=torch.bool, device=active.device)
    image, mean, square = origin.clone(), torch.zeros_like(origin), torch.zeros_like(length)
    for step in range(steps):
        estimate = nearest.oracle.gradient(image, gain)
        far = estimate.loss >= c * kappa * (1 - 1e-4) if kappa else None
        # A success counts for the search over c even where an earlier c came nearer.
        found |= nearest.visit(active, image, estimate, asked=~found, allowed=far)
        slope = 2 * (image - origin) - estimate.gradient
        mean = _MEAN * mean + (1 - _MEAN) * slope
        square = _SQUARE * square + (1 - _SQUARE) * size(slope, "l2").square()
        root = (square / (1 - _SQUARE ** (step + 1))).sqrt().clamp(min=1e-30)
        pace = length * (1 - step / steps) / (1 - _MEAN ** (step + 1)) / root
        image = (image - per_image(pace, image) * mean).clamp(0.0, 1.0)
    return found
