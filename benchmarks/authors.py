"""The method as its authors' code does it, in today's torch: what the others are measured against.

Their noise layer fills a buffer of the input's size with normal numbers and adds it; an ensemble is a loop of
whole forward passes; everything is float32 in the default memory format, batch norm is a layer of its own.
Public repository xuanqing94/RobustNet, branch dev, rewritten.
"""

import torch
from torch import Tensor, nn


class Noise:
    """Their layer, as a hook in front of a convolution."""

    def __init__(self, std: float) -> None:
        self.std = std
        self.buffer: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ARG002
        inputs = args[0]
        if self.buffer is None or self.buffer.shape != inputs.shape:
            self.buffer = torch.empty(inputs.shape, device=inputs.device)
        self.buffer.normal_(0, self.std)
        return (inputs + self.buffer, *args[1:])


def with_noise(model: nn.Module, init_std: float = 0.2, inner_std: float = 0.1) -> nn.Module:
    """Noise in front of every convolution of `model`, in place."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for number, convolution in enumerate(convolutions):
        convolution.register_forward_pre_hook(Noise(inner_std if number else init_std))
    return model


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor, draws: int) -> Tensor:
    """(B, K) summed softmax outputs of `draws` passes."""
    total = torch.zeros((), device="cpu")
    for _ in range(draws):
        total = total + model(inputs).softmax(dim=1)
    return total
