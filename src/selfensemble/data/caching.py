"""Splits decoded once, memory-mapped as uint8 ever after."""

import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.files import cache_dir, write_json

_CACHE_VERSION = 2


def memory_mapped(identity: list[Any], decode: Callable[[], Iterable[Tensor]]) -> Tensor:
    """(N, C, H, W) uint8, from the cache if this very source has been decoded before."""
    key = json.dumps([_CACHE_VERSION, identity])
    folder = cache_dir() / "data" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not _is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
        partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
        partial.mkdir(parents=True)
        try:
            _write(decode(), partial)
            partial.rename(folder)
        except OSError:
            # Another process has finished the same work in between: its copy serves.
            if not _is_whole(folder):
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    shape = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["shape"]
    path = str(folder / "images.bin")
    return torch.from_file(path, shared=False, size=math.prod(shape), dtype=torch.uint8).view(shape)


def _is_whole(folder: Path) -> bool:
    """Whether a decoded split is there and has the size that it should have."""
    try:
        shape = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["shape"]
        return bool((folder / "images.bin").stat().st_size == math.prod(shape))
    except (OSError, ValueError, KeyError):
        return False


def _write(images: Iterable[Tensor], folder: Path) -> None:
    """Write images.bin (N, C, H, W) and meta.json."""
    count, shape = 0, list[int]()
    with (folder / "images.bin").open("wb") as file:
        for image in images:
            file.write(image.contiguous().numpy().tobytes())
            count, shape = count + 1, list(image.shape)
    write_json(folder / "meta.json", {"shape": [count, *shape]})
