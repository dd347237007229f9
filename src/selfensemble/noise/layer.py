"""Gaussian noise: its layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .calls import is_off, new_identity
from .graphs import is_recording
from .levels import NoiseConfig as NoiseConfig
from .levels import Record, as_std
from .levels import Std as Std
from .levels import check_stds as check_stds
from .levels import describe_std as describe_std
from .operators import (
    AddOwn,
    AddToPairs,
    add_noise,
    added,
    call_number,
    first_half,
    noise_like,
    scalable_noise,
    unit_noise,
    with_noise,
)
from .streams import Sampling, check_sampling, is_within_a_draw, random_source

CHILD = "gaussian_noise"  # by which a module has the layer before it


class RandomLayer(nn.Module):
    """A layer that draws random numbers at every call, in training and at test time.

    `eval()` does not switch it off; `noise_disabled` does.

    Attributes:
        layer: number of the layer within its network; seeded streams of two layers differ by it.
        sampling: "per_image" gives every image of a batch its own randomness. "shared" gives all images
            of a batch the same in eval mode, which costs 1 / batch of the random numbers and leaves the
            distribution of each image's output as it is. Training is always per image, but for layers with
            random weights, which say so.
        enabled: False switches it off for everybody; `noise_disabled` switches it off for a call.
        identity: a number that no other layer of the process has, copies included.
        is_continuous: whether no two draws are ever equal.
    """

    is_continuous = True

    def __init__(self, layer: int, sampling: Sampling) -> None:
        super().__init__()
        self.begin_(layer, sampling)

    def begin_(self, layer: int, sampling: Sampling) -> None:
        """Set the attributes that every random layer has."""
        self.layer = layer
        self.sampling: Sampling = check_sampling(sampling)
        self.enabled = True
        self.identity = new_identity()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.identity = new_identity()

    def _replicate_for_data_parallel(self) -> Any:
        if self.enabled and self.varies and (is_within_a_draw() or is_off(self.identity)):
            raise ValueError(
                "nn.DataParallel runs its devices in its own threads, which know nothing of draws of a "
                "prediction, of seeds and noise_disabled: use DistributedDataParallel, or give it one device"
            )
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]

    @property
    def is_on(self) -> bool:
        """Whether the layer is enabled, and not switched off in the current context.

        In a compiled graph the operators ask for the latter when they run.
        """
        return self.enabled and (is_recording() or not is_off(self.identity))

    @property
    def varies(self) -> bool:
        """Whether two calls differ, while the layer is enabled."""
        raise NotImplementedError

    @property
    def is_active(self) -> bool:
        """Whether two calls differ now."""
        return self.is_on and self.varies

    def fix_(self) -> None:
        """Remove the randomness permanently."""
        raise NotImplementedError

    def levels_learned(self) -> list[nn.Parameter]:
        """Parameters that say how much noise there is: weight decay must leave them alone."""
        return []


class GaussianNoise(RandomLayer):
    """Adds `N(0, std^2)` noise to its input, at training and at test time, fresh at every call.

    With per-image sampling, which train mode always uses, the noise of each image of a batch is independent
    of all others, except within `noise_draw(opposite=True)` (docs/decisions/0021).

    The layer adds nothing to a state dict. A state dict can hold its level as `std`, as checkpoints of the
    callback for Lightning do; loading it sets the level.

    Args:
        std: standard deviation, >= 0, in the units of the input; or one for each channel.
        layer, sampling: see `RandomLayer`.

    Attributes:
        overwrites: whether the input can be overwritten when no gradient is needed; for networks in which
            nothing else uses it.
        record: see `records`; kept up to date.
        by_registration: whether it has the level of the first layer because its module was made first.
        injected: whether `inject_noise_` put it where it is.
        features_last: whether levels are of the last dimension, as before a linear layer, not of the second.

    Shape: (B, ...) of any floating dtype, to the same; (B, C, ...) if `std` holds C levels, or (B, ..., C).

    Source: Liu et al., Towards Robust Neural Networks via Random Self-ensemble, ECCV 2018, eq. 2.
    """

    _number: float | None  # one level that is a number rather than a tensor
    _levels: Tensor | None
    _varies: bool
    record: Record | None = None
    by_registration = injected = features_last = False

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
        levels = torch.tensor(self._std, dtype=torch.float32, device="cpu") if self._number is None else None
        # A buffer moves to the device of the network; one that is not persistent is in no state dict.
        self.register_buffer("_levels", levels, persistent=False)
        if self.record is not None:
            self.record["std"] = self._std

    @property
    def varies(self) -> bool:
        return self._varies

    def fix_(self) -> None:
        self.std = 0.0

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: Any,
        unexpected_keys: Any, error_msgs: list[str],
    ) -> None:  # fmt: skip
        if f"{prefix}std" in state_dict:
            try:
                self.std = as_std(state_dict.pop(f"{prefix}std"))
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix}std: {error}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def levels(self) -> Tensor:
        """(C,), or () for one level, where levels are a tensor."""
        assert self._levels is not None
        return self._levels

    def forward(self, inputs: Tensor) -> Tensor:
        if not (self._varies and self.is_on):
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
        if is_recording():
            call = call_number(self.identity)
            noisy = add_noise(inputs, self._number, self.layer, shared, self.training, call)
            return noisy
        source = random_source(self.layer, shared, inputs.device)
        if self.training and source.pairs:
            noise = noise_like(first_half(inputs.detach()), self._number, source)
            noisy = AddToPairs.apply(inputs, noise)  # type: ignore[no-untyped-call]
            return noisy
        if self.training and not source.shared:
            noise = noise_like(inputs.detach(), self._number, source)
            noisy = AddOwn.apply(inputs, noise)  # type: ignore[no-untyped-call]
            return noisy
        overwrite = self.overwrites and not inputs.requires_grad
        return with_noise(inputs, self._number, source, overwrite)

    def _scaled(self, inputs: Tensor, levels: Tensor, shared: bool) -> Tensor:
        """Noise times levels that are a tensor, along the channels and differentiable in the levels."""
        channels = inputs.dim() - 1 if self.features_last else 1
        if levels.dim() and (inputs.dim() < 2 or inputs.shape[channels] != len(levels)):
            where = "last" if self.features_last else "second"
            raise ValueError(
                f"there are noise levels for {len(levels)} channels, and inputs of shape "
                f"{tuple(inputs.shape)}: their {where} dimension must be that of the channels"
            )
        noise: Tensor
        if is_recording():
            call = call_number(self.identity)
            noise = unit_noise(inputs.detach(), self.layer, shared, self.training, call)
        else:
            source = random_source(self.layer, shared, inputs.device)
            noise = scalable_noise(inputs.detach(), source, self.training)
        shape = (-1, *[1] * (inputs.dim() - 1 - channels)) if levels.dim() else ()
        scale = levels.to(inputs).reshape(shape)  # levels that were set later are not moved yet
        if noise.shape[0] < inputs.shape[0]:  # of one draw for the batch; scaled before it meets the batch
            return added(inputs, noise * scale)
        return torch.addcmul(inputs, noise, scale)

    def extra_repr(self) -> str:
        off = "" if self.enabled else ", off"
        return f"std={describe_std(self.std)}, layer={self.layer}, sampling={self.sampling}{off}"
