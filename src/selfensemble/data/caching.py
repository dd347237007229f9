"""Splits decoded once, memory-mapped as uint8 ever after."""

import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..runtime.files import cache_dir, write_json
from .cells import Cells
from .decoding import open_image, prepare_image
from .images import ImageData, Split

_CACHE_VERSION = 1


def cached(
    identity: list[Any], source: str, split: Split, size: int | None, opener: Callable[[], Cells]
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


def _decode(cells: Cells, folder: Path, source: str, size: int | None) -> None:
    """Write images.bin (N, C, H, W), labels.npy and meta.json."""
    labels: list[Any] = []
    shape: tuple[int, ...] | None = None
    with (folder / "images.bin").open("wb") as file:
        for value, label in cells.rows:
            image = open_image(value, source, len(labels))
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
