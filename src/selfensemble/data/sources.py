"""Where images come from, by name.

Sources: `digits` (included, no download), `cifar10`, `cifar100`, `stl10` or any other id of
a Hugging Face data set, a local folder of parquet files or of images, what `save_to_disk` wrote, a table of
paths of images (csv, parquet), arrays (npz), and `package.module:attribute` of a torch `Dataset`.
"""

import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Unpack, get_args

import torch

from ..networks.importing import attribute_named, is_file_name
from ..runtime.remarks import Remark
from .arrays import arrays
from .digits import digits
from .folders import class_folders, files_below, tables_of
from .images import ImageData, Split
from .lists import LIST_SUFFIXES, open_list
from .reading import Options, Reading, Size
from .rendering import images_of
from .rows import Rows
from .tables import HUB_IDS, open_hub, open_parquet, open_saved
from .torch_datasets import dataset_named

_SPLITS, _COLUMNS = ("train_split", "test_split"), ("image_column", "label_column")


def load_data(
    source: str | Path, split: Split, *, size: Size | None = None, **options: Unpack[Options]
) -> ImageData:
    """One split of `source`.

    A test split that is stored in the order of its classes, as folders of images are, comes in an order drawn
    by `split_seed`, so that its first n images stand for all of it.

    Args:
        source: "digits", a known name (`HUB_IDS`), a hub id ("owner/name"); a folder of parquet files whose
            names (or sub-folders) name the split; a folder with one sub-folder a split and one folder
            of images a class in it, or with the folders of the classes alone; a folder that `save_to_disk`
            of the datasets library wrote; a csv or parquet file of paths and labels; an npz file of arrays;
            or "package.module:attribute", "file.py:attribute" of a torch `Dataset` or what returns one,
            which imports that module.
        split: "train" or "test"; a validation split is cut from the first, see `split_validation`.
        size: side in pixels, or (height, width); images are cut to their centre and resized. Needed where
            the sizes of the images differ.
        options: names of splits and columns, channels, and the like: see `Options`.

    Warns:
        UserWarning: some files cannot be used; `ImageData.skipped` lists them.
        Remark: labels begin at 1, so that no image is of class 0.

    Raises:
        FileNotFoundError, ValueError: what is missing or wrong, and what to do.
        ConnectionError: a hub data set that cannot be reached.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    reading = Reading(size=size, **options)
    source = str(source)
    if source == "digits":
        reading.check_read("digits have", (*_SPLITS, *_COLUMNS, "revision"))
        if reading.channels == 3:
            raise ValueError("digits are grey: leave channels out")
    data = digits(split, size) if source == "digits" else _loaded(source, split, reading)
    if reading.shape not in (None, data.shape):
        raise ValueError(
            f"{source} has inputs of shape {data.shape}, {reading.shape} is asked for: change the shape, "
            "or the data"
        )
    if said := _counts_from_one(data):
        warnings.warn(said, Remark, stacklevel=2)
    return data


def _counts_from_one(data: ImageData) -> str | None:
    """What to say of labels 1 to K, which make a class 0 that no image has."""
    count = len(data.classes)
    if len(data) == 0 or data.classes != tuple(map(str, range(count))):
        return None
    empty = (torch.bincount(data.labels.cpu(), minlength=count) == 0).nonzero().flatten().tolist()
    if empty != [0]:  # few images have not every class
        return None
    return (
        f"{data.name} has labels from 1 to {count - 1}, which makes {count} classes, and no image of class 0:"
        " number them from 0 if that is not meant"
    )


def _loaded(source: str, split: Split, reading: Reading) -> ImageData:
    """What is no data set of the package."""
    path = Path(source).expanduser()
    found: ImageData | Rows
    if path.exists() or is_code(source):
        reading.check_read(f"{source} is no data set of the Hub and has", ("revision",))
    if path.is_dir():
        found, in_order = _of_folder(path, split, reading)
    elif path.suffix.lower() == ".npz" and path.is_file():
        found, in_order = arrays(path, split, reading), False
    elif path.suffix.lower() in LIST_SUFFIXES and path.is_file():
        found, in_order = open_list(path, split, reading), False
    elif path.exists():
        raise ValueError(
            f"{source} is a file: pass the folder that holds the data, a table of paths (csv, parquet) or npz"
        )
    elif is_code(source):
        found, in_order = dataset_named(source, attribute_named(source), split, reading), False
    else:
        found, in_order = _of_hub(source, split, reading), False
    data = images_of(found, split, reading) if isinstance(found, Rows) else found
    return data.in_random_order(reading.split_seed, sorted_by_class=in_order) if split == "test" else data


def is_code(source: str) -> bool:
    """Whether a source names something to import; its code would run."""
    place, colon, attribute = source.rpartition(":")
    named = bool(colon) and attribute.replace(".", "").isidentifier() and not Path(source).exists()
    return named and (is_file_name(place) or place.replace(".", "").isidentifier()) and len(place) > 1


def _of_folder(folder: Path, split: Split, reading: Reading) -> tuple[Rows, bool]:
    """The images of a split, and whether they are known to be sorted by class."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return open_saved(folder, split, reading), False
    closed: list[Path] = []
    files = files_below(folder, closed=closed)
    tables = sorted(path for path in files if path.suffix.lower() == ".parquet")
    if tables and closed:
        raise ValueError(
            f"no permission to read {closed[0]}, where there may be more: change its permissions"
        )
    if tables:
        chosen = tables_of(folder, tables, split, reading)
        training: list[Path] = []
        if split == "test" and not chosen.cut:
            with suppress(FileNotFoundError):  # a test split alone
                training = tables_of(folder, tables, "train", reading).files
        rows = open_parquet(folder, chosen.files, chosen.cut, reading, training)
        return replace(rows, others=(*rows.others, *chosen.others)), False
    reading.check_read(f"folders of classes like {folder} have", _COLUMNS)
    return class_folders(folder, split, reading), True


def _of_hub(source: str, split: Split, reading: Reading) -> Rows:
    hub_id = HUB_IDS.get(source, source)
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"no folder and no known data set {source!r}: pass digits, {', '.join(HUB_IDS)}, a hub id "
            "(owner/name), an existing folder of parquet files or images, a csv or npz file, or "
            "package.module:attribute of a torch Dataset"
        )
    return open_hub(hub_id, split, reading)
