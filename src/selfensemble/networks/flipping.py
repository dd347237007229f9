"""The mean of the answers to an image and to its mirror image, as one network."""

from typing import Any

import torch
from torch import Tensor, fx, nn


class FlipAveraged(nn.Module):
    """The mean of the logits of an image and of its horizontal flip (test-time augmentation).

    In training mode it is `model` alone: images are flipped at random there. In eval mode both go through
    `model` in one batch, so a pass costs two.

    Noise before the whole `FlipAveraged` is one draw on the image, which is flipped with it: certificates are
    about that noise. Noise inside acts on both halves.

    Args:
        model: a classifier of images, trained on images flipped at random. Mean and std go inside:
            `FlipAveraged(Normalized(...))`.

    Shape: (B, C, H, W) to logits (B, K).

    Raises:
        ValueError: in a pass: inputs that are no images.
        TypeError: in a pass: an output that is neither a tensor nor has `.logits`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            return self.model(inputs, *args, **kwargs)
        return _mean_of_halves(self.model(_with_flips(inputs), *args, **kwargs))


# Each is one step of a graph, for its checks depend on the inputs.
@fx.wrap
def _with_flips(inputs: Tensor) -> Tensor:
    if inputs.dim() != 4:
        raise ValueError(
            f"FlipAveraged flips images (B, C, H, W) from left to right, got the shape {tuple(inputs.shape)}"
        )
    # Both of an image beside each other: several draws in one batch stay behind each other.
    return torch.stack([inputs, inputs.flip(3)], dim=1).flatten(0, 1)


@fx.wrap
def _mean_of_halves(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"FlipAveraged averages a tensor, or `.logits` of an output, got {type(output).__name__}: "
            "wrap the network so that it returns its logits"
        )
    mean: Tensor = logits.unflatten(0, (-1, 2)).mean(dim=1)
    return mean
