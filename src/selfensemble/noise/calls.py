"""What one call wants of a network that others use at the same time: noise off, eval mode, hooks of its own.

Nothing of it is left on the modules: threads, and calls within calls, do not see what others want. Eval mode
is the exception, for torch keeps it on the modules: it holds as long as any call wants it.
"""

import copy
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from torch import nn

from .graphs import uncompiled

_numbers = itertools.count()
_off: ContextVar[frozenset[int]] = ContextVar("selfensemble_off", default=frozenset())


def new_identity() -> int:
    """A number that no other random layer of this process has."""
    return next(_numbers)


def is_off(identity: int) -> bool:
    """Whether the random layer of this number is switched off in the current context."""
    return identity in _off.get()


@contextmanager
def switched_off(identities: Iterable[int]) -> Iterator[None]:
    """Within this context, and nowhere else, the random layers of these numbers are off."""
    token = _off.set(_off.get().union(identities))
    try:
        yield
    finally:
        _off.reset(token)


class _Held:
    """An attribute that calls want to be False: how many do, and the value that comes back after the last."""

    def __init__(self, attribute: str) -> None:
        self.attribute, self.lock = attribute, threading.RLock()
        self.held: dict[int, list[Any]] = {}

    def enter(self, things: Iterable[Any]) -> None:
        for thing in things:
            entry = self.held.setdefault(id(thing), [0, getattr(thing, self.attribute), thing])
            entry[0] += 1

    def leave(self, things: Iterable[Any]) -> None:
        for thing in things:
            entry = self.held[id(thing)]
            entry[0] -= 1
            if entry[0] == 0:
                setattr(thing, self.attribute, entry[1])
                del self.held[id(thing)]

    def own(self, thing: Any) -> bool:
        """The value without what calls want."""
        entry = self.held.get(id(thing))
        return bool(getattr(thing, self.attribute) if entry is None else entry[1])


_modes, _gradients = _Held("training"), _Held("requires_grad")


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within this context `model` is in eval mode; each module's own comes back when no call wants it."""
    # Frozen TorchScript modules have no mode.
    modules = [module for module in model.modules() if hasattr(module, "training")]
    with _modes.lock:
        _modes.enter(modules)
        if any(module.training for module in modules):
            model.eval()
    try:
        yield
    finally:
        with _modes.lock:
            _modes.leave(modules)


@contextmanager
def without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Within this context no parameter of `model` wants a gradient; likewise."""
    parameters = list(model.parameters())
    with _gradients.lock:
        _gradients.enter(parameters)
        for parameter in parameters:
            parameter.requires_grad_(False)
    try:
        yield
    finally:
        with _gradients.lock:
            _gradients.leave(parameters)


def own_modes(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Each module and whether it is in train mode, or will be when no call wants eval mode any more."""
    with _modes.lock:
        return [(each, _modes.own(each)) for each in model.modules() if hasattr(each, "training")]


def set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Put back what `own_modes` gave; at once, or when no call wants eval mode any more."""
    with _modes.lock:
        for module, training in modes:
            if id(module) in _modes.held:
                _modes.held[id(module)][1] = training
            else:
                module.training = training


class _Handle(Protocol):
    def remove(self) -> None: ...


_Result = TypeVar("_Result")
# Hooks come and go while nothing copies a network.
_structure = threading.RLock()


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, without the hooks that calls of other threads have put into it."""
    with _structure:
        return copy.deepcopy(model)


class _OwnHook:
    """A hook that acts in the thread that put it there, and in no copy of its module."""

    def __init__(self, hook: Callable[..., Any] | None) -> None:
        self.hook, self.thread = hook, threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.hook is None or threading.get_ident() != self.thread:
            return None
        return self.hook(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_OwnHook":
        return _OwnHook(None)

    def __reduce__(self) -> Any:
        return _OwnHook, (None,)


class OwnHooks:
    """Hooks of one call, which see the passes of its thread alone and are gone when its context ends."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> "OwnHooks":
        self._graphs = ExitStack()
        self._graphs.enter_context(uncompiled())  # a graph would not see them, or keep them
        return self

    def __exit__(self, *error: object) -> None:
        with _structure:
            self._stack.close()
        self._graphs.close()

    def add(self, register: Callable[..., _Handle], hook: Callable[..., Any], **options: Any) -> None:
        """Register `hook` by one of a module's methods, e.g. `module.register_forward_pre_hook`."""
        with _structure:
            self._stack.callback(register(_OwnHook(hook), **options).remove)
