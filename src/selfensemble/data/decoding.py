"""Files of images, decoded: upright, on white, in one number of channels and one size."""

import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.packages import needs

# By which files are told to be images, those among them that Pillow cannot read on every machine.
IMAGE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".gif",
    ".tif", ".tiff", ".tga", ".avif", ".heic", ".heif",
}  # fmt: skip


def prepare_image(image: Any, channels: int, size: tuple[int, int], centre: float = 1.0) -> Tensor:
    """A PIL image as (C, H, W) uint8: upright, on white, converted, cut to the centre and resized.

    Args:
        image: of any mode.
        channels: 1 or 3.
        size: (H, W).
        centre: side of the part that is kept, as a share of the largest that has the proportions of `size`;
            0.875 is what others call resize to 256 and centre crop of 224.

    Raises:
        ValueError: numbers whose range is not known.
    """
    with needs("selfensemble[data]"):
        from PIL import ImageOps

    image = plain(image, channels)
    if image.size != (size[1], size[0]) or centre < 1:
        image = ImageOps.fit(image, (size[1], size[0]), bleed=(1 - centre) / 2)
    return as_tensor(image)


def plain(image: Any, channels: int) -> Any:
    """An image of any mode, upright and on white, as one of 8 bits in grey (1) or colour (3)."""
    with needs("selfensemble[data]"):
        from PIL import Image

    turn = how_to_turn(image)
    image = in_8_bits(image)
    image = image if turn is None else image.transpose(turn)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


class UnclearImageError(ValueError):
    """A file that leaves open which image it is."""


# Each file may be several images; a second one in a JPEG (MPO) belongs to the first, which is the photo.
_OF_PAGES = ("TIFF", "GIF", "PNG", "WEBP", "AVIF")
_DEEP, _DARK = "16 bits", "16 bits, as if 12"


def check_one_page(image: Any) -> None:
    """Look at a file whose head has been read.

    Raises:
        UnclearImageError: it holds several pages or frames, any of which may be meant.
    """
    if image.format in _OF_PAGES and getattr(image, "is_animated", False):
        kind = "pages" if image.format == "TIFF" else "frames"
        raise UnclearImageError(f"it has several {kind}, which leave open which is meant: save one of them")


def assumed(image: Any) -> str:
    """What is taken for granted of an image, for `told`; nothing of most."""
    if image.mode.startswith("I"):
        return _DARK if np.asarray(image).max(initial=0) < 2**12 else _DEEP
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        return "transparent"
    return ""


def told(found: Iterable[str]) -> list[str]:
    """How many images something was taken for granted of, and what, for people."""
    counts = Counter(found)
    lines, deep = [], counts[_DEEP] + counts[_DARK]
    if count := counts["transparent"]:
        lines.append(f"{count} with transparent parts: put on white")
    if deep:
        dark = f"; {counts[_DARK]} have no value above 4,095, and are dark: if they have 12 bits, scale them"
        lines.append(f"{deep} of 16 bits: white is 65,535{dark * bool(counts[_DARK])}")
    return lines


def as_tensor(image: Any) -> Tensor:
    """A grey or colour image of 8 bits as (C, H, W)."""
    array = np.array(image, dtype=np.uint8)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def how_to_turn(image: Any) -> int | None:
    """What makes an image stand upright, as its metadata say; nothing where they cannot be read.

    Pillow's `exif_transpose` rewrites the metadata, which fails for some around good pixels.
    """
    with needs("selfensemble[data]"):
        from PIL.Image import Transpose

    turns = (
        Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE,
        Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90,
    )  # fmt: skip
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # parsers of metadata raise many kinds
        return None
    return turns[orientation - 2] if orientation in range(2, 9) else None


def size_upright(image: Any) -> tuple[int, int]:
    """(width, height) of an image that stands upright."""
    width, height = image.size
    return (height, width) if how_to_turn(image) in (2, 4, 5, 6) else (width, height)


def in_8_bits(image: Any) -> Any:
    """An image of 16 or 32 bits a pixel, which `convert` would clip to 255, as one of 8.

    Raises:
        ValueError: the range of its numbers is not known.
    """
    with needs("selfensemble[data]"):
        from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"its pixels are floating-point numbers from {values.min():g} to {values.max():g}, whose "
                "range "
                "is not known: save it in 8 or 16 bits, or with numbers in [0, 1]"
            )
        scaled = values * 255
    else:
        # 16 bits, but for 32 that only other formats than these can hold.
        if image.mode == "I" and image.format not in ("PNG", "PPM"):
            raise ValueError(
                "its pixels are 32-bit integers, whose range is not known: save it in 8 or 16 bits"
            )
        scaled = values.astype(np.float64) / 257
    return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))


def is_grey(image: Any) -> bool:
    """Whether the file holds no colours; palettes of greys are none."""
    if image.mode == "P":
        palette = np.array(image.getpalette() or [0, 0, 0]).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def open_image(value: dict[str, Any] | None, source: str, name: str) -> Any:
    """The PIL image in a cell of an image column, or an error that names it."""
    if value is None:
        raise ValueError(f"image {name} of {source} is missing: remove the row")
    try:
        image = undecoded(value)
        image.load()
        return image
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ValueError(
            f"image {name} of {source} cannot be decoded ({reason(error)}): replace or remove it"
        ) from error


def undecoded(value: dict[str, Any]) -> Any:
    """The PIL image in a cell, of which only the head has been read.

    Raises:
        UnclearImageError: it is several.
    """
    image = _opened(value)
    check_one_page(image)
    return image


def _opened(value: dict[str, Any]) -> Any:
    with needs("selfensemble[data]"):
        from PIL import Image

    if value["bytes"] is not None:
        return Image.open(io.BytesIO(value["bytes"]))
    if Path(value["path"]).is_file():
        return Image.open(io.BytesIO(Path(value["path"]).read_bytes()))  # no file is left open
    with needs("selfensemble[data]"):
        import datasets

    return datasets.Image().decode_example(value)  # the path may be a place on the Hub


def reason(error: BaseException) -> str:
    """Of an image that cannot be used, in a few words."""
    text = " ".join(str(error).split())
    if "cannot identify image file" in text:
        return "not an image, or damaged"
    return text or type(error).__name__
