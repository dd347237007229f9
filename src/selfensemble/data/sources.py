"""Where images come from, by name.

Sources: `digits` (inside scikit-learn, no download), `cifar10`, `cifar100`, `stl10` or any other id of
a Hugging Face data set, a local folder of parquet files, a local folder of images.
"""

from pathlib import Path
from typing import get_args

from .caching import cached
from .digits import digits
from .folders import images_by_class, split_files
from .images import ImageData, Split
from .tables import HUB_IDS, open_hub, open_parquet


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
        return digits(split, size)
    folder = Path(source).expanduser()
    if folder.is_dir():
        files = split_files(folder, split)
        stats = [(path, path.stat()) for path in files]
        identity = [[str(path.relative_to(folder)), s.st_size, s.st_mtime_ns] for path, s in stats]
        opened = open_parquet if files[0].suffix == ".parquet" else images_by_class
        return cached([str(folder.resolve()), identity], source, split, size, lambda: opened(folder, files))
    if folder.exists():
        raise ValueError(f"{source} is a file: pass the folder that holds the data")
    hub_id = HUB_IDS.get(source, source)
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"no folder and no known data set {source!r}: pass digits, {', '.join(HUB_IDS)}, a hub id "
            "(owner/name), or an existing folder of parquet files or images"
        )
    return cached([hub_id], source, split, size, lambda: open_hub(hub_id, split))
