"""Checks of what goes into a classifier and of what comes out of it."""

import inspect
import math
import numbers
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..noise.graphs import is_recording
from ..noise.injection import noise_layers
from ..runtime.errors import UnevenBatchError

_WANTED = "the model must return logits of shape (batch, classes), of two classes or more"
_WRAP = "wrap it in a module whose forward returns them"
_TWO = (
    "one number z an input, before the sigmoid, becomes the logits of two classes by "
    "torch.stack([torch.zeros_like(z), z], dim=1) with z of shape (batch,)"
)
# What torch, timm and transformers say of shapes, and of what only sounds like it.
_OF_SHAPES = re.compile(
    r"\b(shapes?|sizes?|channels?|dim|dimensions?|[1-5]-?D|height|width|elements|length|broadcast)\b",
    re.IGNORECASE,
)
_OF_TYPES = re.compile(
    r"dtype|scalar type|data type|\btype \(|invalid combination|(positional|keyword) argument|must be Tensor",
    re.IGNORECASE,
)
_OF_OTHERS = re.compile(r"dtype|scalar type|\btype \(|device|inplace|gradient", re.IGNORECASE)


class OutputError(ValueError):
    """The model returns something that is not a batch of logits."""


class ShapeError(ValueError):
    """The model cannot take inputs of a shape."""


def logits_of(output: Any, batch: int | None = None) -> Tensor:
    """The logits (B, K) in a model's output.

    That is a tensor, an object with `.logits` (of transformers), a dictionary with "logits", a tuple of one.

    Args:
        output: of the model.
        batch: number of inputs, if known. Not compared within a graph that is being recorded.

    Raises:
        OutputError: no logits of two classes or more for each input; the message says what to do.
    """
    logits = _in(output)
    if not isinstance(logits, Tensor):
        raise OutputError(f"{_WANTED}, got {type(logits).__name__}; {_WRAP}")
    got = f"{_WANTED}, got shape {tuple(logits.shape)}"
    if logits.dim() != 2:
        raise OutputError(f"{got}; {_cure(logits)}")
    if logits.shape[1] < 2:
        raise OutputError(f"{got}; {_TWO if logits.shape[1] else _WRAP}")
    if not logits.is_floating_point():
        raise OutputError(f"the model must return floating-point logits, not labels: got {logits.dtype}")
    if batch is not None and not is_recording() and len(logits) != batch:
        raise OutputError(
            f"{got} for {batch} inputs: each needs a row of its own; keep the batch in the first dimension"
        )
    return logits


def _in(output: Any) -> Any:
    """The logits in an output of a form that is known, or what else there is."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(output, tuple) and len(output) == 1:
        return output[0]
    return getattr(output, "logits", output)


def check_call(model: nn.Module) -> None:
    """Raise a ValueError unless `model(inputs)` is a way to call it, which is how an ensemble does."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # of what is written in C
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise ValueError(
            f"an ensemble calls model(inputs), and this model's forward{signature} cannot be called so "
            f"({error}): wrap it in a module whose forward(inputs) passes them on by their names"
        ) from error


def _cure(logits: Tensor) -> str:
    """What to do about logits that are not (B, K)."""
    wide = [size for size in logits.shape[1:] if size != 1]
    if logits.dim() == 1 or (not wide and logits.dim() > 1):
        return _TWO
    if len(wide) == 1:
        return "flatten them at the end of its forward: logits.flatten(1)"
    return _WRAP


def floating_dtype(model: nn.Module) -> torch.dtype | None:
    """That of a model's first floating-point parameter; None where it has none."""
    return next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), None)


def check_seed(seed: object) -> None:
    """Raise a TypeError unless `seed` is an integer or None."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, numbers.Integral)):
        raise TypeError(f"seed must be an integer or None, got {seed!r}")


def check_bounds(bounds: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return the range of inputs, or raise a ValueError unless it is None or two numbers in rising order."""
    if bounds is None:
        return None
    values = list(bounds) if isinstance(bounds, Iterable) and not isinstance(bounds, str) else []
    if len(values) != 2 or not all(is_number(each) and math.isfinite(each) for each in values):
        raise ValueError(
            f"bounds must be two numbers, (low, high), or None for no range, got {bounds!r}; what differs "
            "between channels belongs into the model: see Normalized"
        )
    low, high = map(float, values)
    if not low < high:
        raise ValueError(f"bounds must be (low, high) with low below high, got {bounds!r}")
    return low, high


def check_images(inputs: Tensor, bounds: tuple[float, float] | None = (0.0, 1.0)) -> None:
    """Raise a ValueError (TypeError for a wrong dtype) unless `inputs` is a finite batch in bounds."""
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a torch.Tensor, got {type(inputs).__name__}")
    tokens = bounds is None and inputs.dtype in (torch.int64, torch.int32)  # for networks that look them up
    if not (inputs.is_floating_point() or tokens):
        raise TypeError(f"inputs must be floating point, got {inputs.dtype}; for uint8: x.float() / 255")
    if inputs.dim() < 2:
        raise ValueError(f"inputs must be a batch (B, ...), got shape {tuple(inputs.shape)}")
    if inputs.numel() == 0 or tokens:
        return
    low, high = (bound.item() for bound in inputs.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("inputs hold NaN or infinite values")
    if bounds is not None and (low < bounds[0] - 1e-6 or high > bounds[1] + 1e-6):
        raise ValueError(
            f"inputs must lie in [{bounds[0]:g}, {bounds[1]:g}], got [{low:g}, {high:g}]; scale images "
            "by 1/255 and put mean and std into the model, or say their range: --bounds LOW:HIGH of a named "
            "network, data.bounds of a recipe, SelfEnsemble(..., bounds=(low, high)), or None for no range"
        )


@contextmanager
def explain_shape(model: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Turn an error about inputs of a wrong shape into a ShapeError, which says more; others pass."""
    try:
        yield
    except (torch.OutOfMemoryError, OutputError, UnevenBatchError):
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        if not _OF_SHAPES.search(reason) or _OF_OTHERS.search(reason):
            raise
        expected = ""
        if (fqn := next(iter(noise_layers(model)), None)) is not None:
            layer = model.get_submodule(fqn)
            expected = f"; its first layer is {type(layer).__name__}({layer.extra_repr()})"
        raise ShapeError(
            f"the model cannot take inputs of shape {tuple(inputs.shape)} ({reason}){expected}"
        ) from error


def is_of_inputs(error: Exception) -> bool:
    """Whether an error in a forward pass is about the shape or the type of what it was given."""
    text = str(error)
    return bool(_OF_SHAPES.search(text.partition("\n")[0]) or _OF_TYPES.search(text))


def is_number(value: object) -> bool:
    """Whether it is a real number, of NumPy or torch as well, and neither text nor truth value."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_count(name: str, value: object) -> int:
    """Return `value` as an int, or raise a ValueError unless it is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return int(value)
