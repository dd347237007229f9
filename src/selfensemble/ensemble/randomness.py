"""Whether a network is random, found out by asking: noise of any kind, whatever draws it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..noise.own_numbers import USUAL, OwnNumbers
from ..noise.streams import stream_seed
from ..runtime.random_state import states_of_others

OTHER_NOISE = 4094  # number of a layer that no network has: noise from torch's global generator
_TRIES = 3
PASSES = 8  # that show randomness which seldom shows, or none is to be expected


@torch.no_grad()
def answers_differ(
    forward: Callable[[Tensor], Tensor], inputs: Tensor, passes: int = 2, most: int = 2
) -> bool:
    """Whether passes over the same images differ, up to the rounding of kernels that add in any order.

    They take none of the numbers of torch's global generators.

    Args:
        forward: one pass, in the mode that is asked about.
        inputs: (B, ...).
        passes: at most.
        most: of the images that are used.
    """
    few = inputs[:most]
    with OwnNumbers():
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
    with OwnNumbers() as seen:
        forward(inputs[:2])
    return seen.names - USUAL


class _Counted(OwnNumbers):
    """How many numbers each operator drew, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            leaves = (leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
            self.counts.append((str(func), max((leaf.numel() for leaf in leaves), default=0)))
        return found


@torch.no_grad()
def images_share_numbers(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> bool:
    """Whether a pass draws numbers that are common to its images, as random weights and transforms do.

    Such an operator draws as many for two images as for four. Numbers that Python draws are taken for common,
    and so are those of passes that cannot be compared.

    Args:
        forward: one pass.
        inputs: (B, ...), one image or more.
    """
    if draws_for_python(forward, inputs):
        return True
    found = []
    try:
        for images in (2, 4):
            with _Counted() as seen:
                forward(torch.cat([inputs[:1]] * images))
            found.append(seen.counts)
    except (RuntimeError, ValueError, AssertionError):  # of a network that takes other batches
        return True
    few, many = found
    if [name for name, _ in few] != [name for name, _ in many]:
        return True
    return any(one == other for (_, one), (_, other) in zip(few, many, strict=True))


@torch.no_grad()
def draws_for_python(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> bool:
    """Whether passes draw from the global generators of Python or numpy, whatever becomes of the numbers.

    Other threads may draw as well, so all of a few passes have to.
    """

    def drew() -> bool:
        before = states_of_others()
        forward(inputs[:2])
        return states_of_others() != before

    return all(drew() for _ in range(_TRIES))


@torch.no_grad()
def takes_numbers(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> bool:
    """Whether passes take numbers from torch's global generators; some are tried, until one does."""
    with OwnNumbers() as seen:
        for _ in range(PASSES):
            forward(inputs[:2])
            if seen.drew:
                return True
    return False


def global_noise(seed: int) -> OwnNumbers:
    """Within it torch's random operators (dropout at test time) give what they would after `seed`."""
    return OwnNumbers(seed)


def other_seed(seed: int, index: int) -> int:
    """Of torch's global generators in draw number `index` of `seed`."""
    return stream_seed(seed, index, OTHER_NOISE)
