"""Bounds on probabilities and means: they hold as often as they say, whatever is bounded."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor

from selfensemble.certainty.bounds import (
    MeanBound,
    clopper_pearson_lower,
    clopper_pearson_upper,
    mean_lower,
    mean_upper,
    narrower,
)

_REPETITIONS = 10_000


def allowed(alpha: float) -> float:
    """alpha plus 3 standard errors."""
    return float(alpha + 3 * np.sqrt(alpha * (1 - alpha) / _REPETITIONS))


def beta(a: float, b: float) -> tuple[Any, float]:
    return stats.beta(a, b), a / (a + b)


DISTRIBUTIONS: dict[str, tuple[Any, float]] = {
    "bernoulli .5": (stats.bernoulli(0.5), 0.5),
    "bernoulli .52": (stats.bernoulli(0.52), 0.52),
    "bernoulli .98": (stats.bernoulli(0.98), 0.98),
    "bernoulli .02": (stats.bernoulli(0.02), 0.02),
    "beta .5": beta(2.0, 2.0),
    "beta .9": beta(0.9, 0.1),
    "beta .999": beta(9.99, 0.01),
    "a number": (stats.uniform(0.7, 0.0), 0.7),
}


@functools.cache
def samples_of(name: str, count: int) -> tuple[Tensor, float]:
    """(count, repetitions) numbers, and their mean."""
    law, mean = DISTRIBUTIONS[name]
    seed = sum(map(ord, name))
    if name == "a number":
        return torch.full((count, _REPETITIONS), 0.7), mean
    drawn = law.rvs(size=(count, _REPETITIONS), random_state=np.random.default_rng(seed))
    return torch.from_numpy(np.asarray(drawn, dtype=np.float32)), mean


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("method", ["betting", "bernstein", "binomial"])
def test_mean_bounds_hold(name: str, method: MeanBound) -> None:
    samples, mean = samples_of(name, 60)
    coins = torch.Generator().manual_seed(0)
    for alpha in (0.05, 0.001):
        low = mean_lower(samples, alpha, method, generator=coins)
        high = 1 - mean_lower(1 - samples, alpha, method, generator=coins)
        assert float((low > mean + 1e-6).double().mean()) <= allowed(alpha)
        assert float((high < mean - 1e-6).double().mean()) <= allowed(alpha)
    few = samples[:, :500]
    assert torch.equal(mean_upper(few, 0.05, "betting"), 1 - mean_lower(1 - few.double(), 0.05))


@pytest.mark.parametrize("name", ["bernoulli .5", "bernoulli .98", "beta .9"])
def test_bounds_for_a_horizon_hold_whenever_one_stops(name: str) -> None:
    """The best of many looks: a bound for a number of samples fixed beforehand would fail too often."""
    samples, mean = samples_of(name, 60)
    looks = [mean_lower(samples[:count], 0.05, horizon=30) for count in range(2, 61, 4)]
    best = torch.stack(looks).amax(dim=0)
    assert float((best > mean).double().mean()) <= allowed(0.05)


@pytest.mark.parametrize("probability", [0.5, 0.52, 0.98, 0.999])
def test_clopper_pearson_holds(probability: float) -> None:
    counts = np.random.default_rng(1).binomial(100, probability, size=_REPETITIONS)
    for alpha in (0.05, 0.001):
        assert (clopper_pearson_lower(counts, 100, alpha) > probability).mean() <= allowed(alpha)
        assert (clopper_pearson_upper(counts, 100, alpha) < probability).mean() <= allowed(alpha)


@pytest.mark.parametrize(
    ("count", "trials"), [(1, 10), (7, 10), (10, 10), (9_990, 10_000), (52_000, 100_000)]
)
def test_clopper_pearson_by_its_definition(count: int, trials: int) -> None:
    """The probability at which so many or more happen with probability alpha."""
    for alpha in (0.001, 0.05):
        root = optimize.brentq(lambda p, a=alpha: stats.binom.sf(count - 1, trials, p) - a, 0, 1, xtol=1e-14)
        assert clopper_pearson_lower(np.array([count]), trials, alpha)[0] == pytest.approx(root, abs=1e-9)
        assert clopper_pearson_upper(np.array([trials - count]), trials, alpha)[0] == pytest.approx(
            1 - root, abs=1e-9
        )
    assert clopper_pearson_lower(np.array([0]), trials, 0.05)[0] == 0
    assert clopper_pearson_upper(np.array([trials]), trials, 0.05)[0] == 1


def test_bounds_close_in_on_the_mean_and_betting_is_tighter() -> None:
    generator = np.random.default_rng(0)
    widths: dict[tuple[str, int], float] = {}
    for count in (100, 1_000, 10_000):
        samples = torch.from_numpy(generator.beta(9.5, 0.5, size=(count, 40)))
        for method in ("betting", "bernstein"):
            low = mean_lower(samples, 0.001, method)
            widths[method, count] = float((0.95 - low).mean())
    assert widths["betting", 10_000] < widths["betting", 1_000] / 2 < widths["betting", 100] / 4
    assert all(widths["betting", count] < widths["bernstein", count] for count in (100, 1_000, 10_000))
    # The normal quantile is the limit.
    limit = 3.09 * float(np.sqrt(0.95 * 0.05 / 11)) / 100
    assert limit < widths["betting", 10_000] < 1.35 * limit


def test_bad_samples() -> None:
    with pytest.raises(ValueError, match="two samples or more"):
        mean_lower(torch.rand(1, 3), 0.05)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        mean_lower(torch.full((5, 2), 1.5), 0.05)
    with pytest.raises(ValueError, match="leave horizon out"):
        mean_lower(torch.rand(5, 2), 0.05, "bernstein", horizon=9)


def test_the_narrower_bound_is_foreseen() -> None:
    """For outputs of 0 and 1, for one number, and for soft outputs."""
    generator = np.random.default_rng(0)
    for law, coins_win in (
        (generator.binomial(1, 0.99, size=(10_000, 20)), True),
        (np.ones((10_000, 20)), True),
        (generator.beta(9, 1, size=(10_000, 20)), False),
    ):
        samples = torch.from_numpy(law).double()
        pilot = samples[:100]
        foreseen = narrower(pilot.mean(dim=0), pilot.var(dim=0), 0.001, 10_000)
        bounds = [mean_lower(samples, 0.001, method) for method in ("binomial", "betting")]
        assert bool((bounds[0].mean() > bounds[1].mean()) == coins_win)
        assert (foreseen == coins_win).double().mean() > 0.9
