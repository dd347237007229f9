"""What draws say of the answer and of its rivals: votes, and means of the softmax, with their bounds.

All of it on the CPU, wherever the draws are: bounds need float64, which not every device has.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..noise.streams import LAYERS, fresh_seed, stream_seed
from .anytime import Bets, OutOfReach, Reached
from .bounds import MeanBound, clopper_pearson_lower, clopper_pearson_upper, mean_lower, narrower

Rivals = Literal["all", "runner_up"]
APART = 8  # rivals with a bound each; the others share one


class Votes:
    """Counts of the classes that single draws choose.

    Args:
        selection: (n0, A, K) outputs that say which class is the answer and which are its rivals.
        rivals: see `certify`.

    Attributes:
        order: (A, K) classes, the answer first, then its likely rivals.
    """

    def __init__(self, selection: Tensor, rivals: Rivals, alpha: float, n: int) -> None:  # noqa: ARG002
        self.order = self._votes(selection).argsort(dim=1, descending=True, stable=True)
        self.counts = torch.zeros_like(self.order)
        self._rivals = rivals

        self._pilot = (_columns(self._votes(selection)[None], self.order, rivals)[0].double() + 0.5) / (
            len(selection) + 1
        )

    def reached(self, gap: float, slack: float, horizon: int) -> Reached:
        """Bets that a radius is reached, which `bet` settles."""
        return Reached(self._pilot[:, 1:], gap, slack, horizon)

    def out_of_reach(self, gap: float, slack: float, horizon: int) -> OutOfReach:
        """Bets that it is not. Rivals that are counted together show nothing."""
        return OutOfReach(self._pilot[:, 1 : 1 + APART], gap, slack, horizon)

    def bet(self, bets: Bets, outputs: Tensor) -> None:
        """Settle the bets on more draws, (c, A, K)."""
        columns = _columns(self._votes(outputs)[None], self.order, self._rivals)[0].double()
        bets.add_votes(len(outputs), columns)

    @staticmethod
    def _votes(outputs: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(outputs.cpu().argmax(dim=2), outputs.shape[2]).sum(dim=0)

    def add(self, outputs: Tensor) -> None:
        """More draws, (c, A, K)."""
        self.counts += self._votes(outputs)

    def keep(self, stay: Tensor) -> None:
        """Continue with some of the images."""
        self.order, self.counts = self.order[stay], self.counts[stay]
        self._pilot = self._pilot[stay]

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


class Means:
    """Softmax outputs of the answer, of its first rivals one by one, and of the others together.

    Args:
        selection: (n0, A, K) outputs that say which class is the answer and which are its rivals.
        rivals, alpha, n, bound: see `certify`.
        seed: of coins, see `mean_lower`.

    Attributes:
        order: (A, K) classes, the answer first, then its likely rivals.
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
        self.order = selection.mean(dim=0).argsort(dim=1, descending=True, stable=True)
        self._rivals, self._bound = rivals, bound
        self._samples: list[Tensor] = []
        self._sum, self._taken = torch.zeros(len(self.order), dtype=torch.float64, device="cpu"), 0
        coins = fresh_seed() if seed is None else stream_seed(seed, 0, LAYERS - 1)
        self._generator = torch.Generator("cpu").manual_seed(coins)
        pilot = self._columns(selection).double()
        both = _columns(selection, self.order, rivals).double().mean(dim=0)
        self._pilot = (both * len(selection) + 0.5) / (len(selection) + 1)
        variance = pilot.var(dim=0) if len(pilot) > 1 else torch.zeros_like(pilot[0])
        self._binomial = narrower(pilot.mean(dim=0), variance, alpha / 2, n)

    def reached(self, gap: float, slack: float, horizon: int) -> Reached:
        """Bets that a radius is reached, which `bet` settles."""
        return Reached(self._pilot[:, 1:], gap, slack, horizon)

    def out_of_reach(self, gap: float, slack: float, horizon: int) -> OutOfReach:
        """Bets that it is not. Rivals that are counted together show nothing."""
        return OutOfReach(self._pilot[:, 1 : 1 + APART], gap, slack, horizon)

    def bet(self, bets: Bets, outputs: Tensor) -> None:
        """Settle the bets on more draws, (c, A, K)."""
        bets.add(_columns(outputs.cpu(), self.order, self._rivals).double())

    def _columns(self, outputs: Tensor) -> Tensor:
        """(c, A, C), the answer's first; all rivals together are what it has not."""
        columns = _columns(outputs, self.order, self._rivals)
        return columns[:, :, :1] if self._rivals == "all" else columns

    def add(self, outputs: Tensor) -> None:
        """More draws, (c, A, K)."""
        columns = self._columns(outputs.cpu())
        self._samples.append(columns)
        self._sum += columns[:, :, 0].double().sum(dim=0)
        self._taken += len(columns)

    def keep(self, stay: Tensor) -> None:
        """Continue with some of the images."""
        self.order, self._binomial = self.order[stay], self._binomial[stay]
        self._pilot, self._sum = self._pilot[stay], self._sum[stay]
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


def _columns(outputs: Tensor, order: Tensor, rivals: Rivals) -> Tensor:
    """(c, A, 1 + R) of what all classes have, (c, A, K): the answer's, then its rivals'."""
    ordered = outputs.gather(2, order.expand_as(outputs))
    apart = 0 if rivals == "all" else APART
    if ordered.shape[2] == 1 or (apart and ordered.shape[2] <= apart + 1):
        return ordered
    together = ordered[:, :, apart + 1 :].sum(dim=2, keepdim=True)
    columns = torch.cat([ordered[:, :, : apart + 1], together], dim=2)
    return columns.clamp(0, 1) if columns.is_floating_point() else columns
