"""Gaussian noise: its levels, its layer, and how draws are sampled and seeded.

A *draw* is one noisy forward pass. Outside `noise_draw` every call of every layer takes fresh
entropy from a generator of this module, seeded by the operating system: the caller's global random
state is neither read nor changed, so that `torch.manual_seed` cannot freeze the defense.
"""

import hashlib
import itertools
import math
import numbers
import operator
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from .half_noise import fill_half_

Sampling = Literal["per_image", "shared"]
Std = float | tuple[float, ...]  # of a layer: one level, or one a channel

# Streams a seed spans before it wraps: LAYERS layers of 2**32 / LAYERS (a million) draws.
LAYERS = 4096
_MASK32 = 0xFFFF_FFFF


def check_std(name: str, std: object) -> float:
    """Return `std` as a float, or raise a ValueError that says what is wrong with it."""
    if isinstance(std, bool) or not isinstance(std, numbers.Real):
        raise ValueError(f"{name} must be a number >= 0, got {std!r}")
    value = float(std)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and >= 0 (0 switches it off), got {std}")
    return value


def check_stds(name: str, std: object) -> Std:
    """The same for one level, or for a list of levels, one a channel."""
    if isinstance(std, Sequence) and not isinstance(std, str):
        if not std:
            raise ValueError(f"{name} must hold a level a channel, got none")
        return tuple(check_std(name, level) for level in std)
    return check_std(name, std)


def describe_std(std: Std) -> str:
    """For people: one figure, or the smallest and the largest of the channels."""
    if isinstance(std, float) or len(std) == 1:
        return f"{np.max(std):.4g}"
    return f"{min(std):.4g} to {max(std):.4g} ({len(std)} channels)"


def check_sampling(sampling: str) -> Sampling:
    """Return `sampling` if it names a policy, or raise a ValueError that lists them."""
    for known in get_args(Sampling):
        if sampling == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"sampling must be one of {get_args(Sampling)}, got {sampling!r}")


@dataclass(frozen=True, slots=True)
class NoiseConfig:
    """Standard deviations of the noise, in the units of what it is added to.

    The defaults are those published for CIFAR-10 and VGG16 (Liu et al. 2018, section 4).

    Attributes:
        init_std: noise on the input of the first convolution; images are in [0, 1].
        inner_std: noise on the input of every other convolution.
    """

    init_std: float = 0.2
    inner_std: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "init_std", check_std("init_std", self.init_std))
        object.__setattr__(self, "inner_std", check_std("inner_std", self.inner_std))


@dataclass(frozen=True, slots=True)
class _Draw:
    seed: int | None = None
    index: int = 0
    sampling: Sampling | None = None
    streams: dict[tuple[int, torch.device], torch.Generator] = field(default_factory=dict)
    bits: dict[int, np.random.SFC64] = field(default_factory=dict)


# Without a seed there are no streams to keep, so that sharing the default is safe.
_current: ContextVar[_Draw] = ContextVar("selfensemble_draw", default=_Draw())  # noqa: B039


@contextmanager
def noise_draw(seed: int | None = None, index: int = 0, sampling: Sampling | None = None) -> Iterator[None]:
    """Within this context, noise is draw number `index` of `seed`, sampled by `sampling`.

    With a seed, the first call of a layer takes the start of the stream (seed, index, layer), and
    later calls go on where it stopped; the same context entered again gives the same noise. Shared
    noise then depends on nothing else: not on the size or composition of the batch, the memory
    format or (but for rounding) the dtype. Per-image noise depends on the first two of these as well.
    CPU and CUDA have different streams. The context holds in the thread that enters it.

    Args:
        seed: any integer, or None for fresh entropy.
        index: number of the draw, >= 0; up to a million draws of a seed do not overlap.
        sampling: "per_image" or "shared" for every layer, or None to leave the choice to each layer.
    """
    if index < 0:
        raise ValueError(f"index must be >= 0, got {index}")
    policy = None if sampling is None else check_sampling(sampling)
    token = _current.set(_Draw(None if seed is None else operator.index(seed), index, policy))
    try:
        yield
    finally:
        _current.reset(token)


def stream_seed(seed: int, index: int, layer: int) -> int:
    """64-bit seed of the stream (seed, draw index, layer).

    torch's CPU generator uses the low 32 bits of a seed only. Within one seed those are an injective
    function of (index, layer), so that no two streams coincide, then mixed (murmur3's finalizer, a
    bijection), so that neighbours do not look alike.
    """
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    high, low = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
    mixed = (low + index * LAYERS + layer) & _MASK32
    mixed = ((mixed ^ (mixed >> 16)) * 0x85EB_CA6B) & _MASK32
    mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2_AE35) & _MASK32
    return (high << 32) | (mixed ^ (mixed >> 16))


