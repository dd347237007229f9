"""Convolutions for a CPU in bfloat16: weights laid out once, the ReLU in the same pass, input gradients only.

`conv2d` of torch lays its weights out at every call and leaves the ReLU to another pass over the output. The
operators that torch's compiler calls on a CPU do both ahead. On small maps of many channels even these read
every weight again for each image, from a cache that does not hold them; there a matrix product over the batch
is faster. What pays where was measured: docs/decisions/0020.
"""

import math
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..noise.injection import CHILD, _pre_hook
from .small_maps import convolve_by_product, product_pays, turned

# A matrix between all pixels of the input and all of the output: at most so many entries, on maps so small.
_DENSE_PIXELS, _DENSE_ENTRIES = 4, 2**24
# Of fewer images a product is no faster, and of so few the weights are read once anyway.
FEW = 16


def can_prepack(convolution: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether `PrepackedConvolution` does what this module does, on this machine."""
    if type(convolution) is not nn.Conv2d or convolution.padding_mode != "zeros":
        return False
    hooks = [hook for hook in convolution._forward_pre_hooks.values() if hook is not _pre_hook]
    if hooks or convolution._forward_hooks or convolution._backward_hooks or convolution._backward_pre_hooks:
        return False
    operators = torch.ops.mkldnn
    needed = ("_convolution_pointwise", "_reorder_convolution_weight", "_is_mkldnn_bf16_supported")
    return (
        not isinstance(convolution.padding, str)
        and convolution.weight.device.type == "cpu"
        and convolution.weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and all(hasattr(operators, name) for name in needed)
        and bool(operators._is_mkldnn_bf16_supported())
    )


class PrepackedConvolution(nn.Conv2d):
    """Stands in for a convolution, and for the ReLU behind it.

    Noise that was injected before the convolution goes along. Weights have no gradients.

    Args:
        convolution: one that `can_prepack` accepts.
        relu: whether a ReLU follows.
        exact_inputs: take each input as the sum of two bfloat16 numbers, and each weight: an error of 2^-16
            rather than 2^-9, for the layer that sees pixels. Gradients are in bfloat16 all the same.

    Shape: (B, C, H, W) of any floating dtype, to (B, O, H', W') in bfloat16, channels last.
    """

    def __init__(self, convolution: nn.Conv2d, relu: bool, exact_inputs: bool = False) -> None:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        same: dict[str, Any] = {name: getattr(convolution, name) for name in names}
        super().__init__(**same, device="meta")
        self.relu = relu
        # Grouped inputs would have to be split group by group.
        self.exact_inputs = exact_inputs and convolution.groups == 1
        self._settings: tuple[list[int], ...] = tuple(
            list(same[name]) for name in ("padding", "stride", "dilation")
        )
        dtype = torch.float32 if self.exact_inputs else torch.bfloat16
        weight = convolution.weight.detach().to(dtype, memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = convolution.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        self._made = _Made()
        if hasattr(convolution, CHILD):
            self.add_module(CHILD, getattr(convolution, CHILD))
            self.register_forward_pre_hook(_pre_hook, with_kwargs=True)
        self.train(convolution.training)

    def extra_repr(self) -> str:
        usual: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{usual}, relu={self.relu}, exact_inputs={self.exact_inputs}"

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.device.type != "cpu" or inputs.dim() != 4:
            return self._elsewhere(inputs)
        # Nothing below is what autocast would change: a context here would cost more than a small layer.
        if not self.exact_inputs:
            inputs = inputs.to(torch.bfloat16)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        if torch.is_grad_enabled() and inputs.requires_grad:
            result: Tensor = _Convolve.apply(inputs, self)  # type: ignore[no-untyped-call]
            return result
        return self.convolve(inputs)

    def _elsewhere(self, inputs: Tensor) -> Tensor:
        """On another device, or of one image without a batch."""
        output = self._by_torch(inputs, self.weight.dtype, self.bias).to(torch.bfloat16)
        return functional.relu(output) if self.relu else output

    def _by_torch(self, inputs: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        """The convolution alone, in this precision whatever autocast says."""
        with torch.autocast(inputs.device.type, enabled=False):
            bias = None if bias is None else bias.to(dtype)
            output: Tensor = self._conv_forward(inputs.to(dtype), self.weight.to(dtype), bias)
        return output

    def convolve(self, inputs: Tensor) -> Tensor:
        """The output, of inputs that are laid out with channels last."""
        if self._is_dense(inputs.shape):
            matrix, bias, shape = self._dense(inputs.shape)
            flat = inputs.permute(0, 2, 3, 1).reshape(len(inputs), -1)
            output = functional.linear(flat, matrix, bias)
            output = output.view(len(inputs), *shape[1:], shape[0]).permute(0, 3, 1, 2)
            return output.relu_() if self.relu else output
        if self._is_over_patches(inputs.shape):
            output = convolve_by_product(inputs, self.weight, self.bias)
            return output.relu_() if self.relu else output
        if self._reads_outside(inputs.shape):
            output = self._by_torch(inputs, torch.float32, self.bias).to(torch.bfloat16)
            return output.relu_() if self.relu else output
        if self.exact_inputs:
            half, rest = _split(inputs)
            inputs = torch.cat([half, rest, half], dim=1)
        layout = self._get("forward", lambda: self._laid_out(self._all_parts()))
        settings = (*self._settings, self.groups, "relu" if self.relu else "none", [], "")
        done: Tensor = torch.ops.mkldnn._convolution_pointwise(inputs, layout, self.bias, *settings)
        return done

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """What `gradient` of the output, before the ReLU, says of inputs of `shape`."""
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        if self._is_dense(shape):
            matrix, _, _ = self._dense(shape)
            flat = gradient.permute(0, 2, 3, 1).reshape(len(gradient), -1) @ matrix
            return flat.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
        if not self._keeps_size:
            padding, stride, dilation = self._settings
            # Of the inputs only shape and layout count.
            like = torch.empty(
                shape, dtype=gradient.dtype, device=gradient.device, memory_format=torch.channels_last
            )
            weight = self.weight.to(torch.bfloat16)
            usual = (None, stride, padding, dilation, False, [0, 0], self.groups, (True, False, False))
            found: Tensor = torch.ops.aten.convolution_backward(gradient, like, weight, *usual)[0]
            return found
        if self._is_over_patches(shape):
            return convolve_by_product(gradient, self._get("turned", self._turned))
        layout = self._get("backward", lambda: self._laid_out(self._turned()))
        settings = (*self._settings, 1, "none", [], "")
        done: Tensor = torch.ops.mkldnn._convolution_pointwise(gradient, layout, None, *settings)
        return done

    @property
    def _keeps_size(self) -> bool:
        padding, stride, dilation = self._settings
        same = all(size == 2 * each + 1 for size, each in zip(self.kernel_size, padding, strict=True))
        return bool(same and self.groups == 1 and {*stride, *dilation} == {1})

    def _is_dense(self, shape: torch.Size) -> bool:
        pixels = shape[-2] * shape[-1]
        if self.exact_inputs or shape[0] < FEW or pixels > _DENSE_PIXELS:
            return False
        sizes = zip(shape[-2:], self.kernel_size, *self._settings, strict=True)
        outputs = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, p, s, d in sizes]
        entries: int = shape[1] * pixels * self.out_channels * math.prod(outputs)
        return entries <= _DENSE_ENTRIES

    def _reads_outside(self, shape: torch.Size) -> bool:
        """Whether torch's bfloat16 convolutions read outside of such inputs: what is NaN there stays it."""
        padding, stride, _ = self._settings
        multiplies = self.groups == shape[1] < self.out_channels  # several filters for each channel
        return stride[1] > 1 and (multiplies or (shape[-1] == 1 and padding[1] > 0))

    def _is_over_patches(self, shape: torch.Size) -> bool:
        pixels = shape[-2] * shape[-1]
        enough = shape[0] >= FEW and self._keeps_size and not self.exact_inputs
        return enough and product_pays(pixels, self.weight.numel())

    def _get(self, key: Any, make: Callable[[], Any]) -> Any:
        return self._made.get(self.weight, key, make)

    def _dense(self, shape: torch.Size) -> tuple[Tensor, Tensor | None, torch.Size]:
        """(out, in) matrix over flat images, channels last, its bias, and the shape of an output."""

        def make() -> tuple[Tensor, Tensor | None, torch.Size]:
            channels, height, width = shape[1:]
            size = channels * height * width
            columns = torch.eye(size, dtype=torch.float32, device=self.weight.device).view(
                size, height, width, channels
            )
            # Each number out is one weight, so that float32 changes nothing, and see `_reads_outside`.
            outputs = self._by_torch(columns.permute(0, 3, 1, 2), torch.float32, None)
            flat = outputs.permute(0, 2, 3, 1).reshape(size, -1).to(torch.bfloat16)
            bias = None if self.bias is None else self.bias.repeat(flat.shape[1] // len(self.bias))
            return flat.t().contiguous(), bias, outputs.shape[1:]

        found: tuple[Tensor, Tensor | None, torch.Size] = self._get(("dense", shape[1:]), make)
        return found

    def _all_parts(self) -> Tensor:
        """Weights that the output is computed with."""
        if not self.exact_inputs:
            return self.weight
        half, rest = _split(self.weight)
        return torch.cat([half, half, rest], dim=1)

    def _turned(self) -> Tensor:
        """Weights of the convolution that takes output gradients to input gradients."""
        return turned(self.weight.to(torch.bfloat16))

    def _laid_out(self, weight: Tensor) -> Tensor:
        # For one image: that layout serves many as well, and that for many makes one wait.
        size = [1, weight.shape[1] * self.groups, 16, 16]
        arguments = (*self._settings, self.groups, size)
        done: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *arguments)
        return done


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 tensors that add up to `values`, but for 2^-16 of them."""
    half = values.to(torch.bfloat16)
    return half, (values - half).to(torch.bfloat16)


class _Made:
    """What is made of weights when it is first needed, and again when they change.

    Copies and pickles of a module start without.
    """

    def __init__(self) -> None:
        self.values: dict[Any, Any] = {}
        self.state = (0, -1)

    def get(self, weight: Tensor, key: Any, make: Callable[[], Any]) -> Any:
        if (state := (weight.data_ptr(), weight._version)) != self.state:
            self.values, self.state = {}, state
        if key not in self.values:
            with torch.no_grad():
                self.values[key] = make()
        return self.values[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Made":
        return _Made()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Made, ()


class _Convolve(torch.autograd.Function):
    """With gradients of inputs."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: PrepackedConvolution) -> Tensor:
        # No view, which a product returns: autograd refuses activations that write into one.
        output = layer.convolve(inputs).data
        ctx.layer, ctx.shape, ctx.dtype = layer, inputs.shape, inputs.dtype
        if layer.relu:
            ctx.save_for_backward(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layer: PrepackedConvolution = ctx.layer
        if layer.relu:
            (output,) = ctx.saved_tensors
            gradient = torch.ops.aten.threshold_backward(gradient, output, 0)
        return layer.input_gradient(gradient, ctx.shape).to(ctx.dtype), None
