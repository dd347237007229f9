"""Random projection filters (RPF): a share of a convolution's filters is drawn again at every call.

Source: Dong & Xu, Adversarial Robustness via Random Projection Filters, CVPR 2023. In the first convolution
48 of 64 filters are random, with entries from `N(0, 1/r^2)` for filters of r by r pixels, as their code
draws them; the others are learned, and brought to the same spread, `w / (r * std(w))` with the standard
deviation of each filter. It is trained adversarially, its filters drawn again for the attack and for the step
(theirs holds the draw through one attack; here each pass has its own). Their evaluation attacks one draw and
answers with another; under attacks that average over the filters nothing was published.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .numbers import gaussian
from .placing import FIRST_NUMBER, Randomness
from .random_weights import RandomConv2d, randomise_weights_
from .streams import Source

_TINY = 1e-5  # beside the spread of a filter, as in their code


class RandomFilterConv2d(RandomConv2d):
    """A convolution whose last filters are random.

    Shared sampling draws one set of filters a batch, in train mode always; per image each has its own.
    Without randomness the random filters are their mean, 0. The entries of `weight` in their place have no
    meaning and get no gradient.

    Attributes:
        random_filters: how many of the filters are random.
    """

    random_filters: int

    def start_(self, share: float) -> None:
        """Say how many filters are random: a share of them, rounded, at least one and not all."""
        filters = len(self.weight)
        self.random_filters = min(filters - 1, max(1, round(share * filters)))

    def _learned(self) -> Tensor:
        learned = self.weight[: len(self.weight) - self.random_filters]
        spread = learned.flatten(1).std(dim=1).reshape(-1, 1, 1, 1) + _TINY
        return learned / (spread * self._side())

    def _side(self) -> float:
        """r, of filters that are no squares the side of the square of as many pixels."""
        return math.sqrt(self.kernel_size[0] * self.kernel_size[1])

    def drawn(self, source: Source, images: int) -> tuple[Tensor, Tensor | None]:
        shape = (self.random_filters, *self.weight.shape[1:])
        random = gaussian(source, shape, images) / self._side()
        learned = self._learned().expand(len(random), -1, -1, -1, -1)
        return torch.cat([learned, random], dim=1), self.bias

    def mean(self) -> tuple[Tensor, Tensor | None]:
        learned = self._learned()
        zeros = learned.new_zeros((self.random_filters, *learned.shape[1:]))
        return torch.cat([learned, zeros]), self.bias

    def extra_repr(self) -> str:
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, {self.random_filters} random, {self.state()}"


class RandomFiltersConfig(Randomness):
    """Random projection filters in the first convolution.

    Attributes:
        share: of its filters that are random; 48 of 64 in the paper.
    """

    places: ClassVar[str] = "convolutions of two filters or more"
    name: Literal["random-filters"] = "random-filters"
    share: float = Field(default=0.75, gt=0, lt=1)

    def fits(self, module: nn.Module) -> bool:
        return type(module) is nn.Conv2d and len(module.weight) > 1

    def chosen(self, called: Sequence[str]) -> list[str]:
        return list(called[:1])

    def put_(self, module: nn.Module, index: int, model: nn.Module) -> None:  # noqa: ARG002
        layer = randomise_weights_(module, RandomFilterConv2d, FIRST_NUMBER + index)
        assert isinstance(layer, RandomFilterConv2d)
        layer.start_(self.share)
