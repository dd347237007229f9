"""The fast path: the same network with batch norm folded, laid out and computed as the device likes it."""

import functools
import time
from collections import Counter
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..ensemble.checks import floating_dtype
from ..ensemble.ensemble import SelfEnsemble
from ..noise import kernel
from ..noise.calls import copied, to_eval_mode_
from ..noise.copies import OptimizedCopy
from ..noise.graphs import original_modules
from ..noise.injection import CHILD, _pre_hook, device_of_parameters, execution_order, is_convolution
from ..noise.layer import GaussianNoise
from ..runtime.devices import has_bfloat16
from .ensemble import FastEnsemble, Precision, original_of, precision_of
from .exact import exact_float32 as exact_float32  # for those who import it from here
from .parts import Parts
from .prepacked import FEW, PrepackedConvolution, can_prepack
from .tracing import repeats_itself, rewritten

__all__ = [  # with what other files look for here
    "FastEnsemble", "Precision", "exact_float32", "faster_precision", "for_attacks", "optimize",
    "original_of", "precision_of",
]  # fmt: skip
_DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16}
_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FRESH = (PrepackedConvolution, nn.MaxPool2d)  # layers whose outputs are memory of their own
# Layers whose weights autocast casts; others may do with theirs what it does not know.
_HALVED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@functools.cache
def faster_precision(device: torch.device) -> Precision:
    """The precision in which a convolution of 64 channels takes less time on this device; measured once.

    Float32 on devices that have no autocast, by which the other would be computed.
    """
    if not torch.amp.is_autocast_available(device.type):
        return "float32"
    generator = torch.Generator("cpu").manual_seed(0)
    images = torch.rand(16, 64, 32, 32, generator=generator, dtype=torch.float32, device="cpu").to(device)
    seconds: dict[Precision, float] = {}
    for precision, dtype in _DTYPES.items():
        convolution = nn.Conv2d(64, 64, 3, padding=1, device=device, dtype=dtype)
        convolution.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = images.to(dtype, memory_format=torch.channels_last)
        times = []
        for _ in range(5):
            _wait(device)
            began = time.perf_counter()
            with torch.no_grad():
                convolution(inputs)
            _wait(device)
            times.append(time.perf_counter() - began)
        seconds[precision] = min(times)
    return min(seconds, key=lambda precision: seconds[precision])


def optimize(
    ensemble: SelfEnsemble, example_inputs: Tensor, precision: Precision | None = None
) -> FastEnsemble:
    """A copy of `ensemble` that computes the same, faster; the original stays unchanged.

    Batch norm is folded into the convolution before it if the network can be traced, images are in
    channels-last format, and with "bf16" everything after the first convolution is computed in bfloat16. The
    first convolution stays in float32: bfloat16 has steps of 1/256 near 1, as large as the perturbations that
    attacks look for.

    The copy is in eval mode and has no gradients of weights. Attacks on it follow its gradients, and check on
    the original whether they succeed.

    Args:
        ensemble: the ensemble to speed up, on the device where it runs; for an optimised copy, its original.
        example_inputs: (B, ...) images, on any device; they tell which convolution is the first.
        precision: "float32", or "bf16": labels then differ if two classes are nearly tied. By default the
            precision in which convolutions are measured to be faster on the device.

    Returns:
        An ensemble with the same noise; seeded shared draws are the same. Calibrated rules are kept, and are
        refused if they were calibrated in another precision.
    """
    original = cast(SelfEnsemble, original_of(ensemble))
    # A graph that is compiled would not follow what is done to its modules.
    network = to_eval_mode_(original_modules(copied(original.model))).requires_grad_(False)
    device = next((parameter.device for parameter in network.parameters()), example_inputs.device)
    wide = floating_dtype(network) == torch.float64
    if wide and precision == "bf16":
        raise ValueError(
            "the network is float64, which bfloat16 cannot stand for: optimize ensemble.float(), or leave "
            "bf16 (--precision) out"
        )
    precision = precision or ("float32" if wide else faster_precision(device))
    floating = example_inputs.is_floating_point()  # tokens stay what they are
    dtype = (original.input_dtype if floating else None) or example_inputs.dtype
    example_inputs = example_inputs[:2].to(dtype).to(device)
    steady = repeats_itself(network, example_inputs)
    if steady:
        network = rewritten(network, _fold_, example_inputs, 1e-3)
    convolutions = [fqn for fqn, module in network.named_modules() if is_convolution(module)]
    order = execution_order(network, convolutions, example_inputs[:1]) if convolutions else []
    first = network.get_submodule(order[0]) if order else None
    if precision == "bf16":
        network, first = _in_half(network, order[0] if order else "", example_inputs, steady)
    wrapped = _Fast(network, first, torch.bfloat16 if precision == "bf16" else None, original.model)
    fast = FastEnsemble(wrapped, original, precision)
    if ensemble is not original:
        fast.draws, fast.bounds, fast.stopping = ensemble.draws, ensemble.bounds, ensemble.stopping
        fast.sets = ensemble.sets
    to_eval_mode_(fast)
    return fast


