"""How long an evaluation takes, told from its first attack on."""

import inspect
import math
import time
from contextlib import suppress

from torch import Tensor, nn

from ..attacks import ATTACKS
from ..attacks.masking import NEED_NO_GRADIENT, NoGradientError
from ..attacks.units import bounds_of
from .identity import duration
from .protocol import Run

_TRIED = 16  # images of the step that is timed
_FACTORS = ("steps", "restarts", "targets", "binary_search_steps", "eot", "queries", "tries")
_COMBINED = {"autoattack-rand": 2, "autoattack-standard": 20}  # their attacks, by the steps of one
FORWARD = 1 / 3  # of what a gradient costs


def gradients(run: Run) -> float:
    """How many an image costs at most; forward passes count as parts of them."""
    parameters = inspect.signature(ATTACKS[run.attack]).parameters
    known = (
        {"eot": 1, "steps": 100} | {name: each.default for name, each in parameters.items()} | run.settings
    )
    blind = run.attack in NEED_NO_GRADIENT
    names = [
        name for name in _FACTORS if isinstance(known.get(name), int) and not (blind and name == "steps")
    ]
    each = math.prod(known[name] for name in names) * _COMBINED.get(run.attack, 1)
    return each * FORWARD if blind else float(each)


def seconds_per_gradient(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Of one image, by one step of an attack on a few of them."""
    x, y = inputs[:_TRIED], labels[:_TRIED]
    low, high = bounds_of(model)
    began = time.monotonic()
    with suppress(NoGradientError):  # its forward pass is what other attacks need
        ATTACKS["pgd"](model, x, y, eps=0.01 * (high - low), steps=1, seed=0)
    return (time.monotonic() - began) / len(x)


class Clock:
    """Says how long is left, from the work that is left and the time that the finished work took.

    Args:
        work: all of it, in gradients.
        rate: seconds a gradient as long as no attack has finished.
    """

    def __init__(self, work: float, rate: float) -> None:
        self._left, self._done, self._rate = work, 0.0, rate
        self._began = time.monotonic()

    def finished(self, work: float, *, is_attack: bool) -> None:
        """Count a unit of work; only attacks say how fast attacks are."""
        self._left -= work
        if is_attack or self._done:
            self._done += work
        else:
            self._began = time.monotonic()

    def __str__(self) -> str:
        if not self._done:
            return f", at most about {duration(self._rate * self._left)} left"
        rate = (time.monotonic() - self._began) / self._done
        return f", about {duration(rate * self._left)} left"
