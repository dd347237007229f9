"""What images a network of a library was made for: their shape, and the mean and std that it wants."""

from typing import Any, NamedTuple

from torch import nn

from .naming import was_pretrained

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLOSE = 1e-6
Channels = tuple[float, ...]


class Expected(NamedTuple):
    """Of images in [0, 1].

    Attributes:
        shape: (C, H, W); None where it is not known.
        mean_and_std: of the channels; None where the network wants images as they are, or that is not known.
    """

    shape: tuple[int, int, int] | None = None
    mean_and_std: tuple[Channels, Channels] | None = None


def expected_images(network: nn.Module, name: str) -> Expected:
    """Of a network that `network_from` made; mean and std where it has the weights of its library.

    Args:
        network: as it was made.
        name: that it was asked for by.
    """
    library, _, rest = name.partition(":")
    if library == "timm":
        found = _of_timm(getattr(network, "pretrained_cfg", None))
    elif library == "torchvision":
        found = Expected((3, 224, 224), _IMAGENET)
    elif library == "transformers":
        found = _of_transformers(getattr(network, "config", None), rest)
    else:
        return Expected()
    return found if was_pretrained(network) else Expected(found.shape)


def _of_timm(config: Any) -> Expected:
    if not isinstance(config, dict):
        return Expected()
    size, mean, std = (config.get(key) for key in ("input_size", "mean", "std"))
    shape = _shape(size) if isinstance(size, tuple | list) else None
    return Expected(shape, None if mean is None or std is None else (tuple(mean), tuple(std)))


def _shape(sizes: Any) -> tuple[int, int, int] | None:
    if len(sizes) != 3 or not all(isinstance(each, int) for each in sizes):
        return None
    channels, height, width = sizes
    return channels, height, width


def _of_transformers(config: Any, name: str) -> Expected:
    told = _processor(name)
    side, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    sides = (side, side) if isinstance(side, int) else side
    if sides is None:
        size = told.get("crop_size") or told.get("size") or {}
        sides = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    shape = _shape((channels, *sides))
    return Expected(shape, _mean_and_std(name, told, channels))


def _mean_and_std(name: str, told: dict[str, Any], channels: int) -> tuple[Channels, Channels] | None:
    """Of pixels in [0, 1], from what a processor does to those in [0, 255]; None where nothing is to be done.

    Raises:
        ValueError: it wants something else of them.
    """
    kind = str(told.get("image_processor_type", ""))
    bare = kind.startswith("MobileViT")  # whose file may have a mean that is not used
    if told.get("do_flip_channel_order", bare):
        raise ValueError(
            f"{name} wants its colours in the order blue, green, red: put `inputs.flip(1)` before it, "
            "in a module of your own, and name that"
        )
    factor = float(told.get("rescale_factor", 1 / 255)) if told.get("do_rescale", True) else 1.0
    offset = 1.0 if told.get("rescale_offset") and told.get("do_rescale", True) else 0.0
    mean, std = told.get("image_mean"), told.get("image_std")
    if not told.get("do_normalize", not bare) or mean is None or std is None:
        mean, std = [0.0] * channels, [1.0] * channels
    again = std if told.get("include_top", False) else [1.0] * len(std)  # EfficientNet divides twice
    scale = 255 * factor
    means = tuple((each + offset) / scale for each in mean)
    stds = tuple(one * other / scale for one, other in zip(std, again, strict=True))
    plain = max(map(abs, means)) < _CLOSE and max(abs(each - 1) for each in stds) < _CLOSE
    return None if plain else (means, stds)


def _processor(name: str) -> dict[str, Any]:
    """What the folder or repository says of its images; nothing where it says nothing."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        found: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(name)[0]
    except (OSError, ValueError):  # there is no such file
        return {}
    return found
