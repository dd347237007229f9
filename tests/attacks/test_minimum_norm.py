"""Minimum-norm attacks: closed forms, random networks, scales, and what they find where PGD finds it."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.attacks import cw_l2, ddn, fab, fmn, pgd
from selfensemble.attacks.losses import cross_entropy
from selfensemble.attacks.norms import unit_l2
from selfensemble.evaluation.balls import within

from ..conftest import LinearClassifier

Attack = Callable[..., Tensor]
ATTACKS: dict[str, Attack] = {
    "cw": lambda *args, **more: cw_l2(*args, steps=40, binary_search_steps=4, **more),
    "ddn": ddn,
    "fmn": fmn,
    "fab": lambda *args, **more: fab(*args, norm="l2", steps=30, **more),
}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = rse.load_data("digits", "test")
    return data.inputs(slice(60)), data.labels[:60]


@pytest.fixture(scope="module")
def ensemble() -> rse.SelfEnsemble:
    return rse.load("digits-rse").eval()


@pytest.fixture(scope="module")
def plain(ensemble: rse.SelfEnsemble) -> nn.Module:
    """The network of it without its noise."""
    network: nn.Module = deepcopy(ensemble).model
    rse.remove_noise_(network)
    network.eval()
    return network


def length(change: Tensor) -> Tensor:
    norms: Tensor = change.flatten(1).norm(dim=1)
    return norms


@pytest.mark.parametrize("name", ATTACKS)
def test_none_is_far_from_the_nearest(name: str, plain: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """Attacks that stay with the boundary nearest to the image were 5 % farther on average."""
    images, labels = digits
    nearest = length(fmn(plain, images, labels, norm="l2", steps=500, seed=0) - images)
    found = length(ATTACKS[name](plain, images, labels, seed=0) - images)
    attacked = nearest > 0
    ratio = found[attacked] / nearest[attacked]
    assert float(ratio.mean()) < 1.025
    assert int((ratio > 1.1).sum()) <= 2


def test_draws_of_a_random_network_come_nearer_in_fewer_steps(
    ensemble: rse.SelfEnsemble, digits: tuple[Tensor, Tensor]
) -> None:
    images, labels = digits[0][:40], digits[1][:40]
    shared, single = (
        length(fmn(ensemble, images, labels, norm="l2", seed=0, average=average) - images)
        for average in ("probabilities", "losses")
    )
    assert float((shared / single)[single > 0].mean()) < 1


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("std", [0.05, 0.15])
def test_distances_on_a_noisy_linear_network(name: str, std: float) -> None:
    """With noise on the pixels the mean softmax changes its mind where the noiseless network does.

    At distance |f| / ||a||; the images lie 1.5 to 12 standard deviations of the noise away. Each returned
    image fools with a probability of 95 % at least: 36 of 40 or fewer do in one run of 100.
    """
    torch.manual_seed(3)
    network = LinearClassifier(192)
    inputs = 0.5 + 0.1 * torch.rand(40, 3, 8, 8) - 0.05
    with torch.no_grad():
        network.b.copy_(-network.value(inputs).mean() - network.a.norm() * torch.tensor(0.7))
        labels = network(inputs).argmax(dim=1)
        closed = network.value(inputs).abs() / network.a.norm()
    assert closed.min() > 1.5 * std
    found = ATTACKS[name](nn.Sequential(rse.GaussianNoise(std), network).eval(), inputs, labels, seed=0)
    with torch.no_grad():
        fools = network(found).argmax(dim=1) != labels
    assert int(fools.sum()) > 36
    ratio = length(found - inputs) / closed
    assert (ratio > 0.9).all()
    assert (ratio < 1.05).all()


@pytest.fixture(scope="module")
def broken(ensemble: rse.SelfEnsemble, digits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Digits that PGD breaks within 1.6, and their labels."""
    inputs, labels = digits[0][:40], digits[1][:40]
    right = ensemble.predict(inputs, draws=100, seed=1).label == labels
    attacked = pgd(ensemble, inputs, labels, norm="l2", eps=1.6, steps=20, eot=4, seed=0)
    found = right & (ensemble.predict(attacked, draws=100, seed=2).label != labels)
    assert int(found.sum()) > 35
    return inputs[found], labels[found]


@pytest.mark.parametrize("name", ATTACKS)
def test_what_pgd_breaks_they_break(
    name: str, ensemble: rse.SelfEnsemble, broken: tuple[Tensor, Tensor]
) -> None:
    """PGD breaks every digit within 1.6; the question is whether the nearest image is found at all."""
    inputs, labels = broken
    found = ATTACKS[name](ensemble, inputs, labels, eot=2, seed=0)
    assert (length(found - inputs) > 1e-3).all()
    carried = within(found, inputs, "l2", 1.6, farther=True)
    held = ensemble.predict(carried, draws=100, seed=3).label == labels
    assert not held.any()


@pytest.mark.parametrize("steps", [20, 50])
def test_cw_breaks_every_image_however_few_the_steps(
    plain: nn.Module, digits: tuple[Tensor, Tensor], steps: int
) -> None:
    """Digits have black pixels, which a change of variables by tanh hardly moves."""
    inputs, labels = digits
    right = plain(inputs).argmax(dim=1) == labels
    inputs, labels = inputs[right], labels[right]
    found = cw_l2(plain, inputs, labels, steps=steps, binary_search_steps=5)
    assert (plain(found).argmax(dim=1) != labels).all()
    assert length(found - inputs).max() < 1.6


class Scaled(nn.Module):
    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.factor * self.network(inputs)
        return out


@pytest.mark.parametrize("name", ATTACKS)
def test_the_scale_of_logits_is_no_matter(name: str, plain: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    inputs, labels = digits[0][:16], digits[1][:16]
    once, *scaled = (
        length(ATTACKS[name](network, inputs, labels, seed=0) - inputs)
        for network in (plain, Scaled(plain, 1e-3), Scaled(plain, 1e3))
    )
    for found in scaled:
        torch.testing.assert_close(found, once, rtol=0.05, atol=1e-3)


def test_a_sure_network_has_a_gradient() -> None:
    """At a lead of 40, 200 and 1000 `1 - softmax_y` is 0 in float32."""
    logits = torch.tensor([[40.0, 0.0, -1.0], [200.0, 0.0, -1.0], [1000.0, 0.0, -1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, torch.tensor([0, 0, 0]), False).sum(), logits)
    expected = torch.tensor([-1.0, 1 / (1 + torch.e**-1), torch.e**-1 / (1 + torch.e**-1)])
    for row in unit_l2(gradient):
        torch.testing.assert_close(row, expected / expected.norm(), rtol=1e-5, atol=0)


def test_cross_entropy_is_that_of_torch() -> None:
    torch.manual_seed(0)
    logits, labels = 8 * torch.randn(64, 7), torch.randint(7, (64,))
    expected = nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, labels, False), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cross_entropy(logits, labels, True), -expected, rtol=1e-5, atol=1e-6)


def test_kappa_is_kept(plain: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    inputs, labels = digits[0][:12], digits[1][:12]
    far = cw_l2(plain, inputs, labels, steps=60, binary_search_steps=5, kappa=3.0)
    near = cw_l2(plain, inputs, labels, steps=60, binary_search_steps=5)
    logits = plain(far)
    margins = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1) - logits[torch.arange(12), labels]
    assert (margins > 2.99).all()
    assert (length(far - inputs) > length(near - inputs)).all()
