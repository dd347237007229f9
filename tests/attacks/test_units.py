"""Attacks in the units of an ensemble's inputs."""

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.attacks import ATTACKS, transfer

LOW, HIGH = -1.0, 3.0
LENGTHS = {"eps": 0.3, "step_size": 0.05, "initial_norm": 0.5}


BRIEFLY: dict[Any, dict[str, Any]] = {rse.attacks.pgd: {"steps": 3}, rse.attacks.square: {"queries": 5}}


class Rescaled(nn.Module):
    """The same network for inputs of another range."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.network((inputs - LOW) / (HIGH - LOW))
        return out


def ensembles(tiny: nn.Module) -> tuple[rse.SelfEnsemble, rse.SelfEnsemble]:
    """One in [0, 1], one in [LOW, HIGH], with the same weights and noise in the same units inside."""
    plain = rse.SelfEnsemble(tiny, rse.NoiseConfig(0.1, 0.1), draws=2).eval()
    return plain, rse.SelfEnsemble(Rescaled(tiny), draws=2, bounds=(LOW, HIGH)).eval()


def settings_of(name: str, scale: float) -> dict[str, Any]:
    known = inspect.signature(ATTACKS[name]).parameters
    few = {"steps": 3, "queries": 8, "tries": 3, "binary_search_steps": 2}
    settings: dict[str, Any] = {key: value for key, value in few.items() if key in known}
    return settings | {key: scale * value for key, value in LENGTHS.items() if key in known} | {"seed": 3}


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_radii_and_images_have_the_units_of_the_inputs(tiny: nn.Module, images: Tensor, name: str) -> None:
    plain, wide = ensembles(tiny)
    labels, span = plain.predict(images, seed=0).label, HIGH - LOW
    found = ATTACKS[name](plain, images, labels, **settings_of(name, 1.0))
    theirs = ATTACKS[name](wide, LOW + span * images, labels, **settings_of(name, span))
    torch.testing.assert_close((theirs - LOW) / span, found, rtol=0, atol=2e-3)
    assert theirs.min() >= LOW
    assert theirs.max() <= HIGH
    assert not torch.equal(theirs, LOW + span * images)
    one, other = (
        rse.judge(model, inputs, adversarial, labels, seed=1)
        for model, inputs, adversarial in ((plain, images, found), (wide, LOW + span * images, theirs))
    )
    torch.testing.assert_close(other.l2, span * one.l2, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", [float, np.float32, np.array, torch.tensor])
def test_radii_of_numpy_and_torch_have_the_units_of_the_inputs(
    tiny: nn.Module, images: Tensor, kind: Any
) -> None:
    plain, wide = ensembles(tiny)
    for model, inputs in ((wide, LOW + (HIGH - LOW) * images), (plain, images)):
        labels = model.predict(inputs, seed=0).label
        for attack in (rse.attacks.pgd, rse.attacks.square):
            found = attack(model, inputs, labels, eps=kind(0.25), seed=0, **BRIEFLY[attack])
            assert float((found - inputs).abs().max()) == pytest.approx(0.25, rel=1e-4)


def test_the_largest_radius_of_a_box_is_allowed(tiny: nn.Module) -> None:
    """Divided by the width of the bounds it is rounded."""
    images = torch.rand(1, 3, 8, 8)
    for width in range(1, 40):
        ensemble = rse.SelfEnsemble(tiny, bounds=(0.0, width / 7)).eval()
        largest = width / 7 * math.sqrt(images.numel())
        rse.attacks.fgsm(ensemble, images * width / 7, torch.tensor([0]), norm="l2", eps=largest, seed=0)
        rse.remove_noise_(ensemble.model)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_a_linear_network_of_another_range_moves_by_the_closed_form(norm: str, dual: int) -> None:
    """The lead of a label falls by eps times the dual norm of its slope, and no further; see `ensembles`."""
    conv = nn.Conv2d(3, 2, 8)
    network = nn.Sequential(conv, nn.Flatten())
    wide = rse.SelfEnsemble(network, rse.NoiseConfig(0.0, 0.0), draws=1, bounds=(-1.0, 1.0)).eval()
    inputs, eps = torch.rand(6, 3, 8, 8) - 0.5, 0.3
    labels = wide(inputs).argmax(dim=1)
    slope = (conv.weight[0] - conv.weight[1]).flatten()
    found = ATTACKS["pgd"](wide, inputs, labels, norm=norm, eps=eps, steps=30, seed=0)
    before, after = (wide(each).diff(dim=1).squeeze(1).abs() for each in (inputs, found))
    lead = torch.where(wide(found).argmax(dim=1) == labels, after, -after)
    torch.testing.assert_close(before - lead, (eps * slope.norm(dual)).expand(6), rtol=1e-3, atol=1e-4)


def test_what_needs_no_attack_comes_back_as_it_was(tiny: nn.Module, images: Tensor) -> None:
    """To the bit: no round trip through [0, 1] rounds it."""
    _, wide = ensembles(tiny)
    with rse.noise_disabled(wide):
        inputs = LOW + (HIGH - LOW) * images
        wrong = (wide.predict(inputs).label + 1) % 5
        assert torch.equal(rse.attacks.fmn(wide, inputs, wrong), inputs)


def test_transfer_and_refusals(tiny: nn.Module, images: Tensor) -> None:
    _, wide = ensembles(tiny)
    inputs = LOW + (HIGH - LOW) * images
    labels = wide.predict(inputs, seed=0).label
    moved = transfer(wide, inputs, labels, norm="linf", eps=0.4, steps=3, seed=0) - inputs
    assert 0.3 < moved.abs().max() <= 0.4 + 1e-5
    with pytest.raises(ValueError, match=r"\[-1, 3\]"):
        rse.attacks.pgd(wide, 2 * inputs, labels)
    with pytest.raises(ValueError, match=r"\[-1, 3\]"):
        rse.judge(wide, inputs, 2 * inputs, labels)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        rse.attacks.pgd(wide.model, inputs, labels)
    with pytest.raises(ValueError, match="beyond eps"):
        rse.judge(wide, inputs, (inputs + 0.5).clamp(LOW, HIGH), labels, eps=0.4)
