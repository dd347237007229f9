"""What draws say of the answer and of its rivals: votes, and means of the softmax, with their bounds.

All of it on the CPU, wherever the draws are: bounds need float64, which not every device has.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..noise.streams import LAYERS, fresh_seed, stream_seed
from .anytime import Against, Bets, OutOfReach, Reached
from .bounds import MeanBound, clopper_pearson_lower, clopper_pearson_upper, mean_lower, narrower

Rivals = Literal["all", "runner_up"]
APART = 8  # rivals with a bound each; the others share one


class Seen:
    """What the draws of selection say of some images, and the bets that follow from it.

    Args:
        order: (A, K) classes, the answer first, then its likely rivals.
        columns: (A, C) what the answer and its rivals have of all draws of selection.
        draws: how many these are.
        rivals: see `certify`.

    Attributes:
        order: see there.
        spread: (A,) how far single draws differ at least, as a share of what votes would; 1 for votes.
    """

    def __init__(self, order: Tensor, columns: Tensor, draws: int, rivals: Rivals) -> None:
        self.order, self._rivals = order, rivals
        self._against: Against = "all" if rivals == "all" else "each"
        others = columns[:, 1:].sum(dim=1, keepdim=True) if rivals == "all" else columns[:, 1:]
        self._pilot = (others.double() + 0.5) / (draws + 1)
        self._classes = columns.shape[1] - 1
        self.spread = torch.ones(len(order), dtype=torch.float64, device="cpu")

    def keep(self, stay: Tensor) -> None:
        """Continue with some of the images."""
        self.order, self._pilot, self.spread = self.order[stay], self._pilot[stay], self.spread[stay]

    def reached(self, gap: float, slack: float, horizon: int) -> Reached:
        """Bets that a radius is reached, which `bet` settles."""
        return Reached(self._pilot, gap, slack, horizon, self._against)

    def unlikely(self, gap: Tensor, slack: float, horizon: int) -> OutOfReach:
        """Bets that the answer is too unlikely for (A,) gaps."""
        return OutOfReach(len(self.order), self._classes, gap, slack, horizon, self._against)

    def out_of_reach(self, gap: float, slack: float, horizon: int) -> tuple[OutOfReach, OutOfReach]:
        """Bets that a radius is out of reach of the answer, and that it is so of all other classes."""
        each, others = (
            OutOfReach(len(self.order), self._classes, gap, slack, horizon, against)
            for against in ("each", "others")
        )
        return each, others


class Votes(Seen):
    """Counts of the classes that single draws choose.

    Args:
        selection: (n0, A, K) outputs that say which class is the answer and which are its rivals.
        rivals: see `certify`.
    """

    def __init__(self, selection: Tensor, rivals: Rivals, alpha: float, n: int) -> None:  # noqa: ARG002
        votes = self._votes(selection)
        order = votes.argsort(dim=1, descending=True, stable=True)
        super().__init__(order, _columns(votes[None], order)[0], len(selection), rivals)
        self.counts = torch.zeros_like(order)

    def bet(self, bets: Sequence[Bets], outputs: Tensor) -> None:
        """Settle bets on more draws, (c, A, K)."""
        columns = _columns(self._votes(outputs)[None], self.order)[0].double()
        for each in bets:
            each.add_votes(len(outputs), columns)

    @staticmethod
    def _votes(outputs: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(outputs.cpu().argmax(dim=2), outputs.shape[2]).sum(dim=0)

    def add(self, outputs: Tensor) -> None:
        """More draws, (c, A, K)."""
        self.counts += self._votes(outputs)

    def keep(self, stay: Tensor) -> None:
        """Continue with some of the images."""
        super().keep(stay)
        self.counts = self.counts[stay]

    def estimate(self) -> Tensor:
        """(A,) share of the votes that the answer has."""
        return self.counts.gather(1, self.order[:, :1])[:, 0].double() / self.counts.sum(dim=1)

    def bounds(self, alpha: float) -> tuple[np.ndarray, np.ndarray]:
        """(A,) lower bounds of the answer and upper bounds of its rivals, wrong with `alpha` together."""
        answer, classes = self.order[:, :1], self.counts.shape[1]
        trials = self.counts.sum(dim=1).numpy()
        mine = self.counts.gather(1, answer)[:, 0].numpy()
        if self._rivals == "all":
            low = clopper_pearson_lower(mine, trials, alpha)
            return low, 1 - low
        # A larger count has a larger bound: the runner-up's is that of all.
        others = self.counts.scatter(1, answer, 0).amax(dim=1).numpy()
        low = clopper_pearson_lower(mine, trials, alpha / 2)
        high = clopper_pearson_upper(others, trials, alpha / 2 / max(1, classes - 1))
        return low, np.minimum(high, 1 - low)


class Means(Seen):
    """Softmax outputs of the answer, of its first rivals one by one, and of the others together.

    Args:
        selection: (n0, A, K) outputs that say which class is the answer and which are its rivals.
        rivals, alpha, n, bound: see `certify`.
        seed: of coins, see `mean_lower`.
    """

    def __init__(
        self,
        selection: Tensor,
        rivals: Rivals,
        alpha: float,
        n: int,
        bound: MeanBound | None,
        seed: int | None = None,
    ) -> None:
        selection = selection.cpu()
        order = selection.mean(dim=0).argsort(dim=1, descending=True, stable=True)
        columns = _columns(selection, order).double()
        super().__init__(order, columns.sum(dim=0), len(selection), rivals)
        self._bound = bound
        self._samples: list[Tensor] = []
        self._sum, self._taken = torch.zeros(len(order), dtype=torch.float64, device="cpu"), 0
        coins = fresh_seed() if seed is None else stream_seed(seed, 0, LAYERS - 1)
        self._generator = torch.Generator("cpu").manual_seed(coins)
        mean = columns.mean(dim=0)
        variance = columns.var(dim=0) if len(columns) > 1 else torch.zeros_like(mean)
        self._binomial = narrower(mean, variance, alpha / 2, n)
        # The variance is known within a factor of some two standard errors, if at all.
        shares = (variance / (mean * (1 - mean)).clamp_min(1e-12)).sqrt()[:, :2].amin(dim=1)
        self.spread = (shares * (1 - math.sqrt(min(1.0, 2 / len(columns))))).clamp(0, 1)

    def bet(self, bets: Sequence[Bets], outputs: Tensor) -> None:
        """Settle bets on more draws, (c, A, K)."""
        columns = _columns(outputs.cpu(), self.order).double()
        for each in bets:
            each.add(columns)

    def _columns(self, outputs: Tensor) -> Tensor:
        """(c, A, C), the answer's first; all rivals together are what it has not."""
        columns = _columns(outputs, self.order)
        return columns[:, :, :1] if self._rivals == "all" else columns

    def add(self, outputs: Tensor) -> None:
        """More draws, (c, A, K)."""
        columns = self._columns(outputs.cpu())
        self._samples.append(columns)
        self._sum += columns[:, :, 0].double().sum(dim=0)
        self._taken += len(columns)

    def keep(self, stay: Tensor) -> None:
        """Continue with some of the images."""
        super().keep(stay)
        self._binomial, self._sum = self._binomial[stay], self._sum[stay]
        self._samples = [each[:, stay] for each in self._samples]

    def estimate(self) -> Tensor:
        """(A,) mean probability of the answer."""
        return self._sum / self._taken

    def bounds(self, alpha: float) -> tuple[np.ndarray, np.ndarray]:
        """(A,) lower bounds of the answer and upper bounds of its rivals, wrong with `alpha` together."""
        samples = torch.cat(self._samples)
        rivals = samples.shape[2] - 1
        if rivals == 0:
            low = self._lower(samples, 0, alpha)
            return low.numpy(), 1 - low.numpy()
        low = self._lower(samples, 0, alpha / 2)
        # The likely runner-up has a share of its own; the bounds of the others are far lower in any case.
        shares = [alpha / 4, *[alpha / 4 / (rivals - 1)] * (rivals - 1)] if rivals > 1 else [alpha / 2]
        highs = [1 - self._lower(1 - samples, 1 + k, share) for k, share in enumerate(shares)]
        high = torch.minimum(torch.stack(highs).amax(dim=0), 1 - low)
        return low.numpy(), high.numpy()

    def _lower(self, samples: Tensor, column: int, alpha: float) -> Tensor:
        """(A,) lower bounds of the means of a column."""
        values = samples[:, :, column]
        if self._bound is not None:
            return mean_lower(values, alpha, self._bound, generator=self._generator)
        coins = self._binomial[:, column]
        low = torch.zeros(len(coins), dtype=torch.float64, device="cpu")
        for chosen, method in ((coins, "binomial"), (~coins, "betting")):
            if chosen.any():
                few = values[:, chosen]
                low[chosen] = mean_lower(few, alpha, method, generator=self._generator)  # type: ignore[arg-type]
        return low


def _columns(outputs: Tensor, order: Tensor) -> Tensor:
    """(c, A, 1 + R) of what all classes have, (c, A, K): the answer's, rivals', the last ones' together."""
    ordered = outputs.gather(2, order.expand_as(outputs))
    if ordered.shape[2] <= APART + 1:
        return ordered
    together = ordered[:, :, APART + 1 :].sum(dim=2, keepdim=True)
    columns = torch.cat([ordered[:, :, : APART + 1], together], dim=2)
    return columns.clamp(0, 1) if columns.is_floating_point() else columns
