"""Normal random numbers in half precision on a CPU: each is a quantile that 16 random bits choose.

torch draws bfloat16 on a CPU with one thread, at 0.2 G/s; this takes a quarter of the time
(docs/decisions/0015). The 65,536 quantiles are equally likely. Their distribution function differs from the
normal one by at most 2^-17, and ends at 4.3 standard deviations. Noise in float32 is never drawn so.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from .kernel import kernel, reaches, state_of

_LEVELS = 2**16
# Numbers at a time: index and output then stay in the cache.
_PART = 2**18
# As many are kept for layers that want few.
KEPT = 2**15


@functools.cache
def _quantiles() -> Tensor:
    """(65536,) float32 quantiles in the middle of equal parts of the unit interval, of variance 1."""
    middles = (torch.arange(_LEVELS, dtype=torch.float64, device="cpu") + 0.5) / _LEVELS
    normal = torch.erfinv(2 * middles - 1) * math.sqrt(2)
    return (normal / normal.std(correction=0)).float()


@functools.lru_cache(maxsize=256)
def table_of(std: float, dtype: torch.dtype) -> Tensor:
    """The quantiles of one level."""
    return (_quantiles() * std).to(dtype)


@functools.lru_cache(maxsize=256)
def _table_of_twos(std: float, dtype: torch.dtype) -> Tensor:
    """(65536,) int32, each two quantiles: the points of a Hammersley set, which fill the plane evenly."""
    first = torch.arange(_LEVELS, device="cpu")
    second = sum((((first >> bit) & 1) << (15 - bit) for bit in range(16)), torch.zeros_like(first))
    table = table_of(std, dtype)
    return torch.stack([table[first], table[second]], dim=1).view(torch.int32).flatten()


class Bits:
    """Random numbers of 16 bits.

    Args:
        generator: where they come from.
        kept: drawn at a time, so that small layers need not ask one by one; 0 where numbers are to depend on
            nothing but the generator and what is asked for.
    """

    def __init__(self, generator: np.random.SFC64, kept: int = 0) -> None:
        self._generator, self._kept = generator, kept
        self._block = torch.empty(0, dtype=torch.int32, device="cpu")
        self._used = 0

    @property
    def state(self) -> int:
        """Where its generator keeps its state, for `kernel`; what is kept of earlier bits stays unused."""
        return state_of(self._generator)

    def take(self, count: int) -> Tensor:
        """(count,) int32, valid until the next call."""
        if count > self._kept:
            return self._draw(count)
        if self._used + count > len(self._block):
            self._block, self._used = self._draw(self._kept), 0
        self._used += count
        return self._block[self._used - count : self._used]

    def _draw(self, count: int) -> Tensor:
        words = self._generator.random_raw(-(-count // 4)).view(np.uint16)
        return torch.from_numpy(words)[:count].to(torch.int32)


def fill_half_(tensor: Tensor, std: float, bits: Bits) -> None:
    """Fill a tensor with `N(0, std^2)` numbers, in the order of its memory.

    Args:
        tensor: dense, on a CPU, bfloat16 or float16.
        std: standard deviation.
        bits: where random bits come from.
    """
    table = table_of(std, tensor.dtype)
    flat = tensor.as_strided((tensor.numel(),), (1,))
    if (compiled := kernel()) is not None and reaches(flat):
        compiled.fill16(bits.state, table.data_ptr(), flat.data_ptr(), len(flat), torch.get_num_threads())
        return
    for part in flat.split(_PART) if len(flat) > _PART else (flat,):
        torch.index_select(table, 0, bits.take(len(part)), out=part)


def fill_half_in_twos_(tensor: Tensor, std: float, bits: Bits) -> None:
    """The same at twice the speed: 16 random bits choose two numbers that lie side by side.

    Each is distributed as those of `fill_half_`, and the two are uncorrelated; their common distribution
    function differs from that of independent ones by at most 2^-12. For training, where that is no matter.
    """
    flat = tensor.as_strided((tensor.numel(),), (1,))
    even = len(flat) - len(flat) % 2
    if flat.storage_offset() % 2 or even == 0:
        fill_half_(tensor, std, bits)
        return
    if even < len(flat):
        fill_half_(flat[even:], std, bits)
    table, twos = _table_of_twos(std, tensor.dtype), flat[:even].view(torch.int32)
    if (compiled := kernel()) is not None and reaches(twos):
        compiled.fill32(bits.state, table.data_ptr(), twos.data_ptr(), len(twos), torch.get_num_threads())
        return
    for part in twos.split(_PART) if len(twos) > _PART else (twos,):
        torch.index_select(table, 0, bits.take(len(part)), out=part)
