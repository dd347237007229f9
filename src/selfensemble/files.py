"""Files that are either whole or not there."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its place when the context ends well.

    On any error, a full disk or an interrupt among them, `path` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            sync(file)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def atomic_write(path: Path, content: bytes) -> None:
    """Write `content` to `path`, all of it or nothing."""
    with atomic_file(path) as file:
        file.write(content)


def sync(file: BinaryIO) -> None:
    """Bring what was written to the disk, or raise the error that it is full."""
    file.flush()
    os.fsync(file.fileno())


def to_json(value: Any) -> bytes:
    """Indented JSON; NaN is an error."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN is an error."""
    atomic_write(path, to_json(value))


def cache_dir() -> Path:
    """Where decoded data lies: `$SELFENSEMBLE_CACHE`, or `selfensemble` in the user's cache folder."""
    if set_dir := os.environ.get("SELFENSEMBLE_CACHE"):
        return Path(set_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selfensemble"
