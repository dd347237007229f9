"""The decision of the infinite ensemble, with a stated risk of being wrong, or an abstention.

For each class c there is a gambler who does not believe that c is the infinite ensemble's answer. Before
every draw she picks a rival, the class that leads so far, and bets that it gets more than c: her capital is
multiplied by `1 + bet * (p_rival - p_c)`, which does not grow on average if c is the answer. By Ville's
inequality the gambler against the true answer ever has `1 / alpha` times what she began with with probability
alpha at most, whenever one looks. So a class is out as soon as its gambler has that much, and the last one
left is decided. There is one true answer, so one bet can fail: the risk is not divided by the classes.

Each gambler spreads her money over several sizes of bets. A draw doubles it at best: no decision at risk
alpha comes before log2(1 / alpha) draws, 10 for .001.

Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B 2024; Shafer,
Testing by betting, JRSS A 2021.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ensemble.checks import check_count, check_images, is_number
from ..ensemble.draws import Draws, check_finite
from ..ensemble.ensemble import SelfEnsemble
from ..noise.injection import eval_mode, noise_disabled
from .bounds import mean_lower, mean_upper

# Sizes of bets and the shares of the money on them: large ones for clear images, small ones for the others.
_BETS = (0.99, 0.5, 0.2)
_SHARES = (0.9, 0.06, 0.04)
# Draws that the bets behind the interval are made for.
_HORIZON = 24
_HISTORY = 2**25  # probabilities that are remembered at a time
ABSTAINED = -1


@dataclass(frozen=True, slots=True)
class Decision:
    """What is known about the infinite ensemble's answer for each of B images.

    Attributes:
        label: (B,) int64, the class with the largest mean probability, wrong with probability alpha at most;
            -1 for an abstention.
        draws: (B,) int64, how many were needed, or tried.
        leader: (B,) int64, the class that led at the end, decided or not.
        low, high: (B,) float64, on the CPU: bounds of the leader's mean probability, which hold together with
            probability `1 - alpha` at least.
    """

    label: Tensor
    draws: Tensor
    leader: Tensor
    low: Tensor
    high: Tensor


class Gamblers:
    """One against each class of each image. On the CPU: their money is counted in float64.

    Args:
        guess: (B,) classes that may lead, from anything but the draws.
        classes: K.
        alpha: the risk.
    """

    def __init__(self, guess: Tensor, classes: int, alpha: float) -> None:
        self._target = math.log(1 / alpha)
        self._bets = torch.tensor(_BETS, dtype=torch.float64, device="cpu")
        # Logarithms of the money on each size: (B, K, bets).
        shares = torch.tensor(_SHARES, dtype=torch.float64, device="cpu").log()
        self._money = shares.expand(len(guess), classes, len(_BETS)).clone()
        self._total = torch.zeros(len(guess), classes, dtype=torch.float64, device="cpu")
        self._guess = torch.nn.functional.one_hot(guess.cpu(), classes).double() * 1e-9
        self._possible = torch.ones(len(guess), classes, dtype=torch.bool, device="cpu")

    def draw(self, probabilities: Tensor) -> None:
        """Bets on the next draw are settled.

        Args:
            probabilities: (B, K), softmax of one draw.
        """
        probabilities = probabilities.cpu().double()
        first, second = (self._total + self._guess).topk(2, dim=1).indices.unbind(dim=1)
        rival = probabilities.gather(1, first[:, None]).expand_as(probabilities).clone()
        rival.scatter_(1, first[:, None], probabilities.gather(1, second[:, None]))
        self._money += torch.log1p(self._bets * (rival - probabilities)[:, :, None])
        self._possible &= self._money.logsumexp(dim=2) < self._target
        self._total += probabilities

    @property
    def decided(self) -> Tensor:
        """(B,) bool, whether at most one class is left."""
        return self._possible.sum(dim=1) <= 1

    def labels(self) -> Tensor:
        """(B,) int64, the class that is left; -1 where several are, or none."""
        alone = self._possible.sum(dim=1) == 1
        return torch.where(alone, self._possible.double().argmax(dim=1), ABSTAINED)

    def keep(self, chosen: Tensor) -> None:
        """Continue with these images alone."""
        self._money, self._total = self._money[chosen], self._total[chosen]
        self._guess, self._possible = self._guess[chosen], self._possible[chosen]


def decide(
    ensemble: SelfEnsemble,
    inputs: Tensor,
    *,
    alpha: float = 0.001,
    max_draws: int = 100,
    max_batch: int | None = None,
    seed: int | None = None,
) -> Decision:
    """The infinite ensemble's label of each image, or an abstention, with as few draws as needed.

    One pass without noise before the draws guesses the leading class; a wrong guess only costs draws.

    Args:
        ensemble: what answers.
        inputs: (B, ...), see `SelfEnsemble.predict`.
        alpha: for each image, the probability that the label is wrong, and that the interval is.
        max_draws: after which the decision abstains.
        max_batch, seed: see `SelfEnsemble.predict`.

    Returns:
        Labels and draws on the device of `inputs`, intervals on the CPU.

    Raises:
        ValueError, TypeError: as `SelfEnsemble.predict`; alpha outside (0, 1).
    """
    check_images(inputs, ensemble.bounds)
    check_alpha(alpha)
    check_count("max_draws", max_draws)
    size = None if max_batch is None else check_count("max_batch", max_batch)
    with noise_disabled(ensemble):
        guess = ensemble.predict(inputs, draws=1, max_batch=max_batch, seed=seed)
    with eval_mode(ensemble):
        draws = Draws(ensemble, inputs, size, seed, asks_again=True)
        varies = len(inputs) > 0 and draws.varies()
    if not varies or guess.probabilities.shape[1] == 1:
        certain = ensemble.predict(inputs, draws=1, max_batch=max_batch)
        check_finite(certain.probabilities)
        value = certain.probabilities.amax(dim=1).cpu().double()
        return Decision(certain.label, certain.draws, certain.label, value, value)
    with eval_mode(ensemble):
        room = max(1, _HISTORY // (max_draws * guess.probabilities.shape[1]))
        parts = [
            _decide(draws, number, group, labels, guess.probabilities.shape[1], alpha, max_draws)
            for number, (group, labels) in enumerate(
                zip(inputs.split(room), guess.label.cpu().split(room), strict=True)
            )
        ]
    label, used, leader, low, high = (torch.cat(column) for column in zip(*parts, strict=True))
    where = inputs.device
    return Decision(label.to(where), used.to(where), leader.to(where), low, high)


def _decide(
    draws: Draws, number: int, group: Tensor, guess: Tensor, classes: int, alpha: float, most: int
) -> tuple[Tensor, ...]:
    """The fields of a `Decision`, on the CPU, of group `number` of the images."""
    group = draws.prepared(group)
    gamblers = Gamblers(guess, classes, alpha)
    active = torch.arange(len(group), device="cpu")
    label, used, leader = torch.full_like(active, ABSTAINED), torch.zeros_like(active), active.clone()
    low, high = torch.zeros(2, len(group), dtype=torch.float64, device="cpu")
    history = torch.zeros(most, len(group), classes, dtype=torch.float32, device="cpu")
    block = math.ceil(-math.log2(alpha)) + 2  # of draws in one pass: about the fewest that decide
    index = 0
    while index < most and len(active):
        count = draws.at_once(len(active), min(most - index, block))
        images = group[active.to(group.device)]
        outputs = check_finite(draws.take(images, index, count, number)).cpu()
        for later in range(count):
            history[index, active] = outputs[later]
            index += 1
            gamblers.draw(outputs[later])
            ends = torch.ones_like(active, dtype=torch.bool) if index == most else gamblers.decided
            if ends.any():
                ended = active[ends]
                label[ended], used[ended] = gamblers.labels()[ends], index
                seen = history[:index, ended]
                leader[ended] = seen.mean(dim=0).argmax(dim=1)
                low[ended], high[ended] = _interval(seen, leader[ended], alpha)
                active, outputs = active[~ends], outputs[:, ~ends]
                gamblers.keep(~ends)
            if len(active) == 0:
                break
    return label, used, leader, low, high


def _interval(seen: Tensor, leader: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(B,) bounds of the leaders' means, whichever of the K classes leads, whenever the draws ended."""
    count, images, classes = seen.shape
    if count < 2:
        nothing = torch.zeros(images, dtype=torch.float64, device="cpu")
        return nothing, nothing + 1
    samples = seen.gather(2, leader.view(1, -1, 1).expand(count, -1, 1))[:, :, 0]
    each = alpha / (2 * classes)
    return mean_lower(samples, each, horizon=_HORIZON), mean_upper(samples, each, horizon=_HORIZON)


def check_alpha(alpha: float) -> float:
    """Return `alpha`, or raise a ValueError unless it is a risk."""
    if not (is_number(alpha) and 1e-300 <= alpha < 1):  # beyond, parts of it are 0 in floating point
        raise ValueError(f"alpha must lie between 1e-300 and 1 (0.001 is usual), got {alpha!r}")
    return alpha
