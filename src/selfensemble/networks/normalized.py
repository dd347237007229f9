"""Mean and standard deviation of the pixels as the first layer of a network."""

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..noise.injection import device_of_parameters


class Normalized(nn.Module):
    """`model((inputs - mean) / std)`: a network that wants standardised images, for images in [0, 1].

    Attacks, certificates and the server then use pixel units. Noise before a convolution of `model` is in the
    units after the division: noise of std s there has std `s * std` on the pixels. Noise before the whole
    `Normalized` is in pixels.

    Args:
        model: a classifier.
        mean, std: of the channels: a number for each, or one for all.

    Shape: (B, C, ...) to what `model` makes of them.

    Raises:
        ValueError: not finite, a std that is not positive, or lists of different lengths.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        means, stds = _channels("mean", mean), _channels("std", std)
        if len(means) != len(stds) and min(len(means), len(stds)) > 1:
            raise ValueError(f"mean has {len(means)} channels, std {len(stds)}: pass as many of each, or one")
        if min(stds) <= 0:
            raise ValueError(f"std must be positive, got {std}")
        count = max(len(means), len(stds))
        self.model = model
        device = device_of_parameters(model)
        for name, values in (("mean", means), ("std", stds)):
            wide = values if len(values) == count else values * count
            self.register_buffer(name, torch.tensor(wide, dtype=torch.float32, device=device))
        self.training = model.training

    @property
    def in_channels(self) -> int:
        """Channels that mean and std are of, as a convolution says its own."""
        return len(self.mean)

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.model(_standardised(inputs, self.mean, self.std), *args, **kwargs)

    def extra_repr(self) -> str:
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"


@fx.wrap  # one step of a graph, for its checks depend on the inputs
def _standardised(inputs: Tensor, means: Tensor, stds: Tensor) -> Tensor:
    count = len(means)
    if not inputs.is_floating_point():
        raise TypeError(f"inputs must be floating point, got {inputs.dtype}; for uint8: x.float() / 255")
    if inputs.dim() < 2 or count not in (1, inputs.shape[1]):
        raise ValueError(
            f"mean and std are of {count} channels, inputs have the shape {tuple(inputs.shape)}: their "
            "second dimension must be that of the channels"
        )
    shape = (1, -1, *[1] * (inputs.dim() - 2))
    mean, std = (each.to(inputs.dtype).view(shape) for each in (means, stds))
    return (inputs - mean) / std


def _channels(name: str, values: object) -> list[float]:
    values = values.tolist() if isinstance(values, Tensor) else values
    each = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    if not each:
        raise ValueError(f"{name} must hold a number for each channel, got none")
    found = []
    for value in each:
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, or one for each channel, got {value!r}")
        found.append(float(value))
    return found
