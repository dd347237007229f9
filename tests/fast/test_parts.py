"""Networks that no tracer follows: their layers are exchanged where one feeds another alone."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.fast.optimize import optimize
from selfensemble.fast.parts import WatchedParts
from selfensemble.fast.prepacked import PrepackedConvolution, can_prepack

COLOUR = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))


class Checked(nn.Module):
    """Asks for the shape, as transformers' networks do, which a graph has no answer to.

    Args:
        what: is called with the outputs of the first convolution and its batch norm.
        in_place: of the ReLUs.
    """

    def __init__(
        self, what: Callable[[Tensor, Tensor], Tensor] = lambda conv, norm: norm, in_place: bool = False
    ):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.other = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.relu, self.last = nn.ReLU(inplace=in_place), nn.ReLU(inplace=in_place)
        self.linear, self.what = nn.Linear(16, 5), what
        for each in (self.norm, self.other):
            nn.init.uniform_(each.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(each.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(each.weight, 0.5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.shape[1] != 3:
            raise ValueError("three channels")
        hidden = self.first(inputs)
        hidden = self.relu(self.what(hidden, self.norm(hidden)))
        logits: Tensor = self.linear(self.last(self.other(self.second(hidden))).mean(dim=(2, 3)))
        return logits


def ensemble_of(network: nn.Module) -> rse.SelfEnsemble:
    return rse.SelfEnsemble(network, rse.NoiseConfig(0.1, 0.1)).eval()


def kinds(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in network.modules())


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_layers_are_folded_and_laid_out(in_place: bool, precision: str) -> None:
    ensemble = ensemble_of(Checked(in_place=in_place))
    fast = optimize(ensemble, COLOUR, precision)  # type: ignore[arg-type]
    assert kinds(fast, nn.BatchNorm2d) == 0
    if precision == "bf16" and can_prepack(nn.Conv2d(3, 4, 3)):
        assert kinds(fast, PrepackedConvolution) == 2
        assert kinds(fast, nn.ReLU) == 0
    for images in (COLOUR, COLOUR[:1], torch.rand(3, 3, 9, 12)):
        ours, theirs = (each.predict_proba(images, seed=1) for each in (fast, ensemble))
        assert torch.allclose(ours, theirs, atol=1e-5 if precision == "float32" else 0.02)
    with pytest.raises(ValueError, match="three channels"):
        fast.predict(torch.rand(2, 1, 16, 16))


def test_the_original_keeps_its_layers() -> None:
    ensemble = ensemble_of(Checked())
    before = ensemble.predict_proba(COLOUR, seed=1)
    optimize(ensemble, COLOUR, "bf16")
    assert kinds(ensemble, nn.BatchNorm2d) == 2
    assert torch.equal(ensemble.predict_proba(COLOUR, seed=1), before)


def decided(conv: Tensor, norm: Tensor) -> Tensor:
    return norm * 2 if float(conv.detach().mean()) > 0 else norm


def left_torch(conv: Tensor, norm: Tensor) -> Tensor:
    return norm * 2 if conv.detach().numpy().mean() > 0 else norm


@pytest.mark.parametrize(
    "what",
    [
        lambda conv, norm: conv + norm,
        lambda conv, norm: norm + conv.mean(),
        lambda conv, norm: norm * conv.detach().sign(),
        decided,
        left_torch,
    ],
    ids=["a sum", "its mean", "without derivatives", "a decision", "numpy"],
)
def test_an_output_that_something_else_reads_is_not_folded(what: Callable[[Tensor, Tensor], Tensor]) -> None:
    ensemble = ensemble_of(Checked(what))
    fast = optimize(ensemble, COLOUR, "float32")
    first = [module for name, module in fast.named_modules() if name.endswith(".norm")]
    assert [type(module) for module in first] == [nn.BatchNorm2d]
    for images in (COLOUR, -COLOUR):  # of which a decision is another
        with rse.noise_disabled(fast):
            assert torch.allclose(fast.model(images), ensemble.model(images), atol=1e-4)


def test_what_a_hook_looks_at_stays() -> None:
    network = Checked()
    network.norm.register_forward_hook(lambda module, args, output: None)
    fast = optimize(ensemble_of(network), COLOUR, "float32")
    assert kinds(fast, nn.BatchNorm2d) == 1


def test_layers_of_two_names_or_two_calls_stay() -> None:
    network = Checked()
    network.alias = network.norm
    fast = optimize(ensemble_of(network), COLOUR, "float32")
    assert kinds(fast, nn.BatchNorm2d) == 1
    network = Checked()
    network.other = network.norm
    fast = optimize(ensemble_of(network), COLOUR, "float32")
    assert kinds(fast, nn.BatchNorm2d) == 1


def test_followers_are_those_that_read_alone() -> None:
    network = Checked(lambda conv, norm: norm + 1).eval()
    found = WatchedParts(network, COLOUR).followers
    assert found == {"first": "norm", "relu": "second", "second": "other", "other": "last"}


def test_a_network_of_transformers_is_folded() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    network = transformers.ResNetForImageClassification(config).eval()
    ensemble = ensemble_of(rse.Normalized(network, 0.5, 0.25))
    fast = optimize(ensemble, COLOUR, "float32")
    assert kinds(fast, nn.BatchNorm2d) == 0
    ours, theirs = (each.predict_proba(COLOUR, seed=1) for each in (fast, ensemble))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_hooks_of_a_root_stay() -> None:
    """Also those that change nothing in the images that the copy was made with."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 14 * 14, 5)
    ).eval()
    network.register_forward_pre_hook(lambda module, args: (args[0].clamp(0.2, 0.8),))
    ensemble = ensemble_of(network)
    fast = optimize(ensemble, COLOUR.clamp(0.3, 0.7), "float32")
    assert kinds(fast, nn.BatchNorm2d) == 0
    ours, theirs = (each.predict_proba(COLOUR, seed=1) for each in (fast, ensemble))
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "network", [Checked(), nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 5, 3))]
)
def test_noise_is_added_in_place_where_nothing_else_reads_what_it_overwrites(network: nn.Module) -> None:
    if not can_prepack(nn.Conv2d(3, 4, 3)):
        pytest.skip("no convolutions with weights laid out ahead")
    if isinstance(network, nn.Sequential):
        network = nn.Sequential(*network, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    ensemble = ensemble_of(copy.deepcopy(network))
    fast = optimize(ensemble, COLOUR, "bf16")
    assert [layer.overwrites for layer in rse.noise_layers(fast).values()] == [False, True]
    before, expected = COLOUR.clone(), fast.predict_proba(COLOUR, seed=1)
    assert torch.equal(COLOUR, before)
    for layer in rse.noise_layers(fast).values():
        layer.overwrites = False
    assert torch.equal(fast.predict_proba(COLOUR, seed=1), expected)


def test_noise_does_not_overwrite_what_a_shortcut_reads() -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.linear = nn.Linear(8, 5)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs)
            logits: Tensor = self.linear((hidden + self.second(hidden)).mean(dim=(2, 3)))
            return logits

    ensemble = ensemble_of(Shortcut())
    fast = optimize(ensemble, COLOUR, "bf16")
    assert not any(layer.overwrites for layer in rse.noise_layers(fast).values())
    ours, theirs = (each.predict_proba(COLOUR, seed=1) for each in (fast, ensemble))
    assert torch.allclose(ours, theirs, atol=0.02)


