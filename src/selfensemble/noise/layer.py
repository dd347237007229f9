"""Gaussian noise: its levels and its layer."""

import itertools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .streams import Sampling, Source, check_sampling, random_source

Std = float | tuple[float, ...]  # of a layer: one level, or one a channel


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


def _noise_like(inputs: Tensor, std: float, source: Source) -> Tensor:
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
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    noise = torch.empty((source.count, *inputs.shape[1:]), dtype=dtype, device=inputs.device)
    source.fill_shared_(noise, std)
    if ordered:
        noise = noise.contiguous(memory_format=torch.channels_last)
    return noise.to(inputs.dtype)


def _added(inputs: Tensor, noise: Tensor, overwrite: bool = False) -> Tensor:
    """`inputs + noise`, where noise that images share belongs to as many of them, one after another."""
    if len(noise) in (1, len(inputs)):
        return inputs.add_(noise) if overwrite else inputs + noise
    each, own = inputs.unflatten(0, (len(noise), -1)), noise.unsqueeze(1)
    added: Tensor = each.add_(own) if overwrite else each + own
    return added.flatten(0, 1)


def _first_half(inputs: Tensor) -> Tensor:
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


class _AddToPairs(torch.autograd.Function):
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
def _add_noise(inputs: Tensor, std: float, layer: int, shared: bool, pairs: bool, call: int) -> Tensor:
    source = random_source(layer, shared, inputs.device)
    if pairs and not source.shared:
        return _added_to_pairs(inputs, _noise_like(_first_half(inputs), std, source))
    noise = _noise_like(inputs, std, source)
    output = torch.empty_like(inputs)  # laid out as the compiler was told
    if len(noise) in (1, len(inputs)):
        return torch.add(inputs, noise, out=output)
    return output.copy_(_added(inputs, noise))


@_add_noise.register_fake
def _(inputs: Tensor, std: float, layer: int, shared: bool, pairs: bool, call: int) -> Tensor:
    return torch.empty_like(inputs)


def _identity_backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    return gradient, None, None, None, None, None


_add_noise.register_autograd(_identity_backward)


# Levels that differ by channel, or are learned, scale this noise in the graph itself.
@torch.library.custom_op(
    "selfensemble::unit_noise", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _unit_noise(inputs: Tensor, layer: int, shared: bool, pairs: bool, call: int) -> Tensor:
    noise = _scalable_noise(inputs, random_source(layer, shared, inputs.device), pairs)
    each = noise if len(noise) in (1, len(inputs)) else _added(torch.zeros_like(inputs), noise)
    return torch.empty_like(inputs).copy_(each)


def _scalable_noise(inputs: Tensor, source: Source, pairs: bool) -> Tensor:
    """Noise of level 1, of the shape of `inputs` or shared."""
    if pairs and not source.shared:
        return _of_pairs(_noise_like(_first_half(inputs), 1.0, source), len(inputs))
    return _noise_like(inputs, 1.0, source)


@_unit_noise.register_fake
def _(inputs: Tensor, layer: int, shared: bool, pairs: bool, call: int) -> Tensor:
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
            distribution of each image's output as it is. Training is always per image.
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

    In train mode the second half of a batch has the opposites of the numbers of the first half, half as many
    to draw; the noise of each image is distributed as it was (docs/decisions/0021).

    The layer adds nothing to a state dict.

    Args:
        std: standard deviation, >= 0, in the units of the input; or one for each channel.
        layer, sampling: see `RandomLayer`.

    Attributes:
        overwrites: whether the input may be overwritten where no gradient is wanted; for networks in which
            nobody else sees it.

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
        self.overwrites = False

    @property
    def std(self) -> Std:
        """Standard deviation, or one for each channel."""
        return self._std

    @std.setter
    def std(self, std: Std) -> None:
        self._std = check_stds("std", std)
        self._number = self._std if isinstance(self._std, float) else None
        self._varies = bool(np.max(self._std) > 0)
        levels = torch.tensor(self._std, device="cpu") if self._number is None else None
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
        noisy: Tensor
        if torch.compiler.is_compiling():
            noisy = _add_noise(inputs, self._number, self.layer, shared, self.training, call_number())
            return noisy
        source = random_source(self.layer, shared, inputs.device)
        if self.training and not source.shared:
            noise = _noise_like(_first_half(inputs.detach()), self._number, source)
            noisy = _AddToPairs.apply(inputs, noise)  # type: ignore[no-untyped-call]
            return noisy
        overwrite = self.overwrites and not inputs.requires_grad
        return _added(inputs, _noise_like(inputs.detach(), self._number, source), overwrite)

    def _scaled(self, inputs: Tensor, levels: Tensor, shared: bool) -> Tensor:
        """Noise times levels that are a tensor, along the channels and differentiable in the levels."""
        if levels.dim() and (inputs.dim() < 2 or inputs.shape[1] != len(levels)):
            raise ValueError(
                f"there are noise levels for {len(levels)} channels, and inputs of shape "
                f"{tuple(inputs.shape)}: their second dimension must be that of the channels"
            )
        noise: Tensor
        if torch.compiler.is_compiling():
            noise = _unit_noise(inputs.detach(), self.layer, shared, self.training, call_number())
        else:
            source = random_source(self.layer, shared, inputs.device)
            noise = _scalable_noise(inputs.detach(), source, self.training)
        shape = (-1, *[1] * (inputs.dim() - 2)) if levels.dim() else ()
        scale = levels.to(inputs).reshape(shape)  # levels that were set later are not moved yet
        if noise.shape[0] < inputs.shape[0]:  # of one draw for the batch; scaled before it meets the batch
            return _added(inputs, noise * scale)
        return torch.addcmul(inputs, noise, scale)

    def extra_repr(self) -> str:
        off = "" if self.enabled else ", off"
        return f"std={describe_std(self.std)}, layer={self.layer}, sampling={self.sampling}{off}"
