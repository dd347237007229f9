"""What the server writes of itself: to stderr, a line a request, and never waiting for who reads it."""

import logging
import os
import queue
import threading
from datetime import UTC, datetime

LOG = logging.getLogger("selfensemble.serving")
ACCESS = logging.getLogger("selfensemble.serving.access")
_ROOM = 10_000  # lines that wait to be written; more are dropped


class _Lines(logging.Formatter):
    """The time in UTC to the millisecond, then what is said."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002, N802
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


class Writer(logging.Handler):
    """Hands lines to a thread that writes them, so that a full pipe or disk holds nobody up.

    Args:
        descriptor: of the file.
    """

    def __init__(self, descriptor: int = 2) -> None:
        super().__init__()
        self.setFormatter(_Lines("%(asctime)s %(message)s"))
        self._descriptor = descriptor
        self._lines: queue.Queue[bytes] = queue.Queue(_ROOM)
        self._written, self._lock, self._left = threading.Event(), threading.Lock(), 0
        self._written.set()
        threading.Thread(target=self._write, name="selfensemble-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = (self.format(record) + "\n").encode(errors="backslashreplace")
            with self._lock:
                self._lines.put_nowait(line)
                self._left += 1
                self._written.clear()
        except queue.Full:
            pass
        except Exception:  # of a record that cannot be formatted
            self.handleError(record)

    def drain(self, seconds: float) -> None:
        """Wait until all is written, but no longer than that."""
        self._written.wait(seconds)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except OSError:  # nobody reads it, or the disk is full: the server goes on
                pass
            with self._lock:
                self._left -= 1
                if not self._left:
                    self._written.set()


def begin(access: bool, descriptor: int = 2) -> Writer:
    """Write what the server and uvicorn have to say; `access` wants a line for each request as well."""
    writer = Writer(descriptor)
    for name, level in ((LOG.name, logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [writer], False
        logger.setLevel(level)
    ACCESS.disabled = not access
    return writer
