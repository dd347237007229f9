"""Layers with random weights: convolutions and linear layers that draw their weights at every call.

Where sampling is shared a batch has one draw of the weights; per image, each image of a batch has its
own weights, and the batch is one grouped convolution. In training the batch has one draw, as in the papers
that the kinds are from: other weights for each image of a step would cost as many weight gradients as images.
`noise_draw(sampling="per_image")` gives each its own all the same.

A layer becomes random in place, as `torch.nn.utils.parametrize` does it: the object stays, with its
parameters, hooks and names in the state dict, and gets another class.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .numbers import source_of
from .placing import PlacedLayer
from .streams import Source

# Numbers of weights that are drawn at a time, for as many images as that is: on a CPU as its cache holds them
# (28 ms an image of a half-width VGG16, 52 for the batch at once), elsewhere as memory does.
_ROOM_ON_CPU, _ROOM = 2**20, 2**26


class RandomWeights(PlacedLayer):
    """Mixed into `nn.Conv2d` or `nn.Linear`: a draw of the weights at each call.

    Attributes:
        weight, bias: what `noise_disabled` and `make_static_` leave, the mean of the draws unless the kind
            says otherwise.
    """

    weight: Tensor
    bias: Any  # Tensor or None; torch's classes differ in what they declare

    def drawn(self, source: Source, images: int) -> tuple[Tensor, Tensor | None]:
        """(G, *weight.shape) weights and (G, O) or (O,) biases, G as in `numbers.entries`."""
        raise NotImplementedError

    def mean(self) -> tuple[Tensor, Tensor | None]:
        """Weights and biases without randomness, of the shapes of one draw."""
        return self.weight, self.bias

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.is_active or inputs.is_meta:
            weight, bias = self._cast(self.mean())
            return self._applied(inputs, weight.unsqueeze(0), bias)
        batched = inputs if inputs.dim() > self._unbatched() else inputs.unsqueeze(0)
        source = source_of(self, batched, self.sampling == "shared" or self.training)
        room = _ROOM_ON_CPU if batched.device.type == "cpu" else _ROOM
        at_once = len(batched) if source.shared else room // self.weight.numel()
        parts = [
            self._applied(part, *self._cast(self.drawn(source, len(part))))
            for part in batched.split(max(1, at_once))
        ]
        outputs = parts[0] if len(parts) == 1 else torch.cat(parts)
        return outputs if batched is inputs else outputs.squeeze(0)

    def _cast(self, drawn: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """In the dtype of the layer, whatever the numbers had."""
        weight, bias = drawn
        return weight.to(self.weight.dtype), None if bias is None else bias.to(self.weight.dtype)

    def _applied(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with the weights (G, ...) of as many equal parts of the batch."""
        raise NotImplementedError

    def _unbatched(self) -> int:
        """Dimensions of an input without a batch."""
        raise NotImplementedError


class RandomConv2d(RandomWeights, nn.Conv2d):
    """A convolution with random weights, see `RandomWeights`. Shape: that of `nn.Conv2d`."""

    def _unbatched(self) -> int:
        return 3

    def _applied(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            inputs = functional.pad(inputs, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        count = len(weight)
        if count == 1:
            own = bias if bias is None or bias.dim() == 1 else bias[0]
            return functional.conv2d(inputs, weight[0], own, self.stride, padding, self.dilation, self.groups)
        if bias is not None:
            bias = bias.expand(count, -1).flatten()
        # Images of one draw one after another, the channels of all draws side by side.
        beside = inputs.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)
        outputs = functional.conv2d(
            beside, weight.flatten(0, 1), bias, self.stride, padding, self.dilation, count * self.groups
        )
        each: Tensor = outputs.unflatten(1, (count, -1))
        return each.transpose(0, 1).flatten(0, 1)


class RandomLinear(RandomWeights, nn.Linear):
    """A linear layer with random weights, see `RandomWeights`. Shape: that of `nn.Linear`."""

    def _unbatched(self) -> int:
        return 1

    def _applied(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        count = len(weight)
        if count == 1:
            own = bias if bias is None or bias.dim() == 1 else bias[0]
            return functional.linear(inputs, weight[0], own)
        parts = inputs.unflatten(0, (count, -1))
        outputs = torch.bmm(parts.flatten(1, -2), weight.transpose(1, 2))
        if bias is not None:
            outputs = outputs + bias.expand(count, -1).unsqueeze(1)
        each: Tensor = outputs.unflatten(1, parts.shape[1:-1])
        return each.flatten(0, 1)


def randomise_weights_(module: nn.Module, kind: type[RandomWeights], number: int) -> RandomWeights:
    """Make a convolution or linear layer one of the given kind, in place.

    Args:
        module: an `nn.Conv2d` or `nn.Linear`, no subclass: what that computes is not known.
        kind: a class that mixes `RandomWeights` into that of `module`.
        number: of the layer, see `RandomLayer`.
    """
    module.__class__ = kind
    layer = cast(RandomWeights, module)
    layer.begin_(number, "per_image")
    return layer
