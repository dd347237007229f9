"""What one method knows of the wanted radii of some images, and when they need no more draws."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special
from torch import Tensor

from .anytime import Bets
from .decision import ABSTAINED
from .statistics import Means, Votes

_RUNGS = (0.1, 0.4, 0.7)  # shares of the smallest wanted radius that are looked for as well


@dataclass(frozen=True, slots=True)
class Aims:
    """What is looked for, see `certify`.

    Attributes:
        std: of the noise on the image.
        alpha, n: risk and draws.
        wanted: radii in rising order; none to draw n times.
        slack: by how much probabilities may differ from those under the noise that the radius is about.
        give_up: see `certify`.
    """

    std: float
    alpha: float
    n: int
    wanted: tuple[float, ...] = ()
    slack: float = 0.0
    give_up: float = 0.0


class Search:
    """A method, what is looked for, and what became of the images of a group.

    Args:
        seen: what the draws of selection say.
        size: images of the group.
        aims: see there.
    """

    def __init__(self, seen: Votes | Means, size: int, aims: Aims) -> None:
        self.seen, self.aims = seen, aims
        self.answer = seen.order[:, 0]
        self.used = torch.zeros(size, dtype=torch.int64, device="cpu")
        self.figures = torch.zeros(4, size, dtype=torch.float64, device="cpu")  # radius, bounds, estimate
        self.verdict = torch.zeros(size, len(aims.wanted), dtype=torch.int64, device="cpu")
        self.radii = [share * aims.wanted[0] for share in (_RUNGS if aims.wanted else ())] + [*aims.wanted]
        gaps = [2 * radius / aims.std for radius in aims.wanted]
        most = 2 / aims.std * largest_radius(aims.std, aims.alpha, aims.n, aims.slack)
        self._possible = torch.tensor([gap <= most for gap in gaps], dtype=torch.bool, device="cpu")
        needed = [_needed(gap, aims.alpha, aims.n, seen.spread) for gap in gaps] if aims.give_up else []
        self.reached = [seen.reached(2 * each / aims.std, aims.slack, aims.n) for each in self.radii]
        self.failed = [seen.out_of_reach(gap, aims.slack, aims.n) for gap in gaps]
        self.hopeless = [seen.unlikely(gap, aims.slack, aims.n) for gap in needed]
        self._bets: list[Bets] = [*self.reached, *sum(self.failed, ()), *self.hopeless]

    def add(self, outputs: Tensor) -> None:
        """More draws of the active images, (c, A, K)."""
        self.seen.add(outputs)
        self.seen.bet(self._bets, outputs)

    def keep(self, stay: Tensor) -> None:
        """Continue with some of the active images."""
        for each in (self.seen, *self._bets):
            each.keep(stay)

    def look(self, active: Tensor, taken: int) -> None:
        """End those of the active images that need no more draws."""
        going = self.used[active] == 0
        ends = torch.full_like(going, taken == self.aims.n)
        radius = torch.zeros(len(active), dtype=torch.float64, device="cpu")
        low, high = torch.full((2, len(active)), torch.nan, dtype=torch.float64, device="cpu")
        if self.radii:
            reached, over = self._bets_won(active[going], going)
            ends |= over
            radius = (torch.tensor(self.radii, dtype=torch.float64, device="cpu")[:, None] * reached).amax(
                dim=0
            )
        if taken == self.aims.n:
            low, high, reach = self._bounds()
            radius = torch.maximum(radius, reach)
            for column, wanted in enumerate(self.aims.wanted):
                self.verdict[active[going & (radius >= wanted)], column] = 1
        ended = going & ends
        self.figures[:, active[ended]] = torch.stack([radius, low, high, self.seen.estimate()])[:, ended]
        self.used[active[ended]] = taken

    def _bets_won(self, images: Tensor, going: Tensor) -> tuple[Tensor, Tensor]:
        """(radii, A) what is reached, and (A,) for whom all that is wanted is decided or given up."""
        aims = self.aims
        # Claims are nested, so that one wrong bet is behind all wrong claims.
        reached = _all_until([bets.sure(aims.alpha / 2) for bets in self.reached])
        mine, others = (
            torch.stack([bets.sure(aims.alpha) for bets in column])
            for column in zip(*self.failed, strict=True)
        )
        failed = _all_until([*(mine & others).flip(0)]).flip(0)
        there = reached[-len(aims.wanted) :]
        over = there | mine | ~self._possible[:, None]
        if self.hopeless:
            over |= torch.stack([bets.sure(aims.give_up) for bets in self.hopeless])
        self.verdict[images] = torch.where(there, 1, torch.where(failed, -1, 0)).T[going]
        return reached, over.all(dim=0)

    def _bounds(self) -> tuple[Tensor, Tensor, Tensor]:
        """(A,) lower bounds of the answers, upper ones of their rivals, and the radii that follow."""
        aims = self.aims
        low, high = self.seen.bounds(aims.alpha / 2 if self.radii else aims.alpha)
        low, high = np.maximum(low - aims.slack, 0), np.minimum(high + aims.slack, 1)
        reach = aims.std / 2 * (special.ndtri(low) - special.ndtri(high))
        return (
            torch.from_numpy(low),
            torch.from_numpy(high),
            torch.from_numpy(np.where(low > high, reach, 0.0)),
        )

    def fields(self, n0: int) -> tuple[Tensor, ...]:
        """Of a `Certificate`, when all images have ended."""
        label = torch.where(self.figures[0] > 0, self.answer, ABSTAINED)
        return label, *self.figures, self.used + n0, self.verdict


def _all_until(sure: list[Tensor]) -> Tensor:
    """(R, A) bool, whether this and all before it are sure."""
    return torch.stack(sure).int().cummin(dim=0).values.bool()


def largest_radius(std: float, alpha: float, n: int, slack: float = 0.0) -> float:
    """What n draws certify of an image of which all of them agree, and no method certifies more."""
    return std * float(special.ndtri(max((alpha / 2) ** (1 / n) - slack, 0.5)))


def _needed(gap: float, alpha: float, n: int, spread: Tensor) -> Tensor:
    """(A,) the gaps that n draws are likely to certify as `gap`: some standard errors more."""
    least = special.ndtr(gap / 2)
    errors = -special.ndtri(alpha / 4) * math.sqrt(least * (1 - least) / n) * spread
    quantile: Tensor = torch.special.ndtri((least + errors).clamp_max((least + 1) / 2))
    return 2 * quantile
