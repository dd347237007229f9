"""Files that are either whole or not there."""

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel, ValidationError

from .checking import explained
from .texts import read_json

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

Schema = TypeVar("Schema", bound=BaseModel)


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


@contextmanager
def named_in_text(folder: Path) -> Iterator[Path]:
    """The folder, by another name if its own is no text: in a locale of ASCII, one in other letters is none.

    For libraries that write names in UTF-8 whatever the locale.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as aside:
            link = Path(aside) / "link"
            link.symlink_to(folder.resolve(), target_is_directory=True)
            yield link
    else:
        yield folder


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Within this context no other thread or process is in the same one of `folder`, which may be waited for.

    Where the system or the file system has no such locks, nothing is held.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            handle = os.open(folder, os.O_RDONLY)  # the folder itself: nothing is left in it
            stack.callback(os.close, handle)
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def atomic_pair(first: Path, second: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The same for two files that belong together: both are on the disk before either takes its place.

    `first` is replaced first, and put back should `second` not be replaceable. Only a process that is killed
    between the two leaves a new `first` beside an old `second`: let the first hold `digest_of` the second. Of
    several writers at once, each replaces both before the next does.
    """
    before, placed = None, False
    with contextlib.ExitStack() as alone:
        try:
            with atomic_file(second) as other:
                with atomic_file(first) as file:
                    yield file, other
                    sync(file)
                    sync(other)
                    alone.enter_context(only_writer(first.parent))
                    before = first.read_bytes() if first.is_file() else None
                placed = True
            placed = False  # nor is there anything to put back
        except BaseException:
            if placed and before is None:
                first.unlink()
            elif placed and before is not None:
                atomic_write(first, before)
            raise


def digest_of(content: bytes) -> str:
    """By which a file is known again: what sha256sum says of it, behind the name of the method."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


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


def read_versioned(path: Path, schema: type[Schema], name: str, version: int, mend: str) -> Schema:
    """Read JSON that says its `format` and `format_version`, checked against a pydantic model.

    Args:
        path: an existing file.
        schema: what it must hold.
        name, version: of the format.
        mend: what to do about a damaged file, for the error.

    Raises:
        ValueError: the file is damaged, foreign, or written by a newer version.
    """
    values = read_json(path, mend)
    if not isinstance(values, dict) or values.get("format") != name:
        raise ValueError(f"{path} was not written by selfensemble as {name}: pass a folder of its own")
    if values.get("format_version") != version:
        raise ValueError(
            f"{path} has format version {values.get('format_version')!r}, this version reads "
            f"{version}: upgrade selfensemble"
        )
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        reasons, newer = explained(found, values, schema), any(e["type"] == "extra_forbidden" for e in found)
        mend = f"upgrade selfensemble, or {mend}" if newer else mend
        raise ValueError(f"{path} does not fit: {reasons}: {mend}") from error


def cache_dir() -> Path:
    """Where decoded data lies: `$SELFENSEMBLE_CACHE`, or `selfensemble` in the user's cache folder."""
    if set_dir := os.environ.get("SELFENSEMBLE_CACHE"):
        return Path(set_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selfensemble"
