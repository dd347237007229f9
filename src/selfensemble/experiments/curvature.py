"""Derivatives of a network's loss in its noise: the second-order term of the method's paper, measured.

Noise of level std_l on the input of layer l raises the loss, to second order, by the sum over the layers of
`std_l^2 / 2 * Tr(H_l)`, H_l being the Hessian with respect to that input. Where ReLU and max-pooling are
piecewise linear, H_l is exact but at their kinks, which a derivative does not see.

Source: Liu et al., ECCV 2018, section 3.3; Hutchinson, Communications in Statistics 1990 (the trace).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ensemble.ensemble import SelfEnsemble
from ..noise.calls import OwnHooks
from ..noise.injection import eval_mode, noise_disabled, noise_layers
from ..noise.layer import Std
from ..noise.streams import noise_draw


@contextmanager
def shifted_activations(model: nn.Module) -> Iterator[list[tuple[int, Tensor]]]:
    """Within this context each noise layer adds a tensor of zeros that gradients can be taken of.

    Yields:
        Number of the layer and its tensor, of every call, in their order.
    """
    shifts: list[tuple[int, Tensor]] = []

    def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        shift = torch.zeros_like(output, requires_grad=True)
        shifts.append((int(layer.layer), shift))  # type: ignore[arg-type]
        return output + shift

    with OwnHooks() as hooks:
        for layer in noise_layers(model).values():
            hooks.add(layer.register_forward_hook, hook)
        yield shifts


def second_order_term(
    ensemble: SelfEnsemble,
    inputs: Tensor,
    labels: Tensor,
    stds: list[Std],
    *,
    probes: int,
    seed: int,
    noisy: bool = False,
) -> Tensor:
    """(B, probes) estimates of the second-order term of each image, each unbiased.

    One product with the Hessian of all layers at once: with v_l = std_l * signs the expectation of
    v^T H v is the sum of std_l^2 Tr(H_l), for signs of two layers are independent.

    Args:
        ensemble: with noise layers.
        inputs, labels: images and their true classes.
        stds: level of each layer, by its number.
        probes: vectors of signs an image.
        seed: of the signs and the noise.
        noisy: take the Hessian at the activations of one noise draw rather than at those without noise.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    quiet = nullcontext() if noisy else noise_disabled(ensemble)
    draw = noise_draw(seed, 0, "per_image")
    with eval_mode(ensemble), quiet, draw, shifted_activations(ensemble.model) as shifts:
        loss = functional.cross_entropy(ensemble.draw_logits(inputs), labels, reduction="sum")
        tensors = [shift for _, shift in shifts]
        gradients = torch.autograd.grad(loss, tensors, create_graph=True)
        estimates = []
        for _ in range(probes):
            signs = [
                _by_channel(stds[layer], shift)
                * (torch.randint(0, 2, shift.shape, generator=generator, device="cpu") * 2 - 1).to(shift)
                for layer, shift in shifts
            ]
            products = torch.autograd.grad(
                gradients, tensors, signs, retain_graph=True, materialize_grads=True
            )
            estimates.append(
                sum((v * hv).flatten(1).sum(dim=1) for v, hv in zip(signs, products, strict=True)) / 2
            )
    return torch.stack(estimates, dim=1).detach()  # type: ignore[arg-type]


def _by_channel(std: Std, like: Tensor) -> Tensor:
    """The level, or that of each channel, to be multiplied with (B, C, ...)."""
    return (
        torch.as_tensor(std, dtype=torch.float32, device="cpu").to(like).reshape(-1, *[1] * (like.dim() - 2))
    )


@torch.no_grad()
def log_softmax_draws(ensemble: SelfEnsemble, inputs: Tensor, draws: int, seed: int) -> Tensor:
    """(draws, B, K) float64 log-probabilities of single draws, on the CPU; noise is each image's own."""
    with eval_mode(ensemble):
        each = []
        for index in range(draws):
            with noise_draw(seed, index, "per_image"):
                each.append(ensemble.draw_logits(inputs).cpu().double().log_softmax(dim=1))
    return torch.stack(each)


@contextmanager
def levels(ensemble: SelfEnsemble, stds: list[Std], factor: float) -> Iterator[None]:
    """Within this context the noise layers have these levels, times a factor."""
    layers = list(noise_layers(ensemble.model).values())
    before = [layer.std for layer in layers]
    try:
        for layer, std in zip(layers, stds, strict=True):
            layer.std = factor * std if isinstance(std, float) else tuple(factor * each for each in std)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.std = own


def log_mean_softmax(ensemble: SelfEnsemble, inputs: Tensor, draws: int, seed: int) -> Tensor:
    """(B, K) log of the mean softmax of draws that a seed fixes, differentiable; images share them."""
    each = []
    with eval_mode(ensemble):
        for index in range(draws if ensemble.is_random else 1):
            with noise_draw(seed, index, "shared"):
                each.append(ensemble.draw_logits(inputs).float().log_softmax(dim=1))
    return torch.stack(each).logsumexp(dim=0) - math.log(len(each))


def gradient_norm(ensemble: SelfEnsemble, inputs: Tensor, labels: Tensor, draws: int, seed: int) -> Tensor:
    """(B,) L2 norm of the gradient of the ensemble's loss with respect to the image."""
    leaf = inputs.clone().requires_grad_()
    loss = functional.nll_loss(log_mean_softmax(ensemble, leaf, draws, seed), labels, reduction="sum")
    norms: Tensor = torch.autograd.grad(loss, leaf)[0].flatten(1).norm(dim=1)
    return norms


def local_lipschitz(
    ensemble: SelfEnsemble, inputs: Tensor, *, draws: int, radius: float, steps: int, seed: int
) -> Tensor:
    """(B,) the largest `||p(x') - p(x)||_1 / ||x' - x||_2` that gradient ascent finds in an L2 ball.

    p is the mean softmax of fixed draws. A lower bound of the local Lipschitz constant.

    Source: Yang et al., A Closer Look at Accuracy vs. Robustness, NeurIPS 2020, section 3.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        here = log_mean_softmax(ensemble, inputs, draws, seed).exp()
    change = torch.randn(inputs.shape, generator=generator, dtype=torch.float32, device="cpu").to(inputs)
    change = change * (0.1 * radius / change.flatten(1).norm(dim=1)).reshape(-1, *[1] * (inputs.dim() - 1))
    best = inputs.new_zeros(len(inputs))
    for step in range(steps + 1):
        leaf = change.clone().requires_grad_()
        moved = log_mean_softmax(ensemble, (inputs + leaf).clamp(0, 1), draws, seed).exp()
        distance = ((inputs + leaf).clamp(0, 1) - inputs).flatten(1).norm(dim=1).clamp(min=1e-12)
        quotient = (moved - here).abs().sum(dim=1) / distance
        best = torch.maximum(best, quotient.detach())
        if step == steps:
            break
        (gradient,) = torch.autograd.grad(quotient.sum(), leaf)
        size = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(-1, *[1] * (inputs.dim() - 1))
        change = change + 2.5 * radius / steps * gradient / size
        norm = change.flatten(1).norm(dim=1).clamp(min=1e-12)
        change = change * (radius / norm).clamp(max=1).reshape(-1, *[1] * (inputs.dim() - 1))
    return best
