"""Random changes of training images, by the batch."""

from collections.abc import Callable

from torch import Tensor, nn

from .data import ImageData
from .recipe import DataSection


def augmentation(config: DataSection, data: ImageData) -> Callable[[Tensor], Tensor]:
    """Random crop with padding, random flip: (B, C, H, W) to the same, each image on its own."""
    steps: list[nn.Module] = []
    if config.crop_padding or config.flip:
        import kornia.augmentation as kornia

        if config.crop_padding:
            size = tuple(data.images.shape[2:])
            steps.append(kornia.RandomCrop(size, padding=config.crop_padding))
        if config.flip:
            steps.append(kornia.RandomHorizontalFlip(p=0.5))
    return nn.Sequential(*steps)
