"""Tables of images and labels: data sets of the Hugging Face Hub, and parquet files."""

from pathlib import Path
from typing import Any

from .cells import Cells
from .images import Split

HUB_IDS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "stl10": "tanganke/stl10"}


def open_parquet(folder: Path, files: list[Path]) -> Cells:
    """The rows of parquet files in `folder`."""
    from datasets import load_dataset

    paths = [str(path) for path in files]
    return _columns(load_dataset("parquet", data_files=paths, split="train", streaming=True), folder)


def open_hub(hub_id: str, split: Split) -> Cells:
    """The rows of one split of a data set of the Hub.

    Raises:
        ConnectionError: it cannot be read.
    """
    from datasets import load_dataset

    try:
        return _columns(load_dataset(hub_id, split=split, streaming=True), hub_id)
    except OSError as error:
        raise ConnectionError(
            f"cannot read data set {hub_id!r} from the hub ({type(error).__name__}: {error}); check the "
            "id and the network, or download it and pass the folder of its parquet files"
        ) from error


def _columns(dataset: Any, source: str | Path) -> Cells:
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
    return Cells(
        ((row[image], row[label]) for row in rows),
        list(kind.names) if isinstance(kind, ClassLabel) else None,
    )
