"""Class numbers: those of the training split, whichever split is read, and of every kind of source."""

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from selfensemble.data.images import ImageData, Split
from selfensemble.data.sources import load_data
from selfensemble.data.torch_datasets import from_dataset

TRAIN, TEST = ["ant", "bee", "cow"], ["bee", "cow"]
SPLITS: tuple[Split, ...] = ("train", "test")


def pixels(name: str) -> np.ndarray[Any, Any]:
    return np.full((8, 8), 10 * ord(name[0]) % 250, dtype=np.uint8)


def save(place: Path, name: str) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(name)).save(place)
    return place


def folders(root: Path, splits: dict[str, list[str]]) -> Path:
    for split, names in splits.items():
        for name in names:
            for number in range(2):
                save(root / split / name / f"{number}.png", name)
    return root


def _rows(root: Path, split: str, names: list[str], label: Callable[[str], Any]) -> list[dict[str, Any]]:
    paths = [save(root / split / f"{number}.png", name) for number, name in enumerate(names * 2)]
    return [
        {"path": path.relative_to(root).as_posix(), "label": label(name), "split": split}
        for path, name in zip(paths, names * 2, strict=True)
    ]


def _write(file: Path, rows: list[dict[str, Any]], *columns: str) -> Path:
    with file.open("w", newline="") as text:
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return file


def column_of_splits(root: Path, splits: dict[str, list[str]], label: Callable[[str], Any] = str) -> Path:
    rows = [row for split, names in splits.items() for row in _rows(root, split, names, label)]
    return _write(root / "all.csv", rows, "path", "label", "split")


def lists_beside_each_other(
    root: Path, splits: dict[str, list[str]], label: Callable[[str], Any] = str
) -> Path:
    for split, names in splits.items():
        _write(root / f"{split}.csv", _rows(root, split, names, label), "path", "label")
    return root / "train.csv"


def _table(names: list[str], label: Callable[[str], Any]) -> datasets.Dataset:
    columns = {
        "image": [Image.fromarray(pixels(name)) for name in names * 2],
        "label": [label(name) for name in names * 2],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def parquet(root: Path, splits: dict[str, list[str]], label: Callable[[str], Any] = str) -> Path:
    for split, names in splits.items():
        _table(names, label).to_parquet(str(root / f"{split}.parquet"))
    return root


def saved(root: Path, splits: dict[str, list[str]], label: Callable[[str], Any] = str) -> Path:
    both = {split: _table(names, label) for split, names in splits.items()}
    datasets.DatasetDict(both).save_to_disk(str(root / "saved"))
    return root / "saved"


def arrays(root: Path, splits: dict[str, list[str]], label: Callable[[str], Any] = str) -> Path:
    found: dict[str, Any] = {}
    for split, names in splits.items():
        found[f"x_{split}"] = np.stack([pixels(name) for name in names * 2])
        found[f"y_{split}"] = np.array([label(name) for name in names * 2])
    np.savez(root / "arrays.npz", **found)
    return root / "arrays.npz"


TABLES = [column_of_splits, lists_beside_each_other, parquet, saved, arrays]


def answers(data: ImageData) -> dict[int, str]:
    """Which images have which number."""
    names = {int(pixels(name)[0, 0]): name for name in (*TRAIN, "dog")}
    labels = data.labels.tolist()
    return {label: names[int(image.max())] for label, image in zip(labels, data.images, strict=True)}


@pytest.mark.parametrize("write", [folders, *TABLES])
def test_a_test_split_that_lacks_a_class_has_the_numbers_of_training(write: Any, tmp_path: Path) -> None:
    source = write(tmp_path, {"train": TRAIN, "test": TEST})
    train, test = (load_data(source, split) for split in SPLITS)
    assert train.classes == test.classes == tuple(TRAIN)
    assert answers(train) == {0: "ant", 1: "bee", 2: "cow"}
    assert answers(test) == {1: "bee", 2: "cow"}


@pytest.mark.parametrize("write", [folders, *TABLES])
def test_a_class_that_training_lacks_is_refused(write: Any, tmp_path: Path) -> None:
    source = write(tmp_path, {"train": TRAIN, "test": [*TEST, "dog"]})
    assert load_data(source, "train").classes == tuple(TRAIN)
    with pytest.raises(ValueError, match=r"classes that its training split lacks.*: dog; remove or rename"):
        load_data(source, "test")


@pytest.mark.parametrize("write", [folders, *TABLES])
def test_a_test_split_alone_has_numbers_of_its_own(write: Any, tmp_path: Path) -> None:
    source = write(tmp_path, {"test": TEST})
    if source.name == "train.csv":
        source = source.with_name("test.csv")
    assert answers(load_data(source, "test")) == {0: "bee", 1: "cow"}


def test_names_on_the_hub_are_those_of_the_training_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {"train": _table(TRAIN, str), "test": _table(TEST, str), "own": _table([*TEST, "dog"], str)}
    read: list[str] = []

    def load_dataset(hub_id: str, *, split: str, streaming: bool, revision: str | None) -> Any:
        read.append(split)
        if split not in tables:
            raise ValueError(f"Unknown split {split!r}. Should be one of {list(tables)}.")
        return tables[split].to_iterable_dataset() if streaming else tables[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha="d" * 40))
    for _ in range(2):  # the labels of the training split are read once
        assert answers(load_data("somebody/animals", "test")) == {1: "bee", 2: "cow"}
    assert read.count("train") == 1
    with pytest.raises(ValueError, match="training split lacks"):
        load_data("somebody/animals", "test", test_split="own")
    alone = load_data("somebody/animals", "test", train_split="none")
    assert answers(alone) == {0: "bee", 1: "cow"}


