"""Images and labels: decoded once, memory-mapped as uint8, augmented by the batch.

Sources: `digits` (inside scikit-learn, no download), `cifar10`, `cifar100`, `stl10` or any other id of
a Hugging Face data set, a local folder of parquet files, a local folder of images.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .files import cache_dir, write_json

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


def load_data(source: str, split: Split, *, size: int | None = None) -> ImageData:
    """One split of `source`.

    Args:
        source: "digits", a known name (`HUB_IDS`), a hub id ("owner/name") or a folder: parquet files
            whose names begin with the split, or one sub-folder a split with one folder of images a
            class in each.
        split: "train" or "test"; a validation split is cut from the first, see `split_validation`.
        size: side in pixels; images are cut to their central square and resized. Needed where the
            sizes of the images differ.

    Raises:
        FileNotFoundError, ValueError: what is missing or wrong, and what to do.
        ConnectionError: a hub data set that cannot be reached.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if source == "digits":
        return _digits(split, size)
    folder = Path(source).expanduser()
    if folder.is_dir():
        files = _split_files(folder, split)
        identity = [[path.name, (stat := path.stat()).st_size, stat.st_mtime_ns] for path in files]
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
    """A PIL image as (C, H, W) uint8: turned upright, converted, cut to the centre and resized."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip to 255
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
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
    for place in (folder, folder / "data"):
        files = sorted(place.glob("*.parquet"))
        if chosen := [path for path in files if path.name.startswith(_FOLDERS[split])]:
            return chosen
        if files:
            raise FileNotFoundError(
                f"no parquet file of the {split} split in {place}: names must begin with one of "
                f"{', '.join(_FOLDERS[split])}"
            )
    for name in _FOLDERS[split]:
        images = [path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
        if images:
            return sorted(images)
    raise FileNotFoundError(
        f"no {split} split in {folder}: expected {split}*.parquet, or images as {split}/CLASS/NAME.png"
    )


def _open_local(folder: Path, files: list[Path]) -> Any:
    from datasets import load_dataset

    if files[0].suffix == ".parquet":
        return load_dataset(
            "parquet", data_files=[str(path) for path in files], split="train", streaming=True
        )
    root = folder / files[0].relative_to(folder).parts[0]
    return load_dataset("imagefolder", data_dir=str(root), split="train", streaming=True)


def _open_hub(hub_id: str, split: Split) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(hub_id, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"cannot read data set {hub_id!r} from the hub ({type(error).__name__}: {error}); check the "
            "id and the network, or download it and pass the folder of its parquet files"
        ) from error


def _cached(
    identity: list[Any], source: str, split: Split, size: int | None, opener: Callable[[], Any]
) -> ImageData:
    """The decoded split, from the cache if this very source has been decoded before."""
    key = json.dumps([_CACHE_VERSION, identity, split, size])
    folder = cache_dir() / "data" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not (folder / "meta.json").exists():
        partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
        partial.mkdir(parents=True)
        try:
            _decode(opener(), partial, source, size)
            if not folder.exists():
                partial.rename(folder)
        except OSError:
            # Another process has finished the same work in between: its copy serves.
            if not (folder / "meta.json").exists():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    meta = json.loads((folder / "meta.json").read_text())
    shape = meta["shape"]
    images = torch.from_file(
        str(folder / "images.bin"), shared=False, size=int(np.prod(shape)), dtype=torch.uint8
    )
    labels = torch.from_numpy(np.load(folder / "labels.npy"))
    return ImageData(source, images.view(shape), labels, tuple(meta["classes"]))


def _decode(dataset: Any, folder: Path, source: str, size: int | None) -> None:
    """Write images.bin (N, C, H, W), labels.npy and meta.json."""
    from datasets import Image

    image_column, label_column, classes = _columns(dataset, source)
    labels: list[int] = []
    shape: tuple[int, ...] | None = None
    with (folder / "images.bin").open("wb") as file:
        rows = dataset.cast_column(image_column, Image(decode=False))
        for row in rows:
            image, label = _open_image(row[image_column], source, len(labels)), int(row[label_column])
            if shape is None:
                channels = 1 if image.mode in ("1", "L", "I", "I;16", "F") else 3
                shape = (channels, size or image.height, size or image.width)
            if size is None and (image.height, image.width) != shape[1:]:
                raise ValueError(
                    f"images of {source} differ in size ({image.width}x{image.height} and "
                    f"{shape[2]}x{shape[1]}): set a size, e.g. --set data.size={shape[1]}"
                )
            file.write(prepare_image(image, shape[0], (shape[1], shape[2])).numpy().tobytes())
            labels.append(label)
    if shape is None:
        raise ValueError(f"no images in {source}")
    if min(labels) < 0:
        raise ValueError(f"some images of {source} have no label (-1): choose a labelled split")
    names = classes or [str(label) for label in range(max(labels) + 1)]
    np.save(folder / "labels.npy", np.array(labels, dtype=np.int64))
    write_json(folder / "meta.json", {"shape": [len(labels), *shape], "classes": names})


def _open_image(value: dict[str, Any], source: str, number: int) -> Any:
    """The PIL image in a cell of an image column, or an error that names it."""
    from datasets import Image

    name = value["path"] or f"number {number}"
    try:
        if value["bytes"] is None and Path(value["path"]).is_file():
            value = {"path": None, "bytes": Path(value["path"]).read_bytes()}
        return Image().decode_example(value)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"image {name} of {source} cannot be decoded ({error}): replace or remove it"
        ) from error


def _columns(dataset: Any, source: str) -> tuple[str, str, list[str] | None]:
    """Names of the image and the label column, and of the classes where the data tell."""
    from datasets import ClassLabel, Image

    features = dataset.features
    if features is None:
        raise ValueError(f"{source} does not describe its columns: save it with the datasets library")
    images = [name for name, kind in features.items() if isinstance(kind, Image)]
    images += [name for name in ("image", "img") if name in features and name not in images]
    preferred = ("label", "labels", "fine_label")
    labels = [name for name in preferred if name in features]
    labels += [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    if not images or not labels:
        raise ValueError(f"{source} needs an image column and a label column, found {', '.join(features)}")
    kind = features[labels[0]]
    return images[0], labels[0], list(kind.names) if isinstance(kind, ClassLabel) else None
