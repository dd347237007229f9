"""Folders: which files are of a split, and images in one folder a class."""

import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .decoding import IMAGE_SUFFIXES
from .images import Split
from .reading import KNOWN_SPLITS, Reading
from .rows import Cell, Rows

# What file systems and archives leave beside people's files; what begins with a dot is hidden.
_NOT_OURS = {"__macosx", "@eadir", "thumbs.db", "desktop.ini"}
_OF_NONE = "beside the splits, and of none"


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none that a user put there."""
    return name.startswith(".") or name.casefold() in _NOT_OURS


def _in_utf8(name: str) -> str:
    """The name of a class in the file system as text: the same whatever the locale, as networks record it."""
    if sys.getfilesystemencoding().lower() in ("utf-8", "utf8"):
        return name
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def files_below(
    folder: Path,
    above: frozenset[str] = frozenset(),
    closed: list[Path] | None = None,
    named: list[Path] | None = None,
) -> Iterator[Path]:
    """All files that are not hidden, links to files and folders followed but for circles.

    Args:
        folder: where to look.
        above: folders that this one lies in.
        closed: gets the folders that nobody may look into; None to raise a PermissionError.
        named: gets the folders in it that are images by their names.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        inside = list(folder.iterdir())
    except PermissionError:
        if closed is None:
            raise
        closed.append(folder)
        return
    for path in inside:
        if not is_hidden(path.name):
            # Not path.is_dir(), which raises an error where the folder may be listed and no more.
            is_folder = os.path.isdir(path)  # noqa: PTH112
            if is_folder and named is not None and _is_image(path):
                named.append(path)
            yield from files_below(path, above | {real}, closed, named) if is_folder else (path,)


def why_no_file(path: Path) -> str | None:
    """Why nothing can be read there: a link to nothing, a pipe; None of a file."""
    try:
        found = path.stat().st_mode
    except FileNotFoundError:
        return "a link to nothing" if path.is_symlink() else "no such file"
    except OSError as error:  # a link to itself, no right to look
        return error.strerror or type(error).__name__
    return None if stat.S_ISREG(found) else "no file, but a pipe or a device"


class Tables(NamedTuple):
    """Parquet files of a split, whether they are of both splits together, and what lies beside the splits."""

    files: list[Path]
    cut: bool
    others: tuple[str, ...] = ()


def tables_of(folder: Path, files: Sequence[Path], split: Split, reading: Reading) -> Tables:
    """Of all parquet files those of a split.

    Raises:
        FileNotFoundError: none is.
        ValueError: a file may be of both.
    """
    named = {path: _splits_in(path.relative_to(folder), reading) for path in files}
    kinds = [{each.casefold() for each in reading.names(kind)} for kind in KNOWN_SPLITS]
    if both := [path for path in files if not reading.cuts and all(named[path] & names for names in kinds)]:
        raise ValueError(f"{both[0]} may be of both splits, by its name: rename it")
    for name in reading.names(split):
        if chosen := [path for path in files if name.casefold() in named[path]]:
            beside = [path.relative_to(folder).as_posix() for path in files if not named[path]]
            return Tables(chosen, reading.cuts, tuple(f"{each}: {_OF_NONE}" for each in beside))
    if any(named.values()) or reading.names(split) != KNOWN_SPLITS[split]:
        raise _no_split(folder, split, reading)
    return Tables(list(files), True)


def _split_names(reading: Reading) -> set[str]:
    """All that a split may be called, as usual or here."""
    usual = {each for names in KNOWN_SPLITS.values() for each in names}
    return usual | {each.casefold() for kind in KNOWN_SPLITS for each in reading.names(kind)}


def _words(name: str) -> set[str]:
    """A name, and what stands between its hyphens, underscores, points and spaces."""
    return {name, *re.split(r"[-_. ]+", name)}


def _splits_in(path: Path, reading: Reading) -> set[str]:
    """The names of splits in the name of a file, or of the nearest folder of it that has one."""
    known, stem = _split_names(reading), path.stem.casefold()
    if begins := {name for name in known if stem.startswith(name)}:
        return begins
    for name in (stem, *(part.casefold() for part in reversed(path.parent.parts))):
        if found := known & _words(name):
            return found
    return set()


