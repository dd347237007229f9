"""Parametric noise injection (PNI): weights with noise in proportion to their spread, its share learned.

Source: He, Rakin & Fan, Parametric Noise Injection: Trainable Randomness to Improve Deep Neural Network
Robustness against Adversarial Attack, CVPR 2019, equations 1 and 2: `w + alpha * eta`, with `eta` from
`N(0, std(w)^2)` and `alpha` learned, one a layer, or one an output channel, which did best in their results.
The gradient does not go through `std(w)`. Its training is `ParametricNoiseTraining`.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .numbers import gaussian
from .placing import FIRST_NUMBER, Randomness, is_plain_layer
from .random_weights import RandomConv2d, RandomLinear, RandomWeights, randomise_weights_
from .streams import Source


class ParametricNoise(RandomWeights):
    """Weights `w + alpha * std(w) * N(0, 1)`; the bias has no noise.

    Shared sampling draws one set of weights a batch, in train mode always; per image each has its own.

    Attributes:
        alpha: learned, a factor for the layer, (1, ...), or for each output channel, (O, 1, ...).
    """

    alpha: nn.Parameter

    def start_(self, start: float, granularity: Literal["layer", "channel"]) -> None:
        """Give it its factors."""
        outputs = len(self.weight) if granularity == "channel" else 1
        shape = (outputs, *[1] * (self.weight.dim() - 1))
        self.alpha = nn.Parameter(torch.full(shape, start, device=self.weight.device))

    def levels_learned(self) -> list[nn.Parameter]:
        return [self.alpha]

    def drawn(self, source: Source, images: int) -> tuple[Tensor, Tensor | None]:
        noise = gaussian(source, self.weight.shape, images)
        level = self.alpha * self.weight.detach().std(correction=0)
        return self.weight + level * noise, self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, parametric noise, {self.state()}"


class ParametricConv2d(ParametricNoise, RandomConv2d):
    """A convolution with parametric noise."""


class ParametricLinear(ParametricNoise, RandomLinear):
    """A linear layer with parametric noise."""


class ParametricNoiseConfig(Randomness):
    """Parametric noise on the weights of every convolution and linear layer.

    Attributes:
        start: alpha before training; the authors' code has 0.25.
        granularity: one alpha a layer, or one an output channel.
    """

    places: ClassVar[str] = "convolutions or linear layers"
    name: Literal["parametric-noise"] = "parametric-noise"
    start: float = Field(default=0.25, gt=0, allow_inf_nan=False)
    granularity: Literal["layer", "channel"] = "channel"

    def fits(self, module: nn.Module) -> bool:
        return is_plain_layer(module)

    def put_(self, module: nn.Module, index: int, model: nn.Module) -> None:  # noqa: ARG002
        kind = ParametricConv2d if type(module) is nn.Conv2d else ParametricLinear
        layer = randomise_weights_(module, kind, FIRST_NUMBER + index)
        assert isinstance(layer, ParametricNoise)
        layer.start_(self.start, self.granularity)
