"""The L2 attack of Carlini and Wagner, as the paper ran it and tuned.

Both minimise `||x' - x||^2 + c * f(x')` over w, where x' = (tanh(w) + 1) / 2 keeps pixels in [0, 1] and
f is the margin of the logits of noisy forward passes.

Sources: Carlini & Wagner, Towards Evaluating the Robustness of Neural Networks, S&P 2017; Liu et al.
2018, section 4.1, and the authors' code.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ensemble import SelfEnsemble, check_count, explain_shape
from .expectation import (
    Forward,
    attacked,
    check_batch,
    device_of,
    expected_gradient,
    margin,
    mean_probabilities,
)

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
    forward: Forward,
    inputs: Tensor,
    labels: Tensor,
    *,
    c: Tensor,
    targeted: bool,
    kappa: float,
    steps: int,
    lr: float,
    eot: int,
    decay: bool = False,
    visit: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Adam on w for `steps`; `visit(image, mean softmax)` sees every iterate; returns the last one.

    `decay`: the learning rate falls linearly to 0, so that the last steps resolve small distances.
    """
    box = _TanhBox(inputs)
    optimizer = torch.optim.Adam([box.w], lr=lr)

    def loss(logits: Tensor) -> Tensor:
        return c * margin(logits, labels, targeted).clamp(min=-kappa)

    for step in range(steps):
        if decay:
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        image = box.image()
        gradient, probabilities = expected_gradient(forward, image, loss, eot)
        if visit is not None:
            visit(image, probabilities)
        box.w.grad = box.chain(gradient + 2 * (image - inputs))
        optimizer.step()
    return box.image()


def _over_batches(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    max_batch: int | None,
    run: Callable[[Forward, Tensor, Tensor], Tensor],
) -> Tensor:
    check_batch(inputs, labels)
    if len(inputs) == 0:
        return inputs.clone()
    size = len(inputs) if max_batch is None else check_count("max_batch", max_batch)
    device, parts = device_of(model, inputs), []
    with attacked(model) as forward:
        with torch.no_grad(), explain_shape(model, inputs):
            classes = forward(inputs[:1].to(device)).shape[1]
        if int(labels.max()) >= classes:
            raise ValueError(
                f"labels must be below {classes}, the number of classes; got {int(labels.max())}"
            )
        for x, y in zip(inputs.split(size), labels.split(size), strict=True):
            # In float32, whatever the model computes in: smaller types cannot hold small changes.
            part = run(forward, x.to(device, torch.float32), y.to(device))
            parts.append(part.to(inputs.device, inputs.dtype))
    return torch.cat(parts)


def _check(steps: int, lr: float, eot: int) -> None:
    check_count("steps", steps)
    check_count("eot", eot)
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
) -> Tensor:
    """C&W exactly as in the paper: fixed c, kappa 0, last iterate, one noise draw a step.

    Weak against randomised defenses: one draw a step is a noisy gradient, and a fixed c depends on the
    scale of the logits. It is here to compare with published curves. Two things differ from the
    authors' code: it attacks the network in eval mode (theirs in training mode, which also changes the
    network), and pixels at 0 or 1 can move.

    Args:
        model: a classifier; of a `SelfEnsemble`, single draws are attacked.
        inputs: (B, C, H, W) in [0, 1].
        labels: (B,) int64, true classes, or wanted ones if `targeted`.
        targeted: reach `labels` rather than leave them.
        c: weight of the margin.
        steps: Adam steps.
        lr: Adam's learning rate in tanh space.
        max_batch: images attacked at a time; None for all.

    Returns:
        (B, C, H, W) the last iterates; judge them on fresh noise.

    Raises:
        ValueError, TypeError: inputs, labels or settings that cannot be attacked.
    """
    _check(steps, lr, 1)
    if not (c >= 0 and math.isfinite(c)):
        raise ValueError(f"c must be finite and >= 0, got {c}")

    def run(forward: Forward, x: Tensor, y: Tensor) -> Tensor:
        strength = x.new_full((len(x),), c)
        return _descend(forward, x, y, c=strength, targeted=targeted, kappa=0.0, steps=steps, lr=lr, eot=1)

    return _over_batches(model, inputs, labels, max_batch, run)


def cw_l2(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    kappa: float = 0.0,
    steps: int = 300,
    lr: float = 1e-2,
    initial_c: float = 1.0,
    binary_search_steps: int = 6,
    eot: int = 1,
    confirm_draws: int = 10,
    max_batch: int | None = None,
) -> Tensor:
    """C&W with binary search over c and the nearest confirmed image kept for each image.

    Each search step starts at the image, and its learning rate falls linearly to 0. An iterate counts
    as a success when the mean softmax of its own draws gives a wrong class *and* that of `confirm_draws`
    fresh draws does so too: a best-so-far from one lucky draw is no success.

    Args:
        model, inputs, labels, targeted, steps, lr, max_batch: see `cw_l2_paper`.
        kappa: confidence, the margin of logits to aim beyond.
        initial_c: where the search over c starts; then 10 times more until it succeeds, then bisection.
        binary_search_steps: values of c tried for each image.
        eot: noise draws a step.
        confirm_draws: fresh draws that confirm a success; 1 for a network without noise.

    Returns:
        (B, C, H, W) the nearest confirmed images; where none was found, the original image.
    """
    _check(steps, lr, eot)
    if not (kappa >= 0 and initial_c > 0 and binary_search_steps >= 1 and confirm_draws >= 1):
        raise ValueError("need kappa >= 0, initial_c > 0, binary_search_steps >= 1 and confirm_draws >= 1")
    if isinstance(model, SelfEnsemble) and not model.is_random:
        confirm_draws = eot = 1

    def run(forward: Forward, x: Tensor, y: Tensor) -> Tensor:
        best, distance = x.clone(), x.new_full((len(x),), torch.inf)
        c, low = torch.full_like(distance, initial_c), torch.zeros_like(distance)
        high = torch.full_like(distance, torch.inf)
        for _ in range(binary_search_steps):
            found = torch.zeros(len(x), dtype=torch.bool, device=x.device)

            def visit(image: Tensor, probabilities: Tensor, found: Tensor = found) -> None:
                size = (image - x).flatten(1).norm(dim=1)
                # A success counts for the search over c even where an earlier c came nearer.
                wanted = _fooled(probabilities, y, targeted) & ((size < distance) | ~found)
                candidates = wanted.nonzero().squeeze(1)
                if len(candidates) and confirm_draws > 1:
                    again = mean_probabilities(forward, image[candidates], confirm_draws)
                    candidates = candidates[_fooled(again, y[candidates], targeted)]
                found[candidates] = True
                nearer = candidates[size[candidates] < distance[candidates]]
                best[nearer], distance[nearer] = image[nearer], size[nearer]

            _descend(
                forward, x, y, c=c, targeted=targeted, kappa=kappa, steps=steps, lr=lr, eot=eot,
                decay=True, visit=visit,
            )  # fmt: skip
            high = torch.where(found, torch.minimum(high, c), high)
            low = torch.where(found, low, torch.maximum(low, c))
            c = torch.where(high.isinf(), c * 10, (low + high) / 2)
        return best

    return _over_batches(model, inputs, labels, max_batch, run)


def _fooled(probabilities: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    answers = probabilities.argmax(dim=1)
    return answers == labels if targeted else answers != labels
