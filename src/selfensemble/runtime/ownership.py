"""A run owns its folder: while it works, another that would write there is refused."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".selfensemble.lock"
_handles: set[int] = set()


def _let_go() -> None:
    """In a forked child, a worker that decodes images, say: it may outlive the run whose folder this is."""
    for handle in _handles:
        with contextlib.suppress(OSError):
            os.close(handle)
    _handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class FolderInUseError(OSError):
    """Another run works in the folder; the message says which process, and what to do."""


@contextmanager
def owned(folder: Path, wanted: bool = True) -> Iterator[None]:
    """Within this context no other process or thread is in the same one of `folder`; it is made if missing.

    The system ends the hold of a process that dies, however it dies. Where the system or the file system has
    no such locks, nothing is held.

    Args:
        folder: of a run.
        wanted: False holds nothing: of the processes of one run the first holds the folder for all.

    Raises:
        FolderInUseError: it is held by another.
        NotADirectoryError: it is a file.
    """
    handle = _held(folder) if wanted and fcntl is not None else None
    if handle is not None:
        _handles.add(handle)
    try:
        yield
    finally:
        if handle in _handles:  # not in a forked child, which has let it go
            _handles.discard(handle)
            # Before it is let go: who has opened it looks whether it is still there.
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
            os.close(handle)


def _held(folder: Path) -> int | None:
    """The open file by which `folder` is held; None where there are no locks."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: pass the folder to write to")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process = os.pread(handle, 32, 0).decode(errors="replace").strip()
            os.close(handle)
            by = f"process {process}" if process else "another process"
            raise FolderInUseError(
                f"{folder} is in use by {by}: wait until it has ended, or pass another folder"
            ) from None
        except OSError:  # of a file system that has no locks
            os.close(handle)
            return None
        if _is_there(handle, path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
            return handle
        os.close(handle)  # its last owner has removed it meanwhile


def _is_there(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
