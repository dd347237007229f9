"""Passes that a backward pass computes again have the noise that they had."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import selfensemble as rse
from selfensemble.noise.learned import learn_noise_


@pytest.fixture
def network(tiny: nn.Sequential) -> nn.Sequential:
    return rse.inject_noise_(tiny, rse.NoiseConfig(0.5, 0.3))  # type: ignore[return-value]


def nested(network: nn.Sequential, inputs: Tensor) -> Tensor:
    def inner(features: Tensor) -> Tensor:
        out: Tensor = checkpoint(network[3:5], features, use_reentrant=False)
        return out

    def outer(features: Tensor) -> Tensor:
        return inner(network[:3](features))

    out: Tensor = network[5:](checkpoint(outer, inputs, use_reentrant=False))
    return out


RUNS: dict[str, Callable[[nn.Sequential, Tensor], Tensor]] = {
    "whole": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "parts": lambda network, x: checkpoint_sequential(network, 3, x, use_reentrant=False),
    "reentrant parts": lambda network, x: checkpoint_sequential(network, 3, x, use_reentrant=True),
    "nested": nested,
}


def close(found: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in pairs)


def gradients(run: Callable[..., Tensor], network: nn.Sequential, images: Tensor) -> list[Tensor]:
    """Of a loss by the image and all parameters."""
    inputs = images.clone().requires_grad_()
    run(network, inputs).square().sum().backward()
    found = [inputs.grad, *(parameter.grad for parameter in network.parameters())]
    network.zero_grad()
    return [each.clone() for each in found if each is not None]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("sampling", ["per_image", "shared"])
@pytest.mark.parametrize("train", [False, True])
def test_seeded_gradients_are_those_without_checkpoints(
    network: nn.Sequential, images: Tensor, name: str, sampling: Any, train: bool
) -> None:
    network.train(train)
    network[1].eval()  # its statistics are torch's business
    found = []
    for run in (lambda net, x: net(x), RUNS[name]):
        with rse.noise_draw(3, 1, sampling):
            run(network, images.clone().requires_grad_())  # streams go on where they stand
            found.append(gradients(run, network, images))
    assert len(found[0]) == len(found[1])
    assert close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("sampling", ["per_image", "shared"])
def test_fresh_noise_is_that_of_the_first_pass(dtype: torch.dtype, reentrant: bool, sampling: Any) -> None:
    """And the next pass has other noise."""
    layer = rse.GaussianNoise(0.5, sampling=sampling).eval()
    seen: list[Tensor] = []

    def part(inputs: Tensor) -> Tensor:
        noisy = layer(inputs)
        seen.append(noisy.detach().clone())
        out: Tensor = noisy.sin()
        return out

    inputs = torch.rand(4, 3, 5, dtype=dtype, requires_grad=True)
    passes = [checkpoint(part, inputs, use_reentrant=reentrant) for _ in range(3)]
    for number in (1, 0, 2):  # in any order
        passes[number].sum().backward(retain_graph=not reentrant)
        assert torch.equal(seen[-1], seen[number])
    if not reentrant:  # and again
        passes[1].sum().backward()
        assert torch.equal(seen[-1], seen[1])
    assert not torch.equal(seen[0], seen[1])
    noise = (seen[0] - inputs).detach().float()
    assert (
        (noise[0] - noise[1]).abs().max() < 0.02
        if sampling == "shared"
        else not torch.equal(noise[0], noise[1])
    )


class Reversible(torch.autograd.Function):
    """A coupling that keeps nothing: what was computed is computed again from the output."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = function
        left, right = inputs.chunk(2, dim=1)
        with torch.no_grad():
            out = torch.cat([left, right + function(left)], dim=1)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        left = out.chunk(2, dim=1)[0].detach().requires_grad_()
        ours, theirs = gradient.chunk(2, dim=1)
        with torch.enable_grad():
            (through,) = torch.autograd.grad(ctx.function(left), left, theirs)
        return torch.cat([ours + through, theirs], dim=1), None


def test_networks_that_undo_their_layers() -> None:
    layer = rse.GaussianNoise(0.5)
    inputs = torch.rand(4, 6, requires_grad=True)
    with rse.noise_draw(2):
        out = Reversible.apply(inputs, lambda x: layer(x).square())  # type: ignore[no-untyped-call]
    out.sum().backward()
    with rse.noise_draw(2):
        noisy = layer(inputs[:, :3])
    assert torch.allclose(inputs.grad, torch.cat([1 + 2 * noisy, torch.ones(4, 3)], dim=1))  # type: ignore[arg-type]


class Careless(torch.autograd.Function):
    """Calls in its backward pass what its forward pass did not call."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.layer(gradient), None


def test_noise_that_no_pass_had_is_refused_in_a_backward_pass() -> None:
    inputs = torch.rand(2, 3, requires_grad=True)
    out = Careless.apply(inputs, rse.GaussianNoise(0.1))  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="inside a backward pass"):
        out.sum().backward()
    other = [rse.GaussianNoise(0.1, layer=k) for k in (0, 1)]
    out = checkpoint(lambda x: other.pop()(x).sin(), inputs, use_reentrant=False)
    with pytest.raises(RuntimeError, match="inside a backward pass"):
        out.sum().backward()


def test_learned_levels_get_their_gradients(network: nn.Sequential, images: Tensor) -> None:
    learn_noise_(network, "layer")
    found = []
    for run in (lambda net, x: net(x), RUNS["whole"]):
        with rse.noise_draw(5):
            found.append(gradients(run, network, images))
    assert len(found[0]) > 2 * len(list(network[0].parameters()))
    assert close(*found)


@pytest.mark.filterwarnings("default")
def test_transformers_that_save_memory() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8,
        patch_size=4, num_labels=4,
    )  # fmt: skip
    ensemble = rse.SelfEnsemble(
        transformers.ViTForImageClassification(config), filter_fn="conv+linear"
    ).train()
    images = torch.rand(3, 3, 8, 8)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            ensemble.model.gradient_checkpointing_enable()  # type: ignore[operator]
        with rse.noise_draw(4), torch.random.fork_rng():
            torch.manual_seed(0)
            ensemble(images).square().sum().backward()
        found.append([p.grad.clone() for p in ensemble.parameters() if p.grad is not None])
        ensemble.zero_grad()
    assert close(*found)
