"""Adding noise to a batch, in eager mode and as operators that a compiler does not look into."""

import itertools
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import CDLL
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .calls import is_off
from .half_precision import table_of
from .kernel import kernel, reaches
from .streams import Source, random_source


def noise_like(inputs: Tensor, std: float, source: Source) -> Tensor:
    """Noise of the shape of `inputs`, or with a first dimension of draws where their images share it."""
    if inputs.device.type == "meta":
        return torch.empty_like(inputs)
    if not source.shared:
        noise = torch.empty_like(inputs, requires_grad=False)
        source.fill_each_(noise, std)
        return noise
    source.check_batch(len(inputs))
    ordered = inputs.dim() == 4 and inputs.is_contiguous(memory_format=torch.channels_last)
    if source.draws_half(inputs.dtype):
        layout = torch.channels_last if ordered else torch.contiguous_format
        shape = (source.count, *inputs.shape[1:])
        noise = torch.empty(shape, dtype=inputs.dtype, device=inputs.device, memory_format=layout)
        source.fill_shared_(noise, std)
        return noise
    # In float32 and logical order, so that neither dtype nor memory format changes the draw.
    noise = torch.empty((source.count, *inputs.shape[1:]), dtype=torch.float32, device=inputs.device)
    source.fill_shared_(noise, std)
    if ordered:
        noise = noise.contiguous(memory_format=torch.channels_last)
    return noise.to(inputs.dtype)


def with_noise(inputs: Tensor, std: float, source: Source, overwrite: bool) -> Tensor:
    """`inputs` and their noise, which needs no gradient; in their memory if `overwrite`."""
    compiled = kernel()
    if compiled is not None and source.shared and source.draws_half(inputs.dtype) and _fits(inputs):
        source.check_batch(len(inputs))
        output = inputs if overwrite else torch.empty_like(inputs)
        _add_shared(output, inputs, std, source, compiled)
        return output
    return added(inputs, noise_like(inputs.detach(), std, source), overwrite)


def _fits(inputs: Tensor) -> bool:
    """Whether `kernel` can add to them: no derivatives, and images one after another in one layout."""
    if inputs.dtype != torch.bfloat16 or inputs.requires_grad or not reaches(inputs):
        return False
    if forward_ad._current_level >= 0 or not len(inputs):
        return False
    last = inputs.dim() == 4 and inputs.is_contiguous(memory_format=torch.channels_last)
    return last or inputs.is_contiguous()


def _add_shared(output: Tensor, inputs: Tensor, std: float, source: Source, compiled: CDLL) -> None:
    """`inputs` and the noise of `Source.fill_shared_`, which never lies in memory."""
    draw, quantiles, threads = source.draw, table_of(std, inputs.dtype), torch.get_num_threads()
    table = quantiles.data_ptr()
    images, size = len(inputs) // draw.count, inputs[0].numel()
    start, to, step = inputs.data_ptr(), output.data_ptr(), images * size * inputs.element_size()
    if draw.seed is None and not draw.antithetic and images == 1:  # one long draw
        compiled.add_noise(source.bits().state, table, start, to, draw.count * size, 1, 1, threads)
        return
    later = 0
    while later < draw.count:
        number = draw.index + later * draw.step
        opposite = source.is_opposite(number)
        pair = draw.antithetic and not opposite and draw.step == 1 and later + 1 < draw.count
        state, signs = source.bits(number - opposite).state, 0 if pair else -1 if opposite else 1
        at = later * step
        compiled.add_noise(state, table, start + at, to + at, size, images, signs, threads)
        later += 2 if pair else 1


def added(inputs: Tensor, noise: Tensor, overwrite: bool = False) -> Tensor:
    """`inputs + noise`, where noise that images share belongs to as many of them, one after another."""
    if len(noise) in (1, len(inputs)):
        return inputs.add_(noise) if overwrite else inputs + noise
    each, own = inputs.unflatten(0, (len(noise), -1)), noise.unsqueeze(1)
    added: Tensor = each.add_(own) if overwrite else each + own
    return added.flatten(0, 1)


