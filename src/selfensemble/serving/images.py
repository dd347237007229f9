"""Images that strangers send: opened with care."""

import base64
import binascii
import io
import warnings

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..data.decoding import prepare_image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


class ImageError(ValueError):
    """An image that cannot be taken, and why."""


class TooLargeError(ImageError):
    """An image with more pixels than the server takes."""


def open_image(data: bytes, shape: tuple[int, int, int], max_pixels: int) -> Tensor:
    """(C, H, W) uint8 of that shape.

    Raises:
        TooLargeError, ImageError: the size is looked at before a pixel is decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` decides
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    size = f"{image.width} x {image.height}"
                    raise TooLargeError(f"the image has {size} pixels, at most {max_pixels:,} are taken")
                return prepare_image(image, shape[0], (shape[1], shape[2]))
        except UnidentifiedImageError:
            raise ImageError(f"this is no image of a known format ({', '.join(FORMATS)})") from None
        except ImageError:
            raise
        except Image.DecompressionBombError:
            raise TooLargeError("the image has too many pixels") from None
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise ImageError(f"the image is damaged: {type(error).__name__}") from error


def decode_base64(text: str) -> bytes:
    """The bytes of a base64 string, with or without `data:image/...;base64,` in front.

    Raises:
        ImageError: it is none.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ImageError("this is no base64 text") from None


def scaled(images: list[Tensor]) -> Tensor:
    """(B, C, H, W) float32 in [0, 1]."""
    return torch.stack(images).float() / 255
