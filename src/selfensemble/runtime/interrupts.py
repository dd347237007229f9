"""Stopping a long run between two steps rather than in the middle of one, and while modules load at once."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # the exit status
NOTHING_LOST = "interrupted; files that were complete before are intact"
_told = NOTHING_LOST  # when Ctrl-C ends the process at once


class Interrupted(RuntimeError):
    """The user asked to stop; everything done so far is in the checkpoint."""


def end_while_loading() -> None:
    """From now on Ctrl-C ends the process at once while a module is being imported; else it does as before.

    Many modules turn a KeyboardInterrupt in the middle of them into other errors, or swallow it, and leave
    themselves half imported. When all is done and Python takes its modules down, Ctrl-C changes nothing: the
    process would be killed by the signal. For a command, not for a library.
    """
    here = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    # Until its work begins, here, a command ends at once whatever it does: see the package's first lines.
    began = getattr(before, "__module__", None) == __name__.partition(".")[0]
    if here and (began or before is signal.default_int_handler):
        signal.signal(signal.SIGINT, _interrupt)
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    within = frame
    while within is not None:
        if within.f_code.co_filename.startswith("<frozen importlib"):
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            with contextlib.suppress(OSError):
                os.write(2, f"error: {_told}\n".encode())
            os._exit(INTERRUPTED)
        within = within.f_back
    signal.default_int_handler(number, frame)


@contextmanager
def telling(text: str) -> Iterator[None]:
    """Within this context Ctrl-C while a module is being imported says `text`."""
    global _told
    before, _told = _told, text
    try:
        yield
    finally:
        _told = before


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        stop.set()
        restore()

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()