def class_folders(folder: Path, split: Split, reading: Reading) -> Rows:
    """Images whose folder below that of the split names their class; without splits, below `folder` itself.

    Raises:
        FileNotFoundError: there are none.
        ValueError: an image is in no class.
    """
    splits = {each.casefold() for kind in KNOWN_SPLITS for each in reading.names(kind)}
    _check_names(folder, reading)
    root = _root_of(folder, split, reading)
    if root is not None:
        rows = _by_class(folder, root, _found(root), reading.cuts, _beside(folder, splits))
        other: Split = "test" if split == "train" else "train"
        opposite = None if reading.cuts else _root_of(folder, other, reading)
        return rows if opposite is None else _compared(rows, opposite, split)
    below = {path.name.casefold() for path in _folders_in(folder)}
    if splits & below or reading.names(split) != KNOWN_SPLITS[split]:
        raise _no_split(folder, split, reading)
    found = _found(folder)
    if not _has_images(found.files):
        raise _no_split(folder, split, reading)
    return _by_class(folder, folder, found, True)


def _check_names(folder: Path, reading: Reading) -> None:
    """Refuse folders like seg_train and seg_test, which would be two classes, unless they are named."""
    if any(_root_of(folder, split, reading) is not None for split in KNOWN_SPLITS):
        return
    alike = [
        [
            path for path in _folders_in(folder)
            if _words(path.name.casefold()) & set(names)
            and any(_has_images(files_below(below, closed=[])) for below in _folders_in(path))
        ]
        for names in KNOWN_SPLITS.values()
    ]  # fmt: skip
    if all(alike):
        (train, *_), (test, *_) = alike
        raise ValueError(
            f"{folder} holds {train.name} and {test.name}, which look like splits: say so "
            f"(--train-split {train.name} --test-split {test.name}, data.train_split and data.test_split), "
            "or rename them"
        )


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def _root_of(folder: Path, split: Split, reading: Reading) -> Path | None:
    """The folder of a split, if one has images.

    Raises:
        ValueError: two may be it.
    """
    below = _folders_in(folder)
    by_name = {path.name.casefold(): path for path in reversed(below)}
    for name in reading.names(split):
        root = by_name.get(name.casefold())
        if root is not None and _has_images(files_below(root, closed=[])):
            same = [path.name for path in below if path.name.casefold() == name.casefold()]
            if len(same) > 1:
                raise ValueError(f"{folder} holds {' and '.join(same)}, which may be one split: rename one")
            return root
    return None


def _compared(rows: Rows, opposite: Path, split: Split) -> Rows:
    """The rows of a split, with what those of the other say of their classes."""
    own = {label for _, label in rows.each()}
    closed = list[Path]()
    theirs = {
        _in_utf8(path.name) for path in _folders_in(opposite)
        if any(why_no_file(file) is None for file in files_below(path, closed=closed) if _is_image(file))
    }  # fmt: skip
    for path in closed:
        if path.parent == opposite and split == "test":
            raise _closed_class(path)
    if split == "test":
        missing = tuple(f"{name}: a class of the training split alone" for name in sorted(theirs - own))
        return replace(rows, training=lambda: theirs, others=(*rows.others, *missing))
    missing = tuple(f"{name}: a class that the test split lacks" for name in sorted(own - theirs))
    return replace(rows, others=(*rows.others, *missing))


def _beside(folder: Path, splits: set[str]) -> tuple[str, ...]:
    """Folders and images that lie beside the splits, where nobody looks for images."""
    known = splits | {each for names in KNOWN_SPLITS.values() for each in names}
    return tuple(
        f"{path.name}: {_OF_NONE}" for path in sorted(folder.iterdir())
        if not is_hidden(path.name) and path.name.casefold() not in known
        and (path.is_dir() or _is_image(path))
    )  # fmt: skip


