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

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from .graphs import uncompiled

_numbers = itertools.count()
_off: ContextVar[frozenset[int]] = ContextVar("selfensemble_off", default=frozenset())


_evaluated: ContextVar[frozenset[int]] = ContextVar("selfensemble_evaluated", default=frozenset())


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Those of `model.modules()` in their order, in a quarter of the time: every prediction wants them."""
    if torch.compiler.is_compiling():  # which follows torch's own way
        return list(model.modules())
    found, waiting = dict[int, nn.Module](), [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += [each for each in reversed(module._modules.values()) if each is not None]
    return list(found.values())


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
    """An attribute that calls want to be False: how many do, and the value that comes back after the last.

    Who sets it to True meanwhile finds it so afterwards.
    """

    def __init__(self, attribute: str) -> None:
        self.attribute, self.lock = attribute, threading.RLock()
        self.held: dict[int, list[Any]] = {}

    def enter(self, things: Iterable[Any]) -> None:
        for thing in things:
            entry = self.held.setdefault(id(thing), [0, False, thing])
            entry[0] += 1
            entry[1] = entry[1] or getattr(thing, self.attribute)

    def leave(self, things: Iterable[Any]) -> None:
        for thing in things:
            entry = self.held[id(thing)]
            entry[0] -= 1
            if entry[0] == 0:
                value = self.own(thing)
                del self.held[id(thing)]
                self.put(thing, value)

    def own(self, thing: Any) -> bool:
        """The value without what calls want."""
        entry = self.held.get(id(thing))
        return bool(getattr(thing, self.attribute) or (entry is not None and entry[1]))

    def put(self, thing: Any, value: bool) -> None:
        """Set the value."""
        setattr(thing, self.attribute, value)


_PLAIN = ("torch", __name__.partition(".")[0])


class _HeldModes(_Held):
    """Modes of modules: those whose `train` does something (merges weights, say) get theirs by it."""

    switching = False  # while such a `train` is called, which calls that of all below it

    def put(self, thing: nn.Module, value: bool) -> None:
        if thing.training != value and _acts(thing):
            self.switch(thing, value)
        thing.training = value

    def switch(self, thing: nn.Module, value: bool) -> None:
        """Call `train`; ensembles below it keep their own modes."""
        before, self.switching = self.switching, True
        try:
            thing.train(value)
        finally:
            self.switching = before


def _acts(module: nn.Module) -> bool:
    """Whether `train` is another than torch's and ours."""
    where = module.train.__module__
    return where.partition(".")[0] not in _PLAIN or "export" in where


_modes, _gradients = _HeldModes("training"), _Held("requires_grad")


def _with_modes(model: nn.Module) -> list[nn.Module]:
    """Frozen TorchScript modules have none."""
    return [module for module in modules_of(model) if hasattr(module, "training")]


def _switched_on(model: nn.Module) -> set[nn.Module]:
    """Modules in train mode under one in eval mode: they are meant so (dropout at test time).

    But for those that hold batch norm in train mode: they were being trained.
    """
    network, found = model, set[nn.Module]()
    if not any(_modes.own(module) for module in _with_modes(model)):
        return found
    while len(children := list(network.children())) == 1 and any(children[0].children()):
        network = children[0]  # whose own mode tells, not that of what it was wrapped into

    def search(module: nn.Module, below: bool) -> None:
        own = hasattr(module, "training") and _modes.own(module)
        if own and not below:
            if not any(isinstance(each, _NormBase) and _modes.own(each) for each in module.modules()):
                found.update(each for each in module.modules() if not _is_noise(each))
        else:
            for child in module.children():
                search(child, own)

    search(network, True)
    return found


def _is_noise(module: nn.Module) -> bool:
    """A random layer of this package, whose train mode says how it samples."""
    return isinstance(vars(module).get("identity"), int)


def switched_on(model: nn.Module) -> int:
    """How many modules are in train mode and stay so when `model` predicts; see `in_eval_mode`."""
    with _modes.lock:
        return len(_switched_on(model))


def to_eval_mode_(model: nn.Module) -> nn.Module:
    """What `eval()` does, but that modules switched on by themselves stay; see `in_eval_mode`."""
    with _modes.lock:
        _leave_train_mode_(_with_modes(model), _switched_on(model))
    return model


