"""The Square Attack against closed forms on a linear classifier, and its contract on any model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.attacks.budget import count_evaluations
from selfensemble.attacks.norms import Norm, size
from selfensemble.attacks.square import _Proposals, square

from ..conftest import LinearClassifier

SHAPE = (1, 4, 4)
RADIUS: dict[Norm, float] = {"linf": 0.1, "l2": 0.5, "l1": 2.0}


@pytest.fixture
def linear() -> LinearClassifier:
    return LinearClassifier(16)


@pytest.fixture
def grey() -> Tensor:
    return 0.45 + 0.1 * torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    labels: Tensor = model(images).argmax(dim=1)
    return labels


@torch.no_grad()
def lead(linear: LinearClassifier, images: Tensor, labels: Tensor) -> Tensor:
    return linear.value(images) * (2 * labels - 1)


def test_reaches_the_largest_loss_of_a_linear_model(linear: LinearClassifier, grey: Tensor) -> None:
    labels = answers(linear, grey)
    adversarial = square(linear, grey, labels, eps=0.05, queries=300, early_stop=False, seed=0)
    optimum = lead(linear, grey, labels) + 0.05 * linear.a.detach().abs().sum()
    torch.testing.assert_close(lead(linear, adversarial, labels), optimum, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("norm", "share"), [("l2", 0.5), ("l1", 0.3)])
def test_comes_near_the_largest_loss(
    linear: LinearClassifier, grey: Tensor, norm: Norm, share: float
) -> None:
    labels, eps = answers(linear, grey), {"l2": 0.2, "l1": 0.4}[norm]
    adversarial = square(linear, grey, labels, norm=norm, eps=eps, queries=300, early_stop=False, seed=0)
    largest = eps * (linear.a.norm() if norm == "l2" else linear.a.abs().max()).detach()
    gain = lead(linear, adversarial, labels) - lead(linear, grey, labels)
    assert (gain > share * largest).all()
    assert (gain <= largest + 1e-4).all()


@pytest.mark.parametrize("shape", [(16,), (1, 16), (2, 8), (1, 2, 2, 4)])
def test_waveforms_and_volumes_reach_the_largest_loss(
    linear: LinearClassifier, grey: Tensor, shape: tuple[int, ...]
) -> None:
    waves = grey.view(8, *shape)
    labels = answers(linear, waves)
    found = square(linear, waves, labels, eps=0.05, queries=300, early_stop=False, seed=0)
    assert found.shape == waves.shape
    optimum = lead(linear, waves, labels) + 0.05 * linear.a.detach().abs().sum()
    torch.testing.assert_close(lead(linear, found, labels), optimum, atol=1e-4, rtol=0)
    for norm, share in (("l2", 0.4), ("l1", 0.3)):
        eps = {"l2": 0.2, "l1": 0.4}[norm]
        found = square(linear, waves, labels, norm=norm, eps=eps, queries=300, early_stop=False, seed=0)  # type: ignore[arg-type]
        largest = eps * (linear.a.norm() if norm == "l2" else linear.a.abs().max()).detach()
        gain = lead(linear, found, labels) - lead(linear, waves, labels)
        assert (gain > share * largest).all()
        assert (gain <= largest + 1e-4).all()


def test_a_waveform_is_changed_in_pieces_of_the_share() -> None:
    proposals = _Proposals("linf", 0.1, torch.Generator().manual_seed(0))
    waves = torch.full((20, 2, 1000), 0.5)
    changed = (proposals.next(waves, waves, 0.3) != waves).any(dim=1)
    for row in changed:
        (places,) = row.nonzero(as_tuple=True)
        assert (len(places), int(places[-1] - places[0])) == (300, 299)
    starts = {int(row.nonzero()[0]) for row in changed}
    assert len(starts) > 15  # of 701 each


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_fools_a_network_within_the_ball(tiny: nn.Module, images: Tensor, norm: Norm, loss: Any) -> None:
    labels, eps = answers(tiny, images), {"linf": 0.3, "l2": 4.0, "l1": 40.0}[norm]
    adversarial = square(tiny, images, labels, norm=norm, eps=eps, queries=600, loss=loss, seed=0)
    assert (answers(tiny, adversarial) != labels).all()
    assert (size(adversarial - images, norm) <= eps * (1 + 1e-5)).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_targeted_reaches_the_target(linear: LinearClassifier, grey: Tensor, norm: Norm) -> None:
    target = 1 - answers(linear, grey)
    eps = RADIUS[norm]
    adversarial = square(
        linear, grey, target, targeted=True, norm=norm, eps=eps, loss="ce", queries=300, seed=0
    )
    assert torch.equal(answers(linear, adversarial), target)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("shape", [(3, 5, 9), (1, 1, 1), (2, 3, 2), (1, 12, 11)])
def test_any_shape(norm: Norm, shape: tuple[int, int, int]) -> None:
    """Images that are not square, or smaller than the smallest square; black and white pixels."""
    features = shape[0] * shape[1] * shape[2]
    linear = LinearClassifier(features)
    images = torch.rand(4, *shape).round()
    labels = answers(linear, images)
    adversarial = square(linear, images, labels, norm=norm, eps=0.5, queries=40, early_stop=False, seed=0)
    assert (size(adversarial - images, norm) <= 0.5 * (1 + 1e-5)).all()
    assert (lead(linear, adversarial, labels) >= lead(linear, images, labels) - 1e-5).sum() >= 1
    assert torch.isfinite(adversarial).all()


@pytest.mark.parametrize("queries", [1, 2, 31])
def test_queries_are_counted(linear: LinearClassifier, grey: Tensor, queries: int) -> None:
    with count_evaluations() as budget:
        square(linear, grey, answers(linear, grey), eps=0.001, queries=queries, early_stop=False, seed=0)
    assert budget.gradients == 0
    assert budget.forwards == 8 * queries


def test_queries_of_a_random_model_are_counted(tiny: nn.Module, images: Tensor) -> None:
    """Two a candidate, each of `eot` draws; the last images are compared with the first on 10 draws."""
    ensemble = rse.SelfEnsemble(tiny).eval()
    labels = answers(ensemble, images)
    with count_evaluations() as budget:
        square(ensemble, images, labels, eps=0.001, queries=20, eot=3, early_stop=False, confirm_draws=5)
    assert budget.forwards == 6 * (20 * 3 + 5)


def test_stops_early(linear: LinearClassifier, grey: Tensor) -> None:
    labels = answers(linear, grey)
    with count_evaluations() as budget:
        adversarial = square(linear, grey, labels, eps=0.3, queries=500, seed=0)
    assert (answers(linear, adversarial) != labels).all()
    assert budget.forwards < 8 * 100
    with count_evaluations() as budget:
        kept = square(linear, grey, 1 - labels, eps=0.3, queries=500, seed=0)
    assert torch.equal(kept, grey)
    assert budget.forwards == 8


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_contract(tiny: nn.Sequential, images: Tensor, norm: Norm) -> None:
    """Seeds repeat, the caller's random state and the model stay as they were."""
    ensemble = rse.SelfEnsemble(tiny, draws=2).train()
    state, labels, kept = torch.get_rng_state(), torch.arange(6) % 5, images.clone()

    def run(seed: int | None) -> Tensor:
        return square(
            ensemble, images, labels, norm=norm, eps=RADIUS[norm], queries=12, early_stop=False,
            max_batch=4, seed=seed,
        )  # fmt: skip

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, kept)
    assert ensemble.training
    assert all(parameter.grad is None for parameter in ensemble.parameters())
    assert square(ensemble, images[:0], labels[:0], eps=0.1).shape == (0, 3, 8, 8)


