"""What a module was told beside its weights: attributes, replaced functions, hooks of others."""

import functools
from typing import Any

import torch
from torch import nn

from ..networks.naming import NAMED_AS
from ..noise.records import KEY, is_pretrained

Settings = tuple[tuple[str, Any], ...]

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype})
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# What every module has, what compilers leave (Lightning around them, too), and what transformers notes about
# where weights came from, and the name that a network was asked for by.
_PASSING = {*vars(nn.Module()), KEY, "_compiled_call_impl", "_is_torch_compile", "_compile_kwargs"}
_PASSING |= {"name_or_path", "_is_hf_initialized", NAMED_AS, "injected", "features_last"}
_OURS = f"{__name__.partition('.')[0]}."
_MOST, _DEEPEST = 100, 4  # of tuples, lists and dicts; longer ones are tables
_NOTHING = object()


def settings_of(module: nn.Module) -> Settings:
    """Plain attributes (in short tuples, lists and dicts too), and functions and hooks by their names.

    Two are equal where the settings are. Left out are tensors and objects, which may be state of a pass.
    """
    found = list[tuple[str, Any]]()
    attributes = module.__dict__
    books = is_pretrained(module)  # whose private attributes say how it was loaded
    for name in attributes.keys() - _PASSING:
        if books and name.startswith("_"):
            continue
        value = attributes[name]
        kind = type(value)
        simple = kind in _PLAIN or (kind is tuple and _PLAIN.issuperset(map(type, value)))
        kept = value if simple else _kept(value)
        if kept is not _NOTHING:
            found.append((name, kept))
    found += hooks_of(module)
    return tuple(found)


def hooks_of(module: nn.Module) -> Settings:
    """Names of the hooks that act on its passes, those of this package left out."""
    found = list[tuple[str, Any]]()
    for name in _HOOKS:
        if hooks := module.__dict__.get(name):
            theirs = [hook for hook in list(hooks.values()) if not f"{hook.__module__}.".startswith(_OURS)]
            found += [(name, _name_of(hook)) for hook in theirs]
    return tuple(found)


def as_text(settings: Settings) -> str:
    """The same in every process, whatever the order in which attributes were set."""
    return repr(sorted((name, _as_text(value)) for name, value in settings))


def _kept(value: Any, depth: int = 0) -> Any:
    """What of a value counts; `_NOTHING` if it is no setting."""
    if type(value) in _PLAIN or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, tuple | list):
        if len(value) > _MOST or depth > _DEEPEST:
            return _NOTHING
        parts = tuple(_kept(part, depth + 1) for part in value)
        return _NOTHING if any(part is _NOTHING for part in parts) else parts
    if isinstance(value, functools.partial) or hasattr(value, "__qualname__"):
        return _name_of(value)
    return _NOTHING


def _as_text(value: Any) -> str:
    return f"({', '.join(map(_as_text, value))})" if isinstance(value, tuple) else repr(value)


def _name_of(value: Any) -> str:
    """Of a function, a class, or an object that is called as one."""
    if isinstance(value, functools.partial):
        arguments = _kept([*value.args, *value.keywords.items()])
        return f"{_name_of(value.func)}({'' if arguments is _NOTHING else _as_text(arguments)})"
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
