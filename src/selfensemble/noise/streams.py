"""Where the numbers of the noise come from: how draws are sampled and seeded.

A *draw* is one noisy forward pass. Outside `noise_draw` every call of every layer takes fresh
entropy from a generator of this module, seeded by the operating system: the caller's global random
state is neither read nor changed, so that `torch.manual_seed` cannot freeze the defense.
"""

import copy
import operator
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..runtime.errors import UnevenBatchError
from .entropy import WideSeed, entropy, stream_of
from .half_precision import Bits, fill_half_, fill_half_in_twos_
from .recomputation import NO_PASSES, note, passes, recall
from .seeds import DRAWS as DRAWS
from .seeds import LAYERS as LAYERS
from .seeds import Generators as Generators
from .seeds import seed_streams_ as seed_streams_
from .seeds import stream_seed as stream_seed

Sampling = Literal["per_image", "shared"]

_IN_BACKWARD = (
    "a noisy layer was called inside a backward pass that does not repeat what the forward pass did: with "
    "other noise its gradients would be wrong; let torch.utils.checkpoint repeat it, or switch that off"
)
_HALVES = (torch.bfloat16, torch.float16)


def check_sampling(sampling: str) -> Sampling:
    """Return `sampling` if it names a policy, or raise a ValueError that lists them."""
    for known in get_args(Sampling):
        if sampling == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"sampling must be one of {get_args(Sampling)}, got {sampling!r}")


@dataclass(frozen=True, slots=True)
class _Draw:
    seed: int | None = None
    index: int = 0
    sampling: Sampling | None = None
    count: int = 1
    step: int = 1
    antithetic: bool = False
    portable: bool = True
    opposite: bool = False
    repeatable: bool = True
    generators: Generators = field(default_factory=dict)
    bits: dict[tuple[int, int], Bits] = field(default_factory=dict)


# Without a seed there are no streams to keep, so that sharing the default is safe.
_DEFAULT = _Draw()
_current: ContextVar[_Draw] = ContextVar("selfensemble_draw", default=_DEFAULT)


def is_within_a_draw() -> bool:
    """Whether a `noise_draw` says what noise is to be, in the current context."""
    return _current.get() is not _DEFAULT


