"""Before which modules noise goes."""

from collections.abc import Callable
from typing import Literal, get_args

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

FilterFn = Callable[[nn.Module, str], bool]
Filter = Literal["conv", "linear", "conv+linear"]
# Of nn.MultiheadAttention, which reads its weights and never calls it.
_NEVER_CALLED = NonDynamicallyQuantizableLinear


def is_convolution(module: nn.Module, fqn: str = "") -> bool:
    """The default filter: 1-d, 2-d, 3-d and transposed convolutions."""
    return isinstance(module, _ConvNd)


def is_linear(module: nn.Module, fqn: str = "") -> bool:
    """Linear layers that are called."""
    return isinstance(module, nn.Linear) and not isinstance(module, _NEVER_CALLED)


def _is_either(module: nn.Module, fqn: str = "") -> bool:
    return is_convolution(module) or is_linear(module)


_FILTERS: dict[str, FilterFn] = {"conv": is_convolution, "linear": is_linear, "conv+linear": _is_either}


def matching(model: nn.Module, filter_fn: FilterFn) -> list[str]:
    """Names of the modules that noise goes before, in order of registration.

    Of a layer that an adapter wraps (LoRA of peft: `base_layer` beside what it learns) the adapter itself,
    once: all that is in it reads the same input.
    """
    adapters = [fqn for fqn, module in model.named_modules() if _is_adapter(module)]
    found: dict[str, None] = {}
    for fqn, module in model.named_modules():
        if filter_fn(module, fqn):
            within = (each for each in adapters if each == "" or fqn.startswith(f"{each}."))
            found[next(within, fqn)] = None
    return list(found)


def _is_adapter(module: nn.Module) -> bool:
    """Whether it is one of peft, or made like those; other networks have a `base_layer` too (DLA)."""
    if "base_layer" not in module._modules:
        return False
    if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
        return True
    return any(name.startswith("lora_") for name in (*module._modules, *module._parameters))


def filter_named(wanted: str | FilterFn) -> FilterFn:
    """The filter of that name: convolutions (of any kind, also transposed), linear layers, or both.

    Args:
        wanted: its name; a filter stays what it is.

    Raises:
        ValueError: another name.
    """
    if not isinstance(wanted, str):
        return wanted
    if wanted not in _FILTERS:
        raise ValueError(f"filter must be one of {', '.join(get_args(Filter))}, got {wanted!r}")
    return _FILTERS[wanted]
