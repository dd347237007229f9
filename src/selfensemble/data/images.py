"""Images and labels: decoded once, memory-mapped as uint8, augmented by the batch.

Sources: `digits` (inside scikit-learn, no download), `cifar10`, `cifar100`, `stl10` or any other id of
a Hugging Face data set, a local folder of parquet files, a local folder of images.
"""

import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..runtime.files import cache_dir, write_json

Split = Literal["train", "test"]

HUB_IDS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "stl10": "tanganke/stl10"}
_FOLDERS = {"train": ("train", "training"), "test": ("test", "validation", "valid", "val")}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff"}
_CACHE_VERSION = 1


@dataclass(frozen=True, slots=True)
class ImageData:
    """One split of a data set.

    Attributes:
        name: where it came from.
        images: (N, C, H, W) uint8, memory-mapped where it was decoded from files.
        labels: (N,) int64.
        classes: names of the K classes.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Images as float32 in [0, 1]."""
        return self.images[index].float() / 255

    def sample(self, count: int, seed: int) -> "ImageData":
        """At most `count` of the images, drawn by `seed`, in their order."""
        if count >= len(self):
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].sort().values
        return replace(self, images=self.images[order], labels=self.labels[order])

    def with_classes(self, classes: tuple[str, ...]) -> "ImageData":
        """The same images, their labels numbered as in `classes` (a split may lack some of them).

        Raises:
            ValueError: a class of these images is not among `classes`.
        """
        if classes == self.classes:
            return self
        unknown = [name for name in self.classes if name not in classes]
        if unknown:
            raise ValueError(
                f"{self.name} has classes that the model does not know: {', '.join(unknown[:5])}; "
                "pass data with the classes it was trained on"
            )
        numbers = torch.tensor([classes.index(name) for name in self.classes])
        return replace(self, labels=numbers[self.labels], classes=classes)


def load_data(source: str | Path, split: Split, *, size: int | None = None) -> ImageData:
    """One split of `source`.

    Args:
        source: "digits", a known name (`HUB_IDS`), a hub id ("owner/name") or a folder: parquet files
            whose names (or sub-folders) begin with the split, or one sub-folder a split with one folder
            of images a class in it.
        split: "train" or "test"; a validation split is cut from the first, see `split_validation`.
        size: side in pixels; images are cut to their central square and resized. Needed where the
            sizes of the images differ.

    Raises:
        FileNotFoundError, ValueError: what is missing or wrong, and what to do.
        ConnectionError: a hub data set that cannot be reached.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    source = str(source)
    if source == "digits":
        return _digits(split, size)
    folder = Path(source).expanduser()
    if folder.is_dir():
        files = _split_files(folder, split)
        stats = [(path, path.stat()) for path in files]
        identity = [[str(path.relative_to(folder)), s.st_size, s.st_mtime_ns] for path, s in stats]
        return _cached(
            [str(folder.resolve()), identity], source, split, size, lambda: _open_local(folder, files)
        )
    if folder.exists():
        raise ValueError(f"{source} is a file: pass the folder that holds the data")
    hub_id = HUB_IDS.get(source, source)
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"no folder and no known data set {source!r}: pass digits, {', '.join(HUB_IDS)}, a hub id "
            "(owner/name), or an existing folder of parquet files or images"
        )
    return _cached([hub_id], source, split, size, lambda: _open_hub(hub_id, split))


def split_validation(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of a training and a validation part of `count` images, drawn by `seed`."""
    if not 0 <= fraction < 1:
        raise ValueError(f"the validation fraction must be in [0, 1), got {fraction}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = round(count * fraction)
    return order[held_out:].sort().values, order[:held_out].sort().values


def prepare_image(image: Any, channels: int, size: tuple[int, int]) -> Tensor:
    """A PIL image as (C, H, W) uint8: upright, on white, converted, cut to the centre and resized."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip to 255
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]))
    array = np.array(image, dtype=np.uint8)
    return torch.from_numpy(array.reshape(*size, channels)).permute(2, 0, 1)


def _digits(split: Split, size: int | None) -> ImageData:
    """1,797 handwritten digits of 8x8 (UCI, Alpaydin & Kaynak 1998); a fixed quarter is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if size not in (None, 8):
        raise ValueError(f"digits are 8x8 images: leave size out, got {size}")
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=450, random_state=0, stratify=labels)
    pixels, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    names = tuple(str(digit) for digit in range(10))
    return ImageData("digits", torch.from_numpy(images), torch.from_numpy(labels).long(), names)


