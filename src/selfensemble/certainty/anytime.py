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
their money may be looked at. That is about the answer that selection chose. Another class may be certain
instead, so each of them (the less likely ones together, which have no less than each) is bet against in the
same way, with the answer as its rival; the gamblers against all classes have to win.

Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B 2024; for
votes against all rivals together, Voracek, Treatment of statistical estimation problems in randomized
smoothing, NeurIPS 2024.
"""

import math
from typing import Literal

import torch
from scipy import special
from torch import Tensor

_BETS = 9  # sizes, in equal ratios from nearly all that can be lost to what pays at the last draw
_LARGEST = 0.95  # share of the money that the largest bet may lose
_TANGENTS = (0.0, 0.5, 1.0)  # powers of the rival's share, as selection saw it, of the most that it may have
_SHOWN = 3  # rivals that may show that a radius is out of reach
_FARTHEST = 10.0  # gap up to which lines are exact enough; whoever is out of reach there is so beyond
_CELLS = 12  # neighbours on the grid of the rival's probability, each larger by a factor of sqrt(2)
_AT_ONCE = 16  # draws

Against = Literal["each", "all", "others"]


def border(m: Tensor, gap: float | Tensor) -> tuple[Tensor, Tensor]:
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
        against: whom a and b are of. "each": the answer, and each of R rivals. "all": the answer, and all
            rivals together. "others": each of R - 1 rivals and the remaining ones together, and the answer.
    """

    def __init__(
        self, slope: Tensor, intercept: Tensor, largest: Tensor, sign: float, horizon: int,
        against: Against = "each",
    ) -> None:  # fmt: skip
        self._against = against
        self._slope, self._intercept, self._sign = slope, intercept, sign
        most = _LARGEST / largest
        least = torch.minimum(6 / (math.sqrt(horizon) * (1 + slope)), most / 2)
        powers = torch.linspace(0, 1, _BETS, dtype=torch.float64, device="cpu")
        self._sizes = most[..., None] * (least / most)[..., None] ** powers
        self._money = torch.zeros_like(self._sizes)
        self._draws = 0  # of votes
        self._mine, self._theirs = self._sides(slope.new_zeros(len(slope), 1 + slope.shape[1]))

    def _sides(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """A and b, (..., 1 or R), of what all classes have, (..., C): the answer first, then its rivals."""
        answer, rivals = columns[..., :1], columns[..., 1:]
        if self._against == "all":
            return answer, rivals.sum(dim=-1, keepdim=True)
        if self._against == "each":
            return answer, rivals[..., : self._slope.shape[1]]
        apart = self._slope.shape[1] - 1
        rest = rivals[..., apart:].sum(dim=-1, keepdim=True)
        return torch.cat([rivals[..., :apart], rest], dim=-1), answer

    def _change(self, a: Tensor, b: Tensor) -> Tensor:
        return self._sign * (a[..., None] - self._slope * b[..., None] - self._intercept)

    def add(self, columns: Tensor) -> None:
        """Draws (c, A, C): what the answer has, and what its rivals have."""
        for some in columns.split(_AT_ONCE):
            # One logarithm of a product, which is far from what float64 cannot hold.
            product = torch.ones_like(self._sizes)
            for draw in self._change(*self._sides(some)):
                product *= torch.addcmul(product.new_ones(()), self._sizes, draw[..., None])
            self._money += product.log_()

    def add_votes(self, draws: int, counts: Tensor) -> None:
        """The same for votes, of which (A, C) are counted."""
        mine, theirs = self._sides(counts)
        self._draws += draws
        self._mine, self._theirs = self._mine + mine, self._theirs + theirs

    def money(self) -> Tensor:
        """(A, R, M, sizes), logarithms of what a stake of 1 on each bet has become."""
        if self._draws == 0:
            return self._money
        mine, theirs = self._mine, self._theirs
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
        self._mine, self._theirs = self._mine[stay], self._theirs[stay]


class Reached(Bets):
    """Bets that a radius is reached.

    Args:
        pilot: (A, R) probabilities of the rivals as other draws see them, above 0.
        gap: `2 radius / std`, above 0; beyond 10 nothing is ever sure.
        slack: by how much probabilities may differ from those that the radius is about.
        horizon, against: see `Bets`; "each" or "all".
    """

    def __init__(
        self, pilot: Tensor, gap: float, slack: float, horizon: int, against: Against = "each"
    ) -> None:
        self._possible = gap <= _FARTHEST
        gap = min(gap, _FARTHEST)
        top = most_of_a_rival(gap)
        share = (pilot / top).clamp(1e-6, 1.0)
        m = top * share[:, :, None] ** torch.tensor(_TANGENTS, dtype=torch.float64, device="cpu")
        value, slope = border(m, gap)
        intercept = value - slope * m + slack * (1 + slope)
        super().__init__(slope, intercept, slope + intercept, 1.0, horizon, against)

    def sure(self, alpha: float) -> Tensor:
        """(A,) bool, whether the radius is proven, wrongly with probability alpha at most."""
        if not self._possible:
            return torch.zeros(len(self._slope), dtype=torch.bool, device="cpu")
        return _mean_log(self.money().flatten(2)).amin(dim=1) >= math.log(1 / alpha)


class OutOfReach(Bets):
    """Bets that a radius is not reached, by no number of draws.

    Args:
        images: how many.
        classes: how many the answer is compared with, or are compared with it: all but it.
        gap: (A,) or one, see `Reached`.
        slack, horizon: see `Reached`.
        against: "each" or "all", that the answer has not reached it; "others", that no other class has.
    """

    def __init__(
        self, images: int, classes: int, gap: float | Tensor, slack: float, horizon: int,
        against: Against = "each",
    ) -> None:  # fmt: skip
        number = {"each": min(classes, _SHOWN), "all": 1, "others": min(classes, _SHOWN + 1)}[against]
        gaps = torch.as_tensor(gap, dtype=torch.float64, device="cpu").expand(images).clamp_max(_FARTHEST)
        exponent = torch.arange(_CELLS, -1, -1, dtype=torch.float64, device="cpu") / 2
        right = torch.special.ndtr(-gaps / 2)[:, None, None] * 2.0**-exponent
        above, nothing = border(right, gaps[:, None, None])[0], torch.zeros_like(right[..., :1])
        left, below = torch.cat([nothing, right[..., :-1]], -1), torch.cat([nothing, above[..., :-1]], -1)
        slope = (above - below) / (right - left)
        intercept = below - slope * left - slack * (1 + slope)
        slope, intercept = (each.expand(-1, number, -1) for each in (slope, intercept))
        super().__init__(slope, intercept, 1 - intercept, -1.0, horizon, against)
        # Half on the likeliest rival.
        weights = torch.full((number,), 0.5 / max(1, number - 1), dtype=torch.float64, device="cpu")
        weights[0] = 0.5 if number > 1 else 1.0
        self._weights = weights.log()

    def sure(self, alpha: float) -> Tensor:
        """(A,) bool, whether it is proven, wrongly with probability alpha at most."""
        poorest = _mean_log(self.money()).amin(dim=2)
        if self._against == "others":
            return poorest.amin(dim=1) >= math.log(1 / alpha)
        return (poorest + self._weights).logsumexp(dim=1) >= math.log(1 / alpha)


def _mean_log(money: Tensor) -> Tensor:
    """Logarithm of the mean over the last dimension, of logarithms."""
    return money.logsumexp(dim=-1) - math.log(money.shape[-1])
