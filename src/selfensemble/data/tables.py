"""Tables of images and labels: data sets of the Hugging Face Hub, saved ones, and parquet files."""

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..runtime.files import cache_dir, write_json
from ..runtime.packages import needs
from .folders import states
from .images import Split
from .reading import Reading
from .rows import Cell, Rows, pick_column

HUB_IDS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "stl10": "tanganke/stl10"}
_PATIENCE = 10.0  # seconds for the Hub to answer
_LABELS = (
    "label", "labels", "fine_label", "target", "targets", "class", "category", "label_id", "class_id",
    "digit",
)  # fmt: skip


# From the name of the column of labels to those of the training split; None where it has no such column.
_Training = Callable[[str], Iterable[Any] | None] | None


def open_parquet(
    folder: Path, files: Sequence[Path], cut: bool, reading: Reading, training: Sequence[Path] = ()
) -> Rows:
    """The rows of parquet files in `folder`, of a test split beside the training split in `training`."""
    with needs("selfensemble[data]"):
        import pyarrow.parquet
        from datasets import load_dataset

    def open_table(streaming: bool) -> Any:
        return load_dataset(
            "parquet", data_files=[glob.escape(str(path)) for path in files], split="train",
            streaming=streaming, cache_dir=str(cache_dir() / "tables"),
        )  # fmt: skip

    def labels(column: str) -> Iterable[Any] | None:
        tables = [pyarrow.parquet.read_table(path, columns=[column]) for path in training]
        if any(column not in table.column_names for table in tables):
            return None
        return {label for table in tables for label in table.column(column).unique().to_pylist()}

    identity, known = states(folder, files), labels if training else None
    opened = (lambda: open_table(True), lambda: open_table(False))
    return _rows(str(folder), identity, *opened, cut, reading, known)


def open_saved(folder: Path, split: Split, reading: Reading) -> Rows:
    """The rows of what `save_to_disk` of the datasets library wrote.

    Raises:
        FileNotFoundError: it has no such split.
    """
    with needs("selfensemble[data]"):
        from datasets import DatasetDict, load_from_disk

    found: Any = load_from_disk(str(folder))
    cut, training = not isinstance(found, DatasetDict), list[Any]()
    if cut:
        reading.check_cut(split, str(folder))
    if not cut:
        by_name = {str(name).casefold(): name for name in found}
        names, trained = (
            [by_name[name.casefold()] for name in reading.names(each) if name.casefold() in by_name]
            for each in (split, "train")
        )
        if not names:
            raise FileNotFoundError(
                f"no {split} split in {folder}: it has {', '.join(map(str, found))}; data.{split}_split, "
                f"--{split}-split name another, and one name for both cuts them out of it"
            )
        if trained and split == "test" and not reading.cuts:
            training = [found[trained[0]]]
        found, cut = found[names[0]], reading.cuts
    files = [Path(each["filename"]) for each in found.cache_files]

    def labels(column: str) -> Iterable[Any] | None:
        (table,) = training
        return table.unique(column) if column in table.column_names else None

    opened, known = (lambda: found, lambda: found), labels if training else None
    return _rows(str(folder), states(folder, files), *opened, cut, reading, known)


def open_hub(hub_id: str, split: Split, reading: Reading) -> Rows:
    """The rows of one split of a data set of the Hub.

    Raises:
        ConnectionError: it cannot be read.
    """
    with needs("selfensemble[data]"):
        from datasets import load_dataset

    revision = _commit(hub_id, reading.revision) or reading.revision

    def open_table(streaming: bool, split: Split = split) -> Any:
        problems = []
        for name in reading.names(split):
            try:
                return load_dataset(hub_id, split=name, streaming=streaming, revision=revision)
            except OSError as error:
                raise ConnectionError(
                    f"cannot read data set {hub_id!r} from the hub ({type(error).__name__}): check "
                    "the id and the connection, or download it and pass the folder of its parquet files"
                ) from error
            except ValueError as error:  # of a split that it does not have
                if "split" not in str(error):
                    raise
                known = re.search(r"\[(.+)\]", str(error))
                problems.append(known.group(1).replace("'", "") if known else "others")
        raise FileNotFoundError(
            f"no {split} split in {hub_id}, which has {problems[0]}: data.{split}_split, --{split}-split "
            "name another, and one name for both cuts them out of it"
        )

    def labels(column: str) -> Iterable[Any] | None:
        def read() -> list[Any] | None:
            try:
                table = open_table(True, "train")
            except FileNotFoundError:
                return None
            if column not in (table.features or ()):
                return None
            return sorted({row[column] for row in table.select_columns([column])} - {None}, key=str)

        return _kept([hub_id, *reading.names("train"), revision, column], read) if revision else read()

    names, known = [hub_id, *reading.names(split), revision], labels if split == "test" else None
    opened, cut = (lambda: open_table(True), lambda: open_table(False)), reading.cuts
    return replace(_rows(hub_id, names, *opened, cut, reading, None if cut else known), revision=revision)


def _kept(identity: list[Any], read: Callable[[], list[Any] | None]) -> list[Any] | None:
    """What was read before of the same, else what is read now."""
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    path = cache_dir() / "labels" / f"{name}.json"
    try:
        found: list[Any] | None = json.loads(path.read_text(encoding="utf-8"))["labels"]
    except (OSError, ValueError, KeyError, TypeError):
        found = read()
        write_json(path, {"labels": found})
    return found


def _commit(hub_id: str, revision: str | None) -> str | None:
    """That of a revision now; None where the Hub is not reached, and what was downloaded before is read."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(hub_id, revision=revision, timeout=_PATIENCE).sha
    except (OSError, ValueError):  # whatever is wrong, opening it will say
        return None


@dataclass(frozen=True)
class _Column(Sequence[Cell]):
    """The cells of a column that can be taken in any order."""

    table: Any
    name: str

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, place: Any) -> Any:
        return self.table[place][self.name]


def _rows(
    source: str,
    identity: list[Any],
    in_order: Callable[[], Any],
    at_random: Callable[[], Any],
    cut: bool,
    reading: Reading,
    training: _Training = None,
) -> Rows:
    """The image and the label column of a data set, opened to be read in order or at random."""
    with needs("selfensemble[data]"):
        from datasets import ClassLabel, Image

    first = in_order()
    features = first.features
    if features is None:
        raise ValueError(f"{source} does not describe its columns: save it with the datasets library")
    columns = list(features)
    images = [name for name, kind in features.items() if isinstance(kind, Image)]
    # Written by other tools, a column of images is a struct of bytes and path.
    images += [name for name, kind in features.items() if isinstance(kind, dict) and "bytes" in kind]
    image = pick_column(reading.image_column, images, columns, "image", source)
    if image not in images:
        raise ValueError(
            f"column {image!r} of {source} holds no images; these do: {', '.join(images) or 'none'}"
        )
    known = [*_LABELS, *(name for name, kind in features.items() if isinstance(kind, ClassLabel))]
    others = [name for name in columns if name not in images]
    label = pick_column(reading.label_column, [*known, *others[: len(others) == 1]], columns, "label", source)
    kind = features[label]

    def only(table: Any) -> Any:
        return table.select_columns([image, label]).cast_column(image, Image(decode=False))

    def each() -> Iterable[tuple[Cell, Any]]:
        return ((row[image], row[label]) for row in only(in_order()))

    return Rows(
        source=source,
        identity=[*identity, image, label],
        each=each,
        cells=lambda: _Column(only(at_random()), image),
        classes=list(kind.names) if isinstance(kind, ClassLabel) else None,
        training=None if training is None else lambda: training(label),
        cut=cut,
    )