class _Entropy(threading.local):
    """One generator a thread and device, seeded by the operating system, and one of bits."""

    def __init__(self) -> None:
        self.generators: dict[torch.device, torch.Generator] = {}
        self.bits: np.random.SFC64 | None = None

    def generator(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            seed = int.from_bytes(os.urandom(8), "big") >> 1
            self.generators[device] = torch.Generator(device).manual_seed(seed)
        return self.generators[device]

    def bit_generator(self) -> np.random.SFC64:
        if self.bits is None:
            self.bits = np.random.SFC64()
        return self.bits

    def forget(self) -> None:
        self.generators, self.bits = {}, None


_entropy = _Entropy()
if hasattr(os, "register_at_fork"):  # a forked child must not repeat its parent's noise
    os.register_at_fork(after_in_child=_entropy.forget)


def _generator(draw: _Draw, layer: int, device: torch.device) -> torch.Generator:
    if draw.seed is None:
        return _entropy.generator(device)
    key = (layer, device)
    if key not in draw.streams:
        seed = stream_seed(draw.seed, draw.index, layer)
        draw.streams[key] = torch.Generator(device).manual_seed(seed)
    return draw.streams[key]


def _bit_generator(draw: _Draw, layer: int) -> np.random.SFC64:
    if draw.seed is None:
        return _entropy.bit_generator()
    if layer not in draw.bits:
        draw.bits[layer] = np.random.SFC64(stream_seed(draw.seed, draw.index, layer))
    return draw.bits[layer]


def fresh_seed() -> int:
    """A seed in [0, 2^62): of fresh entropy, or within a seeded `noise_draw` the next of its seeds."""
    generator = _generator(_current.get(), LAYERS - 1, torch.device("cpu"))
    return int(torch.randint(2**62, (), generator=generator))


def random_source(layer: int, shared: bool, device: torch.device) -> tuple[torch.Generator, bool]:
    """The generator of a layer in the current draw, and whether a batch shares what is drawn.

    Args:
        layer: its number.
        shared: the choice of the layer, which that of `noise_draw` overrides.
        device: of the generator.

    Raises:
        RuntimeError: called inside a backward pass.
    """
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a noisy layer was called inside a backward pass: activation checkpointing would compute it "
            "again with other noise and give wrong gradients; switch checkpointing off"
        )
    draw = _current.get()
    policy = shared if draw.sampling is None else draw.sampling == "shared"
    return _generator(draw, layer, device), policy


def _noise_like(inputs: Tensor, std: float, layer: int, shared: bool) -> Tensor:
    """Noise of the shape of `inputs`, or with a first dimension of 1 where the batch shares it."""
    if inputs.device.type == "meta":
        return torch.empty_like(inputs)
    generator, shared = random_source(layer, shared, inputs.device)
    if not shared:
        noise = torch.empty_like(inputs, requires_grad=False)
        if inputs.device.type == "cpu" and inputs.dtype in (torch.bfloat16, torch.float16):
            fill_half_(noise, std, _bit_generator(_current.get(), layer))
            return noise
        # Filled in memory order: `normal_` on a permuted view is several times slower.
        noise.as_strided((noise.numel(),), (1,)).normal_(0.0, std, generator=generator)
        return noise
    # In float32 and logical order, so that neither dtype nor memory format changes the draw.
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    noise = torch.empty((1, *inputs.shape[1:]), dtype=dtype, device=inputs.device)
    noise.normal_(0.0, std, generator=generator)
    if inputs.dim() == 4 and inputs.is_contiguous(memory_format=torch.channels_last):
        noise = noise.contiguous(memory_format=torch.channels_last)
    return noise.to(inputs.dtype)


