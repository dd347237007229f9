"""Whether a network is random, found out by asking: noise of any kind, whoever draws it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..noise.streams import stream_seed
from ..runtime.random_state import kept_random_state

OTHER_NOISE = 4094  # number of a layer that no network has: noise from torch's global generator
PASSES = 8  # that show randomness which seldom shows, or none is to be expected
# Operators that may draw random numbers, and do not in eval mode.
USUAL = {"rrelu", "rrelu_with_noise", "scaled_dot_product_attention"}


class RandomOps(TorchDispatchMode):
    """Notes the operators that can draw random numbers, by their names."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            name = str(func.overloadpacket).rpartition(".")[2].strip("_")
            attention = name.startswith("scaled_dot_product")
            self.names.add("scaled_dot_product_attention" if attention else name)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def answers_differ(forward: Callable[[Tensor], Tensor], inputs: Tensor, passes: int = 2) -> bool:
    """Whether passes over the same images differ, up to the rounding of kernels that add in any order.

    The numbers that they take from torch's global generators are put back.

    Args:
        forward: one pass, in the mode that is asked about.
        inputs: (B, ...), of which two are used.
        passes: at most.
    """
    few = inputs[:2]
    with kept_random_state(few.device):
        first = forward(few)
        tolerance = 0.0 if few.device.type == "cpu" else 1e-5 * float(first.abs().max())
        return any(not _same(first, forward(few), tolerance) for _ in range(passes - 1))


def _same(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether two answers are equal; a network that returns NaN is not random for that."""
    equal = ((one - other).abs() <= tolerance) | (one == other) | (one.isnan() & other.isnan())
    return bool(equal.all())


@torch.no_grad()
def draws_numbers(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> set[str]:
    """Operators of a pass that draw random numbers of torch, whatever becomes of them."""
    with kept_random_state(inputs.device), RandomOps() as seen:
        forward(inputs[:2])
    names: set[str] = seen.names - USUAL
    return names


@contextmanager
def global_noise(seed: int, device: torch.device) -> Iterator[None]:
    """Numbers of torch's global generators (dropout at test time) from `seed`; the caller's state stays."""
    with kept_random_state(device):
        torch.manual_seed(seed)
        yield


def other_seed(seed: int, index: int) -> int:
    """Of torch's global generators in draw number `index` of `seed`."""
    return stream_seed(seed, index, OTHER_NOISE)
