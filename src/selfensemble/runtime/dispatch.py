"""Modes that see every operator of torch, of one thread."""

import threading
from collections import deque
from typing import Any, Self

from torch.utils._python_dispatch import TorchDispatchMode

_lock = threading.RLock()
_inside = 0  # modes that any thread is in
_outside: list[bool] = []  # torch's flags when there was none


class DispatchMode(TorchDispatchMode):
    """A mode that several threads may be in at once.

    Whether there is any mode torch notes for the whole process, and at an exit it puts back what was so at
    the entry: threads that leave in the order in which they came would leave `torch.compile` off for good.

    A compiled function that is called within a mode is never compiled again: see `noise.graphs.uncompiled`.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler for it, which takes seconds

    def __enter__(self) -> Self:
        global _inside, _outside
        with _lock:
            super().__enter__()  # type: ignore[no-untyped-call]
            if _inside == 0:
                _outside = [flags[-1] for flags in self._flags()]
            _inside += 1
        return self

    def __exit__(self, *error: Any) -> None:
        global _inside
        with _lock:
            _inside -= 1
            for flags, outside in zip(self._flags(), _outside, strict=False):
                flags[-1] = outside or _inside > 0
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _flags(self) -> list[deque[bool]]:
        """What torch puts back at the exit, by entries."""
        return [value for value in vars(self).values() if isinstance(value, deque)]
