"""Who uses the network when: threads take turns, a pass each, and a job that nobody waits for is given up."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from ..ensemble.draws import passes_within


class BusyError(RuntimeError):
    """Too many images wait: come back later."""


class ClosedError(RuntimeError):
    """Nothing more is taken."""


class ModelError(RuntimeError):
    """A pass of the network failed, which is no fault of who asked; the cause says how."""


class AbandonedError(RuntimeError):
    """Nobody waits for the answer any more."""


class Turns:
    """A lock that is given in the order in which it was asked for: who comes again queues again."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    def __enter__(self) -> None:
        with self._mutex:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()

    def __exit__(self, *error: object) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False


class _Turn(AbstractContextManager[None]):
    """A pass of a job: not begun when nobody waits for it, and its errors are the network's."""

    def __init__(self, turns: Turns, answer: "Future[Any]") -> None:
        self._turns, self._answer = turns, answer

    def __enter__(self) -> None:
        self._turns.__enter__()
        if self._answer.cancelled():
            self._turns.__exit__()
            raise AbandonedError("nobody waits for this")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._turns.__exit__()
        if isinstance(error, Exception):
            raise ModelError(f"{type(error).__name__}: {error}") from error


class _Job(NamedTuple):
    call: Callable[[], Any]
    answer: "Future[Any]"


class Lane:
    """A thread that does one job after the other, in passes between those of others.

    Args:
        name: of the thread.
        turns: who uses the network.
        most: jobs that may wait; more are refused.
    """

    def __init__(self, name: str, turns: Turns, most: int) -> None:
        self._turns, self._most = turns, most
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"selfensemble-{name}", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether jobs will be done."""
        return self._thread.is_alive()

    def run(self, call: Callable[[], Any]) -> "Future[Any]":
        """What `call` returns, to come; cancelled, it ends before the next pass.

        Raises:
            BusyError, ClosedError: too many wait; after `close`.
        """
        job = _Job(call, Future())
        with self._changed:
            if self._closing:
                raise ClosedError("the server is stopping")
            if len(self._jobs) >= self._most:
                self._jobs = deque(each for each in self._jobs if not each.answer.cancelled())
            if len(self._jobs) >= self._most:
                raise BusyError(f"{len(self._jobs)} jobs wait, at most {self._most} may")
            self._jobs.append(job)
            self._changed.notify()
        return job.answer

    def close(self) -> None:
        """Take nothing more, and return when all that was taken is done or given up."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._jobs or self._closing):
                    self._changed.wait()
                if not self._jobs:
                    return  # closing
                job = self._jobs.popleft()
            if not job.answer.cancelled():
                with passes_within(lambda job=job: _Turn(self._turns, job.answer)):  # type: ignore[misc]
                    _told(job)


def in_thread(call: Callable[[], Any]) -> "Future[Any]":
    """What `call` returns, to come: of a separate thread, which does not keep the process from ending."""
    job = _Job(call, Future())
    threading.Thread(target=lambda: _told(job), name="selfensemble-job", daemon=True).start()
    return job.answer


def _told(job: _Job) -> None:
    """Do the job, and tell who waits for it, whatever happens."""
    try:
        found = job.call()
    except Exception as error:
        settle(job.answer, error=error)
    except BaseException as error:  # one that would end the thread, or the server that reads the answer
        failed = ModelError(f"{type(error).__name__}: {error}")
        failed.__cause__ = error
        settle(job.answer, error=failed)
    else:
        settle(job.answer, found)


def settle(answer: "Future[Any]", value: Any = None, error: BaseException | None = None) -> None:
    """Tell who waits for it, if anybody still does: a future is left pending, so that it can be cancelled."""
    if answer.done() or not answer.set_running_or_notify_cancel():
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(value)
