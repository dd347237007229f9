"""Levels of the noise: what they may be, and those of a network."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

Std = float | tuple[float, ...]  # of a layer: one level, or one a channel
Record = dict[str, Any]  # what the network knows of a layer: name of its module, and level


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


def as_std(levels: object) -> Std:
    """Levels from a tensor () or (C,) of them."""
    values = levels.tolist() if isinstance(levels, Tensor) else levels
    return check_stds("std", values)


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


def levels_named(text: str) -> tuple[NoiseConfig, ...]:
    """Levels written as "init:inner,init:inner,...".

    Raises:
        ValueError: it is not written so, or a level is negative.
    """
    levels = []
    for part in text.split(","):
        try:
            init, inner = (float(number) for number in part.split(":"))
        except ValueError:
            raise ValueError(f"levels are written 0.1:0.05,0.2:0.1 (init:inner); got {part!r}") from None
        levels.append(NoiseConfig(init, inner))
    return tuple(levels)
