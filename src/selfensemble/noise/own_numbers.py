"""Random numbers that torch's operators take from generators of one call, instead of those of the process."""

import functools
import threading
from contextlib import ExitStack
from os import urandom
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..runtime.dispatch import DispatchMode
from ..runtime.random_state import kept_random_state
from .graphs import uncompiled

# Operators that may draw random numbers, and do not in eval mode.
USUAL = {"rrelu", "rrelu_with_noise", "scaled_dot_product_attention"}
_only_one = threading.RLock()


class OwnNumbers(DispatchMode):
    """Within this context the operators of this thread take random numbers from generators of its own.

    Those of the process stay as they are, and other threads draw from them what they would have drawn.
    Compiled networks run operator by operator.

    Args:
        seed: what `torch.manual_seed` would be given; None for the system's entropy.

    Attributes:
        names: of the operators so far that can draw random numbers, from whatever generator.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed = int.from_bytes(urandom(8), "big") >> 1 if seed is None else seed
        self.names: set[str] = set()
        self._generators: dict[torch.device, tuple[torch.Generator, Tensor]] = {}

    def __enter__(self) -> Self:
        self._graphs = ExitStack()
        self._graphs.enter_context(uncompiled())  # a graph would hide its operators
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._graphs.close()

    @property
    def drew(self) -> bool:
        """Whether any would have drawn from the generators of the process."""
        return any(not torch.equal(one.get_state(), start) for one, start in self._generators.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **kwargs)
        name = str(func.overloadpacket).rpartition(".")[2].strip("_")
        self.names.add("scaled_dot_product_attention" if name.startswith("scaled_dot_product") else name)
        device = _device_of(args, kwargs)
        if device.type == "meta" or func.namespace == "selfensemble":  # whose noise has generators anyway
            return func(*args, **kwargs)
        given = _arguments(func, args, kwargs)
        if given.get("generator") is not None or given.get("dropout_p") == 0:
            return func(*args, **kwargs)
        if func is torch.ops.aten.native_dropout.default:
            return _dropout(*args, generator=self._generator(device))
        if (taking := _taking_generator(func)) is None:
            return self._alone(func, args, kwargs, device)
        # Given by its place it is last, and None.
        args = args[:-1] if "generator" in given and "generator" not in kwargs else args
        return taking(*args, **{**kwargs, "generator": self._generator(device)})

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            generator = torch.Generator(device).manual_seed(self.seed)
            self._generators[device] = generator, generator.get_state()
        return self._generators[device][0]

    def _alone(self, func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
        """An operator that knows no generator but the process's (dropout within fused kernels)."""
        seed = int(torch.randint(2**62, (), generator=self._generator(device), device=device))
        with _only_one, kept_random_state(device):
            torch.manual_seed(seed)
            return func(*args, **kwargs)


def _device_of(args: Any, kwargs: dict[str, Any]) -> torch.device:
    tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    named = torch.device(kwargs.get("device") or "cpu")
    found: torch.device = next((tensor.device for tensor in tensors), named)
    if found.type not in ("cpu", "meta") and ":" not in str(found):  # or it had two generators
        return torch.device(found.type, torch.get_device_module(found).current_device())
    return found


def _arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What an operator is given, by name."""
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


@functools.cache
def _taking_generator(func: Any) -> Any:
    """The operator, or its overload that takes a generator and all else that it takes; None if none does."""

    def signature(each: Any) -> list[tuple[str, str]]:
        arguments = [(argument.name, str(argument.type)) for argument in each._schema.arguments]
        return [each for each in arguments if each[0] != "generator"]

    overloads = [func, *(getattr(func.overloadpacket, name) for name in func.overloadpacket.overloads())]
    for each in overloads:
        takes = any(argument.name == "generator" for argument in each._schema.arguments)
        if takes and signature(each) == signature(func):
            return each
    return None


def _dropout(inputs: Tensor, p: float, train: bool | None, *, generator: torch.Generator) -> Any:
    """What `native_dropout` does, which knows no generator: the outputs and what was kept."""
    if train is False:
        return inputs.clone(), torch.ones_like(inputs, dtype=torch.bool)
    kept = torch.empty_like(inputs, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
    return inputs * kept * (0.0 if p == 1 else 1 / (1 - p)), kept
