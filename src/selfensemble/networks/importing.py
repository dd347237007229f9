"""A user's own code by name, as `uvicorn` and `gunicorn` take it: `package.module:attribute`, or a file."""

import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from ..runtime.errors import MissingPackage

_DIGEST = "selfensemble_digest"  # attribute of the module of a file: of its path and text


def attribute_named(name: str) -> Any:
    """What stands under that name; the module that it lies in is imported.

    Args:
        name: "package.module:attribute" or "path/to/file.py:attribute"; the attribute may have dots.

    Raises:
        FileNotFoundError: no such file or module.
        MissingPackage: the module needs a package that is not installed.
        ValueError: importing it fails, or it has no such attribute.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ValueError(
            f"{name!r} is not a name: write package.module:attribute or path/to/file.py:attribute"
        )
    module = _module_in_file(Path(place)) if is_file_name(place) else _module(place)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{place} has no attribute {attribute!r}; {_offered(module)}")
        found = getattr(found, part)
    return found


def is_file_name(place: str) -> bool:
    """Whether what stands before the colon is a file rather than a module."""
    return place.endswith(".py") or "/" in place or "\\" in place


def is_importable(name: str) -> bool:
    """Whether the module of that name is there, as far as can be told without running any of its code."""
    place = name.rpartition(":")[0]
    if is_file_name(place):
        return Path(place).is_file()
    search: list[str] | None = [str(Path.cwd()), *sys.path]
    parts = place.split(".")
    for count in range(1, len(parts) + 1):
        # Not importlib.util.find_spec, which imports the packages that the module lies in.
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:count]), search)
        if spec is None:
            return False
        search = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
        if search is None and count < len(parts):
            return False
    return True


def _module(place: str) -> ModuleType:
    with _importing_from(Path.cwd()):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise _missing(place, error) from error
            raise FileNotFoundError(
                f"no module {place} in {Path.cwd()} or among what is installed: go to the folder that it "
                "lies in, or write path/to/file.py:attribute"
            ) from error
        except (Exception, SystemExit) as error:  # whatever someone's code raises
            raise ValueError(f"importing {place} failed: {described(error)}") from error


def _is_free(path: Path) -> bool:
    """Whether a module may have the name of its file, as if it had been imported from where it lies."""
    if path.stem in sys.modules or path.stem in sys.stdlib_module_names:
        return False
    found = importlib.machinery.PathFinder.find_spec(path.stem, sys.path)
    return found is None or found.origin in (None, str(path))


class _Source(importlib.machinery.SourceFileLoader):
    """Compiles the text as it is now; bytecode may be that of an edit of the same second."""

    def path_stats(self, path: Any) -> Any:  # noqa: ARG002
        raise OSError


def _module_in_file(path: Path) -> ModuleType:
    """The module of a file, the same one for the same text; its neighbours can be imported by it."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: write path/to/file.py:attribute")
    path = path.resolve()
    digest = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:12]
    unique = f"{path.stem}_{digest}"
    for name in (path.stem, unique):
        if vars(sys.modules.get(name, object)).get(_DIGEST) == digest:
            return sys.modules[name]
    name = path.stem if _is_free(path) else unique
    loader = _Source(name, str(path))
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, loader, origin=str(path)))
    module.__file__ = str(path)
    setattr(module, _DIGEST, digest)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        with _importing_from(path.parent):
            loader.exec_module(module)
    except ModuleNotFoundError as error:
        del sys.modules[name]
        raise _missing(str(path), error) from error
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception | SystemExit):
            raise ValueError(f"importing {path} failed: {described(error)}") from error
        raise
    return module


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Within this context modules are looked for in `folder` first; afterwards last.

    Last, so that what is imported later, by any code, is not taken from a file of that name there.
    """
    place = str(folder)
    known = place in sys.path or ("" in sys.path and folder == Path.cwd())
    sys.path.insert(0, place)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with suppress(ValueError):  # the module may have changed the path
            sys.path.remove(place)
        if not known:
            sys.path.append(place)


def _missing(place: str, error: ModuleNotFoundError) -> MissingPackage:
    return MissingPackage(
        f"{place} needs {error.name or 'a module'}, which is not installed: install it, or put it beside that"
    )


def _offered(module: ModuleType) -> str:
    """What a module has that may be a network or make one."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and (getattr(value, "__module__", None) == module.__name__ or not _is_code(value))
    ]
    return f"it has {', '.join(own[:8])}" if own else "it has nothing that could make a network"


def _is_code(value: object) -> bool:
    return inspect.isclass(value) or inspect.isroutine(value)


def described(error: BaseException) -> str:
    """Kind, message and place of an error in someone else's code, in one line."""
    text = " ".join(str(error).split())
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = "" if frame is None else f" ({Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno})"
    return f"{type(error).__name__}: {text}"[:300] + place
