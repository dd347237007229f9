"""Which wrong classes an attack heads for, and the margin of probabilities."""

import math

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.attacks import apgd_targeted, pgd
from selfensemble.attacks.averaging import Noise
from selfensemble.attacks.expectation import Oracle
from selfensemble.attacks.losses import probability_margin
from selfensemble.attacks.targets import Order, wrong_classes


@pytest.fixture
def network() -> nn.Module:
    """Class 0 leads at mid-grey; 1 is likelier than 2, and its boundary ten times as far: .5 against .05."""
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0] * 4, [2.0, 0, 0, 0], [0, 40.0, 0, 0], [0, 0, 1.0, 0]]))
        linear.bias.copy_(torch.tensor([0.0, -2.0, -22.0, -9.0]))
    return nn.Sequential(nn.Flatten(), linear)


@pytest.fixture
def grey() -> Tensor:
    return torch.full((3, 1, 2, 2), 0.5)


def test_near_classes_come_before_likely_ones(network: nn.Module, grey: Tensor) -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    oracle = Oracle(network, Noise(), seed=0, is_random=False, classes=4)
    assert wrong_classes(oracle, grey, labels, 9, "likely", "l2").tolist() == [[1, 2, 3]] * 3
    assert wrong_classes(oracle, grey, labels, 9, "near", "l2").tolist() == [[2, 1, 3]] * 3
    assert wrong_classes(oracle, grey, labels, 1, "near", "linf").tolist() == [[2]] * 3


def test_one_near_target_finds_what_one_likely_target_does_not(network: nn.Module, grey: Tensor) -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    orders: tuple[Order, ...] = ("likely", "near")
    found = {
        order: apgd_targeted(
            network, grey, labels, norm="l2", eps=0.06, steps=20, targets=1, order=order, seed=0
        )
        for order in orders
    }
    assert network(found["likely"]).argmax(dim=1).tolist() == [0, 0, 0]
    assert network(found["near"]).argmax(dim=1).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="order must be one of likely, near"):
        apgd_targeted(network, grey, labels, order="nearest")  # type: ignore[arg-type]


def test_the_margin_of_probabilities_is_the_lead() -> None:
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(20, 5), torch.randint(5, (20,))
    p = logits.softmax(dim=1)
    own = p[torch.arange(20), labels]
    rival = torch.stack([torch.cat([row[:y], row[y + 1 :]]).max() for row, y in zip(p, labels, strict=True)])
    torch.testing.assert_close(probability_margin(logits, labels, False), rival - own)
    torch.testing.assert_close(probability_margin(logits, labels, True), own - rival)


@pytest.mark.parametrize("lead", [1.0, 20.0, 50.0, 1e4])
@pytest.mark.parametrize("targeted", [False, True])
def test_its_gradient_keeps_the_true_class_where_a_network_is_sure(lead: float, targeted: bool) -> None:
    """Against the difference of two softmax outputs in float64, which holds leads up to some 30."""
    labels = torch.tensor([1, 1])
    logits = torch.tensor([[0.5, lead, 0.0, -3.0], [-2.0, lead, 0.0, -1.0]], requires_grad=True)
    (found,) = torch.autograd.grad(probability_margin(logits, labels, targeted).sum(), logits)
    assert found.isfinite().all()
    assert (found[:, 1].abs() > 0).all()
    if lead < 60:
        wide = logits.detach().double().requires_grad_()
        p = wide.softmax(dim=1)
        others = p[:, [0, 2, 3]]
        sign = -1 if targeted else 1
        value = sign * (others.amax(dim=1) - (1 - others.sum(dim=1)))  # exact where p of the class is near 1
        (wanted,) = torch.autograd.grad(value.sum(), wide)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)
    else:
        assert found[:, 1].abs().tolist() == pytest.approx([math.exp(-60)] * 2, rel=1e-4)


def test_pgd_climbs_it(tiny: nn.Module, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(tiny, rse.NoiseConfig(0.1, 0.1), draws=20).eval()
    labels = ensemble.predict(images, seed=0).label
    moved = pgd(
        ensemble, images, labels, norm="l2", eps=1.0, steps=20, eot=4, loss="probability-margin", seed=0
    )
    before, after = (rse.judge(ensemble, images, each, labels, seed=1).lead for each in (images, moved))
    assert (after > before + 0.004).all()
