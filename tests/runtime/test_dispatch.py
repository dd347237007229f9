"""Modes of several threads, and what torch notes of them for the whole process."""

import threading
from typing import Any

from torch.utils import _python_dispatch

from selfensemble.runtime.dispatch import DispatchMode


class Plain(DispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_no_mode_is_noted_after_modes_of_two_threads() -> None:
    """Which leave in the order in which they came; torch compiles nothing where it has noted a mode."""
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    noted: list[bool] = []

    def first() -> None:
        with Plain():  # type: ignore[no-untyped-call]
            first_in.set()
            second_in.wait(10)
        first_out.set()

    def second() -> None:
        first_in.wait(10)
        with Plain():  # type: ignore[no-untyped-call]
            second_in.set()
            first_out.wait(10)
            noted.append(_python_dispatch.is_in_torch_dispatch_mode())

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert noted == [True]
    assert not _python_dispatch.is_in_torch_dispatch_mode()
