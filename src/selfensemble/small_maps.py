"""Weight gradients of convolutions on small feature maps, in bfloat16 on a CPU, as one matrix product.

oneDNN's kernel for them is made for large maps: for 512 channels at 2x2 and a batch of 128 it takes 61 ms
where the product takes 4, at 4x4 77 against 25 (one thread of a Xeon with AMX, torch 2.13.0), for the same
sums. Outputs and input gradients are left to it. See docs/decisions/0016.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

# Pixels of a feature map up to which the product is faster.
_LARGEST = 16


def speed_up_small_maps_(model: nn.Module) -> int:
    """Let the convolutions of `model` that can take the faster way where it applies; how many those are.

    They are 2d convolutions that keep the size of the map (stride, dilation and groups of 1). State dicts and
    outputs stay as they are, gradients but for rounding.
    """
    convolutions = [module for module in model.modules() if type(module) is nn.Conv2d and _keeps_size(module)]
    for convolution in convolutions:
        convolution._conv_forward = MethodType(_forward, convolution)  # type: ignore[method-assign]
    return len(convolutions)


def _keeps_size(convolution: nn.Conv2d) -> bool:
    plain = convolution.stride == convolution.dilation == (1, 1) and convolution.groups == 1
    padding = convolution.padding
    if not plain or isinstance(padding, str) or convolution.padding_mode != "zeros":
        return False
    return convolution.kernel_size == (2 * padding[0] + 1, 2 * padding[1] + 1)


def _forward(convolution: nn.Conv2d, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Stands in for `nn.Conv2d._conv_forward`."""
    small = inputs.dim() == 4 and inputs.shape[-2] * inputs.shape[-1] <= _LARGEST
    half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    # In eval mode attacks want the gradients of images alone, which a custom function cannot tell.
    learns = convolution.training and weight.requires_grad and torch.is_grad_enabled()
    if not (small and half and learns and inputs.device.type == "cpu"):
        plain: Tensor = nn.Conv2d._conv_forward(convolution, inputs, weight, bias)
        return plain
    cast = [None if each is None else each.to(torch.bfloat16) for each in (inputs, weight, bias)]
    with torch.autocast("cpu", enabled=False):
        output: Tensor = _Convolution.apply(*cast)  # type: ignore[no-untyped-call]
        return output


class _Convolution(torch.autograd.Function):
    """`conv2d` that keeps the size of the map."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return functional.conv2d(inputs, weight, bias, padding=_padding(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        to_inputs, to_weight, to_bias = ctx.needs_input_grad
        found: list[Tensor | None] = [None, None, None]
        if to_inputs:
            found[0] = conv2d_input(inputs.shape, weight, gradient, padding=_padding(weight))
        if to_weight:
            found[1] = weight_gradient(inputs, gradient, weight.shape[-2:])
        if to_bias:
            found[2] = gradient.sum(dim=(0, 2, 3))
        return tuple(found)


def weight_gradient(inputs: Tensor, gradient: Tensor, kernel: torch.Size) -> Tensor:
    """(O, I, h, w) gradient of the weights of a convolution that keeps the size of the map.

    Args:
        inputs: (B, I, H, W) of the convolution.
        gradient: (B, O, H, W) of its output.
        kernel: (h, w), both odd.
    """
    height, width = kernel
    padded = functional.pad(inputs, (width // 2, width // 2, height // 2, height // 2)).permute(0, 2, 3, 1)
    patches = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)  # (B, H, W, h, w, I)
    flat = gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1])
    product = flat.t() @ patches.reshape(len(flat), -1)
    return product.reshape(-1, height, width, inputs.shape[1]).permute(0, 3, 1, 2)


def _padding(weight: Tensor) -> tuple[int, int]:
    return weight.shape[-2] // 2, weight.shape[-1] // 2
