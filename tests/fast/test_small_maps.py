"""Weight gradients as a matrix product: the same as torch's own, where they apply and where not."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

import selfensemble as rse
from selfensemble.fast import small_maps
from selfensemble.fast.small_maps import (
    convolve_by_product,
    patches_of,
    speed_up_small_maps_,
    turned,
    weight_gradient,
)


@settings(deadline=None)
@given(
    batch=st.integers(1, 4), channels=st.integers(1, 5), outputs=st.integers(1, 5),
    height=st.integers(1, 4), width=st.integers(1, 4), half=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)  # fmt: skip
def test_the_product_is_the_gradient(
    batch: int, channels: int, outputs: int, height: int, width: int, half: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.Size([2 * half[0] + 1, 2 * half[1] + 1])
    inputs = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    gradient = torch.randn(batch, outputs, height, width, generator=generator, dtype=torch.float64)
    shape = torch.Size([outputs, channels, *kernel])
    expected = conv2d_weight(inputs, shape, gradient, padding=half)
    torch.testing.assert_close(weight_gradient(patches_of(inputs, kernel), gradient, shape), expected)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        convolve_by_product(inputs, weight, bias), nn.functional.conv2d(inputs, weight, bias, padding=half)
    )
    torch.testing.assert_close(
        convolve_by_product(gradient, turned(weight)),
        conv2d_input(inputs.shape, weight, gradient, padding=half),
    )


def gradients(model: nn.Module, images: Tensor, *, autocast: bool) -> list[Tensor]:
    leaf = images.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), rse.noise_draw(1):
        model(leaf).float().square().sum().backward()
    return [each.grad for each in (leaf, *model.parameters()) if each.grad is not None]


def test_a_network_in_bfloat16_has_the_gradients_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """As close to float32's as those of torch itself."""
    torch.manual_seed(0)
    model = rse.create_model("vgg16", width=0.125).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rse.inject_noise_(model, rse.NoiseConfig(0, 0))
    images = torch.rand(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    exact = gradients(copy.deepcopy(model), images, autocast=False)
    before = gradients(copy.deepcopy(model), images, autocast=True)
    calls = []

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return weight_gradient(*args)

    monkeypatch.setattr(small_maps, "weight_gradient", counted)
    assert speed_up_small_maps_(model) == 13
    assert set(model.state_dict()) == set(rse.create_model("vgg16", width=0.125).state_dict())
    after = gradients(model, images, autocast=True)
    assert len(calls) == 6  # three convolutions at 4x4, three at 2x2
    assert len(after) == len(before) == len(exact)

    def error(found: list[Tensor]) -> float:
        return sum(float((one - two).norm() / two.norm()) for one, two in zip(found, exact, strict=True))

    assert error(after) < 1.2 * error(before)


def _never(*args: object) -> Tensor:
    raise AssertionError("the product was taken")


def test_gradients_of_images_alone_cost_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """As attacks within training take them, in eval mode."""
    monkeypatch.setattr(small_maps, "weight_gradient", _never)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).eval()
    speed_up_small_maps_(model)
    leaf = torch.rand(2, 3, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(model(leaf).sum(), leaf)
    assert found.shape == leaf.shape


def test_elsewhere_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_maps, "weight_gradient", _never)
    odd = [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    ]
    assert [speed_up_small_maps_(module) for module in odd] == [0, 0, 0, 0]
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    assert speed_up_small_maps_(model) == 1
    gradients(model, torch.rand(2, 3, 4, 4), autocast=False)
    gradients(model, torch.rand(2, 3, 8, 8), autocast=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.rand(2, 3, 4, 4))
    frozen = model.requires_grad_(False)
    leaf = torch.rand(2, 3, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        frozen(leaf).sum().backward()
    assert leaf.grad is not None
