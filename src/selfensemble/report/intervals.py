"""Figures with their intervals, from per-image results."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..runtime.provenance import binomial_interval

_NORMAL = 1.959964  # the 97.5 % quantile


class Share(NamedTuple):
    """A share of the images in [0, 1] with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """In per cent."""
        return f"{100 * self.value:z.1f} ({100 * self.low:z.1f} to {100 * self.high:z.1f})"


def share(which: NDArray[np.bool_]) -> Share:
    """Share of the images with its Clopper-Pearson interval."""
    count = int(which.sum())
    return Share(count / len(which), *binomial_interval(count, len(which)))


def bounded(values: NDArray[np.float64]) -> Share:
    """Mean of values in [0, 1] with the Clopper-Pearson interval that images right or wrong as a whole have.

    Those spread most of all values of this mean, so it is the wider one; and it is not empty where all agree.
    """
    total, count = float(values.sum()), len(values)
    low = binomial_interval(math.floor(total + 1e-9), count)[0]
    return Share(total / count, low, binomial_interval(math.ceil(total - 1e-9), count)[1])


def mean(values: NDArray[np.float64]) -> Share:
    """Mean of a quantity of each image, with its normal interval over the images, `+- 1.96 std / sqrt(N)`.

    Of the differences of two accuracies of the same images it is the paired interval.
    """
    middle = float(values.mean())
    half = _NORMAL * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Share(middle, middle - half, middle + half)
