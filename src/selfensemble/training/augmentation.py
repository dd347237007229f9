"""Random changes of training images, by the batch and on its device; of photos, see `photos`."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .sections import DataSection


def augmentation(config: DataSection) -> Callable[[Tensor], Tensor]:
    """Random crop with padding, random flip: (B, C, H, W) to the same, each image on its own.

    All in one gather, without a loop over the images and without waiting for the device, so that a CUDA
    graph can hold it; the random numbers are those of torch's global generator of the device.
    """
    padding, flip = config.crop_padding, config.flip

    def augment(images: Tensor) -> Tensor:
        if not (padding or flip):
            return images
        if images.dim() != 4:
            raise ValueError(
                f"crop_padding and flip are for images (C, H, W), these are {tuple(images.shape[1:])}: leave "
                "them out"
            )
        count, _, height, width = images.shape
        rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
        if flip:
            chosen = torch.rand(count, 1, dtype=torch.float32, device=images.device) < 0.5
            columns = torch.where(chosen, width - 1 - columns, columns)
        top, left = torch.randint(2 * padding + 1, (2, count, 1), device=images.device)
        each = torch.arange(count, device=images.device)[:, None, None]
        padded = functional.pad(images, 4 * (padding,), value=config.bounds[0])
        taken = padded[each, :, (top + rows)[:, :, None], (left + columns)[:, None, :]]
        return taken.permute(0, 3, 1, 2)

    return augment


def mixing(share: float) -> Callable[[Tensor], Tensor]:
    """Each image mixed with another of its batch, (B, ...) to the same; labels stay those of the images.

    An image's share is drawn from Beta(share + 1, share). In expectation a loss that is linear in the labels
    is that of Zhang et al., mixup, ICLR 2018, who mix the labels, too, with a share from Beta(share, share):
    of each pair either may come first.
    """

    def mix(images: Tensor) -> Tensor:
        if not share or len(images) < 2:
            return images
        alpha = torch.full((len(images),), share, dtype=torch.float32, device=images.device)
        own = torch.distributions.Beta(alpha + 1, alpha, validate_args=False).sample()
        other = images[torch.randperm(len(images), device=images.device)]
        return other.lerp(images, own.view(-1, *[1] * (images.dim() - 1)).to(images.dtype))

    return mix
