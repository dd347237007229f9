"""Prepacked convolutions against torch's own, in float64."""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import selfensemble as rse
from selfensemble.fast.optimize import optimize
from selfensemble.fast.prepacked import FEW, PrepackedConvolution, can_prepack
from selfensemble.noise.injection import attach_noise_

pytestmark = pytest.mark.skipif(
    not can_prepack(nn.Conv2d(1, 1, 1)), reason="needs bfloat16 convolutions of oneDNN"
)


def close(ours: Tensor, exact: Tensor, tolerance: float = 0.01) -> bool:
    """Up to what bfloat16 rounds."""
    return bool((ours.double() - exact).norm() <= tolerance * exact.norm() + 1e-9)


def in_float64(convolution: nn.Conv2d, relu: bool) -> nn.Module:
    exact = copy.deepcopy(convolution).double()
    with torch.no_grad():
        for each in exact.parameters():
            each.copy_(each.to(torch.bfloat16))
    return nn.Sequential(exact, nn.ReLU()) if relu else exact


@pytest.mark.parametrize("height", [2, 4, 8, 16, 32])
@pytest.mark.parametrize(("kernel", "padding"), [(2, 1), (3, 1), (5, 2)])
def test_nothing_outside_the_input_is_read(height: int, kernel: int, padding: int) -> None:
    """Maps one pixel wide, among numbers that spoil what they touch; torch's own convolutions fail here."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(32, 64, kernel, stride=2, padding=padding).eval()
    for exact_inputs, autocast in itertools.product((False, True), repeat=2):
        ours = PrepackedConvolution(convolution, relu=False, exact_inputs=exact_inputs)
        for batch in (1, FEW, 64):
            size, around = batch * height * 32, 8192
            memory = torch.full((size + 2 * around,), torch.nan, dtype=torch.bfloat16)
            memory[around:-around] = torch.randn(size)
            inputs = memory[around:-around].view(batch, height, 1, 32).permute(0, 3, 1, 2)
            with torch.no_grad():
                exact = in_float64(convolution, relu=False)(inputs.double())
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    output = ours(inputs)
                assert close(output, exact)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    channels=st.sampled_from([(2, 4), (8, 6), (32, 64)]),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 2), (3, 1), (5, 5)]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    size=st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 4), (5, 7), (9, 9)]),
    batch=st.sampled_from([1, 3, FEW, FEW + 1]),
    bias=st.booleans(),
    relu=st.booleans(),
)
def test_it_is_the_convolution_and_its_gradient(
    groups: int, channels: tuple[int, int], kernel: tuple[int, int], stride: int, padding: int, dilation: int,
    size: tuple[int, int], batch: int, bias: bool, relu: bool,
) -> None:  # fmt: skip
    for extent, width in zip(size, kernel, strict=True):
        if extent + 2 * padding < dilation * (width - 1) + 1:
            return  # no output
    if size[1] == 1 and dilation > 1 and stride > 1 and padding:
        return  # torch 2.13's own convolutions, in float32 too, read outside their input for some of these
    torch.manual_seed(0)
    convolution = nn.Conv2d(
        *channels, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias
    ).eval()
    ours = PrepackedConvolution(convolution, relu)
    inputs = torch.randn(batch, channels[0], *size).to(torch.bfloat16).requires_grad_()
    exact_inputs = inputs.detach().double().requires_grad_()
    output, exact = ours(inputs), in_float64(convolution, relu)(exact_inputs)
    assert output.shape == exact.shape
    assert close(output, exact)
    with torch.no_grad():
        assert torch.equal(ours(inputs), output)
    weights = torch.randn_like(exact).to(torch.bfloat16)
    # Where the two ReLUs disagree about a number next to 0, gradients differ by more than rounding.
    weights = torch.where(exact.abs() < 0.02, 0, weights) if relu else weights
    (ours_back,) = torch.autograd.grad(output, inputs, weights)
    (exact_back,) = torch.autograd.grad(exact, exact_inputs, weights.double())
    assert ours_back.dtype == torch.bfloat16
    assert close(ours_back, exact_back)


@pytest.mark.parametrize("pixels", [2, 4])
@pytest.mark.parametrize("batch", [2, 16])
def test_many_channels_on_small_maps(pixels: int, batch: int) -> None:
    """Where matrix products stand in: 512 channels, and over patches at least 2^20 weights."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(512, 512, 3, padding=1).eval()
    ours = PrepackedConvolution(convolution, relu=False)
    inputs = torch.randn(batch, 512, pixels, pixels).to(torch.bfloat16).requires_grad_()
    exact_inputs = inputs.detach().double().requires_grad_()
    output, exact = ours(inputs), in_float64(convolution, False)(exact_inputs)
    assert close(output, exact)
    weights = torch.randn_like(exact).to(torch.bfloat16)
    ours_back, exact_back = (
        torch.autograd.grad(result, point, weights.to(result.dtype))[0]
        for result, point in ((output, inputs), (exact, exact_inputs))
    )
    assert close(ours_back, exact_back)


