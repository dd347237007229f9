"""Random changes of training images, by the batch and on its device."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .recipe import DataSection


def augmentation(config: DataSection) -> Callable[[Tensor], Tensor]:
    """Random crop with padding, random flip: (B, C, H, W) to the same, each image on its own.

    All in one gather, without a loop over the images and without waiting for the device, so that a CUDA
    graph can hold it; the random numbers are those of torch's global generator of the device.
    """
    padding, flip = config.crop_padding, config.flip

    def augment(images: Tensor) -> Tensor:
        if not (padding or flip):
            return images
        count, _, height, width = images.shape
        rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
        if flip:
            chosen = torch.rand(count, 1, dtype=torch.float32, device=images.device) < 0.5
            columns = torch.where(chosen, width - 1 - columns, columns)
        top, left = torch.randint(2 * padding + 1, (2, count, 1), device=images.device)
        each = torch.arange(count, device=images.device)[:, None, None]
        padded = functional.pad(images, 4 * (padding,))
        taken = padded[each, :, (top + rows)[:, :, None], (left + columns)[:, None, :]]
        return taken.permute(0, 3, 1, 2)

    return augment
