"""Is a wanted radius reached, or out of reach? Bets that may be looked at after every draw.

Noise of deviation std makes an answer of probability p_A, whose likeliest rival has p_B, certain within the
radius r if `Phi^-1(p_A) - Phi^-1(p_B) >= 2 r / std`, written `gap` below. On the plane of (p_B, p_A) the
border is the curve `g(m) = Phi(Phi^-1(m) + gap)`, which is increasing and concave.

**Reached.** What is below a concave curve is below each of its tangents: where a rival stands against the
radius, `E[a - s b] <= c` for the slope s and the intercept c of the tangent at any m; a and b are what the
answer and the rival have of a draw. A gambler whose money is multiplied by `1 + l (a - s b - c)` then wins
nothing on average, and ever has `1 / alpha` times what she began with with probability alpha at most
(Ville's inequality), whenever one looks. She spreads her money over tangents and sizes of bets. The radius
is reached when the gamblers against all rivals have won: if it is not, one of them had to win unfair bets,
so the risk is not divided.

**Out of reach.** What is above the curve is no half-plane, but between two neighbours on a grid of rival's
probabilities the curve lies above its chord: where the radius is certain, `E[a - s b] >= c` for the chord
between those neighbours that p_B lies between. The gambler bets against every chord, and the poorest of
these bets counts. Where the radius is certain no gambler against any rival has fair bets, so the mean of
their money may be looked at.

Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B 2024; for
votes against all rivals together, Voracek, Treatment of statistical estimation problems in randomized
smoothing, NeurIPS 2024.
"""

import math

import torch
from scipy import special
from torch import Tensor

_BETS = 9  # sizes, in equal ratios from nearly all that can be lost to what pays at the last draw
_LARGEST = 0.95  # share of the money that the largest bet may lose
_TANGENTS = (0.0, 0.5, 1.0)  # powers of the rival's share, as selection saw it, of the most that it may have
_SHOWN = 3  # rivals that may show that a radius is out of reach
_CELLS = 12  # neighbours on the grid of the rival's probability, each larger by a factor of sqrt(2)
_AT_ONCE = 16  # draws


def border(m: Tensor, gap: float) -> tuple[Tensor, Tensor]:
    """The curve `Phi(Phi^-1(m) + gap)` and its slope."""
    quantile = torch.special.ndtri(m)
    return torch.special.ndtr(quantile + gap), (-gap * (quantile + gap / 2)).exp()


def most_of_a_rival(gap: float) -> float:
    """The probability of a rival that has all that the answer has not, on the border."""
    return float(special.ndtr(-gap / 2))


class Bets:
    """Bets on `sign * (a - s b - c)` of several sizes, on the CPU in float64.

    Args:
        slope, intercept: s and c, (A, R, M) of M lines for each of A images and R rivals.
        largest: (A, R, M) what is lost at most of a bet of 1.
        sign: 1 or -1.
        horizon: how many draws there are at most. The best bet against a mean that is barely wrong is then
            `4 / sqrt(horizon)` over the deviation, which is of the order of `(1 + slope) / 2`.
    """

    def __init__(self, slope: Tensor, intercept: Tensor, largest: Tensor, sign: float, horizon: int) -> None:
        self._slope, self._intercept, self._sign = slope, intercept, sign
        most = _LARGEST / largest
        least = torch.minimum(6 / (math.sqrt(horizon) * (1 + slope)), most / 2)
        powers = torch.linspace(0, 1, _BETS, dtype=torch.float64, device="cpu")
        self._sizes = most[..., None] * (least / most)[..., None] ** powers
        self._money = torch.zeros_like(self._sizes)
        self._draws, self._counts = 0, slope.new_zeros(len(slope), 1 + slope.shape[1])  # of votes

    def _change(self, a: Tensor, b: Tensor) -> Tensor:
        return self._sign * (a[..., None] - self._slope * b[..., None] - self._intercept)

    def add(self, columns: Tensor) -> None:
        """Draws (c, A, 1 + R and more): what the answer has, and what its rivals have."""
        rivals = self._slope.shape[1]
        for some in columns.split(_AT_ONCE):
            # One logarithm of a product, which is far from what float64 cannot hold.
            product = torch.ones_like(self._sizes)
            for draw in self._change(some[:, :, :1], some[:, :, 1 : 1 + rivals]):
                product *= torch.addcmul(product.new_ones(()), self._sizes, draw[..., None])
            self._money += product.log_()

    def add_votes(self, draws: int, counts: Tensor) -> None:
        """The same for votes, of which (A, 1 + R and more) are counted."""
        self._draws += draws
        self._counts += counts[:, : 1 + self._slope.shape[1]]

    def money(self) -> Tensor:
        """(A, R, M, sizes), logarithms of what a stake of 1 on each bet has become."""
        if self._draws == 0:
            return self._money
        mine, theirs = self._counts[:, :1], self._counts[:, 1:]
        one = torch.ones(1, 1, dtype=torch.float64, device="cpu")
        none, total = torch.zeros_like(one), self._money.clone()
        for a, b, number in (
            (one, none, mine), (none, one, theirs), (none, none, self._draws - mine - theirs),
        ):  # fmt: skip
            gains = torch.log1p(self._sizes * self._change(a, b)[..., None])
            total.addcmul_(gains.expand_as(total), number[..., None, None])
        return total

    def keep(self, stay: Tensor) -> None:
        """Continue with some of the images."""
        self._slope, self._intercept = self._slope[stay], self._intercept[stay]
        self._sizes, self._money = self._sizes[stay], self._money[stay]
        self._counts = self._counts[stay]


