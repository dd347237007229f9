"""Noise into networks and out again."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.networks.models import MODELS, create_model

from ..conftest import Aliased, OutOfOrder, RootConv


def _transformer(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small: dict[str, dict[str, Any]] = {
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "ConvNext": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_stages": 4},
        "Swin": {
            "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
            "window_size": 4,
        },
        "ViT": {
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "image_size": 32, "patch_size": 8,
        },
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(num_labels=5, **small[name])
    model: nn.Module = getattr(transformers, f"{name}ForImageClassification")(config)
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{
        name: (
            partial(create_model, name, width=0.125),
            96 if "stl" in name else 32,
        )
        for name in MODELS
    },
    "transformers-resnet": (lambda: _transformer("ResNet"), 32),
    "transformers-convnext": (lambda: _transformer("ConvNext"), 32),
    "transformers-swin": (lambda: _transformer("Swin"), 32),
    "transformers-vit": (lambda: _transformer("ViT"), 32),
    "root": (lambda: RootConv(3, 5, 3), 8),
    "aliased": (Aliased, 8),
}


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    output = model(inputs)
    result: Tensor = getattr(output, "logits", output)
    return result


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_keys_stay_and_disabled_outputs_are_bit_equal(name: str) -> None:
    build, size = NETWORKS[name]
    model, inputs = build().eval(), torch.rand(2, 3, size, size)
    before, keys = logits(model, inputs), list(model.state_dict())
    pretrained = copy.deepcopy(model.state_dict())
    rse.inject_noise_(model, example_inputs=inputs)
    assert list(model.state_dict()) == keys
    assert not torch.equal(logits(model, inputs), logits(model, inputs))
    with rse.noise_disabled(model):
        assert torch.equal(logits(model, inputs), before)
    fresh = rse.inject_noise_(build().eval())
    fresh.load_state_dict(pretrained)
    with rse.noise_disabled(fresh):
        assert torch.equal(logits(fresh, inputs), before)
    rse.remove_noise_(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, inputs), before)
    assert not any(isinstance(module, rse.GaussianNoise) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_of_every_kind(dimensions: int, transposed: bool) -> None:
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dimensions}d")
    model = rse.inject_noise_(kind(2, 4, 3, groups=2))
    batched = torch.rand(2, 2, *[6] * dimensions)
    assert not torch.equal(model(batched), model(batched))
    # Without a batch dimension, shared noise must not be shared by the channels.
    layer = rse.noise_layers(model)[""]
    layer.std = 1.0
    layer.sampling = "shared"
    model.eval()
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output - args[0]))
    model(batched[0])
    assert seen[0].shape[:2] == (1, 2)
    assert not torch.equal(seen[0][0, 0], seen[0][0, 1])


def test_linear_layers_by_filter() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="filter_fn"):
        rse.inject_noise_(model)
    rse.inject_noise_(model, filter_fn=lambda module, fqn: isinstance(module, nn.Linear))
    assert [layer.std for layer in rse.noise_layers(model).values()] == [0.2, 0.1]
    assert list(rse.noise_layers(model)) == ["1", "3"]
    assert not torch.equal(model(torch.rand(2, 12)), model(torch.rand(2, 12)))


def test_the_filter_sees_names() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1))
    rse.inject_noise_(model, filter_fn=lambda module, fqn: fqn == "1")
    assert list(rse.noise_layers(model)) == ["1"]


def test_first_means_first_called_when_an_example_is_given() -> None:
    inputs = torch.rand(2, 3, 4, 4)
    by_order = rse.noise_layers(rse.inject_noise_(OutOfOrder()))
    assert by_order["inner"].std == 0.2
    by_call = rse.noise_layers(rse.inject_noise_(OutOfOrder(), example_inputs=inputs))
    assert (by_call["stem"].std, by_call["inner"].std) == (0.2, 0.1)
    assert (by_call["stem"].layer, by_call["inner"].layer) == (0, 1)


def test_the_example_leaves_modes_statistics_and_random_state_alone(
    tiny: nn.Sequential, images: Tensor
) -> None:
    tiny.train()
    tiny[1].eval()
    statistics, state = tiny.get_buffer("1.running_mean").clone(), torch.get_rng_state()
    rse.inject_noise_(tiny, example_inputs=(images,))
    assert [module.training for module in tiny] == [True, False, *[True] * 6]
    assert torch.equal(tiny.get_buffer("1.running_mean"), statistics)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_aliased_convolution_gets_one_layer_and_fresh_noise_at_each_call() -> None:
    model = rse.inject_noise_(Aliased())
    assert list(rse.noise_layers(model)) == ["first"]
    seen: list[Tensor] = []
    rse.noise_layers(model)["first"].register_forward_hook(
        lambda module, args, output: seen.append(output - args[0])
    )
    with rse.noise_draw(seed=0):
        model(torch.rand(1, 3, 8, 8))
    assert len(seen) == 2
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)


def test_copies_and_pickles_keep_their_noise(tiny: nn.Module, images: Tensor) -> None:
    rse.inject_noise_(tiny)
    for twin in (copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
        with rse.noise_draw(seed=1):
            expected = tiny(images)
        with rse.noise_draw(seed=1):
            assert torch.equal(twin(images), expected)
        rse.remove_noise_(twin)
        assert torch.equal(twin(images), twin(images))
        assert not torch.equal(tiny(images), tiny(images))


def test_inputs_by_keyword() -> None:
    model = rse.inject_noise_(nn.Conv2d(3, 2, 1))
    inputs = torch.rand(2, 3, 4, 4)
    assert not torch.equal(model(input=inputs), model(input=inputs))


def test_noise_acts_right_in_front_of_the_convolution() -> None:
    """On a 1x1 convolution with weight w the output's spread is |w| std, whatever other hooks do."""
    model = nn.Conv2d(1, 1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(3.0)
    model.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    rse.inject_noise_(model, rse.NoiseConfig(0.5))
    with rse.noise_draw(seed=0):
        outputs = model(torch.ones(1, 1, 1000, 1000))
    assert abs(outputs.std() - 1.5) < 4 * 1.5 / 2000**0.5 / 1000**0.5


def test_twice_and_nothing_are_errors(tiny: nn.Module, images: Tensor) -> None:
    rse.inject_noise_(tiny)
    with pytest.raises(ValueError, match="remove_noise_"):
        rse.inject_noise_(tiny)
    with pytest.raises(ValueError, match="no module matches"):
        rse.inject_noise_(nn.ReLU())
    rse.remove_noise_(rse.remove_noise_(tiny))
    clash = nn.Conv2d(1, 1, 1)
    clash.gaussian_noise = 1  # type: ignore[assignment]
    with pytest.raises(ValueError, match="gaussian_noise"):
        rse.inject_noise_(clash)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_refused() -> None:
    scripted = torch.jit.trace(nn.Sequential(nn.Conv2d(1, 1, 1)), torch.rand(1, 1, 2, 2))
    with pytest.raises(ValueError, match="TorchScript"):
        rse.inject_noise_(scripted, filter_fn=lambda module, fqn: fqn == "0")


def test_weight_norm_and_lazy_convolutions_work() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 2, 3)))
    model(torch.rand(1, 3, 8, 8))
    rse.inject_noise_(model, example_inputs=torch.rand(1, 3, 8, 8))
    inputs = torch.rand(1, 3, 8, 8)
    assert len(rse.noise_layers(model)) == 2
    assert not torch.equal(model(inputs), model(inputs))