@pytest.mark.parametrize("write", TABLES)
def test_labels_that_are_numbers_are_counted_in_both_splits(write: Any, tmp_path: Path) -> None:
    source = write(tmp_path, {"train": TRAIN, "test": ["ant", "bee"]}, label=TRAIN.index)
    train, test = (load_data(source, split) for split in SPLITS)
    assert train.classes == test.classes == ("0", "1", "2")
    assert answers(test) == {0: "ant", 1: "bee"}


class Named(Dataset[Any]):
    """A data set that numbers its own classes, as an `ImageFolder` of one split does."""

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, place: int) -> tuple[Image.Image, int]:
        return Image.fromarray(pixels(self.classes[place])), place


class Numbered(Dataset[Any]):
    """Six images, two of each class."""

    def __init__(self, classes: Any) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return 6

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(3, 8, 8), place % 3


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ({"dog": 1, "cat": 0, "emu": 2}, ("cat", "dog", "emu")),
        ({2: "emu", 0: "cat", 1: "dog"}, ("cat", "dog", "emu")),
        ({0: 3, 1: 7, 2: 9}, ("3", "7", "9")),
        ({0: 0, 1: 1, 2: 2}, ("0", "1", "2")),
        ({0: 1, 1: 2, 2: 0}, None),
        ({"dog": 0, "Dog": 0, "emu": 1}, None),
        ({"dog": 1, "cat": 2, "emu": 3}, None),
        ({"dog": "Hund", "cat": "Katze", "emu": "Emu"}, None),
    ],
)
def test_classes_as_a_mapping_are_in_the_order_of_their_numbers(
    classes: dict[Any, Any], names: tuple[str, ...] | None
) -> None:
    items = Numbered(classes)
    if names is None:
        with pytest.raises((TypeError, ValueError), match=r"Numbered\.classes"):
            from_dataset(items, "items")
    else:
        assert from_dataset(items, "items").classes == names


SETS = f"""
from {__name__} import TEST, TRAIN, Named

both = {{"train": Named(TRAIN), "test": Named(TEST)}}
other = {{"train": Named(TRAIN), "test": Named([*TEST, "dog"])}}

def make(split):
    return both[split]

def make_other(split):
    return other[split]
"""