class Noisy(nn.Module):
    """A linear model whose logits are far noisier than any change of the image."""

    def __init__(self, linear: LinearClassifier) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, inputs: Tensor) -> Tensor:
        value = self.linear.value(inputs) + 2 * torch.randn(())
        return torch.stack([value, torch.zeros_like(value)], dim=1)


def test_lucky_draws_do_not_shut_out_candidates(linear: LinearClassifier, grey: Tensor) -> None:
    """The best image is evaluated again on the draws of the candidate: noise common to both cancels.

    A remembered loss would be the luckiest of all draws, which no candidate could beat any more."""
    labels = answers(linear, grey)
    adversarial = square(Noisy(linear), grey[:1], labels[:1], eps=0.05, queries=800, early_stop=False, seed=0)
    gain = lead(linear, adversarial, labels[:1]) - lead(linear, grey[:1], labels[:1])
    assert gain.item() > 0.5 * 0.05 * linear.a.detach().abs().sum().item()


def test_frozen_noise(tiny: nn.Module, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(tiny).eval()
    with count_evaluations() as budget:
        square(
            ensemble, images, torch.arange(6) % 5, eps=0.1, queries=10, frozen=True, early_stop=False, seed=0
        )
    assert budget.forwards == 60


def test_one_lucky_draw_is_no_success(grey: Tensor) -> None:
    """A coin that answers wrong in one draw of ten fools nobody: no image leaves the search."""

    class Coin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            value = (-4.0 if self.calls % 10 == 0 else 4.0) + 0 * inputs.mean(dim=(1, 2, 3))
            noise = 1e-6 * torch.rand(()).expand_as(value)
            return torch.stack([value + noise, -value], dim=1)

    labels = torch.zeros(8, dtype=torch.int64)
    with count_evaluations() as budget:
        square(Coin(), grey, labels, eps=0.1, queries=400, seed=0)
    assert budget.forwards >= 8 * 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(8)}, "labels must be int64"),
        ({"labels": torch.full((8,), 2)}, "below 2"),
        ({"inputs": torch.full((8, *SHAPE), 2.0)}, r"\[0, 1\]"),
        ({"queries": 0}, "queries"),
        ({"norm": "l0"}, "norm must be"),
        ({"eps": 0.0}, "eps must be"),
        ({"eps": 1.5}, "eps must be"),
        ({"loss": "hinge"}, "loss must be"),
        ({"p_init": 0.0}, "p_init"),
        ({"p_init": float("nan")}, "p_init"),
        ({"max_batch": 0}, "max_batch"),
        ({"eot": 0}, "eot"),
    ],
)
def test_bad_input(linear: LinearClassifier, grey: Tensor, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"inputs": grey, "labels": torch.zeros(8, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        square(linear, **arguments)
