"""Learned noise levels: gradients, what keeps them up, checkpoints, and what is saved."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.noise.learned import (
    Granularity,
    LearnedNoise,
    distance_from_start,
    learn_noise_,
    mean_levels,
    parameter_groups,
)
from selfensemble.training.recipe import Recipe, load_recipe
from selfensemble.training.trainer import Trainer

SHORT = [
    "model.width=0.25", "train.batch_size=128", "noise.init_std=0.4", "noise.inner_std=0.2", "noise.draws=2",
]  # fmt: skip


def recipe(*more: str) -> Recipe:
    return load_recipe("digits-rse", [*SHORT, *more])


def tensor_of(std: object) -> Tensor:
    return torch.tensor(std, dtype=torch.float32).reshape(-1)


@pytest.mark.parametrize("std", [0.3, (0.1, 0.2, 0.7)])
def test_noise_starts_at_its_levels_and_equals_constant_noise(std: float | tuple[float, ...]) -> None:
    inputs = torch.rand(4, 3, 5, 5)
    with rse.noise_draw(seed=1):
        expected = rse.GaussianNoise(std)(inputs)
    learned = LearnedNoise(std)
    torch.testing.assert_close(tensor_of(learned.std), tensor_of(std), rtol=1e-6, atol=0)
    with rse.noise_draw(seed=1):
        torch.testing.assert_close(learned(inputs), expected)
    assert learned.distance_from_start() < 1e-10


def test_the_gradient_of_a_level_is_that_of_its_noise() -> None:
    """Of a.(x + level z) it is a.z, times the derivative of the level by its parameter."""
    learned = LearnedNoise((0.1, 0.2, 0.7))
    weights = torch.randn(4, 3, 5, 5)
    with rse.noise_draw(seed=1):
        noise = rse.GaussianNoise(1.0)(torch.zeros(4, 3, 5, 5))
    with rse.noise_draw(seed=1):
        (weights * learned(torch.rand(4, 3, 5, 5))).sum().backward()
    assert learned.raw.grad is not None
    slope = math.sqrt(3) * torch.sigmoid(math.sqrt(3) * learned.raw.detach())
    torch.testing.assert_close(learned.raw.grad, slope * (weights * noise).sum(dim=(0, 2, 3)))


def test_the_prior_is_its_formula() -> None:
    model = nn.Sequential(rse.inject_noise_(nn.Conv2d(3, 4, 1)), rse.inject_noise_(nn.Conv2d(4, 2, 1)))
    learn_noise_(model, "channel")
    first, second = (layer for layer in rse.noise_layers(model).values() if isinstance(layer, LearnedNoise))
    assert (len(first.raw), len(second.raw)) == (3, 4)
    with torch.no_grad():
        first.raw.copy_((torch.tensor([0.1, 0.2, 0.4])).expm1().log() / math.sqrt(3))
    expected = (math.log(0.1 / 0.2) ** 2 + math.log(0.4 / 0.2) ** 2) / 3
    torch.testing.assert_close(distance_from_start(model), torch.tensor(expected))
    assert [level for _, level in mean_levels(model)] == pytest.approx([0.7 / 3, 0.2])


def test_levels_are_spared_weight_decay_and_others_are_not(tiny: nn.Module) -> None:
    plain = parameter_groups(tiny)
    assert [len(group["params"]) for group in plain] == [len(list(tiny.parameters()))]  # type: ignore[arg-type]
    rse.inject_noise_(tiny)
    learn_noise_(tiny, "layer")
    others, levels = parameter_groups(tiny)
    assert (levels["weight_decay"], len(levels["params"])) == (0.0, 3)  # type: ignore[arg-type]
    assert others == plain[0]


def test_layers_that_cannot_learn(tiny: nn.Module) -> None:
    with pytest.raises(ValueError, match="no noise to learn"):
        learn_noise_(tiny, "layer")
    rse.inject_noise_(tiny, rse.NoiseConfig(0, 0.1))
    learn_noise_(tiny, "channel")
    constant, *others = rse.noise_layers(tiny).values()
    assert type(constant) is rse.GaussianNoise
    assert all(isinstance(layer, LearnedNoise) for layer in others)
    with pytest.raises(ValueError, match="start above 0"):
        LearnedNoise((0.1, 0.0))
    with pytest.raises(ValueError, match="no noise to learn"):
        recipe("noise.learn=layer", "noise.init_std=0", "noise.inner_std=0")


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_levels_do_not_collapse(tmp_path: Path, granularity: Granularity) -> None:
    """Plain cross-entropy, to which noise is but a nuisance: without the prior the first level is lost."""
    ends: dict[float, Tensor] = {}
    for hold in (0.0, 0.1):
        settings = (f"noise.learn={granularity}", f"noise.hold={hold}", "train.epochs=12")
        trainer = Trainer(recipe(*settings), tmp_path / str(hold))
        results = trainer.run()
        assert results["metrics"]["test"]["accuracy"] > 0.8
        layers = rse.noise_layers(rse.load(tmp_path / str(hold)).model).values()
        start = [0.4, 0.2, 0.2, 0.2]
        ends[hold] = torch.cat(
            [tensor_of(layer.std) / level for layer, level in zip(layers, start, strict=True)]
        )
        assert results["history"][-1]["noise/0"] == pytest.approx(0.4 * float(ends[hold][0]), rel=1e-4)
    assert ends[0.0][0] < 0.15
    assert ends[0.1].min() > 0.3
    assert ends[0.1].max() < 1.5


def test_what_is_saved_is_a_plain_network_with_constants(tmp_path: Path) -> None:
    trainer = Trainer(recipe("noise.learn=channel", "train.epochs=1"), tmp_path)
    trainer.run()
    loaded, trained = rse.load(tmp_path), trainer.ensemble.cpu().eval()
    plain = rse.create_model("small-cnn", channels=1, width=0.25)
    assert loaded.model.state_dict().keys() == plain.state_dict().keys()
    layers = list(rse.noise_layers(loaded.model).values())
    assert all(type(layer) is rse.GaussianNoise for layer in layers)
    assert [len(tensor_of(layer.std)) for layer in layers] == [1, 8, 8, 16]
    images = rse.load_data("digits", "test").inputs(slice(5))
    mine, theirs = (model.predict_proba(images, seed=1) for model in (loaded, trained))
    torch.testing.assert_close(mine, theirs)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_killed_run_ends_in_the_same_levels_and_weights(tmp_path: Path, average: float) -> None:
    config = recipe(
        "noise.learn=channel", "train.epochs=2", "train.checkpoint_steps=3", f"train.average={average}"
    )
    Trainer(config, tmp_path / "whole").run()

    def kill(step: int, steps: int, text: str) -> None:
        if step == 5:
            raise _Killed

    with pytest.raises(_Killed):
        Trainer(config, tmp_path / "killed", progress=kill).run()
    Trainer(config, tmp_path / "killed", resume=True).run()
    one, other = (rse.load(tmp_path / name) for name in ("whole", "killed"))
    stds = [[layer.std for layer in rse.noise_layers(model.model).values()] for model in (one, other)]
    assert stds[0] == stds[1]
    weights = other.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in one.state_dict().items())


class OwnLinear(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.in_features = features
        self.weight = nn.Parameter(torch.eye(features))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight.T


@pytest.mark.parametrize("own", [False, True])
def test_levels_of_a_linear_layer_are_of_its_features(own: bool) -> None:
    """Of tokens (B, T, D) too, as many of them as features, or fewer; and of layers of other people."""
    for tokens in (6, 5):
        linear: nn.Module = OwnLinear(6) if own else nn.Linear(6, 6, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.eye(6))  # type: ignore[operator]
        network = rse.inject_noise_(
            nn.Sequential(linear), filter_fn=lambda module, fqn: isinstance(module, OwnLinear | nn.Linear)
        )
        learn_noise_(network, granularity="channel")
        (layer,) = rse.noise_layers(network).values()
        layer.std = (5.0, *[1e-6] * 5)
        found = network.eval()(torch.zeros(400, tokens, 6)).std(dim=0)
        assert (found[:, 0] > 4).all()
        assert (found[:, 1:] < 1e-4).all()