@pytest.mark.parametrize("kind", ["both", "make"])
def test_data_sets_that_name_their_classes(kind: str, tmp_path: Path) -> None:
    (tmp_path / "sets.py").write_text(SETS)
    assert answers(load_data(f"{tmp_path}/sets.py:{kind}", "test")) == {1: "bee", 2: "cow"}
    other = {"both": "other", "make": "make_other"}[kind]
    with pytest.raises(ValueError, match="training split lacks"):
        load_data(f"{tmp_path}/sets.py:{other}", "test")


def test_classes_of_one_split_and_of_two_cases_are_listed(tmp_path: Path) -> None:
    folders(tmp_path, {"train": [*TRAIN, "Ant"], "test": TEST})
    for split in SPLITS:
        skipped = load_data(tmp_path, split).skipped
        if split == "train":
            said = "Ant and ant: 2 classes whose names differ in upper and lower case alone"
            one = (tmp_path / "train" / "Ant").samefile(tmp_path / "train" / "ant")
            assert (said in skipped) is not one
            assert "ant: a class that the test split lacks" in skipped
        else:
            assert "ant: a class of the training split alone" in skipped


def test_a_class_in_another_case_is_refused_with_its_twin(tmp_path: Path) -> None:
    folders(tmp_path, {"train": TRAIN, "test": ["Bee"]})
    with pytest.raises(ValueError, match=r"Bee \(there: bee\)"):
        load_data(tmp_path, "test")


def test_folders_that_are_images_by_their_names_are_listed(tmp_path: Path) -> None:
    folders(tmp_path, {"train": TRAIN})
    (tmp_path / "train" / "bee" / "dir.png").mkdir()
    save(tmp_path / "train" / "cow" / "dir.jpg" / "9.png", "cow")
    data = load_data(tmp_path, "train")
    assert len(data) == 7
    assert data.skipped == (
        "bee/dir.png: a folder, though an image by its name",
        "cow/dir.jpg: a folder, though an image by its name",
    )


@pytest.mark.filterwarnings("ignore:.*left out")
def test_classes_whose_training_files_are_all_missing_have_no_number(tmp_path: Path) -> None:
    """As in the training split itself, which leaves such rows out."""
    for name in ("a0", "a1", "c0", "c1"):
        save(tmp_path / f"{name}.png", name)
    (tmp_path / "train.csv").write_text("image,label\na0.png,a\ngone.png,b\nc0.png,c\n")
    (tmp_path / "test.csv").write_text("image,label\na1.png,a\nc1.png,c\n")
    lines = ["image,label,split", "a0.png,a,train", "gone.png,b,train", "c0.png,c,train"]
    (tmp_path / "one.csv").write_text("\n".join([*lines, "a1.png,a,test", "c1.png,c,test"]))
    for train, test in (("train.csv", "test.csv"), ("one.csv", "one.csv")):
        found = [load_data(tmp_path / file, split) for file, split in zip((train, test), SPLITS, strict=True)]
        assert [each.classes for each in found] == [("a", "c")] * 2
        assert [each.labels.tolist() for each in found] == [[0, 1]] * 2


def test_a_test_split_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alone.py").write_text(
        "import torch\n"
        "class Test(torch.utils.data.Dataset):\n"
        "    classes = ['a', 'b']\n"
        "    def __init__(self, split):\n"
        "        if split == 'train':\n"
        "            raise RuntimeError('not downloaded')\n"
        "    def __len__(self):\n"
        "        return 4\n"
        "    def __getitem__(self, index):\n"
        "        return torch.rand(3, 8, 8), index % 2\n"
    )
    monkeypatch.chdir(tmp_path)
    data = load_data("alone.py:Test", "test")
    assert data.classes == ("a", "b")
    assert data.labels.tolist() == [0, 1, 0, 1]
