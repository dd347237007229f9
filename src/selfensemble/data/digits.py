"""Handwritten digits, which come with the package: `digits.npz` beside this file."""

from importlib import resources

import numpy as np
import torch

from .images import ImageData, Split


def digits(split: Split, size: int | tuple[int, int] | None) -> ImageData:
    """1,797 handwritten digits of 8x8 pixels; a fixed quarter is the test set.

    Source: Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI Machine Learning
    Repository, doi:10.24432/C50P49 (CC BY 4.0), its test part as scikit-learn holds it: 17 levels a pixel.
    """
    if size not in (None, 8, (8, 8)):
        raise ValueError(f"digits are 8x8 images: leave size out, got {size}")
    with (resources.files(__package__) / "digits.npz").open("rb") as file, np.load(file) as stored:
        levels, labels = stored[f"{split}_images"], stored[f"{split}_labels"]
    images = np.rint(levels.astype(np.float64) * (255 / 16)).astype(np.uint8)
    names = tuple(str(digit) for digit in range(10))
    return ImageData("digits", torch.from_numpy(images), torch.from_numpy(labels).long(), names)
