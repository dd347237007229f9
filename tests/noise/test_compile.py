"""Compilers, exporters, precision and memory formats keep the noise."""

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.noise.learned import learn_noise_

# Deprecation warnings of torch's own compiler and exporter.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class TwoDraws(nn.Module):
    """The difference of two draws of the same input: zero if a compiler merges them."""

    def __init__(self, ensemble: rse.SelfEnsemble) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, inputs: Tensor) -> Tensor:
        return self.ensemble.draw_logits(inputs) - self.ensemble.draw_logits(inputs)


def two_convolutions() -> nn.Sequential:
    """Few kernels, each of which takes a second to compile."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def test_compiled_whole_equals_eager_draw_by_draw(tiny: nn.Module, images: Tensor) -> None:
    rse.inject_noise_(tiny)
    compiled = torch.compile(tiny, fullgraph=True)
    for seed in (1, 2):
        with rse.noise_draw(seed):
            eager = tiny(images)
        with rse.noise_draw(seed):
            torch.testing.assert_close(compiled(images), eager)
    assert not torch.equal(compiled(images), compiled(images))
    with rse.noise_disabled(tiny):
        torch.testing.assert_close(compiled(images), tiny(images))


def test_levels_by_channel_compiled_equal_eager_ones(images: Tensor) -> None:
    """And learned ones, with the gradient of their parameters."""
    net = two_convolutions()
    rse.inject_noise_(net)
    learn_noise_(net, "channel")
    rse.noise_layers(net)["0"].std = (0.5, 0.1, 0.2)
    first = net[0].get_submodule("gaussian_noise")
    net[2].add_module("gaussian_noise", rse.GaussianNoise((0.1, 0.0, 0.3, 0.4), layer=1))
    ensemble = rse.SelfEnsemble(net, draws=1).eval()
    compiled = torch.compile(ensemble, fullgraph=True)
    outputs, gradients = [], []
    for model in (ensemble, compiled):
        leaf = images.clone().requires_grad_()
        with rse.noise_draw(seed=4):
            output = model(leaf)
        outputs.append(output.detach())
        gradients.append(torch.autograd.grad(output[:, 0].sum(), [leaf, first.get_parameter("raw")]))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)
    assert gradients[0][1].abs().min() > 0
    assert not torch.equal(compiled(images), compiled(images))


def test_compiled_ensembles_and_gradients(images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(two_convolutions(), draws=2).eval()
    compiled = torch.compile(ensemble, fullgraph=True)
    for seed in (4, 5):
        gradients, outputs = [], []
        for model in (ensemble, compiled):
            leaf = images.clone().requires_grad_()
            with rse.noise_draw(seed):
                output = model(leaf)
            outputs.append(output.detach())
            gradients.append(torch.autograd.grad(output[:, 0].sum(), leaf)[0])
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*gradients)
    assert not torch.equal(compiled(leaf), compiled(leaf))


@pytest.mark.parametrize("how", ["compile", "export"])
def test_draws_are_not_merged(how: str) -> None:
    """Two draws of one input are equal subexpressions to a compiler; noise must differ all the same."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = TwoDraws(rse.SelfEnsemble(net, draws=2).eval())
    images = torch.rand(2, 3, 8, 8)
    if how == "compile":
        compiled = torch.compile(model, fullgraph=True)
        difference = compiled(images)
        with rse.noise_disabled(model):
            assert torch.equal(compiled(images), torch.zeros_like(difference))
    else:
        program = torch.export.export(model, (images,)).run_decompositions()
        difference = program.module()(images)
    assert difference.abs().min() > 0


def test_exported_programs_stay_random(tiny: nn.Module, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(tiny, draws=2).eval()
    exported = torch.export.export(ensemble, (images,)).module()
    first, second = exported(images), exported(images)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.exp().sum(dim=1), torch.ones(6))
    with rse.noise_draw(seed=1):
        expected = ensemble(images)
    with rse.noise_draw(seed=1):
        torch.testing.assert_close(exported(images), expected)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_operator_keeps_torchs_contracts(images: Tensor, pairs: bool) -> None:
    """Schema, fake tensors, autograd registration and tracing; at std 0 the operator is deterministic."""
    operator = torch.ops.selfensemble.add_noise
    torch.library.opcheck(operator, (images.requires_grad_(), 0.0, 0, False, pairs, 0))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sampling", ["per_image", "shared"])
def test_autocast_and_memory_formats(
    tiny: nn.Module, images: Tensor, memory_format: torch.memory_format, sampling: str
) -> None:
    ensemble = rse.SelfEnsemble(tiny, sampling=sampling).eval()  # type: ignore[arg-type]
    exact = ensemble.predict_proba(images, seed=3, draws=50)
    ensemble.to(memory_format=memory_format)  # type: ignore[call-overload]
    inputs = images.contiguous(memory_format=memory_format)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ensemble.predict_proba(inputs, seed=3, draws=50)
    assert rounded.dtype == torch.float32
    if sampling == "shared":
        torch.testing.assert_close(rounded, exact, rtol=0, atol=0.02)
        torch.testing.assert_close(ensemble.predict_proba(inputs, seed=3, draws=50), exact)
    else:  # other noise, same distribution
        torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1)


@pytest.mark.parametrize("sampling", ["per_image", "shared"])
def test_levels_by_channel_keep_precision_and_format(images: Tensor, sampling: str) -> None:
    layer = rse.GaussianNoise((0.1, 0.2, 0.3), sampling=sampling).eval()  # type: ignore[arg-type]
    for inputs in (images.bfloat16(), images.contiguous(memory_format=torch.channels_last)):
        noisy = layer(inputs)
        assert (noisy.dtype, noisy.stride()) == (inputs.dtype, inputs.stride())
