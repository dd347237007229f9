"""Decisions of the infinite ensemble: right as often as they say, and no more draws than they need."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.certainty.decision import ABSTAINED, Gamblers, decide

_REPETITIONS = 10_000


def dirichlet(mean: list[float], strength: float) -> "Law":
    def law(generator: np.random.Generator) -> Tensor:
        return torch.from_numpy(generator.dirichlet(np.array(mean) * strength, size=_REPETITIONS))

    return law


def one_hot(mean: list[float]) -> "Law":
    def law(generator: np.random.Generator) -> Tensor:
        return torch.from_numpy(generator.multinomial(1, mean, size=_REPETITIONS))

    return law


Law = object


def play(law: object, classes: int, alpha: float, draws: int, guess: int = 0) -> tuple[Tensor, Tensor]:
    """Labels and draws of 10,000 repetitions."""
    generator = np.random.default_rng(7)
    gamblers = Gamblers(torch.full((_REPETITIONS,), guess), classes, alpha)
    used = torch.full((_REPETITIONS,), draws)
    labels = torch.full((_REPETITIONS,), ABSTAINED)
    for index in range(1, draws + 1):
        gamblers.draw(law(generator))  # type: ignore[operator]
        new = gamblers.decided & (labels == ABSTAINED) & (used == draws)
        used[new], labels[new] = index, gamblers.labels()[new]
    return labels, used


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize(
    ("law", "mean"),
    [
        (one_hot([0.51, 0.49]), [0.51, 0.49]),
        (one_hot([0.49, 0.51]), [0.49, 0.51]),
        (one_hot([0.35, 0.34, 0.31]), [0.35, 0.34, 0.31]),
        (one_hot([0.02, 0.98]), [0.02, 0.98]),
        (dirichlet([0.34, 0.36, 0.3], 1.0), [0.34, 0.36, 0.3]),
        (dirichlet([0.02, 0.9, 0.08], 2.0), [0.02, 0.9, 0.08]),
    ],
    ids=["near a half", "guessed wrong", "three near", "sure", "beta near", "beta sure"],
)
def test_wrong_decisions_are_as_rare_as_promised(law: object, mean: list[float], alpha: float) -> None:
    labels, _ = play(law, len(mean), alpha, 60)
    best = max(mean)
    right = torch.tensor([value == best for value in mean])
    wrong = (labels != ABSTAINED) & ~right[labels.clamp_min(0)]
    assert float(wrong.double().mean()) <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / _REPETITIONS)


def test_a_tie_is_seldom_decided() -> None:
    """Either answer would be right; still the gamblers cannot get rich."""
    labels, _ = play(one_hot([0.5, 0.5]), 2, 0.05, 60)
    # One of two processes: at most 2 alpha.
    assert float((labels != ABSTAINED).double().mean()) <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / _REPETITIONS)


def test_clear_answers_come_soon_and_never_before_the_floor() -> None:
    for alpha, floor in ((0.05, 5), (0.001, 10)):
        labels, used = play(one_hot([0.0, 1.0]), 2, alpha, 40, guess=1)
        assert (labels == 1).all()
        assert floor <= int(used.min()) <= int(used.max()) <= floor + 1
        labels, used = play(dirichlet([0.02, 0.95, 0.03], 3.0), 3, alpha, 60, guess=1)
        assert float(used.double().median()) <= floor + 4
        assert (labels == 1).double().mean() > 0.99


class Coin(nn.Module):
    """Noise on one pixel, whose sign decides between two classes: P(class 1) = Phi(x / std)."""

    def __init__(self, std: float = 1.0) -> None:
        super().__init__()
        self.noise = rse.GaussianNoise(std)
        self.scale = nn.Parameter(torch.tensor(1e4))

    def forward(self, inputs: Tensor) -> Tensor:
        value = self.scale * self.noise(inputs).flatten(1).sum(dim=1)
        return torch.stack([-value, value, torch.full_like(value, -1e6)], dim=1)


def test_decisions_of_a_network() -> None:
    ensemble = rse.SelfEnsemble(Coin(), bounds=None).eval()
    pixels = torch.tensor([2.5, -2.5, 0.0, 0.8]).view(4, 1)
    found = decide(ensemble, pixels.repeat(50, 1), alpha=0.01, max_draws=80, seed=0)
    truth = torch.distributions.Normal(0.0, 1.0).cdf(pixels[:, 0].abs()).repeat(50).double()
    assert found.label.shape == found.draws.shape == (200,)
    for kind, label in ((0, 1), (1, 0)):
        assert (found.label[kind::4] == label).all()
        assert found.draws[kind::4].double().mean() < 12
    undecided = found.label[2::4] == ABSTAINED
    assert undecided.double().mean() > 0.9
    assert (found.draws[2::4][undecided] == 80).all()
    decided = found.label != ABSTAINED
    assert (found.leader[decided] == found.label[decided]).all()
    # Intervals hold for all 200 at a risk of .01 each: 8 misses or more have probability 1e-3.
    leads = torch.where(found.leader == (pixels[:, 0] > 0).long().repeat(50), truth, 1 - truth)
    assert int(((found.low > leads) | (found.high < leads)).sum()) < 8
    assert (found.high - found.low)[2::4].mean() < 0.5
    assert decide(ensemble, pixels, seed=3).draws.tolist() == decide(ensemble, pixels, seed=3).draws.tolist()


def test_without_noise_one_pass_decides() -> None:
    ensemble = rse.SelfEnsemble(Coin(), bounds=None).eval()
    with rse.noise_disabled(ensemble):
        found = decide(ensemble, torch.tensor([[1.0], [-1.0]]))
    assert found.label.tolist() == [1, 0]
    assert found.draws.tolist() == [1, 1]


def test_one_draw_one_class_and_no_image(tiny: nn.Module, images: Tensor) -> None:
    found = decide(rse.SelfEnsemble(tiny), images, max_draws=1)
    assert (found.label == ABSTAINED).all()
    assert found.draws.tolist() == [1] * 6
    assert found.low.tolist() == [0.0] * 6
    assert found.high.tolist() == [1.0] * 6
    assert decide(rse.SelfEnsemble(tiny), images[:0]).label.shape == (0,)
    single = nn.Sequential(nn.Conv2d(3, 1, 8), nn.Flatten())
    with pytest.raises(ValueError, match="two classes or more"):
        decide(rse.SelfEnsemble(single), images)


def test_bad_settings(tiny: nn.Module, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(tiny)
    with pytest.raises(ValueError, match="alpha must lie between 1e-300 and 1"):
        decide(ensemble, images, alpha=0)
    with pytest.raises(ValueError, match="max_draws must be an integer >= 1"):
        decide(ensemble, images, max_draws=0)


class Dropped(nn.Module):
    """Dropout at test time, which the guess of the leading class sees as well."""

    def __init__(self) -> None:
        super().__init__()
        self.network = rse.load("digits-rse").model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(nn.functional.dropout(inputs, 0.5, training=True))  # type: ignore[no-any-return]


def test_a_seed_repeats_decisions_of_any_noise() -> None:
    """The first bets follow a guess, which is of the seed too."""
    ensemble = rse.SelfEnsemble(Dropped(), None).eval()
    images = rse.load_data("digits", "test").inputs(slice(40))
    first = rse.decide(ensemble, images, seed=3)
    assert len(set(first.draws.tolist())) > 2
    for _ in range(3):
        again = rse.decide(ensemble, images, seed=3)
        for name in ("label", "draws", "leader", "low", "high"):
            assert torch.equal(getattr(first, name), getattr(again, name))


def test_risks_next_to_nothing_and_numbers_that_are_none() -> None:
    ensemble = rse.load("digits-rse")
    images = rse.load_data("digits", "test").inputs(slice(2))
    assert rse.decide(ensemble, images, alpha=1e-300, max_draws=5, seed=0).label.tolist() == [-1, -1]
    with pytest.raises(ValueError, match="alpha must lie between 1e-300 and 1"):
        rse.decide(ensemble, images, alpha=5e-324)  # which is 0 where it is divided among classes
    still = rse.SelfEnsemble(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), rse.NoiseConfig(0, 0)).eval()
    with torch.no_grad():
        still.model[1].bias[0] = torch.nan  # type: ignore[index]
    with pytest.raises(ValueError, match="returns NaN"):
        rse.decide(still, images)