@contextmanager
def noise_draw(
    seed: int | None = None,
    index: int = 0,
    sampling: Sampling | None = None,
    *,
    count: int = 1,
    step: int = 1,
    antithetic: bool = False,
    portable: bool = True,
    opposite: bool = False,
    repeatable: bool = True,
    generators: Generators | None = None,
) -> Iterator[None]:
    """Within this context, noise is draw number `index` of `seed`, sampled by `sampling`.

    With a seed, the first call of a layer takes the start of the stream (seed, index, layer), and
    later calls continue where it stopped; the same context entered again gives the same noise. Shared
    noise then depends on nothing else: not on the size or composition of the batch, the memory
    format or (but for rounding) the dtype. Per-image noise depends on the first two of these as well.
    CPU and CUDA have different streams. The context holds in the thread that enters it.

    Args:
        seed: any integer, or None for fresh entropy.
        index: number of the draw, >= 0; up to a million draws of a seed do not overlap.
        sampling: "per_image" or "shared" for every layer, or None to leave the choice to each layer.
        count: draws within one batch, which holds the images of draw `index`, then as many of
            `index + step`, and so on. Shared noise is shared by the images of one draw; per-image noise is
            of the stream of the first one.
        step: between the numbers of those draws.
        antithetic: draws of odd number have the opposite Gaussian noise of those before them. The mean over
            pairs has the same expectation and varies less, as far as the network is linear in its
            noise; the draws of a pair are not independent, which certificates must account for. Needs a seed,
            or whole pairs in the batch.
        portable: whether shared noise of a seed is to be the same in every dtype. If not, half precision on a
            CPU has numbers that cost less, as it has without a seed.
        opposite: in train mode the second half of a batch has the opposites of the numbers of the first half,
            so half as many are drawn. Only for batches in which no image occurs twice: an image and its copy
            could get noise that cancels out. By default the noise of each image is independent of all others.
        repeatable: whether a backward pass can compute parts of this one again (activation checkpointing),
            with the same noise. False saves the search if there is none.
        generators: where the generators of the streams are kept, for a draw with a seed.
    """
    if index < 0 or count < 1 or step < 1:
        raise ValueError(f"index must be >= 0, count and step >= 1, got {index}, {count} and {step}")
    if antithetic and seed is None and (index % 2 or count % 2 or step != 1):
        raise ValueError(
            "antithetic draws repeat each other's noise: give them a seed, e.g. a fresh one, or whole pairs"
        )
    policy = None if sampling is None else check_sampling(sampling)
    chosen = seed if seed is None or isinstance(seed, WideSeed) else operator.index(seed)
    kept: Generators = {} if generators is None else generators
    draw = _Draw(chosen, index, policy, count, step, antithetic, portable, opposite, repeatable, kept)
    token = _current.set(draw)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a layer takes its random numbers from in one draw.

    Attributes:
        shared: whether a batch shares what is drawn.
    """

    draw: _Draw
    layer: int
    device: torch.device
    shared: bool

    @property
    def count(self) -> int:
        """Draws within the batch."""
        return self.draw.count

    @property
    def pairs(self) -> bool:
        """Whether half of a batch in train mode has the opposite noise of the other half."""
        return self.draw.opposite and not self.shared

    def generator(self, number: int | None = None) -> torch.Generator:
        """For torch's functions, on the device: of a draw, by default the first of the batch."""
        draw = self.draw
        if draw.seed is None:
            return entropy.generator(self.device)
        key = (draw.index if number is None else number, self.layer, self.device)
        if key not in draw.generators:
            if isinstance(draw.seed, WideSeed):
                draw.generators[key] = stream_of(draw.seed, key[0], self.layer, self.device)
            else:
                seed = stream_seed(draw.seed, key[0], self.layer)
                draw.generators[key] = torch.Generator(self.device).manual_seed(seed)
        return draw.generators[key]

    def split(self, tensor: Tensor) -> Iterator[tuple[Tensor, torch.Generator]]:
        """Parts of a tensor with an entry for each draw of the batch, and what fills each of them."""
        if self.draw.seed is None:
            yield tensor, self.generator()
            return
        for later in range(self.count):
            number = self.draw.index + later * self.draw.step
            yield tensor[later : later + 1], self.generator(number)

    def draws_half(self, dtype: torch.dtype) -> bool:
        """Whether shared noise for inputs of this dtype may be drawn in it."""
        free = self.draw.seed is None or not self.draw.portable
        return free and self.device.type == "cpu" and dtype in _HALVES

    def fill_shared_(self, noise: Tensor, std: float) -> None:
        """Gaussian noise, an entry for each draw of the batch."""
        draw = self.draw
        if draw.seed is None:
            if draw.antithetic:
                self._fill_pairs_(noise, std)
            else:
                self._fill_(noise, std, draw.index)
            return
        size = noise.numel() // draw.count
        rows = noise.as_strided((draw.count, size), (size, 1)).unbind()  # in the order of memory
        for later, row in enumerate(rows):
            number = draw.index + later * draw.step
            if not self.is_opposite(number):
                self._fill_(row, std, number)
            elif later and draw.step == 1:
                torch.neg(rows[later - 1], out=row)
            else:
                self._fill_(row, std, number - 1)
                row.neg_()

    def _fill_pairs_(self, noise: Tensor, std: float) -> None:
        """Fresh noise of every other draw, and its opposite for the draws after them."""
        first = noise.new_empty(noise.numel() // 2)
        self._fill_(first, std, self.draw.index)
        size = noise.numel() // len(noise)
        pairs, rows = noise.as_strided((len(noise) // 2, 2, size), (2 * size, size, 1)), first.view(-1, size)
        pairs[:, 0].copy_(rows)
        torch.neg(rows, out=pairs[:, 1])

    def fill_each_(self, noise: Tensor, std: float) -> None:
        """Gaussian noise of each image's own, in the order of its memory."""
        draw = self.draw
        if draw.antithetic and draw.count > 1:
            raise ValueError("antithetic draws with noise of each image's own go into batches of one draw")
        if draw.seed is None and noise.device.type == "cpu" and noise.dtype in _HALVES:
            fill_half_in_twos_(noise, std, self.bits())
            return
        opposite = self.is_opposite(draw.index)
        self._fill_(noise, std, draw.index - opposite)
        if opposite:
            noise.neg_()

    def fill_images_(self, noise: Tensor) -> None:
        """Gaussian noise of level 1, an entry an image, which does not depend on the images behind it."""
        draw = self.draw
        if draw.antithetic and draw.count > 1:
            raise ValueError("antithetic draws with noise of each image's own go into batches of one draw")
        if draw.seed is None:
            noise.normal_(generator=self.generator())
            return
        opposite = self.is_opposite(draw.index)
        generator = self.generator(draw.index - opposite)
        for one in noise:
            one.normal_(generator=generator)
        if opposite:
            noise.neg_()

    def _fill_(self, noise: Tensor, std: float, number: int) -> None:
        """With the stream of a draw, in the order of the memory of `noise`."""
        if noise.device.type == "cpu" and noise.dtype in _HALVES:
            fill_half_(noise, std, self.bits(number))
            return
        # `normal_` on a permuted view is several times slower.
        flat = noise if noise.dim() == 1 else noise.as_strided((noise.numel(),), (1,))
        flat.normal_(0.0, std, generator=self.generator(number))

    def is_opposite(self, number: int) -> bool:
        """Whether a draw has the opposite noise of the one before it."""
        return self.draw.antithetic and number % 2 == 1

    def check_batch(self, size: int) -> None:
        """Raise an UnevenBatchError unless a batch of `size` images can hold the draws of this one."""
        if size % self.count:
            what = f"a batch of {size} cannot hold {self.count} draws of as many images each"
            raise UnevenBatchError(f"{what}: repeat the images")

    def bits(self, number: int | None = None) -> Bits:
        """Random bits on the CPU, faster than those of torch; of a draw as above."""
        draw = self.draw
        if draw.seed is None:
            return entropy.fresh_bits()
        key = (draw.index if number is None else number, self.layer)
        if key not in draw.bits:
            draw.bits[key] = Bits(np.random.SFC64(stream_seed(draw.seed, *key)))
        return draw.bits[key]


def fresh_seed() -> int:
    """A seed in [0, 2^62): of fresh entropy, or within a seeded `noise_draw` the next of its seeds."""
    source = Source(_current.get(), LAYERS - 1, torch.device("cpu"), shared=True)
    number = int(torch.randint(2**62, (), generator=source.generator(), device="cpu"))
    return WideSeed(number) if source.draw.seed is None else number


def derived_seed(seed: int, index: int, layer: int) -> int:
    """`stream_seed` as a separate seed of the same kind."""
    own = stream_seed(seed, index, layer)
    return WideSeed(own) if isinstance(seed, WideSeed) else own


_watching: list[tuple[int, Counter[int]]] = []  # threads, and what they draw


@contextmanager
def drawn_layers() -> Iterator[Counter[int]]:
    """How often layers draw random numbers within this context, by their numbers.

    Unlike hooks it sees layers within compiled and exported graphs; in this thread.
    """
    counts = Counter[int]()
    entry = (threading.get_ident(), counts)
    _watching.append(entry)
    try:
        yield counts
    finally:
        _watching[:] = [each for each in _watching if each is not entry]


def random_source(layer: int, shared: bool, device: torch.device) -> Source:
    """Where a layer takes its random numbers from in the current draw.

    Args:
        layer: its number.
        shared: the choice of the layer, which that of `noise_draw` overrides.
        device: of the numbers.

    Raises:
        RuntimeError: called inside a backward pass, in what is no repetition of a pass before it.
    """
    for thread, counts in _watching:
        counts[layer] += thread == threading.get_ident()
    draw = _current.get()
    found = passes() if draw.repeatable else NO_PASSES
    if found.again is not None:
        source = _as_before(recall(found.again), layer, device)
    elif torch._C._current_graph_task_id() != -1:
        raise RuntimeError(_IN_BACKWARD)
    else:
        policy = shared if draw.sampling is None else draw.sampling == "shared"
        source = Source(draw, layer, device, policy)
    if found.first:
        if source.draw.seed is None:  # fresh noise that can be drawn again
            source = replace(
                source, draw=replace(source.draw, seed=WideSeed(fresh_seed()), generators={}, bits={})
            )
        note(found.first, replace(source, draw=_kept(source.draw, layer)))
    return source


def _as_before(source: Source | None, layer: int, device: torch.device) -> Source:
    """Where a layer took its numbers from when its pass was computed first."""
    if source is None or (source.layer, source.device) != (layer, device):
        raise RuntimeError(_IN_BACKWARD)
    return replace(source, draw=_kept(source.draw, layer))


def _kept(draw: _Draw, layer: int) -> _Draw:
    """The draw with generators of its own for a layer, which stand where those of `draw` do."""
    generators = {
        key: torch.Generator(key[2]).set_state(generator.get_state())
        for key, generator in draw.generators.items()
        if key[1] == layer
    }
    bits = {key: copy.deepcopy(each) for key, each in draw.bits.items() if key[1] == layer}
    return replace(draw, generators=generators, bits=bits)