class Clipped(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input).clamp(max=1.0)


@pytest.mark.parametrize("activation", [Clipped(), nn.ReLU()])
def test_only_a_relu_of_torch_is_fused(activation: nn.Module) -> None:
    """Where it acts as one on the images that the copy was made with, too."""
    network = Checked()
    network.relu = copy.deepcopy(activation)  # type: ignore[assignment]
    if type(activation) is nn.ReLU:
        network.relu.forward = lambda x: torch.relu(x).clamp(max=1.0)  # type: ignore
    with torch.no_grad():
        network.first.weight.mul_(8)
    ensemble = ensemble_of(network)
    fast = optimize(ensemble, COLOUR * 0.01, "float32")
    half = optimize(ensemble, COLOUR * 0.01, "bf16")
    with torch.no_grad(), rse.noise_disabled(ensemble), rse.noise_disabled(fast), rse.noise_disabled(half):
        expected = ensemble.draw_logits(COLOUR)
        scale = float(expected.abs().max())
        assert torch.allclose(fast.draw_logits(COLOUR), expected, atol=1e-4 * scale)
        assert torch.allclose(half.draw_logits(COLOUR).float(), expected, atol=0.05 * scale)


class Forks(nn.Module):
    """Whether batch norm follows the convolution alone depends on `wanted`."""

    def __init__(self, wanted: Callable[[nn.Module, Tensor], bool]) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.linear, self.wanted, self.passes = nn.Linear(16, 5), wanted, 0
        nn.init.uniform_(self.norm.weight, -2, 2)
        nn.init.uniform_(self.norm.running_mean, -0.5, 0.5)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 3  # no tracer follows it
        other = self.wanted(self, x)
        x = self.first(x)
        if other:
            x = nn.functional.max_pool2d(x, 2)
        logits: Tensor = self.linear(self.norm(x).relu().mean((2, 3)))
        return logits


