"""The networks against published parameter counts, and their shapes."""

import pytest
import torch

from selfensemble.networks.models import MODELS, create_model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Counts of the common 32x32 forms (kuangliu/pytorch-cifar), which the method's authors use.
        ("vgg11", 9_231_114),
        ("vgg13", 9_416_010),
        ("vgg16", 14_728_266),
        ("vgg19", 20_040_522),
        ("resnet18", 11_173_962),
        ("resnext29-2x64d", 9_128_778),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    assert sum(tensor.numel() for tensor in create_model(name).parameters()) == parameters


def test_model_a_has_the_papers_shape() -> None:
    model = create_model("stl10-model-a")
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert [conv.out_channels for conv in convolutions] == [32, 64, 128, 128, 256, 256]
    assert model(torch.rand(2, 3, 96, 96)).shape == (2, 10)


@pytest.mark.parametrize("name", MODELS)
def test_bounded_activations(name: str) -> None:
    """Every ReLU is replaced, the keys stay, and features are min(max(0, x), 1)."""
    relu, brelu = (create_model(name, width=0.125, activation=kind) for kind in ("relu", "brelu"))
    assert relu.state_dict().keys() == brelu.state_dict().keys()
    assert not any(isinstance(module, torch.nn.ReLU) for module in brelu.modules())
    bounded = [module for module in brelu.modules() if isinstance(module, torch.nn.Hardtanh)]
    assert len(bounded) == sum(isinstance(module, torch.nn.ReLU) for module in relu.modules())
    values = torch.tensor([-2.0, 0.25, 1.0, 3.0])
    assert torch.equal(bounded[0](values.clone()), torch.tensor([0.0, 0.25, 1.0, 1.0]))
    features: list[torch.Tensor] = []
    for module in bounded:
        module.register_forward_hook(lambda m, args, output: features.append(output))
    side = 96 if "stl" in name else 32
    with torch.no_grad():
        brelu(5 * torch.randn(2, 3, side, side))
    assert len(features) == len(bounded)
    assert all(float(each.min()) >= 0 and float(each.max()) <= 1 for each in features)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_and_widths(name: str, channels: int) -> None:
    side = 96 if "stl" in name else 32
    model = create_model(name, classes=7, channels=channels, width=0.25)
    assert model(torch.rand(2, channels, side, side)).shape == (2, 7)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="vgg16"):
        create_model("vgg12")
    with pytest.raises(ValueError, match="brelu"):
        create_model("vgg11", activation="gelu")  # type: ignore[arg-type]
    for wrong in ({"classes": 1}, {"channels": 0}, {"width": 0.0}, {"width": float("nan")}):
        with pytest.raises(ValueError, match="need classes"):
            create_model("vgg11", **wrong)
