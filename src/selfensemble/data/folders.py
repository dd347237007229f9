"""Folders: which files are of a split, and images in one folder a class."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .decoding import IMAGE_SUFFIXES
from .images import Split
from .reading import KNOWN_SPLITS, Reading
from .rows import Cell, Rows

# What file systems and archives leave beside people's files; what begins with a dot is hidden.
_NOT_OURS = {"__macosx", "@eadir", "thumbs.db", "desktop.ini"}


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none that a user put there."""
    return name.startswith(".") or name.casefold() in _NOT_OURS


def files_below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """All files that are not hidden, links to files and folders followed but for circles."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for path in folder.iterdir():
        if not is_hidden(path.name):
            yield from files_below(path, above | {real}) if path.is_dir() else (path,)


def tables_of(folder: Path, files: Sequence[Path], split: Split, reading: Reading) -> tuple[list[Path], bool]:
    """Of all parquet files those of a split, and whether they are of both splits together.

    Raises:
        FileNotFoundError: none is.
    """
    for name in reading.names(split):
        chosen = [path for path in files if path.name.startswith(name) or path.parent.name == name]
        if chosen:
            return chosen, reading.cuts
    known = [each for names in KNOWN_SPLITS.values() for each in names]
    named = [path for path in files if path.name.startswith(tuple(known)) or path.parent.name in known]
    if named or reading.names(split) != KNOWN_SPLITS[split]:
        raise _no_split(folder, split, reading)
    return list(files), True


def class_folders(folder: Path, split: Split, reading: Reading) -> Rows:
    """Images whose folder below that of the split names their class; without splits, below `folder` itself.

    Raises:
        FileNotFoundError: there are none.
        ValueError: an image lies in no class.
    """
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    by_name = {path.name.casefold(): path for path in reversed(below)}
    for name in reading.names(split):
        root = by_name.get(name.casefold())
        if root is not None and (files := sorted(files_below(root))) and _has_images(files):
            return _by_class(folder, root, files, reading.cuts)
    splits = {each.casefold() for kind in KNOWN_SPLITS for each in reading.names(kind)}
    if splits & by_name.keys() or reading.names(split) != KNOWN_SPLITS[split]:
        raise _no_split(folder, split, reading)
    files = sorted(files_below(folder))
    if not _has_images(files):
        raise _no_split(folder, split, reading)
    return _by_class(folder, folder, files, True)


def _has_images(files: Sequence[Path]) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in files)


def _by_class(folder: Path, root: Path, files: Sequence[Path], cut: bool) -> Rows:
    images: list[Path] = []
    skipped, kinds = list[str](), Counter[tuple[str, str]]()
    for path in files:
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            place = path.parent.relative_to(root).as_posix()
            kinds[place, path.suffix.lower() or "without suffix"] += 1
        elif not path.is_file():
            skipped.append(f"{path.relative_to(root).as_posix()}: a link to nothing")
        elif path.parent == root:
            raise ValueError(
                f"{path} lies in no class: put images into {'' if cut else root.name + '/'}CLASS/, of all "
                f"classes, in {folder}"
            )
        else:
            images.append(path)
    others = [
        f"{place}: {count} file{'s' * (count > 1)} {suffix}: no image, by the name"
        for (place, suffix), count in sorted(kinds.items())
    ]
    names = [path.relative_to(root).as_posix() for path in images]
    classes = [name.split("/")[0] for name in names]
    empty = sorted(
        path.name for path in root.iterdir()
        if path.is_dir() and not is_hidden(path.name) and path.name not in set(classes)
    )  # fmt: skip
    others += [f"{name}: a folder without images, which is no class" for name in empty]
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
        others=tuple(others),
    )


def _state(path: Path) -> list[Any]:
    """By which a change of a file is noticed."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


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