class _Found(NamedTuple):
    """Files of a folder, and folders in it that nobody may look into, or that are images by their names."""

    files: list[Path]
    closed: list[Path]
    named: list[Path]


def _found(root: Path) -> _Found:
    closed, named = list[Path](), list[Path]()
    return _Found(sorted(files_below(root, closed=closed, named=named)), sorted(closed), sorted(named))


def _has_images(files: Iterable[Path]) -> bool:
    return any(map(_is_image, files))


def _is_image(file: Path) -> bool:
    """By its name."""
    return file.suffix.lower() in IMAGE_SUFFIXES


def _closed_class(path: Path) -> ValueError:
    return ValueError(f"no permission to read {path}, which would be a class: change its permissions")


def _by_class(folder: Path, root: Path, found: _Found, cut: bool, beside: tuple[str, ...] = ()) -> Rows:
    images: list[Path] = []
    skipped, kinds = list[str](), Counter[tuple[str, str]]()
    for path in found.closed:
        if path.parent == root:
            raise _closed_class(path)
        skipped.append(f"{path.relative_to(root).as_posix()}: a folder without permission to read")
    for path in found.files:
        if not _is_image(path):
            place = path.parent.relative_to(root).as_posix()
            kinds[place, path.suffix.lower() or "without suffix"] += 1
        elif (why := why_no_file(path)) is not None:
            skipped.append(f"{path.relative_to(root).as_posix()}: {why}")
        elif path.parent == root:
            raise ValueError(
                f"{path} is in no class: put images into {'' if cut else root.name + '/'}CLASS/, of all "
                f"classes, in {folder}"
            )
        else:
            images.append(path)
    others = [
        f"{place}: {count} file{'s' * (count > 1)} {suffix}: no image, by the name"
        for (place, suffix), count in sorted(kinds.items())
    ]
    names = [path.relative_to(root).as_posix() for path in images]
    classes = [_in_utf8(name.split("/")[0]) for name in names]
    empty = sorted(
        path.name for path in root.iterdir()
        if path.is_dir() and not is_hidden(path.name) and _in_utf8(path.name) not in set(classes)
    )  # fmt: skip
    others += [f"{name}: a folder without images, which is no class" for name in empty]
    others += [
        f"{path.relative_to(root).as_posix()}: a folder, though an image by its name"
        for path in found.named if path.name not in empty
    ]  # fmt: skip
    others += _twins(set(classes))
    cells: list[Cell] = [{"path": str(path), "bytes": None} for path in images]
    return Rows(
        source=str(folder),
        identity=[
            str(root.resolve()),
            [[name, *_state(path)] for name, path in zip(names, images, strict=True)],
        ],
        each=lambda: zip(cells, classes, strict=True),
        cells=lambda: cells,
        names=names,
        cut=cut,
        skipped=tuple(skipped),
        others=(*others, *beside),
    )


def _twins(classes: set[str]) -> list[str]:
    """What to say of classes whose names differ in nothing but upper and lower case."""
    by_name: dict[str, list[str]] = {}
    for name in sorted(classes):
        by_name.setdefault(name.casefold(), []).append(name)
    return [
        f"{' and '.join(names)}: {len(names)} classes whose names differ in upper and lower case alone"
        for names in by_name.values() if len(names) > 1
    ]  # fmt: skip


def _state(path: Path) -> list[Any]:
    """By which a change of a file is noticed, and one of who may read it."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, *([] if os.access(path, os.R_OK) else ["closed"])]


def states(folder: Path, files: Sequence[Path]) -> list[Any]:
    """By which a change of files is noticed."""
    return [str(folder.resolve()), [[str(path), *_state(path)] for path in files]]


def _no_split(folder: Path, split: Split, reading: Reading) -> FileNotFoundError:
    names = ", ".join(reading.names(split))
    return FileNotFoundError(
        f"no {split} split in {folder}: expected {split}*.parquet, or images as {split}/CLASS/NAME.png (for "
        f"{split}, any of {names}; data.{split}_split, --{split}-split name another), or without any splits "
        "CLASS/NAME.png; to cut both splits out of one, give both the same name"
    )