def _leave_train_mode_(modules: list[nn.Module], stay: set[nn.Module]) -> None:
    done = set[nn.Module]()
    for module in modules:
        if module in stay or module in done or not module.training:
            continue
        if _acts(module):  # and says what becomes of those below it
            _modes.switch(module, False)
            done.update(module.modules())
        else:
            module.training = False
    for module in stay:  # what `train` of one above them may have changed
        _modes.put(module, True)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within this context `model` is in eval mode; each module's own comes back when no call wants it.

    Modules that are in train mode by themselves, under others in eval mode, stay so: dropout at test time is
    switched on like this. Batch norm does not.

    Modules that are `asks_calls` keep the mode they have, and ask `in_eval_mode_now` as well.
    """
    modules = [module for module in _with_modes(model) if not getattr(module, "asks_calls", False)]
    asking = {id(module) for module in model.modules() if getattr(module, "asks_calls", False)}
    with _modes.lock:
        _modes.enter(modules)
        try:
            _leave_train_mode_(modules, _switched_on(model))
        except BaseException:
            _modes.leave(modules)
            raise
    token = _evaluated.set(_evaluated.get() | asking)
    try:
        yield
    finally:
        _evaluated.reset(token)
        with _modes.lock:
            _modes.leave(modules)


def in_eval_mode_now(module: nn.Module) -> bool:
    """Whether the current context wants a module that `asks_calls` to be in eval mode."""
    return id(module) in _evaluated.get()


@contextmanager
def without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Within this context no parameter of `model` gets a gradient; for this thread alone."""
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
        return [(each, _modes.own(each)) for each in _with_modes(model)]


def own_gradients(model: nn.Module) -> list[bool]:
    """Of each parameter, whether it wants a gradient, or will when no call forbids it any more."""
    with _gradients.lock:
        return [_gradients.own(parameter) for parameter in model.parameters()]


def set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Put back what `own_modes` gave; at once, or when no call wants eval mode any more."""
    with _modes.lock:
        for module, training in modes:
            if id(module) in _modes.held:
                _modes.held[id(module)][1] = training
                module.training = module.training and training
            else:
                _modes.put(module, training)


def switch_mode(model: nn.Module, training: bool) -> None:
    """What `nn.Module.train` does; where calls want eval mode, when none does any more."""
    with _modes.lock:
        modules = _with_modes(model)
        if _modes.switching:
            for child in model.children():
                child.train(training)
        elif any(id(module) in _modes.held for module in modules):
            set_modes((module, training) for module in modules)
        else:
            nn.Module.train(model, training)


def state_of_copy(model: nn.Module) -> dict[str, Any]:
    """The network's own modes and wishes for gradients, for copies that are made while calls change them."""
    return {"modes": [mode for _, mode in own_modes(model)], "gradients": own_gradients(model)}


def restore_copy_(copied: nn.Module, state: dict[str, Any]) -> None:
    """Give a copy what `state_of_copy` said of its original."""
    for module, training in zip(_with_modes(copied), state["modes"], strict=False):
        _modes.put(module, training)
    for parameter, wanted in zip(copied.parameters(), state["gradients"], strict=False):
        if parameter.requires_grad != wanted:
            parameter.requires_grad_(wanted)


class _Handle(Protocol):
    def remove(self) -> None: ...


_Result = TypeVar("_Result")
# Hooks come and go while nothing copies a network.
_structure = threading.RLock()


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, without what calls of other threads want of it: hooks, eval mode, no gradients."""
    with _structure:
        state, made = state_of_copy(model), copy.deepcopy(model)
    restore_copy_(made, state)
    return made


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
            keep_hooks_apart(getattr(register, "__self__", None))
            self._stack.callback(register(_OwnHook(hook), **options).remove)


def keep_hooks_apart(*modules: object) -> None:
    """Give torch's next hook a number that no hook of these has, for pickled ones bring those they had."""
    for module in (each for each in modules if isinstance(each, nn.Module)):
        used = (*module._forward_pre_hooks, *module._forward_hooks)
        RemovableHandle.next_id = max([RemovableHandle.next_id, *(number + 1 for number in used)])
