"""WCA-Net: anisotropic Gaussian noise on the penultimate features, aligned with the weights behind it.

Source: Eustratiadis, Gouk, Li & Hospedales, Weight-Covariance Alignment for Adversarially Robust Neural
Networks, ICML 2021: features get noise from `N(0, L L^T)`, with L learned, lower triangular, uniform in [0,
1) before training as their code has it. Its training, which rewards the variance that the noise has along
the weights of the classes, is `AlignmentTraining`; it is not adversarial. Their ResNet-18 has a layer of 32
features with a ReLU before the last one; here the features are those that the network has.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .injection import device_of_parameters
from .numbers import gaussian, per_image, source_of
from .placing import CHILD, FIRST_NUMBER, PlacedLayer, Randomness, attach_
from .streams import Sampling


class AlignedNoise(PlacedLayer):
    """Adds `N(0, L L^T)` to features.

    In train mode each image has its own noise (the authors' code has one draw a batch); elsewhere where
    sampling is per image. Shared, all images of a batch have the same.

    Args:
        features: D.
        scale: entries of L before training are uniform in [0, scale), of torch's global generator.
        layer, sampling: see `RandomLayer`.

    Attributes:
        factor: learned, (D, D); what is above its diagonal counts for nothing.

    Shape: (..., D), to the same; the first dimension is the batch.
    """

    factor: nn.Parameter

    def __init__(
        self,
        features: int,
        scale: float = 1.0,
        *,
        layer: int = 0,
        sampling: Sampling = "per_image",
        device: torch.device | None = None,
    ) -> None:
        super().__init__(layer, sampling)
        place = device or torch.device("cpu")
        self.factor = nn.Parameter((scale * torch.rand(features, features, device=place)).tril())

    def lower(self) -> Tensor:
        """L, (D, D)."""
        return self.factor.tril()

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.is_active or inputs.is_meta:
            return inputs
        source = source_of(self, inputs, self.sampling == "shared" and not self.training)
        noise = per_image(gaussian(source, inputs.shape[1:], len(inputs)), inputs)
        return inputs + (noise @ self.lower().T.to(noise.dtype)).to(inputs.dtype)

    def extra_repr(self) -> str:
        return f"features={len(self.factor)}, {self.state()}"


class AlignedNoiseConfig(Randomness):
    """Aligned noise before the last linear layer.

    Attributes:
        scale: of L before training.
    """

    places: ClassVar[str] = "linear layers"
    name: Literal["aligned-noise"] = "aligned-noise"
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def fits(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def chosen(self, called: Sequence[str]) -> list[str]:
        return list(called[-1:])

    def put_(self, module: nn.Module, index: int, model: nn.Module) -> None:
        assert isinstance(module, nn.Linear)
        device = device_of_parameters(module, model)
        layer = AlignedNoise(module.in_features, self.scale, layer=FIRST_NUMBER + index, device=device)
        attach_(module, layer, "before")


def alignments(model: nn.Module) -> Iterator[Tensor]:
    """Of each layer with aligned noise the variance of its outputs by the noise, `sum_k w_k L L^T w_k^T`."""
    for module in model.modules():
        noise = getattr(module, CHILD, None)
        if isinstance(module, nn.Linear) and isinstance(noise, AlignedNoise):
            yield (module.weight.float() @ noise.lower().float()).square().sum()