def counted(module: Any, images: Tensor) -> bool:
    module.passes += 1
    return bool(module.passes % 1000 == 999)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda module, images: images.shape[-1] > 16,
        lambda module, images: images.shape[-1] < 16,
        lambda module, images: random.random() < 1e-9,
        lambda module, images: np.random.rand() < 1e-9,  # noqa: NPY002
        counted,
    ],
)
def test_what_other_passes_may_do_otherwise_stays(wanted: Callable[[nn.Module, Tensor], bool]) -> None:
    ensemble = ensemble_of(Forks(wanted))
    fast = optimize(ensemble, COLOUR, "float32")
    assert kinds(fast, nn.BatchNorm2d) == 1
    for side in (8, 16, 32):
        images = torch.rand(4, 3, side, side)
        ours, theirs = (each.predict_proba(images, seed=1) for each in (fast, ensemble))
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_noise_does_not_overwrite_what_a_hook_keeps() -> None:
    if not can_prepack(nn.Conv2d(3, 4, 3)):
        pytest.skip("no convolutions with weights laid out ahead")
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 5, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )  # fmt: skip
    kept: list[Tensor] = []
    network[2].register_forward_hook(lambda module, args, output: kept.append(output))
    fast = optimize(ensemble_of(network), COLOUR, "bf16")
    assert not any(layer.overwrites for layer in rse.noise_layers(fast).values())


def test_noise_does_not_overwrite_what_a_hook_is_given() -> None:
    if not can_prepack(nn.Conv2d(3, 4, 3)):
        pytest.skip("no convolutions with weights laid out ahead")
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    kept: list[Tensor] = []
    network[2].register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    fast = optimize(ensemble_of(network), COLOUR, "bf16")
    fast.predict(COLOUR, draws=1)
    assert min(float(each.min()) for each in kept) >= 0


def test_other_sizes_leave_nothing_in_the_copy() -> None:
    class Longest(Checked):
        longest = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.longest = max(self.longest, inputs.shape[-1])
            return super().forward(inputs)

    ensemble = ensemble_of(Longest())
    ensemble.predict(COLOUR)
    fast = optimize(ensemble, COLOUR, "float32")
    assert kinds(fast, nn.BatchNorm2d) == 0
    assert [each.longest for each in fast.modules() if isinstance(each, Longest)] == [16]
