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


def with_random_images(images: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Images (B, ...) with as many random ones behind them, where they are images."""
    if not images.is_floating_point():
        return images
    low, high = bounds
    generator = torch.Generator("cpu").manual_seed(0)
    numbers = torch.rand(images.shape, generator=generator, dtype=torch.float32, device="cpu")
    return torch.cat([images, (low + (high - low) * numbers).to(images.dtype).to(images.device)])


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


_AMONG_IMAGES = {"randperm"}  # which draw as many numbers as there are images, and mix them


class _Counted(OwnNumbers):
    """How many numbers each operator drew, one after the other."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(seed)
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
def images_share_numbers(forward: Callable[[Tensor], Tensor], inputs: Tensor, most: int = 4) -> bool:
    """Whether a pass of a random network may draw numbers that are common to its images.

    Random weights and transforms do. An operator of torch that draws for each image draws twice as many for
    twice as many images, the answers to copies of one image differ, and with equal numbers of torch's two
    passes are equal. Where that does not hold, or a pass cannot be looked at, numbers are taken for common:
    those of Python, of numpy, of generators of the network's own, of a clock.

    Args:
        forward: one pass.
        inputs: (B, ...), one image or more.
        most: images of a pass, 2 or more.
    """
    copies = [torch.cat([inputs[:1]] * count) for count in ((2, 4) if most >= 4 else (1, 2))]
    try:
        if draws_for_python(forward, copies[0]):
            return True
        seen, answers = [], []
        for number, images in enumerate([*copies, copies[1], copies[1]]):
            with _Counted(min(number, 2)) as counted:  # the last two passes are of one seed
                answers.append(forward(images))
            seen.append(counted)
    except Exception:  # code of a user, which may take other batches alone
        return True
    few, many = seen[0].counts, seen[1].counts
    if not many or [name for name, _ in few] != [name for name, _ in many]:
        return True
    if any(one == other for (_, one), (_, other) in zip(few, many, strict=True)):
        return True
    if any(counted.names & _AMONG_IMAGES for counted in seen):
        return True
    tolerance = 0.0 if inputs.device.type == "cpu" else 1e-5 * float(answers[1].abs().max())
    repeats = _same(answers[2], answers[3], tolerance)
    as_one = [_same(each[:1].expand_as(each), each, tolerance) for each in answers[1:3]]
    return not repeats or (all(as_one) and not _same(answers[1], answers[2], tolerance))


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