@pytest.mark.parametrize("pixels", [2, 8])
def test_an_activation_may_write_into_the_output(pixels: int) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 4, 3, padding=1).eval()
    inputs = torch.randn(FEW, 4, pixels, pixels).requires_grad_()
    gradients = []
    for inplace in (False, True):
        output = functional.hardtanh(PrepackedConvolution(convolution, relu=False)(inputs), inplace=inplace)
        gradients.append(torch.autograd.grad(output.float().sum(), inputs)[0])
    assert torch.equal(*gradients)
    ours = PrepackedConvolution(convolution, relu=True)(inputs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(ours.add_(1).float().sum(), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_inputs_keep_what_bfloat16_drops(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 16, 3, padding=1).eval()
    rough, fine = (PrepackedConvolution(convolution, False, exact_inputs=each) for each in (False, True))
    inputs = torch.rand(4, 3, 16, 16, dtype=dtype).requires_grad_()
    exact = copy.deepcopy(convolution).double()
    with torch.no_grad():
        rounded = exact(inputs.double()).to(torch.bfloat16)
        right = [float((each(inputs) == rounded).double().mean()) for each in (rough, fine)]
    assert right[0] < 0.9
    assert right[1] > 0.99
    (gradient,) = torch.autograd.grad(fine(inputs).float().sum(), inputs)
    assert gradient.dtype == dtype
    (exact_gradient,) = torch.autograd.grad(
        exact(point := inputs.detach().double().requires_grad_()).sum(), point
    )
    assert close(gradient, exact_gradient)


def test_copies_pickles_and_new_weights_are_laid_out_anew() -> None:
    torch.manual_seed(0)
    inputs = torch.rand(FEW, 4, 2, 2)
    ours = PrepackedConvolution(nn.Conv2d(4, 4, 3, padding=1).eval(), relu=True)
    first = ours(inputs)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(inputs), first)
    state = {name: 2 * value for name, value in ours.state_dict().items()}
    ours.load_state_dict(state)
    torch.testing.assert_close(ours(inputs), 2 * first)
    assert torch.equal(ours(inputs[0]), ours(inputs[:2])[0])  # without a batch


def test_second_derivatives_are_refused() -> None:
    ours = PrepackedConvolution(nn.Conv2d(2, 2, 1).eval(), relu=False)
    inputs = torch.rand(1, 2, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(ours(inputs).float().square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class _Mine(nn.Conv2d):
    pass


def _hooked(convolution: nn.Conv2d) -> nn.Conv2d:
    convolution.register_forward_hook(lambda *_: None)
    return convolution


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(2, 2, 3),
        nn.ConvTranspose2d(2, 2, 3),
        _Mine(2, 2, 3),
        nn.Conv2d(2, 2, 3).double(),
        _hooked(nn.Conv2d(2, 2, 3)),
    ],
)
def test_what_it_cannot_stand_in_for(convolution: nn.Module) -> None:
    assert not can_prepack(convolution)


class Branches(nn.Module):
    """A convolution with two users, one in front of a ReLU, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(4, 5)

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.first(inputs)
        hidden = hidden.relu() + hidden
        return self.linear(self.twice(self.twice(hidden).relu()).mean(dim=(2, 3)))


def test_only_what_is_called_once_is_replaced() -> None:
    torch.manual_seed(0)
    ensemble = rse.SelfEnsemble(Branches(), rse.NoiseConfig(0.1, 0.1)).eval()
    inputs = torch.rand(4, 3, 8, 8)
    fast = optimize(ensemble, inputs, "bf16")
    packed = [module for module in fast.modules() if isinstance(module, PrepackedConvolution)]
    assert [(each.relu, each.exact_inputs) for each in packed] == [(False, True)]
    ours, theirs = (each.predict_proba(inputs, draws=3, seed=1) for each in (fast, ensemble))
    torch.testing.assert_close(ours, theirs, atol=0.01, rtol=0)


def test_noise_in_front_goes_along() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 1, 1, bias=False).eval()
    nn.init.ones_(convolution.weight)
    attach_noise_(convolution, {"": 0.5})
    ours = PrepackedConvolution(convolution, relu=True)
    outputs = ours(torch.full((1, 1, 200, 200), 10.0)).float()
    assert float(outputs.detach().std()) == pytest.approx(0.5, rel=0.03)
    assert list(rse.noise_layers(ours)) == [""]
