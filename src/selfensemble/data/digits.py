"""Handwritten digits, which come with scikit-learn."""

import numpy as np
import torch

from .images import ImageData, Split


def digits(split: Split, size: int | tuple[int, int] | None) -> ImageData:
    """1,797 handwritten digits of 8x8 (UCI, Alpaydin & Kaynak 1998); a fixed quarter is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if size not in (None, 8, (8, 8)):
        raise ValueError(f"digits are 8x8 images: leave size out, got {size}")
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=450, random_state=0, stratify=labels)
    pixels, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    names = tuple(str(digit) for digit in range(10))
    return ImageData("digits", torch.from_numpy(images), torch.from_numpy(labels).long(), names)
