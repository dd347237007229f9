"""Folders: the files of a split in them, and images in one folder a class."""

from pathlib import Path

from .cells import Cells
from .decoding import IMAGE_SUFFIXES
from .images import Split

_FOLDERS = {"train": ("train", "training"), "test": ("test", "validation", "valid", "val")}


def split_files(folder: Path, split: Split) -> list[Path]:
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


def images_by_class(folder: Path, files: list[Path]) -> Cells:
    """Image files whose folder below that of the split names their class.

    Raises:
        ValueError: an image lies in no class.
    """
    root = folder / files[0].relative_to(folder).parts[0]
    loose = [path for path in files if path.parent == root]
    if loose:
        raise ValueError(f"{loose[0]} lies in no class: put images into {root.name}/CLASS/")
    names = [path.relative_to(root).parts[0] for path in files]
    return Cells(
        (({"path": str(path), "bytes": None}, name) for path, name in zip(files, names, strict=True)), None
    )
