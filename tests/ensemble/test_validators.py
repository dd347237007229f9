"""Each rule on a network with that fault, and silence on networks without one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.networks.models import MODELS, create_model

from ..conftest import Aliased, Functional, OutOfOrder


def rules(model: nn.Module, inputs: Tensor, **kwargs: Any) -> dict[str, str]:
    issues = rse.validate(model, inputs, **kwargs)
    assert all(issue.message and issue.cure for issue in issues)
    return {issue.rule: issue.where for issue in issues}


class Custom(nn.Module):
    """Whatever `function(convolution, inputs)` makes of the inputs."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self.conv, inputs)


def pooled(tensor: Tensor) -> Tensor:
    return tensor.mean(dim=(2, 3))


@pytest.mark.parametrize("name", MODELS)
def test_silence_on_good_networks(name: str) -> None:
    side = 96 if "stl" in name else 32
    model, inputs = create_model(name, width=0.125), torch.rand(2, 3, side, side)
    assert rse.validate(model, inputs) == []
    rse.inject_noise_(model, example_inputs=inputs)
    assert rse.validate(model, inputs) == []


def test_functional_convolutions_are_reported_with_their_place(images: Tensor) -> None:
    (issue,) = rse.validate(Functional(), images)
    assert (issue.rule, issue.severity) == ("functional-convolution", "error")
    assert "conftest.py:" in issue.message
    assert "GaussianNoise" in str(issue)
    # Injecting cannot mend it, and does not hide it.
    assert "functional-convolution" in rules(rse.inject_noise_(Functional()), images)


def test_a_convolution_called_by_its_weight_is_reported(images: Tensor) -> None:
    model = Custom(lambda conv, x: pooled(nn.functional.conv2d(x, conv.weight)))  # type: ignore[arg-type]
    assert rules(model, images).keys() == {"functional-convolution", "not-called"}


def test_modules_that_filter_fn_leaves_out_are_not_functional(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert rules(model, images, filter_fn=lambda module, fqn: fqn == "0") == {}


def test_aliased_and_out_of_order_networks_are_fine(images: Tensor) -> None:
    assert rules(Aliased(), images) == {}
    assert rules(OutOfOrder(), images) == {}


def test_no_convolution(images: Tensor) -> None:
    assert "no-convolution" in rules(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), images)


def test_a_module_that_does_not_run(images: Tensor) -> None:
    model = OutOfOrder()
    model.unused = nn.Conv2d(1, 1, 1)
    assert rules(model, images) == {"not-called": "unused"}


@pytest.mark.parametrize("noisy", [False, True])
def test_normalisation_before_the_first_noise(images: Tensor, noisy: bool) -> None:
    model = Custom(lambda conv, x: pooled(conv((x - 0.5) / 0.25)))
    if noisy:
        rse.inject_noise_(model)
    assert rules(model, images).keys() == {"transformed-input"}


@pytest.mark.parametrize("noisy", [False, True])
def test_a_way_around_the_first_noise(images: Tensor, noisy: bool) -> None:
    model = Custom(lambda conv, x: pooled(conv(x)) + x.sum(dim=(1, 2, 3))[:, None])
    if noisy:
        rse.inject_noise_(model)
    assert rules(model, images).keys() == {"around-first-noise"}


def test_a_second_stem_is_a_way_around() -> None:
    class Stems(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            return pooled(self.left(inputs) + self.right(inputs))

    assert rules(Stems(), torch.rand(2, 3, 4, 4)) == {"around-first-noise": "right"}


def test_copies_and_views_of_the_image_count_as_the_image(images: Tensor) -> None:
    model = Custom(lambda conv, x: pooled(conv(x.clone().flip(3)[:, :, :, 1:].double().float())))
    assert rules(model, images).keys() <= {"transformed-input"}
    model = Custom(lambda conv, x: pooled(conv(x[:, :, 1:].contiguous())))
    assert rules(model, images) == {}


def test_frames_folded_into_the_batch(images: Tensor) -> None:
    def frames(conv: nn.Module, inputs: Tensor) -> Tensor:
        each = pooled(conv(inputs.flatten(0, 1)))
        return each.view(2, 3, -1).mean(dim=1)

    videos = images.unflatten(0, (2, 3))
    assert rules(Custom(frames), videos).keys() == {"folded-batch"}
    assert rules(Custom(frames), videos)["folded-batch"] == "conv"


def test_labels_beside_the_image_are_not_the_image(images: Tensor) -> None:
    class WithLabels(OutOfOrder):
        def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
            logits = super().forward(inputs)
            if labels is not None:
                logits = logits + 0 * labels[:, None]
            return logits

    assert rse.validate(WithLabels(), {"inputs": images, "labels": torch.zeros(6)}) == []


def test_an_empty_or_integer_example(images: Tensor) -> None:
    assert rules(OutOfOrder(), images[:0]) == {}
    model = rse.inject_noise_(OutOfOrder())
    assert "forward" in rules(model, images.mul(255).to(torch.uint8))


def test_probabilities_instead_of_logits(images: Tensor) -> None:
    assert rules(Custom(lambda conv, x: pooled(conv(x)).softmax(1)), images).keys() == {"probabilities"}


def test_outputs_of_a_wrong_shape(images: Tensor) -> None:
    assert rules(Custom(lambda conv, x: conv(x)), images).keys() == {"output"}


def test_a_forward_pass_that_fails(images: Tensor) -> None:
    issues = rse.validate(Custom(lambda conv, x: conv(x[:, :1])), images)
    assert [issue.rule for issue in issues] == ["forward"]
    assert "channels" in issues[0].message


def test_inputs_out_of_range(images: Tensor) -> None:
    assert rules(Aliased(), images * 255).keys() == {"input-range"}


@pytest.mark.parametrize("bounds", [torch.tensor([[0.0], [1.0]]), [0, 0, 0, 1, 1, 1], "map"])
def test_bounds_of_a_network_are_its_own(images: Tensor, bounds: object) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = rse.validate(network, images)
    network.bounds = bounds  # type: ignore[assignment]
    assert rse.validate(network, images) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(images: Tensor) -> None:
    traced = torch.jit.trace(OutOfOrder(), images)
    assert "torchscript" in rules(traced, images)


def test_noise_that_is_only_partly_there(images: Tensor) -> None:
    model = OutOfOrder()
    rse.inject_noise_(model, filter_fn=lambda module, fqn: fqn == "stem")
    assert rules(model, images) == {"partly-noisy": "inner"}


def test_errors_come_first_and_the_model_is_left_alone(images: Tensor) -> None:
    def forward(conv: nn.Module, inputs: Tensor) -> Tensor:
        return pooled(nn.functional.conv2d(conv(inputs - 0.5), torch.ones(2, 4, 1, 1)))

    model = Custom(forward)
    model.train()
    issues = rse.validate(model, images)
    assert [issue.severity for issue in issues] == sorted(issue.severity for issue in issues)
    assert issues[0].severity == "error"
    assert issues[-1].severity == "warning"
    assert model.training
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
