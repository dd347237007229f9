"""Images that strangers send: opened with care."""

import base64
import binascii
import io
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..data.decoding import UnclearImageError, check_one_page, prepare_image
from ..data.images import as_inputs

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
_SCAN = b"\xff\xda"  # begins each scan of a JPEG; within its data it cannot occur
_URL_SAFE = str.maketrans("-_", "+/")
_SCANS = 20  # of a JPEG that count as one; those that are saved as progressive have about ten


class ImageError(ValueError):
    """An image that cannot be taken, and why."""


class TooLargeError(ImageError):
    """An image with more pixels than the server takes."""


def cost_of(data: bytes, max_pixels: int) -> int:
    """What it takes to decode an image, in pixels, from its header alone.

    A progressive JPEG is gone over once for each of its scans, of which a small file can have thousands.

    Raises:
        TooLargeError, ImageError: see `open_image`.
    """
    with _opened(data) as image:
        size = f"{image.width} x {image.height}"
        if image.width * image.height > max_pixels:
            raise TooLargeError(f"the image has {size} pixels, at most {max_pixels:,} are taken")
        scans = data.count(_SCAN) if image.info.get("progressive") else 1
        cost = image.width * image.height * max(1, -(-scans // _SCANS))
    if cost > max_pixels:
        raise TooLargeError(f"the image has {size} pixels in {scans:,} scans: save it with fewer")
    return cost


def open_image(data: bytes, shape: tuple[int, int, int], max_pixels: int, centre: float = 1.0) -> Tensor:
    """(C, H, W) uint8 of that shape, of the central part whose side is that share.

    Raises:
        TooLargeError, ImageError: the size is looked at before a pixel is decoded.
    """
    cost_of(data, max_pixels)
    with _opened(data) as image:
        check_one_page(image)
        return prepare_image(image, shape[0], (shape[1], shape[2]), centre)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image, whose pixels are not decoded yet; with what goes wrong as an `ImageError`."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError:
        raise ImageError(f"this is not an image of a known format ({', '.join(FORMATS)})") from None
    except ImageError:
        raise
    except UnclearImageError as error:
        raise ImageError(f"this is no image to answer: {error}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLargeError("the image has too many pixels") from None
    except MemoryError:
        raise TooLargeError("the image takes more memory than there is") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ImageError("the image is damaged, or a part of it is missing") from error


def decode_base64(text: str) -> bytes:
    """The bytes of a base64 string: of either alphabet, with line breaks or without, padded or not.

    `data:image/...;base64,` may stand in front.

    Raises:
        ImageError: it is none.
    """
    if text.lstrip()[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.rstrip().lower().endswith(";base64"):
            raise ImageError("this is not base64 text (a data: address holds it behind ';base64,')")
    text = "".join(text.split()).translate(_URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ImageError("this is not base64 text") from None


def scaled(images: list[Tensor], bounds: tuple[float, float] | None) -> Tensor:
    """(B, C, H, W) float32 of black and white at the bounds; without bounds in [0, 1]."""
    return as_inputs(torch.stack(images), bounds)