# Under torch.compile and torch.export the layer is one opaque operator: the graph stays whole, seeds
# are read when it runs rather than baked in, and a CPU keeps its vectorised generator.
@torch.library.custom_op(
    "selfensemble::add_noise", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _add_noise(inputs: Tensor, std: float, layer: int, shared: bool, call: int) -> Tensor:
    noise = _noise_like(inputs, std, layer, shared)
    return torch.add(inputs, noise, out=torch.empty_like(inputs))


@_add_noise.register_fake
def _(inputs: Tensor, std: float, layer: int, shared: bool, call: int) -> Tensor:
    return torch.empty_like(inputs)


def _identity_backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    return gradient, None, None, None, None


_add_noise.register_autograd(_identity_backward)


# Levels that differ by channel, or are learned, scale this noise in the graph itself.
@torch.library.custom_op(
    "selfensemble::unit_noise", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _unit_noise(inputs: Tensor, layer: int, shared: bool, call: int) -> Tensor:
    return torch.empty_like(inputs).copy_(_noise_like(inputs, 1.0, layer, shared))


@_unit_noise.register_fake
def _(inputs: Tensor, layer: int, shared: bool, call: int) -> Tensor:
    return torch.empty_like(inputs)


_calls = itertools.count()


def call_number() -> int:
    """A number that no other call in a traced graph has.

    The compiler's common-subexpression elimination merges calls of custom operators with equal
    arguments, tagged as random or not; the draws of an ensemble would share their first noise.
    """
    return next(_calls)


# What torch.compiler.assume_constant_result does; calling that imports the whole compiler.
call_number._dynamo_marked_constant = True  # type: ignore[attr-defined]


class RandomLayer(nn.Module):
    """A layer that draws random numbers at every call, in training and at test time.

    `eval()` does not switch it off; `noise_disabled` does.

    Attributes:
        layer: number of the layer within its network; seeded streams of two layers differ by it.
        sampling: "per_image" gives every image of a batch its own randomness. "shared" gives all images
            of a batch the same in eval mode, which costs 1 / batch of the random numbers and leaves the
            distribution of each image's output as it is; training is always per image.
        enabled: what `noise_disabled` sets to False.
        is_continuous: whether no two draws are ever equal.
    """

    is_continuous = True

    def __init__(self, layer: int, sampling: Sampling) -> None:
        super().__init__()
        self.layer = layer
        self.sampling: Sampling = check_sampling(sampling)
        self.enabled = True

    @property
    def varies(self) -> bool:
        """Whether two calls differ, while the layer is enabled."""
        raise NotImplementedError

    @property
    def is_active(self) -> bool:
        """Whether two calls differ now."""
        return self.enabled and self.varies

    def fix_(self) -> None:
        """Take the randomness out for good."""
        raise NotImplementedError


class GaussianNoise(RandomLayer):
    """Adds `N(0, std^2)` noise to its input, at training and at test time, fresh at every call.

    The layer adds nothing to a state dict.

    Args:
        std: standard deviation, >= 0, in the units of the input; or one for each channel.
        layer, sampling: see `RandomLayer`.

    Shape: (B, ...) of any floating dtype, to the same; (B, C, ...) where `std` holds C levels.

    Source: Liu et al., Towards Robust Neural Networks via Random Self-ensemble, ECCV 2018, eq. 2.
    """

    _number: float | None  # one level that is a number rather than a tensor
    _levels: Tensor | None
    _varies: bool

    def __init__(
        self, std: float | Sequence[float] = 0.1, *, layer: int = 0, sampling: Sampling = "per_image"
    ) -> None:
        super().__init__(layer, sampling)
        self.std = check_stds("std", std)

    @property
    def std(self) -> Std:
        """Standard deviation, or one for each channel."""
        return self._std

    @std.setter
    def std(self, std: Std) -> None:
        self._std = check_stds("std", std)
        self._number = self._std if isinstance(self._std, float) else None
        self._varies = bool(np.max(self._std) > 0)
        levels = torch.tensor(self._std) if self._number is None else None
        # A buffer moves to the device of the network; one that is not persistent is in no state dict.
        self.register_buffer("_levels", levels, persistent=False)

    @property
    def varies(self) -> bool:
        return self._varies

    def fix_(self) -> None:
        self.std = 0.0

    def levels(self) -> Tensor:
        """(C,), or () for one level, where levels are a tensor."""
        assert self._levels is not None
        return self._levels

    def forward(self, inputs: Tensor) -> Tensor:
        if not (self.enabled and self._varies):
            return inputs
        if not inputs.is_floating_point():
            raise TypeError(
                f"noise needs floating-point inputs in [0, 1], got {inputs.dtype}; "
                "for uint8 images use inputs.float() / 255"
            )
        shared = self.sampling == "shared" and not self.training
        if self._number is None:
            return self._scaled(inputs, self.levels(), shared)
        if torch.compiler.is_compiling():
            noisy: Tensor = _add_noise(inputs, self._number, self.layer, shared, call_number())
            return noisy
        return inputs + _noise_like(inputs.detach(), self._number, self.layer, shared)

    def _scaled(self, inputs: Tensor, levels: Tensor, shared: bool) -> Tensor:
        """Noise times levels that are a tensor, along the channels and differentiable in the levels."""
        if levels.dim() and (inputs.dim() < 2 or inputs.shape[1] != len(levels)):
            raise ValueError(
                f"there are noise levels for {len(levels)} channels, and inputs of shape "
                f"{tuple(inputs.shape)}: their second dimension must be that of the channels"
            )
        noise: Tensor
        if torch.compiler.is_compiling():
            noise = _unit_noise(inputs.detach(), self.layer, shared, call_number())
        else:
            noise = _noise_like(inputs.detach(), 1.0, self.layer, shared)
        shape = (-1, *[1] * (inputs.dim() - 2)) if levels.dim() else ()
        scale = levels.to(inputs.dtype).reshape(shape)
        if len(noise) < len(inputs):  # of one draw for the batch; scaled before it meets the batch
            return inputs + noise * scale
        return torch.addcmul(inputs, noise, scale)

    def extra_repr(self) -> str:
        off = "" if self.enabled else ", off"
        return f"std={describe_std(self.std)}, layer={self.layer}, sampling={self.sampling}{off}"
