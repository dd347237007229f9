"""Data from every kind of source, on real images (the digits) written as real files."""

import io
import multiprocessing
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from selfensemble.data import caching, rendering, survey
from selfensemble.data.decoding import prepare_image
from selfensemble.data.images import ImageData, Inputs, split_validation
from selfensemble.data.sources import load_data
from selfensemble.evaluation.identity import data_record

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits", "test")


def write_folder(root: Path, digits: ImageData, count: int = 20) -> Path:
    for split in ("train", "test"):
        for i in range(count):
            label = digits.classes[int(digits.labels[i])]
            folder = root / split / label
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.images[i, 0].numpy()).save(folder / f"{i:03}.png")
    return root


def write_parquet(root: Path, digits: ImageData, count: int = 20, column: str = "img") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = {
            column: [Image.fromarray(image[0].numpy()) for image in digits.images[:count]],
            "label": digits.labels[:count].tolist(),
        }
        features = datasets.Features(
            {column: datasets.Image(), "label": datasets.ClassLabel(names=list(digits.classes))}
        )
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(root / f"{split}-00000-of-00001.parquet"))
    return root


def test_digits_are_real_split_and_stable() -> None:
    train, test = load_data("digits", "train"), load_data("digits", "test")
    assert (len(train), len(test)) == (1347, 450)
    assert train.images.shape[1:] == (1, 8, 8)
    assert train.images.dtype == torch.uint8
    assert int(train.images.max()) == 255
    assert train.inputs(slice(3)).max() <= 1
    together = torch.cat([train.images, test.images]).flatten(1)
    assert len(together.unique(dim=0)) >= 1796  # nearly all distinct: no image in both splits
    assert test.labels.bincount().min() >= 43
    # The split is part of every published figure: it must not change.
    assert test.labels[:10].tolist() == load_data("digits", "test").labels[:10].tolist()


def test_image_folder(tmp_path: Path, digits: ImageData) -> None:
    loaded = load_data(str(write_folder(tmp_path, digits)), "test")
    assert set(loaded.classes) == {str(int(label)) for label in digits.labels[:20]}
    images = {
        tuple(image.flatten().tolist()): loaded.classes[int(label)]
        for image, label in zip(loaded.images, loaded.labels, strict=True)
    }
    for image, label in zip(digits.images[:20], digits.labels[:20], strict=True):
        assert images[tuple(image.flatten().tolist())] == str(int(label))


@pytest.mark.parametrize("column", ["img", "image"])
def test_parquet_folder(tmp_path: Path, digits: ImageData, column: str) -> None:
    folder = write_parquet(tmp_path / column, digits, column=column)
    loaded = load_data(str(folder), "train")
    assert torch.equal(loaded.images, digits.images[:20])
    assert torch.equal(loaded.labels, digits.labels[:20])
    assert loaded.classes == digits.classes


def test_parquet_files_of_no_split_are_told(tmp_path: Path, digits: ImageData) -> None:
    folder = write_parquet(tmp_path / "data", digits)
    assert load_data(str(folder), "train").skipped == ()
    shutil.copy(folder / "train-00000-of-00001.parquet", folder / "more.parquet")
    for split in ("train", "test"):
        loaded = load_data(str(folder), split)
        assert len(loaded) == 20
        assert loaded.skipped == ("more.parquet: beside the splits, and of none",)