def for_attacks(ensemble: SelfEnsemble, example_inputs: Tensor, precision: Precision) -> SelfEnsemble:
    """What attacks follow for gradients of a precision: for "float32" the ensemble, else an optimised copy.

    The copy is in float32 where a processor would only imitate bfloat16, and of networks in float64, of
    which there is no copy in bfloat16.
    """
    if precision == "float32":
        return ensemble
    half = has_bfloat16(device_of_parameters(ensemble)) and ensemble.input_dtype != torch.float64
    return optimize(ensemble, example_inputs, precision if half else "float32")


def _in_half(
    network: nn.Module, first: str, inputs: Tensor, steady: bool
) -> tuple[nn.Module, nn.Module | None]:
    """The network with weights in bfloat16 but for those of the convolution `first`.

    Returns:
        It, and that convolution where it has to be kept out of autocast.
    """
    if inputs.device.type == "cpu":
        kernel.prepare()
    # Of enough images for each way of computing a layer.
    enough = inputs.repeat(FEW, *[1] * (inputs.dim() - 1))[:FEW]
    if steady:
        network = rewritten(network, partial(_prepack_, first=first), enough, 0.05, half=True)
    convolution = network.get_submodule(first) if first else None
    if isinstance(convolution, PrepackedConvolution):
        convolution = None  # which sees to it itself
    _halve_weights(network, convolution)
    return network, convolution


def _fold_(parts: Parts) -> None:
    """Batch norm into the convolutions before it; those of torch alone, for others may do more."""
    for name, convolution in list(parts.modules.items()):
        batch_norm = parts.modules.get(parts.followers.get(name, ""))
        # Of random weights the levels would have to be folded as well.
        if type(convolution) not in _CONVOLUTIONS:
            continue
        if not isinstance(batch_norm, _BATCH_NORMS) or type(batch_norm) not in _BATCH_NORMS:
            continue
        if not batch_norm.track_running_stats:
            continue
        if convolution._forward_hooks or batch_norm._forward_hooks or batch_norm._forward_pre_hooks:
            continue  # what sees them would see something else
        transposed = isinstance(convolution, nn.modules.conv._ConvTransposeNd)
        fused = fuse_conv_bn_eval(convolution, batch_norm, transpose=transposed)  # type: ignore[type-var]
        parts.replace(name, fused)
        parts.drop_follower(name)


def _prepack_(parts: Parts, first: str) -> None:
    """Convolutions, and the ReLUs behind them, by those whose weights are laid out ahead.

    Args:
        parts: changed in place.
        first: name of the convolution that sees pixels.
    """
    modules = dict(parts.modules)
    uses = Counter(parameter for module in parts.root.modules() for parameter in module._parameters.values())
    for name, convolution in modules.items():
        if not can_prepack(convolution) or any(uses[each] > 1 for each in convolution.parameters()):
            continue
        relu = _is_plain_relu(modules.get(parts.followers.get(name, "")))
        parts.replace(name, PrepackedConvolution(convolution, relu, exact_inputs=name == first))
        if relu:
            parts.drop_follower(name)
    looked_at = any(map(_has_hooks_of_others, parts.root.modules()))
    for name, after in parts.followers.items() if not looked_at else ():
        # Noise in place: no memory has to be found.
        taker = parts.modules[after]
        noise = dict(taker.named_children()).get(CHILD, taker)  # by a hook, of which a graph knows nothing
        before = parts.modules[name]
        own = type(before) in _FRESH and "forward" not in vars(before)
        if isinstance(noise, GaussianNoise) and own:
            noise.overwrites = True


def _has_hooks_of_others(module: nn.Module) -> bool:
    """Whether a user may keep what it is given or returns."""
    pre = [each for each in module._forward_pre_hooks.values() if each is not _pre_hook]
    return bool(pre or module._forward_hooks)


def _is_plain_relu(module: nn.Module | None) -> bool:
    """Torch's own, with which nothing is called: a random layer before it or behind it would be lost."""
    if type(module) is not nn.ReLU:
        return False
    return not (module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module))


def _halve_weights(network: nn.Module, first: nn.Module | None) -> None:
    """What autocast would do to weights at every call: those of all layers but the first in bfloat16."""
    layers = [module for module in network.modules() if type(module) in _HALVED and module is not first]
    uses = Counter(parameter for module in network.modules() for parameter in module._parameters.values())
    for layer in layers:
        if any(uses[parameter] > 1 for parameter in layer._parameters.values() if parameter is not None):
            continue  # shared with a layer that may not be run under autocast
        layer.to(torch.bfloat16)
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class _Fast(OptimizedCopy, nn.Module):
    """Channels last and autocast around a network, without autocast in its first convolution."""

    def __init__(
        self, network: nn.Module, first: nn.Module | None, dtype: torch.dtype | None, original: nn.Module
    ) -> None:
        super().__init__()
        self._original = (original,)
        self.network = network
        self.dtype = dtype
        if dtype is not None and first is not None:
            first.forward = partial(_without_autocast, first)

    def forward(self, inputs: Tensor) -> Any:
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        if self.dtype is None:
            return self.network(inputs)
        with torch.autocast(inputs.device.type, self.dtype):
            return self.network(inputs)


def _without_autocast(convolution: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Its forward in float32. The next layer computes in half, as does what lies between."""
    kind = next(each.device.type for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
    with torch.autocast(kind, enabled=False):
        output: Tensor = type(convolution).forward(convolution, *args, **kwargs)
    return output.to(torch.bfloat16)
