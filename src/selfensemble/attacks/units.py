"""Inputs in any range: attacks work on [0, 1], and see a model's own range from the outside."""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..ensemble.checks import check_images, is_number
from ..ensemble.ensemble import SelfEnsemble
from .leads import wide
from .norms import check_eps, check_norm, largest_eps, per_image, size

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
            given = {name: settings[name] for name in lengths if name in settings}
            settings |= {name: float(value) for name, value in given.items() if is_number(value)}
            if (low, high) == _UNIT or _bounds.get() is not None:
                return attack(model, inputs, labels, **settings)
            check_images(inputs, (low, high))
            for name in lengths:
                value = settings.get(name, defaults[name].default)
                if name == "eps" and is_number(value):
                    norm = settings.get("norm", defaults["norm"].default)
                    check_norm(norm)
                    check_eps(value, norm, inputs, (low, high))
                if is_number(value):
                    settings[name] = float(value) / (high - low)
                    if name == "eps":  # the largest by rounding only
                        settings[name] = min(settings[name], largest_eps(norm, inputs[:1].numel()))
            exact = inputs if inputs.dtype == torch.float64 else inputs.float()
            unit = ((exact - low) / (high - low)).clamp(0.0, 1.0)
            token = _bounds.set((low, high))
            try:
                found = attack(model, unit, labels, **settings)
            finally:
                _bounds.reset(token)
            change = (wide(found) - wide(unit)) * (high - low)
            if settings.get("eps") is not None:
                change = _within(change, norm, float(settings["eps"]) * (high - low))
            return rounded_towards(inputs, (wide(inputs) + change).clamp(low, high))

        return cast("_Attack", in_units)

    return decorate


def _within(change: Tensor, norm: str, eps: float) -> Tensor:
    """A change (B, ...) that rounding has brought out of its ball, brought back."""
    if norm == "linf":
        return change.clamp(-eps, eps)
    return change * per_image((eps / size(change, norm).clamp(min=1e-30)).clamp(max=1.0), change)


def rounded_towards(origin: Tensor, found: Tensor) -> Tensor:
    """Attacked images in the dtype of their originals, no number of them farther away than before rounding.

    Args:
        origin: (B, ...) in any floating dtype.
        found: (B, ...) in a dtype that holds at least as much, on the same device.
    """
    rounded = found.to(origin.dtype)
    whole = {2: torch.int16, 4: torch.int32}.get(origin.dtype.itemsize)
    if whole is None:
        return rounded
    after, before = rounded.to(found.dtype), origin.to(found.dtype)
    farther = (after - before).abs() > (found - before).abs()
    # Numbers of one sign are in the order of their bits, and those of the other in the opposite one.
    bits = rounded.view(whole)
    nearer = torch.where((after > before) == (after > 0), bits - 1, bits + 1).view(origin.dtype)
    return torch.where(farther & (after != 0), nearer, rounded)


def from_units(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A model's forward as a function of inputs in [0, 1], within an attack in its own units."""
    bounds = _bounds.get()
    if bounds is None:
        return forward
    low, high = bounds
    return lambda inputs: forward(low + (high - low) * inputs)