def _split_files(folder: Path, split: Split) -> list[Path]:
    """The files of a split: parquet files, else images in the split's sub-folder."""
    tables = sorted(folder.rglob("*.parquet"))
    for name in _FOLDERS[split]:
        chosen = [path for path in tables if path.name.startswith(name) or path.parent.name == name]
        if chosen:
            return chosen
        images = [path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
        if images and not tables:
            return sorted(images)
    raise FileNotFoundError(
        f"no {split} split in {folder}: expected {split}*.parquet, or images as {split}/CLASS/NAME.png "
        f"(for {split}, any of {', '.join(_FOLDERS[split])})"
    )


@dataclass(frozen=True, slots=True)
class _Cells:
    """Undecoded images and labels, and the names of the classes where the data tell them."""

    rows: Iterable[tuple[dict[str, Any] | None, Any]]
    classes: list[str] | None


def _open_local(folder: Path, files: list[Path]) -> _Cells:
    if files[0].suffix == ".parquet":
        from datasets import load_dataset

        paths = [str(path) for path in files]
        return _columns(load_dataset("parquet", data_files=paths, split="train", streaming=True), folder)
    root = folder / files[0].relative_to(folder).parts[0]
    loose = [path for path in files if path.parent == root]
    if loose:
        raise ValueError(f"{loose[0]} lies in no class: put images into {root.name}/CLASS/")
    names = [path.relative_to(root).parts[0] for path in files]
    return _Cells(
        (({"path": str(path), "bytes": None}, name) for path, name in zip(files, names, strict=True)), None
    )


def _open_hub(hub_id: str, split: Split) -> _Cells:
    from datasets import load_dataset

    try:
        return _columns(load_dataset(hub_id, split=split, streaming=True), hub_id)
    except OSError as error:
        raise ConnectionError(
            f"cannot read data set {hub_id!r} from the hub ({type(error).__name__}: {error}); check the "
            "id and the network, or download it and pass the folder of its parquet files"
        ) from error


def _columns(dataset: Any, source: str | Path) -> _Cells:
    """The image and the label column of a data set."""
    from datasets import ClassLabel, Image

    features = dataset.features
    if features is None:
        raise ValueError(f"{source} does not describe its columns: save it with the datasets library")
    images = [name for name, kind in features.items() if isinstance(kind, Image)]
    # Written by other tools, a column of images is a struct of bytes and path.
    images += [name for name, kind in features.items() if isinstance(kind, dict) and "bytes" in kind]
    labels = [name for name in ("label", "labels", "fine_label") if name in features]
    labels += [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    if not images or not labels:
        raise ValueError(f"{source} needs an image column and a label column, found {', '.join(features)}")
    image, label = images[0], labels[0]
    kind = features[label]
    rows = dataset.cast_column(image, Image(decode=False))
    return _Cells(
        ((row[image], row[label]) for row in rows),
        list(kind.names) if isinstance(kind, ClassLabel) else None,
    )


def _cached(
    identity: list[Any], source: str, split: Split, size: int | None, opener: Callable[[], _Cells]
) -> ImageData:
    """The decoded split, from the cache if this very source has been decoded before."""
    key = json.dumps([_CACHE_VERSION, identity, split, size])
    folder = cache_dir() / "data" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not _is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
        partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
        partial.mkdir(parents=True)
        try:
            _decode(opener(), partial, source, size)
            partial.rename(folder)
        except OSError:
            # Another process has finished the same work in between: its copy serves.
            if not _is_whole(folder):
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    meta = json.loads((folder / "meta.json").read_text())
    shape = meta["shape"]
    images = torch.from_file(
        str(folder / "images.bin"), shared=False, size=math.prod(shape), dtype=torch.uint8
    )
    labels = torch.from_numpy(np.load(folder / "labels.npy"))
    return ImageData(source, images.view(shape), labels, tuple(meta["classes"]))


def _is_whole(folder: Path) -> bool:
    """Whether a decoded split is there and has the size that it should have."""
    try:
        shape = json.loads((folder / "meta.json").read_text())["shape"]
        return bool((folder / "images.bin").stat().st_size == math.prod(shape))
    except (OSError, ValueError, KeyError):
        return False


def _decode(cells: _Cells, folder: Path, source: str, size: int | None) -> None:
    """Write images.bin (N, C, H, W), labels.npy and meta.json."""
    labels: list[Any] = []
    shape: tuple[int, ...] | None = None
    with (folder / "images.bin").open("wb") as file:
        for value, label in cells.rows:
            image = _open_image(value, source, len(labels))
            if label is None or (isinstance(label, int) and label < 0):
                raise ValueError(f"image {len(labels)} of {source} has no label: choose a labelled split")
            grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
            if shape is None:
                shape = (1 if grey else 3, size or image.height, size or image.width)
            if shape[0] == 1 and not grey:
                raise ValueError(f"{source} mixes grey and colour images: convert them to one kind")
            if size is None and (image.height, image.width) != shape[1:]:
                raise ValueError(
                    f"images of {source} differ in size ({image.width}x{image.height} and "
                    f"{shape[2]}x{shape[1]}): set a size, e.g. --set data.size={shape[1]}"
                )
            file.write(prepare_image(image, shape[0], (shape[1], shape[2])).numpy().tobytes())
            labels.append(label)
    if shape is None:
        raise ValueError(f"no images in {source}")
    names = cells.classes
    if names is None and isinstance(labels[0], int):
        names = [str(label) for label in range(max(labels) + 1)]
    elif names is None:
        names = sorted(set(labels))
        labels = [names.index(label) for label in labels]
    np.save(folder / "labels.npy", np.array(labels, dtype=np.int64))
    write_json(folder / "meta.json", {"shape": [len(labels), *shape], "classes": names})


def _open_image(value: dict[str, Any] | None, source: str, number: int) -> Any:
    """The PIL image in a cell of an image column, or an error that names it."""
    from datasets import Image

    if value is None:
        raise ValueError(f"image number {number} of {source} is missing: remove the row")
    name = value["path"] or f"number {number}"
    try:
        if value["bytes"] is None and Path(value["path"]).is_file():
            value = {"path": None, "bytes": Path(value["path"]).read_bytes()}
        return Image().decode_example(value)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ValueError(
            f"image {name} of {source} cannot be decoded ({error}): replace or remove it"
        ) from error
