"""Confidence bounds on probabilities and on means of numbers in [0, 1].

Each function bounds one side, for many images at once; a bound for the other side is that of `1 - x`.
"""

import math
from typing import Literal

import numpy as np
import torch
from scipy import special
from torch import Tensor

from ..noise.streams import fresh_seed

MeanBound = Literal["betting", "bernstein", "binomial"]
_STEPS = 40  # of bisection: an interval of 2^-40
_TRUNCATION = 0.75  # most of the capital that a bet may lose


def clopper_pearson_lower(counts: np.ndarray, trials: int | np.ndarray, alpha: float) -> np.ndarray:
    """Lower bounds of the probability of what happened `counts` times in `trials`.

    Each is above the probability with probability `alpha` at most. Exact.
    """
    counts, trials = np.broadcast_arrays(np.asarray(counts), np.asarray(trials))
    with np.errstate(invalid="ignore"):
        bound = special.betaincinv(counts, trials - counts + 1, alpha)
    return np.where(counts == 0, 0.0, bound)


def clopper_pearson_upper(counts: np.ndarray, trials: int | np.ndarray, alpha: float) -> np.ndarray:
    """Upper bounds, see `clopper_pearson_lower`."""
    counts, trials = np.broadcast_arrays(np.asarray(counts), np.asarray(trials))
    return 1.0 - clopper_pearson_lower(trials - counts, trials, alpha)


def mean_lower(
    samples: Tensor,
    alpha: float,
    method: MeanBound = "betting",
    horizon: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Lower bounds of the means of independent numbers in [0, 1].

    Args:
        samples: (n, ...), n >= 2, on any device.
        alpha: each bound is above the mean with probability `alpha` at most.
        method: "betting"; "bernstein", which is closed form and wider; "binomial", which replaces each
            number by a coin that shows 1 with that probability and bounds the share of ones exactly: the
            narrowest where numbers are nearly all 0 or 1.
        horizon: the number of samples that bets are made for, by default n. A number that does not depend
            on the samples makes the bound hold whatever decided how many there are ("betting" alone).
        generator: of the coins, on the CPU; None for fresh entropy.

    Returns:
        (...) float64, on the CPU: not every device has float64.

    Raises:
        ValueError: fewer than two samples, or numbers outside [0, 1].
    """
    if len(samples) < 2:
        raise ValueError(f"a bound on a mean needs two samples or more, got {len(samples)}")
    samples = samples.cpu().double()
    if samples.numel() and not (samples.min() >= -1e-9 and samples.max() <= 1 + 1e-6):
        raise ValueError("samples must lie in [0, 1]")
    samples = samples.clamp(0, 1)
    if method == "bernstein":
        bound = _bernstein(samples, alpha)
    elif method == "binomial":
        if generator is None:
            generator = torch.Generator("cpu").manual_seed(fresh_seed())
        chance = torch.rand(samples.shape, dtype=samples.dtype, device="cpu", generator=generator)
        ones = (chance < samples).sum(dim=0)
        bound = torch.from_numpy(clopper_pearson_lower(ones.numpy(), len(samples), alpha))
    else:
        return _betting(samples, alpha, horizon or len(samples))
    if horizon is not None:
        raise ValueError(f'"{method}" holds for a number of samples fixed beforehand: leave horizon out')
    return bound


def mean_upper(
    samples: Tensor, alpha: float, method: MeanBound = "betting", horizon: int | None = None
) -> Tensor:
    """Upper bounds, see `mean_lower`."""
    return 1 - mean_lower(1 - samples.cpu().double(), alpha, method, horizon)


def _bernstein(samples: Tensor, alpha: float) -> Tensor:
    """Maurer and Pontil, Empirical Bernstein bounds and sample variance penalization, COLT 2009, thm. 4."""
    count = len(samples)
    log = math.log(2 / alpha)
    width = (2 * samples.var(dim=0) * log / count).sqrt() + 7 * log / (3 * (count - 1))
    return (samples.mean(dim=0) - width).clamp_min(0)


def _betting(samples: Tensor, alpha: float, horizon: int) -> Tensor:
    """Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B 2024.

    A gambler bets, sample after sample, that the mean is above m. If it is not, her capital ever reaches
    1 / alpha times what she began with with probability alpha at most (Ville's inequality): every m at which
    it does is refuted. Her bets are theirs for a fixed number of samples (section 3), one-sided: each is set
    by the mean and the variance of the samples before it.
    """
    number = torch.arange(1, len(samples) + 1, dtype=torch.float64, device="cpu")
    number = number.view(-1, *[1] * (samples.dim() - 1))
    means = (samples.cumsum(dim=0) + 0.5) / (number + 1)
    variances = ((samples - means).square().cumsum(dim=0) + 0.25) / (number + 1)
    before = torch.cat([torch.full_like(variances[:1], 0.25), variances[:-1]])
    bets = (2 * math.log(1 / alpha) / (horizon * before)).sqrt()

    def refuted(mean: Tensor) -> Tensor:
        limited = torch.minimum(bets, _TRUNCATION / mean)
        capital: Tensor = torch.log1p(limited * (samples - mean)).cumsum(dim=0).amax(dim=0)
        return capital >= math.log(1 / alpha)

    # Capital falls with m: all below the bound are refuted.
    low, high = torch.zeros_like(samples[0]), torch.ones_like(samples[0])
    for _ in range(_STEPS):
        middle = (low + high) / 2
        beyond = refuted(middle)
        low, high = torch.where(beyond, middle, low), torch.where(beyond, high, middle)
    return low


def narrower(mean: Tensor, variance: Tensor, alpha: float, count: int) -> Tensor:
    """Whether "binomial" is likely narrower than "betting".

    Args:
        mean, variance: (...) of other samples of the same law.
        alpha, count: of the bound that is to be made.

    Returns:
        (...) bool, on the CPU.
    """
    mean, variance = mean.cpu().double(), variance.cpu().double()
    log = math.log(1 / alpha)
    usual = (2 * log * variance / count).sqrt() + log / (3 * count)
    betting = usual.clamp_min(log / (_TRUNCATION * count))  # bets cannot be larger
    ones = (mean * count).numpy()
    binomial = mean - torch.from_numpy(clopper_pearson_lower(ones, count, alpha))
    return binomial < betting
