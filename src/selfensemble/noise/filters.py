"""In front of which modules noise goes, by name."""

from typing import Literal, get_args

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .injection import FilterFn, is_convolution

Filter = Literal["conv", "linear", "conv+linear"]
# Of nn.MultiheadAttention, which reads its weights and never calls it.
_NEVER_CALLED = NonDynamicallyQuantizableLinear


def is_linear(module: nn.Module, fqn: str = "") -> bool:
    """Linear layers that are called."""
    return isinstance(module, nn.Linear) and not isinstance(module, _NEVER_CALLED)


def _is_either(module: nn.Module, fqn: str = "") -> bool:
    return is_convolution(module) or is_linear(module)


_FILTERS: dict[str, FilterFn] = {"conv": is_convolution, "linear": is_linear, "conv+linear": _is_either}


def filter_named(name: str) -> FilterFn:
    """The filter of that name: convolutions (of any kind, also transposed), linear layers, or both.

    Raises:
        ValueError: another name.
    """
    if name not in _FILTERS:
        raise ValueError(f"filter must be one of {', '.join(get_args(Filter))}, got {name!r}")
    return _FILTERS[name]
