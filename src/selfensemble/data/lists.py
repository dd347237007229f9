"""Lists of files: a csv or parquet table of the paths of images and their labels."""

import csv
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..runtime.packages import needs
from .folders import states
from .images import Split
from .reading import Reading
from .rows import Cell, Rows, pick_column

LIST_SUFFIXES = {".csv", ".tsv", ".parquet"}
_IMAGES = (
    "path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img",
    "img_path", "image_file",
)  # fmt: skip
_LABELS = ("label", "labels", "target", "class", "category", "class_name", "label_name", "label_id", "y")
_SPLITS = ("split", "set", "subset", "partition", "fold")


def open_list(file: Path, split: Split, reading: Reading) -> Rows:
    """The images that a table names, by paths that begin at the folder of the table, and their labels.

    A column `split` says which are of which split. Without one the splits lie in separate files, beside
    each other (train.csv, test.csv), or are cut out of the one file that there is.

    Raises:
        FileNotFoundError: there is no such split.
        ValueError: a table without such columns, or one whose paths lead nowhere.
    """
    columns, cut, trained = _table(file), reading.cuts, None
    name = file.stem
    by = next((each for each in _SPLITS if each in columns), None)
    if by is None and (own := reading.splits_of(name)) and not cut:
        if split not in own:
            file = _beside(file, split, reading)
            columns = _table(file)
        if split == "test":
            with suppress(FileNotFoundError):  # a test split alone
                trained = _table(_beside(file, "train", reading))
    elif by is None:
        reading.check_cut(split, str(file))
        cut = True
    image = pick_column(reading.image_column, _IMAGES, list(columns), "image", str(file))
    others = [each for each in columns if each not in (image, by)]
    label = pick_column(
        reading.label_column, [*_LABELS, *others[: len(others) == 1]], list(columns), "label", str(file)
    )
    rows = list(zip(columns[image], columns[label], columns[by] if by else columns[image], strict=True))
    if by is not None:
        known = {str(each[2]).casefold() for each in rows}
        wanted = next((each for each in reading.names(split) if each.casefold() in known), None)
        if wanted is None:
            raise FileNotFoundError(
                f"no {split} split in {file}: its column {by!r} holds {', '.join(sorted(known)[:6])}; "
                f"data.{split}_split, --{split}-split name another"
            )
        of_training = _in_split(file.parent, rows, reading.names("train"))
        training = of_training if split == "test" and not cut and of_training else None
        rows = [each for each in rows if str(each[2]).casefold() == wanted.casefold()]
    else:
        training = None
        if trained is not None and label in trained and image in trained:
            pairs = zip(trained[image], trained[label], strict=True)
            training = [each for name, each in pairs if (file.parent / str(name)).is_file()]
    labels = _numbers([*(each[1] for each in rows), *(training or ())])
    theirs = None if training is None else labels[len(rows) :]
    return _rows(file, [str(each[0]) for each in rows], labels[: len(rows)], theirs, cut)


def _in_split(folder: Path, rows: list[tuple[Any, Any, Any]], names: Sequence[str]) -> list[Any]:
    """The labels of the rows of the first of these splits that there is, where their files are there."""
    for name in names:
        found = [each for each in rows if str(each[2]).casefold() == name.casefold()]
        if found:
            return [each[1] for each in found if (folder / str(each[0])).is_file()]
    return []


def _rows(file: Path, names: list[str], labels: list[Any], training: list[Any] | None, cut: bool) -> Rows:
    paths = [file.parent / name for name in names]
    there = [path.is_file() for path in paths]
    if not any(there):
        raise ValueError(
            f"no file that {file} names is there ({paths[0] if paths else 'it is empty'}): paths begin at "
            "the "
            "folder of the table"
        )
    skipped = tuple(f"{name}: no such file" for name, found in zip(names, there, strict=True) if not found)
    names = [name for name, found in zip(names, there, strict=True) if found]
    labels = [label for label, found in zip(labels, there, strict=True) if found]
    cells: list[Cell] = [{"path": str(file.parent / name), "bytes": None} for name in names]
    known = [file, *(file.parent / name for name in names)]
    return Rows(
        source=str(file),
        identity=[*states(file.parent, known), labels],
        each=lambda: zip(cells, labels, strict=True),
        cells=lambda: cells,
        training=None if training is None else lambda: training,
        names=names,
        cut=cut,
        skipped=skipped,
    )


def _table(file: Path) -> Mapping[str, Sequence[Any]]:
    """The columns of a table."""
    if file.suffix.lower() == ".parquet":
        with needs("selfensemble[data]"):
            import pyarrow.parquet

        table = pyarrow.parquet.read_table(file)
        names = [field.name for field in table.schema if str(field.type) in ("string", "large_string")]
        if not any(name in names for name in _IMAGES):
            raise ValueError(f"{file} holds no paths of images: pass the folder that holds the data")
        return {name: table.column(name).to_pylist() for name in table.column_names}
    with file.open(encoding="utf-8-sig", newline="") as text:
        try:
            delimiter = max(",;\t", key=text.readline().count)
            text.seek(0)
            rows = list(csv.DictReader(text, delimiter=delimiter, strict=True))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not in UTF-8 ({error}): save it in that encoding") from error
        except csv.Error as error:
            raise ValueError(f"{file} cannot be read as a table ({error})") from error
    if not rows:
        raise ValueError(f"{file} has no rows: a line of names of columns, then a line an image")
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{file} has rows of other lengths than its first line: fix the file")
    return {name: [row[name] for row in rows] for name in rows[0]}


def _numbers(labels: list[Any]) -> list[Any]:
    """Texts that are all whole numbers as such, and empty ones as None: no label."""
    labels = [(label.strip() or None) if isinstance(label, str) else label for label in labels]
    texts = {label for label in labels if isinstance(label, str)}
    whole = all(re.fullmatch(r"-?[0-9]+", text) for text in texts)
    if not whole or len({int(text) for text in texts}) < len(texts):  # 1 and 01 are two names
        return labels
    return [int(label) if isinstance(label, str) else label for label in labels]


def _beside(file: Path, split: Split, reading: Reading) -> Path:
    for name in reading.names(split):
        for suffix in (file.suffix, *LIST_SUFFIXES):
            if (other := file.with_name(name + suffix)).is_file():
                return other
    raise FileNotFoundError(
        f"no {split} split beside {file}: expected {reading.names(split)[0]}{file.suffix}, or a column "
        "`split`; "
        f"data.{split}_split, --{split}-split name another, and one name for both cuts them out of it"
    )
