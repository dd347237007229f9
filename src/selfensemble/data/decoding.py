"""Files of images, decoded: upright, on white, in one number of channels and one size."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff"}


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


def open_image(value: dict[str, Any] | None, source: str, number: int) -> Any:
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
