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

_LEVELS = 2**16
# Numbers at a time: index and output then stay in the cache.
_PART = 2**18


@functools.cache
def _quantiles() -> Tensor:
    """(65536,) float32 quantiles in the middle of equal parts of the unit interval, of variance 1."""
    middles = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
    normal = torch.erfinv(2 * middles - 1) * math.sqrt(2)
    return (normal / normal.std(correction=0)).float()


@functools.lru_cache(maxsize=256)
def _table(std: float, dtype: torch.dtype) -> Tensor:
    """The quantiles of one level."""
    return (_quantiles() * std).to(dtype)


def fill_half_(tensor: Tensor, std: float, bits: np.random.SFC64) -> None:
    """Fill a tensor with `N(0, std^2)` numbers, in the order of its memory.

    Args:
        tensor: dense, on a CPU, bfloat16 or float16.
        std: standard deviation.
        bits: where random bits come from.
    """
    table = _table(std, tensor.dtype)
    flat = tensor.as_strided((tensor.numel(),), (1,))
    index = torch.empty(min(_PART, len(flat)), dtype=torch.int32)
    for part in flat.split(_PART):
        words = bits.random_raw(-(-len(part) // 4))
        chosen = index[: len(part)].copy_(torch.from_numpy(words.view(np.uint16))[: len(part)])
        torch.index_select(table, 0, chosen, out=part)
