"""Bayesian layers as Adv-BNN has them: Gaussian weights whose means and levels are learned.

Source: Liu, Li, Wu & Hsieh, Adv-BNN: Improved Adversarial Defense through Robust Bayesian Neural Network,
ICLR 2019, section 3: the posterior of each weight and bias of the convolutions and linear layers is
`N(mean, exp(s)^2)`, the prior `N(0, prior_std^2)`. Batch norm stays as it is. Its training, the lower bound
of the evidence under attack, is `BayesianTraining`.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .numbers import gaussian
from .placing import FIRST_NUMBER, Randomness, is_plain_layer
from .random_weights import RandomConv2d, RandomLinear, RandomWeights, randomise_weights_
from .streams import Source


class BayesianWeights(RandomWeights):
    """Weights and biases from independent Gaussians.

    Shared sampling draws one set of weights a batch, in train mode always; per image each has its own.

    Attributes:
        weight, bias: the means.
        log_std, bias_log_std: logarithms of the levels, learned, of the same shapes.
        prior_std: of the prior, whose mean is 0.
    """

    log_std: nn.Parameter
    bias_log_std: nn.Parameter | None
    prior_std: float

    def start_(self, start: float, prior_std: float) -> None:
        """Give it its levels and its prior."""
        self.prior_std = prior_std
        self.log_std = nn.Parameter(torch.full_like(self.weight, math.log(start)))
        self.bias_log_std = (
            None if self.bias is None else nn.Parameter(torch.full_like(self.bias, math.log(start)))
        )

    def levels_learned(self) -> list[nn.Parameter]:
        return [self.log_std] if self.bias_log_std is None else [self.log_std, self.bias_log_std]

    def drawn(self, source: Source, images: int) -> tuple[Tensor, Tensor | None]:
        # Weights and biases in one piece, so that an image's draw does not depend on how many images follow.
        sizes = [self.weight.numel(), 0 if self.bias is None else self.bias.numel()]
        numbers, more = gaussian(source, (sum(sizes),), images).split(sizes, dim=1)
        weight = torch.addcmul(self.weight, self.log_std.exp(), numbers.reshape(-1, *self.weight.shape))
        if self.bias is None or self.bias_log_std is None:
            return weight, None
        return weight, self.bias + self.bias_log_std.exp() * more

    def divergence(self) -> Tensor:
        """Kullback-Leibler divergence of posterior from prior, summed over weights and biases; a scalar."""
        total = self._divergence(self.weight, self.log_std)
        if self.bias is not None and self.bias_log_std is not None:
            total = total + self._divergence(self.bias, self.bias_log_std)
        return total

    def _divergence(self, mean: Tensor, log_std: Tensor) -> Tensor:
        square = ((2 * log_std).exp() + mean.square()) / self.prior_std**2
        return (math.log(self.prior_std) - log_std + (square - 1) / 2).sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, Bayesian, {self.state()}"


class BayesianConv2d(BayesianWeights, RandomConv2d):
    """A convolution with Gaussian weights."""


class BayesianLinear(BayesianWeights, RandomLinear):
    """A linear layer with Gaussian weights."""


class BayesianConfig(Randomness):
    """Gaussian weights in every convolution and linear layer.

    Attributes:
        start: levels before training; the authors' script, for 128x128 images, has 0.08 for both. Weights
            that begin below their noise may never rise above it: the posterior is then the prior.
        prior_std: of the prior.
    """

    places: ClassVar[str] = "convolutions or linear layers"
    name: Literal["bayesian"] = "bayesian"
    start: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    prior_std: float = Field(default=0.05, gt=0, allow_inf_nan=False)

    def fits(self, module: nn.Module) -> bool:
        return is_plain_layer(module)

    def put_(self, module: nn.Module, index: int, model: nn.Module) -> None:  # noqa: ARG002
        kind = BayesianConv2d if type(module) is nn.Conv2d else BayesianLinear
        layer = randomise_weights_(module, kind, FIRST_NUMBER + index)
        assert isinstance(layer, BayesianWeights)
        layer.start_(self.start, self.prior_std)


def divergence(model: nn.Module) -> Tensor:
    """Divergence of all Bayesian layers of `model` from their priors, a scalar; 0 without any."""
    each = [module.divergence() for module in model.modules() if isinstance(module, BayesianWeights)]
    return torch.stack(each).sum() if each else torch.zeros((), device="cpu")
