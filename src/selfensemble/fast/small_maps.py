"""Convolutions on small feature maps, in bfloat16 on a CPU, as one matrix product over patches.

oneDNN's kernels are made for large maps: for 512 channels at 2x2 and a batch of 128 the gradient of weights
takes it 61 ms and the product 4, at 4x4 77 against 25 (one thread of a Xeon with AMX, torch 2.13.0), for the
same sums. Outputs and gradients of inputs are as slow where a core's cache does not hold the weights, which
are read again for each image. See docs/decisions/0016 and 0020.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

# Pixels of a feature map up to which the product is faster for gradients of weights; for the rest those up to
# which it is faster anyway, and what it takes of weights otherwise.
_LARGEST, _TINY, _MANY_WEIGHTS = 16, 4, 2**20


def product_pays(pixels: int, weights: int) -> bool:
    """Whether outputs and gradients of inputs are found faster by a product."""
    return pixels <= _TINY or (pixels <= _LARGEST and weights >= _MANY_WEIGHTS)


def speed_up_small_maps_(model: nn.Module) -> int:
    """Let the convolutions of `model` that can take the faster way where it applies; how many those are.

    They are 2d convolutions that keep the size of the map (stride, dilation and groups of 1). State dicts and
    outputs stay as they are, gradients but for rounding.
    """
    convolutions = [module for module in model.modules() if type(module) is nn.Conv2d and _keeps_size(module)]
    for convolution in convolutions:
        # No method: pickle looks for those on the class.
        convolution._conv_forward = partial(_forward, convolution)  # type: ignore[method-assign]
    return len(convolutions)


def as_before_(model: nn.Module) -> None:
    """Undo `speed_up_small_maps_`, which only training needs."""
    for module in model.modules():
        if getattr(vars(module).get("_conv_forward"), "func", None) is _forward:
            del module._conv_forward


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
        ctx.shape = inputs.shape
        ctx.by_product = product_pays(inputs.shape[-2] * inputs.shape[-1], weight.numel())
        if ctx.by_product:
            patches = patches_of(inputs, weight.shape[-2:])
            ctx.save_for_backward(patches, weight)
            return _product(patches, weight, bias, inputs.shape)
        ctx.save_for_backward(inputs, weight)
        return functional.conv2d(inputs, weight, bias, padding=_padding(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved, weight = ctx.saved_tensors
        to_inputs, to_weight, to_bias = ctx.needs_input_grad
        found: list[Tensor | None] = [None, None, None]
        if to_inputs and ctx.by_product:
            found[0] = convolve_by_product(gradient, turned(weight))
        elif to_inputs:
            found[0] = conv2d_input(ctx.shape, weight, gradient, padding=_padding(weight))
        if to_weight:
            patches = saved if ctx.by_product else patches_of(saved, weight.shape[-2:])
            found[1] = weight_gradient(patches, gradient, weight.shape)
        if to_bias:
            found[2] = gradient.sum(dim=(0, 2, 3))
        return tuple(found)


def patches_of(inputs: Tensor, kernel: torch.Size) -> Tensor:
    """(B H W, h w C) patches around each pixel, zeros beyond the edges.

    Args:
        inputs: (B, C, H, W).
        kernel: (h, w), both odd.
    """
    height, width = kernel
    padding = (width // 2, width // 2, height // 2, height // 2)
    padded = functional.pad(inputs.permute(0, 2, 3, 1), (0, 0, *padding))
    patches = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)
    return patches.reshape(-1, height * width * inputs.shape[1])


def weight_gradient(patches: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    """(O, C, h, w) gradient of the weights of a convolution that keeps the size of the map.

    Args:
        patches: of its inputs.
        gradient: (B, O, H, W) of its output.
        shape: of the weights.
    """
    outputs, channels, height, width = shape
    product = gradient.permute(0, 2, 3, 1).reshape(-1, outputs).t() @ patches
    return product.view(outputs, height, width, channels).permute(0, 3, 1, 2)


def convolve_by_product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`conv2d` with odd kernels that keeps the size of the map."""
    return _product(patches_of(inputs, weight.shape[-2:]), weight, bias, inputs.shape)


def _product(patches: Tensor, weight: Tensor, bias: Tensor | None, shape: torch.Size) -> Tensor:
    output = functional.linear(patches, weight.permute(0, 2, 3, 1).reshape(len(weight), -1), bias)
    return output.view(shape[0], *shape[2:], len(weight)).permute(0, 3, 1, 2)


def turned(weight: Tensor) -> Tensor:
    """Weights of the convolution that takes gradients of outputs to those of inputs, channels last."""
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def _padding(weight: Tensor) -> tuple[int, int]:
    return weight.shape[-2] // 2, weight.shape[-1] // 2
