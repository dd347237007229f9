"""Activations dropped at random, at test time as well: dropout, and stochastic activation pruning (SAP).

Both act after every activation function. Sources: Srivastava et al., Dropout, JMLR 2014, kept on at test
time; Dhillon et al., Stochastic Activation Pruning for Robust Adversarial Defense, ICLR 2018, who compare
with it. Athalye et al., Obfuscated Gradients Give a False Sense of Security, ICML 2018, section 5.2, broke
SAP by averaging over it.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .numbers import per_image, source_of, uniform
from .placing import FIRST_NUMBER, PlacedLayer, Randomness, attach_, is_activation
from .streams import Sampling


class _Dropping(PlacedLayer):
    """Keeps each activation with its own probability, and divides it by that."""

    is_continuous = False

    def kept(self, inputs: Tensor) -> Tensor:
        """Probabilities that broadcast with `inputs`, above 0 wherever those are not 0."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.is_active or inputs.is_meta:
            return inputs
        source = source_of(self, inputs, self.sampling == "shared" and not self.training)
        chance = per_image(uniform(source, inputs.shape[1:], len(inputs)), inputs)
        kept = self.kept(inputs.detach())
        factor = torch.where(chance < kept, 1 / kept.clamp(min=torch.finfo(kept.dtype).tiny), 0.0)
        return inputs * factor.to(inputs.dtype)


class LastingDropout(_Dropping):
    """Dropout that `eval()` does not switch off: each activation is kept with probability `1 - p`.

    What is kept is divided by that, so that the mean of the output is the input. In train mode each image
    has its own choice, elsewhere where sampling is per image; shared, all images of a batch lose the same
    activations.

    Args:
        p: probability that an activation is dropped.
        layer, sampling: see `RandomLayer`.

    Shape: (B, ...), to the same.
    """

    def __init__(self, p: float, *, layer: int = 0, sampling: Sampling = "per_image") -> None:
        super().__init__(layer, sampling)
        if not 0 < p < 1:
            raise ValueError(f"p must be above 0 and below 1, got {p}")
        self.p = p

    def kept(self, inputs: Tensor) -> Tensor:
        return torch.full((), 1 - self.p, device=inputs.device)

    def extra_repr(self) -> str:
        return f"p={self.p:g}, {self.state()}"


class ActivationPruning(_Dropping):
    """Stochastic activation pruning: small activations of an image are dropped more often than large ones.

    Of n activations h of an image, `share * n` are drawn with replacement, each with probability `p_i =
    |h_i| / sum |h|`; those drawn at least once stay, divided by the probability of that, `1 - (1 -
    p_i)^(share * n)`, so that the mean of the output is the input. Here each activation is kept or not by
    itself with that probability, which differs from draws with replacement in how choices are correlated, by
    the order of 1 / n, and costs one number an activation. The gradient takes probabilities for constants:
    its mean is the gradient without pruning.

    Off in train mode: the method is for trained networks. Elsewhere each image has its own numbers where
    sampling is per image; shared, all images of a batch have the same, each its own probabilities.

    Args:
        share: of draws, in activations; 1 is the paper's SAP-100.
        layer, sampling: see `RandomLayer`.

    Shape: (B, ...), to the same.
    """

    def __init__(self, share: float = 1.0, *, layer: int = 0, sampling: Sampling = "per_image") -> None:
        super().__init__(layer, sampling)
        if not share > 0:
            raise ValueError(f"share must be above 0, got {share}")
        self.share = share

    @property
    def varies(self) -> bool:
        return not (self.is_fixed or self.training)

    def kept(self, inputs: Tensor) -> Tensor:
        size = inputs.float().abs().flatten(1)
        share = size / size.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        draws = self.share * size.shape[1]
        return -torch.expm1(draws * torch.log1p(-share.clamp(max=1 - 1e-7))).reshape(inputs.shape)

    def extra_repr(self) -> str:
        return f"share={self.share:g}, {self.state()}"


class DropoutConfig(Randomness):
    """Dropout after every activation function, at test time as well.

    Attributes:
        p: probability that an activation is dropped.
    """

    places: ClassVar[str] = "activation modules (nn.ReLU and the like)"
    name: Literal["dropout"] = "dropout"
    p: float = Field(default=0.1, gt=0, lt=1)

    def fits(self, module: nn.Module) -> bool:
        return is_activation(module)

    def can_take(self, module: nn.Module) -> bool:  # noqa: ARG002
        return True

    def put_(self, module: nn.Module, index: int, model: nn.Module) -> None:  # noqa: ARG002
        attach_(module, LastingDropout(self.p, layer=FIRST_NUMBER + index), "behind")


class PruningConfig(Randomness):
    """Stochastic activation pruning after every activation function, only at test time.

    Attributes:
        share: of draws, in activations.
    """

    places: ClassVar[str] = "activation modules (nn.ReLU and the like)"
    name: Literal["activation-pruning"] = "activation-pruning"
    share: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def fits(self, module: nn.Module) -> bool:
        return is_activation(module)

    def can_take(self, module: nn.Module) -> bool:  # noqa: ARG002
        return True

    def put_(self, module: nn.Module, index: int, model: nn.Module) -> None:  # noqa: ARG002
        attach_(module, ActivationPruning(self.share, layer=FIRST_NUMBER + index), "behind")
