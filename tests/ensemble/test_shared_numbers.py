"""Noise that a pass draws once for all of its images: draws stay independent, and so do images."""

import os
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.ensemble.checks import ShapeError
from selfensemble.ensemble.draws import one_by_one
from selfensemble.ensemble.randomness import images_share_numbers


class Drawn(nn.Module):
    """A linear layer whose numbers `draw` makes, of an input (B, 16)."""

    def __init__(self, draw: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear, self.draw = nn.Linear(16, 4), draw
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(4, 16, generator=generator))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.draw(self.linear, inputs.flatten(1))


def weights(linear: nn.Linear, inputs: Tensor) -> Tensor:
    return nn.functional.linear(inputs, linear.weight + torch.randn_like(linear.weight), linear.bias)


def roll(linear: nn.Linear, inputs: Tensor) -> Tensor:
    return linear(inputs.roll(int(torch.randint(16, (1,))), 1))  # type: ignore[no-any-return]


def dropout(linear: nn.Linear, inputs: Tensor) -> Tensor:
    return linear(nn.functional.dropout(inputs, 0.5, training=True))  # type: ignore[no-any-return]


def pixels(linear: nn.Linear, inputs: Tensor) -> Tensor:
    return linear(inputs + torch.randn_like(inputs))  # type: ignore[no-any-return]


NUMBERS = np.random.default_rng(0)


def own_generator(linear: nn.Linear, inputs: Tensor) -> Tensor:
    return linear(inputs + torch.from_numpy(NUMBERS.normal(size=16)).float())  # type: ignore[no-any-return]


def system(linear: nn.Linear, inputs: Tensor) -> Tensor:
    return linear(inputs) + os.urandom(1)[0] * torch.eye(4)[0] / 99  # type: ignore[no-any-return]


def one_for_all(linear: nn.Linear, inputs: Tensor) -> Tensor:
    return linear(inputs + torch.randn_like(inputs)[:1])  # type: ignore[no-any-return]


def mixed(linear: nn.Linear, inputs: Tensor) -> Tensor:
    return linear(inputs + inputs[torch.randperm(len(inputs))])  # type: ignore[no-any-return]


def dropout_and_clock(linear: nn.Linear, inputs: Tensor) -> Tensor:
    return dropout(linear, inputs) + time.perf_counter_ns() % 97


def ensemble_of(draw: Callable[[nn.Linear, Tensor], Tensor]) -> rse.SelfEnsemble:
    network = nn.Sequential(rse.GaussianNoise(0.01), Drawn(draw))
    return rse.SelfEnsemble(network, sampling="per_image").eval()


IMAGES = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("draw", [weights, roll, dropout, pixels])
def test_draws_of_one_image_are_not_one_draw(draw: Callable[[nn.Linear, Tensor], Tensor]) -> None:
    """Of a few images a pass holds several draws, if they have nothing in common."""
    ensemble = ensemble_of(draw)
    for sampling in ("per_image", "shared"):
        answer = ensemble.predict(IMAGES[:1], draws=40, sampling=sampling)
        assert answer.spread.max() > 0.05


@pytest.mark.parametrize(
    ("draw", "shared"),
    [
        (dropout, False),
        (pixels, False),
        *(
            (draw, True)
            for draw in (weights, roll, own_generator, system, one_for_all, mixed, dropout_and_clock)
        ),
    ],
)
def test_images_with_numbers_in_common_pass_one_by_one(
    draw: Callable[[nn.Linear, Tensor], Tensor], shared: bool
) -> None:
    ensemble = ensemble_of(draw)
    assert one_by_one(ensemble, IMAGES, None) == (1 if shared else None)
    assert one_by_one(ensemble, IMAGES, 7) == (1 if shared else 7)


def test_images_of_the_packages_own_noise_pass_together() -> None:
    assert one_by_one(rse.load("digits-rse"), torch.rand(2, 1, 8, 8), None) is None


class Shaken(nn.Module):
    """Draws only where its level, a buffer, is above 0."""

    level: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        logits = inputs.flatten(1)[:, :2] * 0
        return logits + self.level * torch.randn(1, 2) if self.level > 0 else logits


def test_what_is_loaded_may_be_random() -> None:
    """Asked before its level was loaded, it seemed to draw nothing: draws of one pass were one draw."""
    ensemble = rse.SelfEnsemble(nn.Sequential(rse.GaussianNoise(0.01), Shaken())).eval()
    ensemble.predict(IMAGES, draws=4)
    ensemble.load_state_dict({key: value + 3 for key, value in ensemble.state_dict().items()})
    assert ensemble.predict(IMAGES, draws=40).spread.max() > 0.05


class Sudden(nn.Module):
    """Adds noise to its weights, once a pass, from when it is told to: by a buffer, or behind its back."""

    level: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(()))
        self.linear, self.told = nn.Linear(16, 3), SimpleNamespace(level=0.0)

    def forward(self, inputs: Tensor) -> Tensor:
        level = float(self.level) + self.told.level
        weight = self.linear.weight
        weight = weight + level * torch.randn_like(weight) if level > 0 else weight
        return nn.functional.linear(inputs.flatten(1), weight, self.linear.bias)


@pytest.mark.parametrize("how", ["in place", "replaced", "loaded", "behind its back"])
def test_noise_that_came_later_is_certain_of_nothing(how: str) -> None:
    """Draws of one pass were one draw: of 40 decisions at a risk of .001 none named a class of three."""
    torch.manual_seed(0)
    network = Sudden()
    ensemble = rse.SelfEnsemble(nn.Sequential(rse.GaussianNoise(0.1), network)).eval()
    image = IMAGES[:1]
    assert int(rse.decide(ensemble, image).label) >= 0
    rse.certify(ensemble, image, n0=10, n=50)
    if how == "in place":
        network.level.fill_(5.0)
    elif how == "replaced":
        network.level = torch.tensor(5.0)
    elif how == "loaded":
        network.load_state_dict(network.state_dict() | {"level": torch.tensor(5.0)})
    else:
        network.told.level = 5.0
    decided = [int(rse.decide(ensemble, image, max_draws=60, seed=seed).label) for seed in range(8)]
    assert decided == [-1] * 8
    assert [int(rse.certify(ensemble, image, n0=10, n=60, seed=seed).label) for seed in range(4)] == [-1] * 4


def alone(linear: nn.Linear, inputs: Tensor) -> Tensor:
    if len(inputs) > 1:
        raise ValueError("one image at a time")
    return dropout(linear, inputs)


def test_networks_that_take_one_image_pass_them_one_by_one() -> None:
    ensemble = ensemble_of(alone)
    with torch.no_grad():
        found = images_share_numbers(ensemble.draw_logits, IMAGES[:1])
    assert found


def pairs(linear: nn.Linear, inputs: Tensor) -> Tensor:
    if len(inputs) > 2:
        raise IndexError("two images at most")
    return dropout(linear, inputs)


def test_no_pass_is_larger_than_was_asked_for() -> None:
    assert one_by_one(ensemble_of(pairs), IMAGES, 2) == 2
    assert one_by_one(ensemble_of(pairs), IMAGES, 7) == 1


def test_images_of_another_shape_are_refused_with_what_is_the_matter() -> None:
    with pytest.raises(ShapeError, match="cannot take inputs of shape"):
        rse.conformal_sets(ensemble_of(dropout), torch.rand(100, 3, 8, 8), torch.zeros(100).long())
