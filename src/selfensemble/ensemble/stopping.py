"""When an image needs no further noise draws."""

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from .fingerprint import Promise

Stop = Literal["exact", "calibrated"]
_Share = Annotated[float, Field(gt=0, lt=1)]


class Rule(Protocol):
    """Decides from the mean so far."""

    @property
    def most(self) -> int:
        """Draws after which every image is settled."""

    @property
    def block(self) -> int:
        """Draws worth taking in the first pass: more are likely not wanted."""

    def settled(self, mean: Tensor, draws: int) -> Tensor:
        """Which images stop after `draws` draws, `draws < most`.

        Args:
            mean: (A, K) softmax averaged over the draws so far.

        Returns:
            (A,) bool.
        """


@dataclass(frozen=True, slots=True)
class Fixed:
    """Every image takes as many draws."""

    most: int

    @property
    def block(self) -> int:
        return self.most

    def settled(self, mean: Tensor, draws: int) -> Tensor:
        return torch.full((len(mean),), draws >= self.most, device=mean.device)


@dataclass(frozen=True, slots=True)
class Exact:
    """Stop when the draws that are left cannot change the label of the ensemble of `most` draws.

    Each of them could at most give all to one rival and nothing to the leader. With 10 draws no image stops
    before the sixth.
    """

    most: int

    @property
    def block(self) -> int:
        return self.most // 2 + 1

    def settled(self, mean: Tensor, draws: int) -> Tensor:
        # Sums of a few hundred float32 numbers in [0, 1] are right to 1e-5 of the number of them.
        return draws * margin(mean) > (self.most - draws) + 1e-5 * self.most


class Calibrated(Promise):
    """Stop when the margin of the mean passes the threshold of the number of draws, see `calibrate`.

    Attributes:
        thresholds: one for each number of draws; the last of them is the most draws of an image.
        epsilon: with confidence `1 - delta` over the images it was calibrated on, at most this share of
            images like them is answered otherwise than by `reference_draws` draws.
        delta: the risk that it does not hold.
        mean_draws, disagreement: measured on the images that the thresholds were tested on.
        images: how many those were.
        reference_draws: draws that stood for infinitely many.
        antithetic: whether draws come in pairs of opposite noise.
        draws: fixed number of draws of the ensemble, whose share of other answers is the default of epsilon;
            None where early versions saved it.
        precision, fingerprint: of the ensemble it was calibrated on, see `Promise`.
    """

    thresholds: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]
    epsilon: _Share
    delta: _Share
    mean_draws: Annotated[float, Field(ge=1)]
    disagreement: Annotated[float, Field(ge=0, le=1)]
    images: Annotated[int, Field(ge=1)]
    reference_draws: Annotated[int, Field(ge=1)]
    antithetic: bool = False
    draws: Annotated[int, Field(ge=1)] | None = None

    @property
    def most(self) -> int:
        """Draws after which every image is settled."""
        return len(self.thresholds)

    @property
    def block(self) -> int:
        """Draws worth taking in the first pass, see `Rule`; the few images that want many raise the mean."""
        usual = max(1, round(self.mean_draws / 2))
        return usual + usual % 2 if self.antithetic else usual

    def settled(self, mean: Tensor, draws: int) -> Tensor:
        """Which images stop after `draws` draws, see `Rule`."""
        return margin(mean) >= self.thresholds[draws - 1]


def worth_taking(rule: Rule, used: int) -> int:
    """Draws worth taking in the next pass: who is undecided after `used` is likely to want many more."""
    return min(rule.most - used, max(rule.block, 2 * used))


def margin(mean: Tensor) -> Tensor:
    """(A,) largest minus second largest of (A, K) probabilities; infinite where there is one class."""
    if mean.shape[1] < 2:
        return mean.new_full((len(mean),), float("inf"))
    first, second = mean.topk(2, dim=1).values.unbind(dim=1)
    return first - second