def test_decoded_once_and_again_when_files_change(
    tmp_path: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_parquet(tmp_path / "data", digits)
    decoded: list[str] = []
    original = caching._write

    def counting(*args: Any) -> None:
        decoded.append("x")
        original(*args)

    monkeypatch.setattr(caching, "_write", counting)
    first, second = load_data(str(folder), "train"), load_data(str(folder), "train")
    assert len(decoded) == 1
    assert torch.equal(first.images, second.images)
    write_parquet(folder, digits, count=10)
    assert len(load_data(str(folder), "train")) == 10
    assert len(decoded) == 2


def test_a_failed_decoding_leaves_nothing_behind(
    tmp_path: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is damaged between two looks at it."""
    monkeypatch.setenv("SELFENSEMBLE_CACHE", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "data", digits)
    broken = next((folder / "train").rglob("*.png"))
    whole = broken.read_bytes()
    found = survey.survey

    def then_damaged(rows: Any) -> Any:
        known = found(rows)
        broken.write_bytes(whole[: len(whole) // 2])
        return known

    monkeypatch.setattr(rendering, "survey", then_damaged)
    with pytest.raises(ValueError, match=broken.name):
        load_data(str(folder), "train")
    assert list((tmp_path / "cache" / "data").iterdir()) == []
    monkeypatch.undo()
    broken.write_bytes(whole)
    assert len(load_data(str(folder), "train")) == 20


def _load(folder: str) -> int:
    return len(load_data(folder, "train"))


def test_two_processes_decode_at_once(tmp_path: Path, digits: ImageData) -> None:
    folder = str(write_parquet(tmp_path / "data", digits))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_load, [folder] * 4) == [20] * 4


def test_sizes_must_agree_or_be_given(tmp_path: Path, digits: ImageData) -> None:
    folder = write_folder(tmp_path, digits)
    odd = folder / "train" / "0" / "odd.png"
    odd.parent.mkdir(exist_ok=True)
    Image.new("L", (16, 12), 128).save(odd)
    with pytest.raises(ValueError, match=r"data\.size"):
        load_data(str(folder), "train")
    assert load_data(str(folder), "train", size=8).images.shape == (21, 1, 8, 8)


def test_what_is_missing_is_said(tmp_path: Path, digits: ImageData) -> None:
    with pytest.raises(FileNotFoundError, match="digits, cifar10"):
        load_data("nothing", "train")
    with pytest.raises(FileNotFoundError, match=r"train\*\.parquet"):
        load_data(str(tmp_path), "train")
    folder = write_parquet(tmp_path / "data", digits)
    (folder / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="no test split"):
        load_data(str(folder), "test")
    with pytest.raises(ValueError, match="pass the folder"):
        load_data(str(folder / "train-00000-of-00001.parquet"), "train")
    with pytest.raises(ValueError, match="split"):
        load_data("digits", "validation")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="8x8"):
        load_data("digits", "train", size=32)
    with pytest.raises(ConnectionError, match="folder of its parquet files"):
        load_data("cifar10", "train")


def test_a_split_that_lacks_a_class_keeps_the_numbers_of_the_others(
    tmp_path: Path, digits: ImageData
) -> None:
    folder = write_folder(tmp_path, digits)
    train = load_data(str(folder), "train")
    shutil.rmtree(folder / "test" / train.classes[0])
    test = load_data(str(folder), "test")
    assert test.classes == train.classes
    assert int(test.labels.min()) == 1
    assert f"{train.classes[0]}: a class of the training split alone" in test.skipped
    lacking = ImageData("a part", test.images, test.labels - 1, train.classes[1:])
    assert torch.equal(lacking.with_classes(train.classes).labels, test.labels)
    with pytest.raises(ValueError, match=f"does not know: {train.classes[0]}"):
        train.with_classes(lacking.classes)


@pytest.mark.parametrize("name", ["train", "data", "a"])
def test_names_of_classes_and_files_mean_nothing_else(tmp_path: Path, digits: ImageData, name: str) -> None:
    """The datasets library reads splits out of such names; a stray table must not drop the labels."""
    for kind in (name, "other"):
        folder = tmp_path / "train" / kind
        folder.mkdir(parents=True)
        for prefix in ("train", "test", "ILSVRC2012_val"):
            Image.fromarray(digits.images[0, 0].numpy()).save(folder / f"{prefix}_1.png")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\nx.png,y\n")
    loaded = load_data(str(tmp_path), "train")
    assert loaded.classes == tuple(sorted((name, "other")))
    assert loaded.labels.bincount().tolist() == [3, 3]


def test_renaming_a_class_is_noticed(tmp_path: Path, digits: ImageData) -> None:
    folder = write_folder(tmp_path, digits)
    first = load_data(str(folder), "train").classes[0]
    (folder / "train" / first).rename(folder / "train" / "aardvark")
    assert "aardvark" in load_data(str(folder), "train").classes


def test_validation_files_are_not_mixed_into_the_test_split(tmp_path: Path, digits: ImageData) -> None:
    folder = write_parquet(tmp_path / "plain_text", digits, count=12)
    write_parquet(tmp_path / "other", digits, count=5)
    source = tmp_path / "other" / "test-00000-of-00001.parquet"
    source.rename(folder / "validation-00000-of-00001.parquet")
    assert len(load_data(str(tmp_path), "test")) == 12
    (folder / "test-00000-of-00001.parquet").unlink()
    assert len(load_data(str(tmp_path), "test")) == 5


@pytest.mark.parametrize(
    "names",
    [
        ("mnist_train", "mnist_test"),
        ("Train", "Test"),
        ("train/shard0/0", "test/shard0/0"),
        ("a-train.v2", "a-val.v2"),
        ("st*r[1]/train", "st*r[1]/test"),
    ],
)
def test_the_names_of_files_and_folders_tell_the_splits(
    names: tuple[str, str], tmp_path: Path, digits: ImageData
) -> None:
    """However they are written, and whatever a folder beside them is called."""
    for name, count in zip(names, (12, 5), strict=True):
        source = write_parquet(tmp_path / "source", digits, count=count) / "test-00000-of-00001.parquet"
        place = tmp_path / "data" / f"{name}.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        source.rename(place)
    train, test = (load_data(str(tmp_path / "data"), split) for split in ("train", "test"))
    assert (len(train), len(test), train.cut, test.cut) == (12, 5, None, None)


def test_a_file_that_may_be_of_both_splits_is_refused(tmp_path: Path, digits: ImageData) -> None:
    folder = write_parquet(tmp_path, digits, count=12)
    (folder / "test-00000-of-00001.parquet").rename(folder / "mnist_train_test.parquet")
    with pytest.raises(ValueError, match="both splits"):
        load_data(str(tmp_path), "train")
    found = [
        load_data(str(tmp_path), split, train_split="train", test_split="train")
        for split in ("train", "test")
    ]
    assert sum(map(len, found)) == 24  # of both files


def test_files_written_by_other_tools(tmp_path: Path, digits: ImageData) -> None:
    """No metadata of the datasets library; labels as text."""
    pandas = pytest.importorskip("pandas")
    cells = []
    for image in digits.images[:4]:
        buffer = io.BytesIO()
        Image.fromarray(image[0].numpy()).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    labels = ["dog", "cat", "dog", "ant"]
    pandas.DataFrame({"picture": cells, "label": labels}).to_parquet(tmp_path / "train.parquet")
    loaded = load_data(tmp_path, "train")
    assert loaded.classes == ("ant", "cat", "dog")
    assert loaded.labels.tolist() == [2, 1, 2, 0]
    assert torch.equal(loaded.images, digits.images[:4])


def test_a_damaged_cache_is_decoded_again(
    tmp_path: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFENSEMBLE_CACHE", str(tmp_path / "cache"))
    folder = str(write_parquet(tmp_path / "data", digits))
    load_data(folder, "train")
    (binary,) = (tmp_path / "cache").rglob("images.bin")
    binary.write_bytes(binary.read_bytes()[:100])
    assert torch.equal(load_data(folder, "train").images, digits.images[:20])


def test_grey_and_colour_do_not_mix(tmp_path: Path, digits: ImageData) -> None:
    folder = write_folder(tmp_path, digits)
    Image.new("RGB", (8, 8), "red").save(folder / "train" / "9" / "zzz.png")
    with pytest.raises(ValueError, match="grey and colour"):
        load_data(str(folder), "train")


def test_columns_must_be_there(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    table.to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match="image column"):
        load_data(str(tmp_path), "train")


def test_unlabelled_images_are_refused(tmp_path: Path, digits: ImageData) -> None:
    write_parquet(tmp_path, digits)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    rows = {"img": [Image.new("L", (8, 8))], "label": [-1]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    with pytest.raises(ValueError, match="no label"):
        load_data(str(tmp_path), "train")


def test_validation_split() -> None:
    kept, held_out = split_validation(1000, 0.1, seed=3)
    assert len(held_out) == 100
    assert torch.equal(torch.cat([kept, held_out]).sort().values, torch.arange(1000))
    assert torch.equal(split_validation(1000, 0.1, seed=3)[1], held_out)
    assert not torch.equal(split_validation(1000, 0.1, seed=4)[1], held_out)
    assert len(split_validation(10, 0.0, seed=0)[1]) == 0
    with pytest.raises(ValueError, match="fraction"):
        split_validation(10, 1.0, seed=0)


def test_preparing_an_image() -> None:
    wide = np.zeros((4, 8, 3), dtype=np.uint8)
    wide[:, 2:6] = 255
    cut = prepare_image(Image.fromarray(wide), 3, (4, 4))
    assert cut.shape == (3, 4, 4)
    assert int(cut.min()) == 255
    deep = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))
    assert prepare_image(deep, 1, (1, 3)).flatten().tolist() == [0, 1, 255]
    transparent = Image.new("RGBA", (5, 5), (10, 20, 30, 0))
    assert int(prepare_image(transparent, 1, (5, 5)).min()) == 255
    turned = Image.fromarray(wide)
    exif = turned.getexif()
    exif[0x0112] = 6
    assert prepare_image(turned, 3, (8, 4)).shape == (3, 8, 4)


def test_the_cache_can_be_deleted_while_in_use(
    tmp_path: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFENSEMBLE_CACHE", str(tmp_path / "cache"))
    loaded = load_data(str(write_parquet(tmp_path / "data", digits)), "train")
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(loaded.images, digits.images[:20])


def test_a_sample_is_of_all_classes_and_of_its_seed(digits: ImageData) -> None:
    few, again, other = (digits.sample(200, seed) for seed in (3, 3, 4))
    assert torch.equal(few.images, again.images)
    assert torch.equal(few.labels, again.labels)
    assert not torch.equal(few.images, other.images)
    assert (len(few), few.classes, few.labels.unique().tolist()) == (200, digits.classes, list(range(10)))
    known = {
        image.numpy().tobytes(): int(label) for image, label in zip(digits.images, digits.labels, strict=True)
    }
    for image, label in zip(few.images, few.labels, strict=True):
        assert known[image.numpy().tobytes()] == label
    assert digits.sample(len(digits), 0) is digits


@pytest.fixture
def on_the_hub(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """`somebody/numbers` is there, with two commits, names of its own and no test split; revisions asked for.

    What is replaced is what the libraries do on the network; the tables are those of the library.
    """
    asked: list[str | None] = []
    pictures = [Image.fromarray(image[0].numpy()) for image in digits.images[:40]]
    numbers = digits.labels[:40].tolist()
    columns = {"thumbnail": pictures, "photo": pictures[::-1], "kind": numbers, "size": [8] * 40}
    features = datasets.Features({
        "thumbnail": datasets.Image(), "photo": datasets.Image(),
        "kind": datasets.ClassLabel(names=list(digits.classes)), "size": datasets.Value("int64"),
    })  # fmt: skip
    tables = {"everything": datasets.Dataset.from_dict(columns, features=features)}
    tables["nameless"] = tables["everything"].remove_columns(["kind", "size"])

    def load_dataset(hub_id: str, *, split: str, streaming: bool, revision: str | None) -> Any:
        assert hub_id == "somebody/numbers"
        asked.append(revision)
        if split not in tables:
            raise ValueError(f"Unknown split {split!r}. Should be one of {list(tables)}.")
        return tables[split].to_iterable_dataset() if streaming else tables[split]

    def dataset_info(self: object, hub_id: str, *, revision: str | None, timeout: float) -> Any:
        if revision == "unreachable":
            raise ConnectionError("no network")
        return SimpleNamespace(sha={None: "c" * 40, "v1": "a" * 40}[revision])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return asked


def test_a_data_set_of_the_hub_with_names_of_its_own(
    digits: ImageData, on_the_hub: list[str | None], tmp_path: Path
) -> None:
    """Its commit is what is read, known again and recorded."""
    both: dict[str, Any] = {"train_split": "everything", "test_split": "everything", "label_column": "kind"}
    train, test = (load_data("somebody/numbers", split, **both) for split in ("train", "test"))
    assert (len(train) + len(test), test.cut, test.revision) == (40, (0.2, 0), "c" * 40)
    assert set(on_the_hub) == {"c" * 40}
    whole = load_data("somebody/numbers", "test", test_split="everything", label_column="kind", revision="v1")
    assert whole.revision == "a" * 40
    assert torch.equal(whole.images, digits.images[:40])
    assert whole.classes == digits.classes
    other = load_data("somebody/numbers", "test", **both | {"image_column": "photo", "train_split": None})
    assert torch.equal(other.images, digits.images[:40].flip(0))
    far = load_data("somebody/numbers", "test", **both, revision="unreachable")
    assert (far.revision, on_the_hub[-1]) == ("unreachable", "unreachable")
    answer = data_record(Inputs(whole, 5), whole.labels[:5])
    assert answer.revision == "a" * 40


def test_what_a_data_set_of_the_hub_lacks_is_said(on_the_hub: list[str | None]) -> None:
    with pytest.raises(FileNotFoundError, match=r"no test split .*everything.*one name for both cuts"):
        load_data("somebody/numbers", "test", label_column="kind")
    with pytest.raises(ValueError, match=r"has no column 'class'; it has thumbnail"):
        load_data("somebody/numbers", "test", test_split="everything", label_column="class")
    with pytest.raises(ValueError, match="column 'size' of somebody/numbers holds no images"):
        load_data("somebody/numbers", "test", test_split="everything", image_column="size")
    with pytest.raises(ValueError, match="found thumbnail, photo: name the label column"):
        load_data("somebody/numbers", "test", test_split="nameless")


def test_what_data_do_not_have_is_refused(tmp_path: Path, digits: ImageData) -> None:
    """Names of columns and splits, and revisions, are read or refused, never dropped."""
    with pytest.raises(ValueError, match="digits have no test_split, label_column: leave that out"):
        load_data("digits", "test", label_column="number", test_split="validation")
    folder = write_folder(tmp_path, digits, count=4)
    with pytest.raises(ValueError, match="have no image_column: leave"):
        load_data(folder, "test", image_column="picture")
    with pytest.raises(ValueError, match="is no data set of the Hub and has no revision"):
        load_data(folder, "test", revision="main")