class Reached(Bets):
    """Bets that a radius is reached.

    Args:
        pilot: (A, R) probabilities of the rivals as other draws see them, above 0.
        gap: `2 radius / std`, above 0.
        slack: by how much probabilities may differ from those that the radius is about.
        horizon: see `Bets`.
    """

    def __init__(self, pilot: Tensor, gap: float, slack: float, horizon: int) -> None:
        top = most_of_a_rival(gap)
        share = (pilot / top).clamp(1e-6, 1.0)
        m = top * share[:, :, None] ** torch.tensor(_TANGENTS, dtype=torch.float64, device="cpu")
        value, slope = border(m, gap)
        intercept = value - slope * m + slack * (1 + slope)
        super().__init__(slope, intercept, slope + intercept, 1.0, horizon)

    def sure(self, alpha: float) -> Tensor:
        """(A,) bool, whether the radius is proven, wrongly with probability alpha at most."""
        return _mean_log(self.money().flatten(2)).amin(dim=1) >= math.log(1 / alpha)


class OutOfReach(Bets):
    """Bets that a radius is not reached, by no number of draws.

    Args:
        pilot, gap, slack, horizon: see `Reached`; of `pilot` the likeliest rivals, each of them one class.
    """

    def __init__(self, pilot: Tensor, gap: float, slack: float, horizon: int) -> None:
        images, rivals = len(pilot), min(pilot.shape[1], _SHOWN)
        exponent = torch.arange(_CELLS, -1, -1, dtype=torch.float64, device="cpu") / 2
        right = most_of_a_rival(gap) * 2.0**-exponent
        above, nothing = border(right, gap)[0], torch.zeros_like(right[:1])
        left, below = torch.cat([nothing, right[:-1]]), torch.cat([nothing, above[:-1]])
        slope = (above - below) / (right - left)
        intercept = below - slope * left - slack * (1 + slope)
        slope, intercept = (each.repeat(images, rivals, 1) for each in (slope, intercept))
        super().__init__(slope, intercept, 1 - intercept, -1.0, horizon)
        # Half on the likeliest rival.
        weights = torch.full((rivals,), 0.5 / max(1, rivals - 1), dtype=torch.float64, device="cpu")
        weights[0] = 0.5 if rivals > 1 else 1.0
        self._weights = weights.log()

    def sure(self, alpha: float) -> Tensor:
        """(A,) bool, whether it is proven, wrongly with probability alpha at most."""
        poorest = _mean_log(self.money()).amin(dim=2)
        return (poorest + self._weights).logsumexp(dim=1) >= math.log(1 / alpha)


def _mean_log(money: Tensor) -> Tensor:
    """Logarithm of the mean over the last dimension, of logarithms."""
    return money.logsumexp(dim=-1) - math.log(money.shape[-1])