def first_half(inputs: Tensor) -> Tensor:
    """Of a batch, the larger one where its size is odd."""
    return inputs[: -(-len(inputs) // 2)]


def _added_to_pairs(inputs: Tensor, noise: Tensor) -> Tensor:
    """Noise added to the first half of the images, and its opposite to the second; outside of any graph."""
    output = torch.empty_like(inputs, requires_grad=False)
    first = len(noise)
    torch.add(inputs[:first], noise, out=output[:first])
    torch.sub(inputs[first:], noise[: len(inputs) - first], out=output[first:])
    return output


def _of_pairs(noise: Tensor, size: int) -> Tensor:
    """Noise of a first half, and its opposite for the second, of `size` images in all."""
    return torch.cat([noise, -noise[: size - len(noise)]])


class AddOwn(torch.autograd.Function):
    """Inputs added to noise of each image's own, which becomes the output."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG004
        return noise.add_(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradient, None


class AddToPairs(torch.autograd.Function):
    """The same within a graph."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG004
        return _added_to_pairs(inputs, noise)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradient, None


# Under torch.compile and torch.export the layer is one opaque operator: the graph stays whole, seeds
# are read when it runs rather than baked in, and a CPU keeps its vectorised generator.
@torch.library.custom_op(
    "selfensemble::add_noise", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def add_noise(inputs: Tensor, std: float, layer: int, shared: bool, pairs: bool, call: int) -> Tensor:
    """Noise on `inputs`, where compilers do not look; `pairs`: in train mode, see `noise_draw(opposite)`."""
    if called_off(call):
        return inputs.clone()
    source = random_source(layer, shared, inputs.device)
    if pairs and source.pairs:
        return _added_to_pairs(inputs, noise_like(first_half(inputs), std, source))
    noise = noise_like(inputs, std, source)
    output = torch.empty_like(inputs)  # laid out as the compiler was told
    if len(noise) in (1, len(inputs)):
        return torch.add(inputs, noise, out=output)
    return output.copy_(added(inputs, noise))


@add_noise.register_fake
def _(inputs: Tensor, std: float, layer: int, shared: bool, pairs: bool, call: int) -> Tensor:
    return torch.empty_like(inputs)


def _identity_backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    return gradient, None, None, None, None, None


add_noise.register_autograd(_identity_backward)


# Levels that differ by channel, or are learned, scale this noise in the graph itself.
@torch.library.custom_op(
    "selfensemble::unit_noise", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def unit_noise(inputs: Tensor, layer: int, shared: bool, pairs: bool, call: int) -> Tensor:
    """Noise of level 1 for `inputs`, in the same way."""
    if called_off(call):
        return torch.zeros_like(inputs)
    noise = scalable_noise(inputs, random_source(layer, shared, inputs.device), pairs)
    each = noise if len(noise) in (1, len(inputs)) else added(torch.zeros_like(inputs), noise)
    return torch.empty_like(inputs).copy_(each)


def scalable_noise(inputs: Tensor, source: Source, pairs: bool) -> Tensor:
    """Noise of level 1, of the shape of `inputs` or shared."""
    if pairs and source.pairs:
        return _of_pairs(noise_like(first_half(inputs), 1.0, source), len(inputs))
    return noise_like(inputs, 1.0, source)


@unit_noise.register_fake
def _(inputs: Tensor, layer: int, shared: bool, pairs: bool, call: int) -> Tensor:
    return torch.empty_like(inputs)


_calls = itertools.count()
_layer_of_call: dict[int, int] = {}


def call_number(identity: int) -> int:
    """A number that no other call in a traced graph has.

    The compiler's common-subexpression elimination merges calls of custom operators with equal
    arguments, tagged as random or not; the draws of an ensemble would share their first noise.

    Graphs that are exported or traced may run in another process, which must not take their calls for its
    own: those numbers are random. Compiled ones stay here, and are counted, so that compilers find them in
    their caches again.

    Args:
        identity: of the layer that is called, which the operator asks for when it runs.

    Raises:
        RuntimeError: torch's ONNX exporter records it, which has no operator for noise.
    """
    _check_exporter()
    stays = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    number = next(_calls) if stays else secrets.randbits(62)
    _layer_of_call[number] = identity
    return number


_translates: ContextVar[bool] = ContextVar("selfensemble_translates", default=False)


@contextmanager
def onnx_translated() -> Iterator[None]:
    """Within this context torch's ONNX exporter may meet noise: it is told what becomes of it."""
    token = _translates.set(True)
    try:
        yield
    finally:
        _translates.reset(token)


def _check_exporter() -> None:
    if not _translates.get() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "torch.onnx.export has no operator for noise: use rse.export_onnx(ensemble, path, inputs) "
            "(`selfensemble export`), whose noise stays random, or remove_noise_ for a network without it"
        )


def called_off(call: int) -> bool:
    """Whether the layer of a call in a traced graph is switched off in the context in which it runs."""
    return is_off(_layer_of_call.get(call, -1))


# What torch.compiler.assume_constant_result does; calling that imports the whole compiler.
call_number._dynamo_marked_constant = True  # type: ignore[attr-defined]
