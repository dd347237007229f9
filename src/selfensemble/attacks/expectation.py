"""Expectation over noise, shared by all attacks.

Source: Athalye et al., Synthesizing Robust Adversarial Examples, ICML 2018 (EOT).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..ensemble import SelfEnsemble, check_images, logits_of
from ..inject import eval_mode

Forward = Callable[[Tensor], Tensor]


def single_draw(model: nn.Module) -> Forward:
    """The logits of one noise draw: of an ensemble, a single draw rather than the mean of many.

    Inputs of another floating dtype than the model's are converted on the way, differentiably.
    """
    draw = model.draw_logits if isinstance(model, SelfEnsemble) else lambda x: logits_of(model(x))
    dtype = next((parameter.dtype for parameter in model.parameters()), None)
    return draw if dtype is None else lambda inputs: draw(inputs.to(dtype))


@contextmanager
def attacked(model: nn.Module) -> Iterator[Forward]:
    """The single-draw forward of `model` in eval mode, without gradients of its parameters."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with eval_mode(model), torch.enable_grad():
            yield single_draw(model)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def expected_gradient(
    forward: Forward, inputs: Tensor, loss: Callable[[Tensor], Tensor], samples: int
) -> tuple[Tensor, Tensor]:
    """Mean over noise draws of the gradient of a loss, in the memory of one draw.

    Args:
        forward: (B, ...) to logits (B, K) of one noise draw.
        inputs: (B, ...).
        loss: logits (B, K) to losses (B,).
        samples: noise draws.

    Returns:
        The gradient (B, ...), and the mean softmax (B, K) of the same draws.
    """
    gradient = torch.zeros_like(inputs)
    probabilities: Tensor | None = None
    for _ in range(samples):
        leaf = inputs.detach().requires_grad_()
        logits = forward(leaf).float()
        gradient += torch.autograd.grad(loss(logits).sum(), leaf)[0]
        drawn = logits.detach().softmax(dim=-1)
        probabilities = drawn if probabilities is None else probabilities + drawn
    assert probabilities is not None
    return gradient / samples, probabilities / samples


@torch.no_grad()
def mean_probabilities(forward: Forward, inputs: Tensor, draws: int) -> Tensor:
    """Mean softmax (B, K) over fresh noise draws."""
    return torch.stack([forward(inputs).float().softmax(dim=-1) for _ in range(draws)]).mean(dim=0)


def margin(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """(B,) what an attack must bring below zero: `z_y - max z_j`, j != y, or its negative if targeted."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    rival = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return rival - own if targeted else own - rival


def check_batch(inputs: Tensor, labels: Tensor) -> None:
    """Raise a ValueError or TypeError unless inputs and labels fit each other and the rules."""
    check_images(inputs)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64 or labels.shape != inputs.shape[:1]:
        raise ValueError(
            f"labels must be int64 of shape ({len(inputs)},), got {labels.dtype} {tuple(labels.shape)}"
        )
    if len(labels) and int(labels.min()) < 0:
        raise ValueError("labels must be class numbers >= 0")


def device_of(model: nn.Module, inputs: Tensor) -> torch.device:
    """Where the model lives."""
    return next((parameter.device for parameter in model.parameters()), inputs.device)
