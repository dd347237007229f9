"""A device of its own, in the memory of the CPU, that has no float64: what MPS and some XPUs are like.

Tensors on it do not mix with those of the CPU, have the device `DEVICE`, and refuse to become float64. What
they compute is what the CPU computes. A tensor gets there by `.to(DEVICE)` and back by `.cpu()`.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

# A type of device that every build of torch knows, that autograd works on, and that nobody here has.
DEVICE = torch.device("lazy")
_WIDE = (torch.float64, torch.complex128)
_PLAIN = {int, float, bool, type(None), str, torch.dtype, torch.device}
# These take indices from the CPU.
_INDEXES = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}
_INDEXES |= {torch.ops.aten._index_put_impl_}


class OnDevice(Tensor):
    """A tensor there; whose numbers lie in `memory`."""

    memory: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        if inner.dtype in _WIDE:
            raise TypeError(f"the emulated device has no {inner.dtype}")
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE,
        )  # fmt: skip
        return made

    def __init__(self, inner: Tensor) -> None:
        super().__init__()
        self.memory = inner

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.memory.untyped_storage()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.memory!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


class _Creating(TorchDispatchMode):
    """Sees what asks for the device without having a tensor there."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and each operator is called at half the price

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found: list[Tensor] = []
    inner_args, inner = _memory(args, found), {key: _memory(value, found) for key, value in kwargs.items()}
    there, wanted = any(type(tensor) is OnDevice for tensor in found), kwargs.get("device")
    stays = wanted is None or torch.device(wanted).type == DEVICE.type
    if not there and (wanted is None or not stays):
        return func(*args, **kwargs)
    if there and kwargs.get("dtype") in _WIDE:
        raise TypeError(f"the emulated device has no {kwargs['dtype']}")  # MPS converts before it copies
    if there and not all(type(tensor) is OnDevice or tensor.dim() == 0 for tensor in found):
        if func.overloadpacket is torch.ops.aten.copy_:
            return _copied(*args)
        indexed = func.overloadpacket in _INDEXES and isinstance(args[0], OnDevice)
        if not indexed and func.overloadpacket is not torch.ops.aten._to_copy:
            raise RuntimeError(f"{func}: expected all tensors to be on one device, found cpu and {DEVICE}")
    if wanted is not None:
        inner["device"] = torch.device("cpu")
    result = func(*inner_args, **inner)
    if not stays or func is torch.ops.aten._local_scalar_dense.default:
        return result
    alias = _alias(func) if there else _Alias.NONE
    if alias is _Alias.WRITTEN:
        return args[0]
    made = OnDevice(result) if type(result) is Tensor else tree_map(_wrapped, result)
    return return_and_correct_aliasing(func, args, kwargs, made) if alias is _Alias.OTHER else made


def _wrapped(leaf: Any) -> Any:
    return OnDevice(leaf) if isinstance(leaf, Tensor) else leaf


class _Alias(Enum):
    """What an operator returns: new memory, its first argument, which it wrote to, or a view or more."""

    NONE = 0
    WRITTEN = 1
    OTHER = 2


@functools.cache
def _alias(func: Any) -> _Alias:
    arguments, returns = func._schema.arguments, func._schema.returns
    if not any(argument.alias_info is not None for argument in arguments):
        return _Alias.NONE
    written = [each.name for each in arguments if each.alias_info is not None and each.alias_info.is_write]
    first = len(returns) == 1 and written == [arguments[0].name] and not arguments[0].kwarg_only
    returned = first and returns[0].alias_info is not None and returns[0].alias_info.is_write
    return _Alias.WRITTEN if returned and torch.Tag.inplace_view not in func.tags else _Alias.OTHER


def _memory(value: Any, found: list[Tensor]) -> Any:
    """Arguments with tensors' memory in place of the tensors, which are collected."""
    kind = type(value)
    if kind is OnDevice:
        found.append(value)
        return value.memory
    if kind in _PLAIN:
        return value
    if isinstance(value, Tensor):
        found.append(value)
        return value
    if isinstance(value, list | tuple):
        return [_memory(each, found) for each in value]
    return value


def _copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    own, other = (each.memory if isinstance(each, OnDevice) else each for each in (target, source))
    if isinstance(source, OnDevice) and own.dtype in _WIDE:
        raise TypeError(f"the emulated device has no {own.dtype}")  # MPS converts before it copies
    own.copy_(other)
    return target


class _Generator(torch.Generator):
    """There is none of the device: one of the CPU draws for it."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        where = "cpu" if torch.device(device).type == DEVICE.type else device
        own: _Generator = super().__new__(cls, where)  # type: ignore[call-arg]
        return own


def there_too(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a thread of its own, in which there is the device as well."""

    def run(*args: Any) -> Any:
        with _Creating():  # type: ignore[no-untyped-call]
            return function(*args)

    return run


@contextmanager
def emulated_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Within this context and this thread there is the device."""
    state = torch.Generator("cpu").get_state()
    module = SimpleNamespace(
        get_rng_state=lambda device=None: state,
        set_rng_state=lambda value, device=None: None,
        device_count=lambda: 1,
        current_device=lambda: 0,
    )
    with monkeypatch.context() as patch, _Creating():  # type: ignore[no-untyped-call]
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch, "lazy", module, raising=False)
        patch.setattr(torch.accelerator, "synchronize", lambda device=None: None)
        torch.get_device_module.cache_clear()  # it remembers
        # torch.tensor(..., device=DEVICE) makes a tensor of the CPU and moves it where we see it.
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        # Parameters that are moved stay the same objects, which optimisers rely on.
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            yield DEVICE
        finally:
            torch.get_device_module.cache_clear()
            torch.__future__.set_swap_module_params_on_conversion(False)
            torch._C._set_only_lift_cpu_tensors(before)
