"""Inputs in any range: attacks work on [0, 1], and see a model's own range from the outside."""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..ensemble.checks import check_images
from ..ensemble.ensemble import SelfEnsemble

Bounds = tuple[float, float]
_UNIT: Bounds = (0.0, 1.0)
_Attack = TypeVar("_Attack", bound=Callable[..., Tensor])
# Of the model that is attacked within this context, whose inputs are in [0, 1] there.
_bounds: ContextVar[Bounds | None] = ContextVar("selfensemble_bounds", default=None)


def bounds_of(model: nn.Module) -> Bounds:
    """The valid range of a model's inputs: that of an ensemble which has one, else [0, 1]."""
    bounds = model.bounds if isinstance(model, SelfEnsemble) else None
    return _UNIT if bounds is None else bounds


def in_own_units(*lengths: str) -> Callable[[_Attack], _Attack]:
    """Make an attack on inputs in [0, 1] one on inputs in the bounds of its model.

    Args:
        lengths: names of its arguments that are lengths, which callers give in the units of the inputs.
    """

    def decorate(attack: _Attack) -> _Attack:
        defaults = inspect.signature(attack).parameters

        @functools.wraps(attack)
        def in_units(model: nn.Module, inputs: Tensor, labels: Tensor, **settings: Any) -> Tensor:
            low, high = bounds_of(model)
            if (low, high) == _UNIT or _bounds.get() is not None:
                return attack(model, inputs, labels, **settings)
            check_images(inputs, (low, high))
            for name in lengths:
                value = settings.get(name, defaults[name].default)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    settings[name] = value / (high - low)
            exact = inputs if inputs.dtype == torch.float64 else inputs.float()
            unit = ((exact - low) / (high - low)).clamp(0.0, 1.0)
            token = _bounds.set((low, high))
            try:
                found = attack(model, unit, labels, **settings)
            finally:
                _bounds.reset(token)
            moved = (low + (high - low) * found).clamp(low, high).to(inputs.dtype)
            return torch.where(found == unit, inputs, moved)

        return cast("_Attack", in_units)

    return decorate


def from_units(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A model's forward as a function of inputs in [0, 1], within an attack in its own units."""
    bounds = _bounds.get()
    if bounds is None:
        return forward
    low, high = bounds
    return lambda inputs: forward(low + (high - low) * inputs)
