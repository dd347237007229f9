"""Tables of paths, saved data sets, arrays, and data sets of torch, with names of their own."""

import csv
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from selfensemble.data.images import ImageData
from selfensemble.data.sources import is_code, load_data
from selfensemble.data.streaming import Streamed, ahead
from selfensemble.data.torch_datasets import from_dataset

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits", "test")


def write_list(root: Path, digits: ImageData, rows: list[dict[str, Any]], name: str = "photos.csv") -> Path:
    """A table, and in the folder `files` the images that it numbers."""
    (root / "files").mkdir(parents=True, exist_ok=True)
    for number in range(len(rows)):
        Image.fromarray(digits.images[number][0].numpy()).save(root / "files" / f"{number}.png")
    with (root / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return root / name


def test_a_list_with_a_column_of_splits(tmp_path: Path, digits: ImageData) -> None:
    rows = [
        {
            "file": f"files/{number}.png",
            "kind": "odd" if number % 2 else "even",
            "split": "val" if number < 5 else "train",
        }
        for number in range(20)
    ]
    file = write_list(tmp_path, digits, rows)
    train, test = (load_data(file, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (15, 5)
    assert train.classes == test.classes == ("even", "odd")
    assert torch.equal(train.images[:], digits.images[5:20])
    assert train.labels.tolist() == [number % 2 for number in range(5, 20)]


def test_lists_beside_each_other_and_one_that_is_cut(tmp_path: Path, digits: ImageData) -> None:
    rows = [{"path": f"files/{number}.png", "digit": number % 3} for number in range(30)]
    train = write_list(tmp_path, digits, rows, "train.csv")
    with pytest.raises(FileNotFoundError, match="no test split beside"):
        load_data(train, "test")
    write_list(tmp_path, digits, rows[:6], "validation.csv")
    assert (len(load_data(train, "train")), len(load_data(train, "test"))) == (30, 6)
    whole = write_list(tmp_path, digits, rows, "all.csv")
    assert [len(load_data(whole, split)) for split in ("train", "test")] == [24, 6]
    assert load_data(whole, "test").classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("written", "classes"),
    [
        (["1_1", "11"], ("11", "1_1")),
        (["2_10", "21_0"], ("21_0", "2_10")),
        (["01", "1"], ("01", "1")),
        (["07", " 02"], tuple(map(str, range(8)))),
    ],
)
def test_labels_in_a_list_that_differ_are_different_classes(
    written: list[str], classes: tuple[str, ...], tmp_path: Path, digits: ImageData
) -> None:
    rows = [{"file": f"files/{number}.png", "label": written[number % 2]} for number in range(20)]
    data = load_data(write_list(tmp_path, digits, rows), "train")
    assert data.classes == classes
    assert len(set(data.labels.tolist())) == 2


def test_labels_that_are_none_or_no_class_numbers_are_refused(tmp_path: Path, digits: ImageData) -> None:
    rows = [{"file": f"files/{number}.png", "label": str(number % 2)} for number in range(20)]
    rows[3]["label"] = " "
    with pytest.raises(ValueError, match=r"files/3.png .* has no label"):
        load_data(write_list(tmp_path, digits, rows), "train")
    rows[3]["label"] = "254837009"
    with pytest.raises(ValueError, match="go up to 254,837,009 for 20 images"):
        load_data(write_list(tmp_path, digits, rows, "ids.csv"), "train", test_share=0.01)
    rows[3]["label"] = "h\N{LATIN SMALL LETTER O WITH DIAERESIS}h"
    table = write_list(tmp_path, digits, rows, "umlauts.csv")
    table.write_text(table.read_text(encoding="utf-8"), encoding="cp1252")
    with pytest.raises(ValueError, match="save it in that encoding"):
        load_data(table, "train")
    np.savez(tmp_path / "ids.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4) + 10**9)
    with pytest.raises(ValueError, match="write their names"):
        load_data(tmp_path / "ids.npz", "train")


def test_damaged_arrays_are_told_from_pickles(tmp_path: Path) -> None:
    file, images = tmp_path / "a.npz", np.zeros((4, 8, 8), np.uint8)
    np.savez(file, images=images, labels=np.arange(4))
    whole = file.read_bytes()
    for damaged in (whole[:200], b"", whole.replace(bytes(100), b"x" + bytes(99), 1)):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            load_data(file, "train")
    with file.open("wb") as opened:
        np.save(opened, images)
    with pytest.raises(ValueError, match=r"is one array .* np.savez"):
        load_data(file, "train")


def test_a_list_in_parquet_and_columns_that_are_named(tmp_path: Path, digits: ImageData) -> None:
    pandas = pytest.importorskip("pandas")
    rows = [{"where": f"files/{n}.png", "a": n % 2, "b": "x", "path": "no.png"} for n in range(20)]
    write_list(tmp_path, digits, rows)
    file = tmp_path / "photos.parquet"
    pandas.DataFrame(rows).to_parquet(file)
    with pytest.raises(ValueError, match=r"found where, a, b, path: name the label column .*--label-column"):
        load_data(file, "train")
    with pytest.raises(ValueError, match="no column 'c'"):
        load_data(file, "train", label_column="c")
    with pytest.raises(ValueError, match=r"no file that .* names is there"):
        load_data(file, "train", label_column="a")
    data = load_data(file, "train", label_column="a", image_column="where")
    assert (len(data), data.classes) == (16, ("0", "1"))


def test_files_that_a_list_names_and_that_are_not_there(tmp_path: Path, digits: ImageData) -> None:
    rows = [{"path": f"files/{number}.png", "label": number % 2} for number in range(20)]
    file = write_list(tmp_path, digits, rows)
    (tmp_path / "files" / "3.png").unlink()
    with pytest.warns(UserWarning, match=r"files/3\.png: no such file"):
        train = load_data(file, "train")
    with pytest.warns(UserWarning, match="1 images"):
        assert len(load_data(file, "test")) + len(train) == 19
    file.write_text("path,label\n")
    with pytest.raises(ValueError, match="no rows"):
        load_data(file, "train")
    file.write_text("path,label\na.png\n")
    with pytest.raises(ValueError, match="other lengths"):
        load_data(file, "train")


def table(digits: ImageData, count: int, label: str = "label", image: str = "image") -> Any:
    rows = {
        image: [Image.fromarray(each[0].numpy()) for each in digits.images[:count]],
        label: digits.labels[:count].tolist(),
        "note": ["x"] * count,
    }
    names = datasets.ClassLabel(names=list(digits.classes))
    features = datasets.Features({image: datasets.Image(), label: names, "note": datasets.Value("string")})
    return datasets.Dataset.from_dict(rows, features=features)


def test_what_save_to_disk_wrote(tmp_path: Path, digits: ImageData) -> None:
    both = datasets.DatasetDict({"train": table(digits, 30), "holdout": table(digits, 10, label="label")})
    both.save_to_disk(str(tmp_path / "both"))
    assert torch.equal(load_data(tmp_path / "both", "train").images[:], digits.images[:30])
    with pytest.raises(FileNotFoundError, match="it has train, holdout"):
        load_data(tmp_path / "both", "test")
    assert len(load_data(tmp_path / "both", "test", test_split="holdout")) == 10
    parts = [
        load_data(tmp_path / "both", s, train_split="train", test_split="train") for s in ("train", "test")
    ]
    assert sum(map(len, parts)) == 30
    table(digits, 100, label="species", image="picture").save_to_disk(str(tmp_path / "one"))
    one = [load_data(tmp_path / "one", split) for split in ("train", "test")]
    assert sum(map(len, one)) == 100
    assert one[0].classes == digits.classes


def test_a_column_of_labels_of_any_name(tmp_path: Path, digits: ImageData) -> None:
    for split in ("train", "test"):
        table(digits, 30, label="species").to_parquet(str(tmp_path / f"{split}.parquet"))
    assert load_data(tmp_path, "train").labels.tolist() == digits.labels[:30].tolist()
    assert load_data(tmp_path, "train", label_column="species").classes == digits.classes
    assert load_data(tmp_path, "train", label_column="note").classes == ("x",)
    with pytest.raises(ValueError, match="no column 'kind'"):
        load_data(tmp_path, "train", label_column="kind")


@pytest.mark.parametrize("names", ["{0}_images {0}_labels", "x_{0} y_{0}"])
def test_arrays_of_splits(names: str, tmp_path: Path, digits: ImageData) -> None:
    images, labels = digits.images[:, 0].numpy(), digits.labels.numpy()
    parts = {"train": slice(0, 100), "test": slice(100, 150)}
    keys = {split: names.format(split).split() for split in parts}
    found: dict[str, Any] = {keys[s][0]: images[part] for s, part in parts.items()}
    found |= {keys[s][1]: labels[part][:, None] for s, part in parts.items()}
    np.savez(tmp_path / "data.npz", **found)
    test = load_data(tmp_path / "data.npz", "test")
    assert torch.equal(test.inputs(), digits.inputs(slice(100, 150)))
    assert torch.equal(test.labels, digits.labels[100:150])


def test_arrays_without_splits_and_of_floating_point(tmp_path: Path, digits: ImageData) -> None:
    colour = digits.inputs()[:200].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", pictures=colour, kinds=np.array(["a", "b"] * 100))
    with pytest.raises(ValueError, match=r"found pictures, kinds: name them \(data.image_column"):
        load_data(tmp_path / "a.npz", "train")
    data = load_data(tmp_path / "a.npz", "train", image_column="pictures", label_column="kinds")
    assert (data.shape, data.classes, len(data)) == ((3, 8, 8), ("a", "b"), 160)
    assert data.inputs().max() == 1.0  # not divided by 255
    np.savez(tmp_path / "b.npz", images=np.zeros((4, 3, 9, 3), np.uint8), labels=np.zeros(4, int))
    with pytest.raises(ValueError, match="leave open where the channels are"):
        load_data(tmp_path / "b.npz", "train")
    np.savez(tmp_path / "c.npz", images=np.zeros((4, 8, 8), int), labels=np.zeros(4, int))
    with pytest.raises(ValueError, match="uint8"):
        load_data(tmp_path / "c.npz", "train")
    np.savez(tmp_path / "d.npz", images=np.array([object()] * 4), labels=np.zeros(4, int))
    with pytest.raises(ValueError, match="never read"):
        load_data(tmp_path / "d.npz", "train")


class Floats(Dataset[Any]):
    """Images in [0, 1] with a random change, whose labels are read item by item."""

    classes = ("even", "odd")

    def __init__(self, count: int = 200) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        change = torch.rand(()).item() + random.random() + np.random.rand()  # noqa: NPY002
        return torch.full((1, 4, 4), place / 1000 + 0.1 * change / 3), place % 2


CODE = """
import torch
from torch.utils.data import TensorDataset

def whole():
    return TensorDataset(torch.rand(50, 1, 4, 4), torch.arange(50) % 2)

def of(split):
    count = 6 if split == "train" else 3
    return TensorDataset(torch.zeros(count, 1, 4, 4), torch.arange(count) % 2)

class Old:
    def __init__(self, train=True):
        self.targets = [0, 1] * (4 if train else 2)
    def __len__(self):
        return len(self.targets)
    def __getitem__(self, place):
        return torch.zeros(1, 4, 4, dtype=torch.uint8), self.targets[place]

both = {"train": of("train"), "val": of("val")}
def needs(root, other):
    return None
"""


@pytest.mark.parametrize(
    ("attribute", "sizes"), [("whole", (40, 10)), ("of", (6, 3)), ("Old", (8, 4)), ("both", (6, 3))]
)
def test_data_sets_by_name(
    attribute: str, sizes: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mysets.py").write_text(CODE)
    found = [load_data(f"{tmp_path}/mysets.py:{attribute}", split) for split in ("train", "test")]
    assert tuple(map(len, found)) == sizes
    assert found[0].classes == ("0", "1")
    monkeypatch.chdir(tmp_path)
    assert len(load_data(f"mysets:{attribute}", "train")) == sizes[0]


def test_names_that_lead_to_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "mysets.py").write_text(CODE)
    for name, reason in (
        ("needs", "needs root, other"), ("CODE", "no attribute"), ("torch", "neither|is a module|Dataset"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=reason):
            load_data(f"{tmp_path}/mysets.py:{name}", "train")
    names = ("ab:c", "a.b:c.d", "x/a.py:b", "C:\\folder", "owner/name", "digits")
    assert [is_code(each) for each in names] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_items_are_random_but_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whichever workers, and the caller's random numbers stay as they are."""
    data = from_dataset(Floats(), "floats")
    assert (data.shape, data.classes, data.labels.tolist()[:3]) == ((1, 4, 4), ("even", "odd"), [0, 1, 0])
    before = torch.get_rng_state(), random.getstate()
    one = data.inputs()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert one.max() < 0.4  # as they are
    assert len(one.flatten(1)[:, 0].unique()) == 200
    images = data.images
    assert isinstance(images, Streamed)
    groups = torch.arange(200).split(48)
    for workers in (0, 1, 3):
        streamed = Streamed(images.reader, images.places, images.one, images.dtype, workers)
        assert torch.equal(torch.cat(list(streamed.groups(groups))), one)
        other = torch.cat(list(streamed.groups(groups, seed=1)))
        assert (other != one).any(dim=(1, 2, 3)).float().mean() > 0.9


def test_items_of_other_kinds_are_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    def of(*items: Any) -> Any:
        return type(
            "Own", (), {"__len__": lambda self: len(items), "__getitem__": lambda self, n: items[n]}
        )()

    grey, colour = Image.new("L", (4, 4)), Image.new("RGB", (4, 4), "red")
    with pytest.raises(TypeError, match="in any order"):
        from_dataset(Stream(), "s")
    for items, reason in (
        ([(torch.zeros(1, 4, 4), "cat")], "label 'cat'"),
        ([(torch.zeros(1, 4, 4), torch.eye(3)[1])], "no scores of classes"),
        ([(torch.zeros(1, 4, 4), np.eye(3)[1])], "no scores of classes"),
        ([torch.zeros(1, 4, 4)], "must be \\(image, label\\)"),
        ([{"a": 1}], "keys a"),
        ([("cat.png", 0)], "begins with a str"),
        ([(torch.zeros(1, 4, 4, dtype=torch.int64), 0)], "int64"),
        ([(np.zeros((3, 4, 3), np.uint8), 0)], "leaves open"),
        ([], "no images"),
    ):
        with pytest.raises((ValueError, TypeError), match=reason):
            from_dataset(of(*items), "s")
    many = [(grey, 0)] * 40
    many[2] = (colour, 1)
    with pytest.raises(ValueError, match="item 2 is in colour"):
        from_dataset(of(*many), "s").inputs()
    with pytest.raises(ValueError, match="--size 4"):
        from_dataset(of((grey, 0), (Image.new("L", (5, 5)), 0)), "s").inputs()
    with pytest.raises(ValueError, match="item 1 of s"):
        from_dataset(of((torch.zeros(1, 4, 4), 0), (torch.zeros(1, 5, 4), 0)), "s").inputs()
    mixed = from_dataset(of((grey, 0), (colour, 1)), "s")
    assert mixed.shape == (3, 4, 4)
    assert from_dataset(of({"img": colour, "label": 1}), "s").labels.tolist() == [1]


class Shifted(Floats):
    """Its raw labels begin at 1, those of its items at 0; `classes` in any form."""

    def __init__(self, classes: Any = None) -> None:
        super().__init__()
        self.targets = [1 + place % 2 for place in range(self.count)]
        self.classes = classes


def test_items_say_what_their_labels_are() -> None:
    data = from_dataset(Shifted(), "shifted")
    assert data.labels.tolist() == [0, 1] * 100
    assert data.classes == ("0", "1")


@pytest.mark.parametrize("classes", [["a", "b"], ("a", "b"), np.array(["a", "b"]), {"a": 0, "b": 1}])
def test_classes_of_a_data_set_in_any_form(classes: Any) -> None:
    assert from_dataset(Shifted(classes), "shifted").classes == ("a", "b")


def test_classes_that_are_no_names_in_order() -> None:
    assert from_dataset(Shifted(2), "shifted").classes == ("0", "1")
    with pytest.raises(TypeError, match="order changes from run to run"):
        from_dataset(Shifted({"a", "b"}), "shifted")


def test_photos_of_a_data_set_are_compared_upright() -> None:
    upright = Image.new("RGB", (40, 20))
    turned = Image.new("RGB", (40, 20))
    turned.getexif()[0x112] = 6
    with pytest.raises(ValueError, match=r"differ in size \(20x40, item 1, and 40x20\)"):
        _ = from_dataset(Pairs([(upright, 0), (turned, 1)]), "photos").images[:]


class Pairs(Dataset[Any]):
    def __init__(self, pairs: list[Any]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: int) -> Any:
        return self.pairs[place]


@pytest.mark.parametrize("kind", ["npz", "list", "saved", "code"])
def test_a_split_that_was_named_is_not_cut_out_of_something_else(
    tmp_path: Path, digits: ImageData, kind: str
) -> None:
    """Of data without splits, whatever kind they are of; one name for both splits cuts."""
    if kind == "npz":
        np.savez(tmp_path / "all.npz", images=np.zeros((20, 4, 4), np.uint8), labels=np.arange(20) % 2)
    elif kind == "list":
        Image.new("L", (4, 4)).save(tmp_path / "0.png")
        (tmp_path / "all.csv").write_text("path,label\n" + "0.png,a\n0.png,b\n" * 10)
    elif kind == "saved":
        table(digits, 30, label="label").save_to_disk(str(tmp_path / "all"))
    else:
        (tmp_path / "all.py").write_text(
            "import torch\nfrom torch.utils.data import TensorDataset\n"
            "both = TensorDataset(torch.zeros(20, 1, 4, 4), torch.arange(20) % 2)\n"
        )
    source = tmp_path / {"npz": "all.npz", "list": "all.csv", "saved": "all", "code": "all.py:both"}[kind]
    whole = 30 if kind == "saved" else 20
    assert len(load_data(source, "test")) + len(load_data(source, "train")) == whole
    assert len(load_data(source, "test", train_split="all", test_split="all")) < whole
    with pytest.raises(FileNotFoundError, match=r"no test split 'holdout' in .*leave data\.test_split"):
        load_data(source, "test", test_split="holdout")


def test_parts_of_data_sets_have_the_labels_of_their_part() -> None:
    whole = TensorDataset(torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert from_dataset(Subset(whole, [5, 0]), "s").labels.tolist() == [2, 0]


def test_an_error_in_a_worker_is_that_of_the_image(tmp_path: Path) -> None:
    for number in range(100):
        place = tmp_path / "train" / "a" / f"{number:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12)).save(place)
    data = load_data(tmp_path, "train", stream=True)
    assert isinstance(data.images, Streamed)
    (tmp_path / "train" / "a" / "77.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"77\.png of .* cannot be decoded"):
        list(data.batches(torch.arange(100), 30))


def test_streamed_images_are_those_that_were_decoded_at_once(tmp_path: Path) -> None:
    """Of other sizes, turned, cut to a size, by any number of workers."""
    chance = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(70):
            place = tmp_path / split / "ab"[number % 2] / f"{number}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            height, width = chance.integers(20, 40, 2)
            pixels = chance.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place)
    whole = load_data(tmp_path, "test", size=16, stream=False, centre=0.875)
    parts = load_data(tmp_path, "test", size=16, stream=True, centre=0.875)
    assert isinstance(parts.images, Streamed)
    assert torch.equal(whole.inputs(), parts.inputs())
    assert torch.equal(whole.labels, parts.labels)
    everything = torch.arange(70)
    batches = [list(data.batches(everything, 16)) for data in (whole, parts)]
    for (one, left), (other, right) in zip(*batches, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(left, right)
    assert torch.equal(whole.sample(9, 1).inputs(), parts.sample(9, 1).inputs())


def test_a_data_set_of_the_library_datasets(digits: ImageData) -> None:
    data = from_dataset(table(digits, 40), "table")
    assert data.classes == digits.classes
    assert torch.equal(data.labels, digits.labels[:40])
    assert torch.equal(data.inputs(), digits.inputs(slice(40)))


def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do() -> None:
    def make(number: int) -> int:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(OSError, match=r"data\.workers"):
        list(ahead(make, 6, 1))


ABANDONED = """
import numpy as np
from selfensemble.data.streaming import ahead
for found in ahead(lambda number: np.zeros(10**6), 100, workers=2):
    print("one", flush=True)
    input()
"""


def test_workers_end_with_a_process_that_was_killed() -> None:
    """In the midst of sending images that nobody takes; they hold what it printed to open until they end."""
    command = [sys.executable, "-c", ABANDONED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "one\n"
        running.kill()
        running.communicate(timeout=20)
