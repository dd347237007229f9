"""What images a network of a library was made for: their shape, and the mean and std that it wants."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from torch import nn

from .libraries import HUB
from .naming import name_of, was_pretrained

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
    known, pretrained = name_of(network), was_pretrained(network)
    arguments = {} if known is None else known[1]
    if library == "timm":
        found = _of_timm(getattr(network, "pretrained_cfg", None), arguments, pretrained)
    elif library == "torchvision":
        found = _of_torchvision(network, rest, arguments)
    elif library == "transformers":
        found = _of_transformers(getattr(network, "config", None), rest, arguments, pretrained)
    else:
        return Expected()
    return found if pretrained else Expected(found.shape)


def _of_timm(config: Any, arguments: dict[str, Any], pretrained: bool) -> Expected:
    """By the configuration of the weights, but for what the arguments change of the network."""
    if not isinstance(config, dict):
        return Expected()
    size, mean, std = (config.get(key) for key in ("input_size", "mean", "std"))
    shape = _shape(size) if isinstance(size, tuple | list) else None
    told = None if mean is None or std is None else (tuple(mean), tuple(std))
    if shape is not None:
        channels, *sides = shape
        shape = _shape((arguments.get("in_chans", channels), *_sides(arguments.get("img_size"), sides)))
    if told is not None and shape is not None and len(told[0]) != shape[0]:
        if shape[0] != 1 and pretrained:
            raise ValueError(
                f"the weights are of images with a mean of {len(told[0])} channels, and the network takes "
                f"{shape[0]}: say the mean and std of each (--mean, --std)"
            )
        told = _of_grey(told) if shape[0] == 1 else None
    return Expected(shape, told)


def _of_grey(told: tuple[Channels, Channels]) -> tuple[Channels, Channels]:
    """Of one channel, where the weights of three were added up."""
    mean, std = (sum(each) / len(each) for each in told)
    return (mean,), (std,)


def _of_torchvision(network: nn.Module, name: str, arguments: dict[str, Any]) -> Expected:
    """By the network, where it is of one size, and the preprocessing of the weights.

    Those that were asked for, else those that torchvision has.
    """
    models: Any = import_module("torchvision").models
    asked = arguments.get("weights") or "DEFAULT"
    known = models.get_model_weights(name)
    if isinstance(asked, str):
        try:
            asked = known[asked.rpartition(".")[2]]
        except KeyError:  # of a network with fresh weights, for which they were not looked up
            asked = known["DEFAULT"]
    wanted = asked.transforms()
    (side,) = set(wanted.crop_size)
    own = getattr(network, "image_size", arguments.get("image_size"))
    shape = _shape((3, *_sides(own, [side, side])))
    return Expected(shape, (tuple(wanted.mean), tuple(wanted.std)))


def _sides(asked: Any, usual: Sequence[int]) -> Sequence[int]:
    """(H, W) that an argument asks for, one number or two, or the usual ones."""
    if asked is None:
        return usual
    return (asked, asked) if isinstance(asked, int) else tuple(asked)


def _shape(sizes: Any) -> tuple[int, int, int] | None:
    if len(sizes) != 3 or not all(isinstance(each, int) for each in sizes):
        return None
    channels, height, width = sizes
    return channels, height, width


def _of_transformers(config: Any, name: str, arguments: dict[str, Any], pretrained: bool) -> Expected:
    """By the file of their processor; sides that the arguments ask for, and else those of the network."""
    if isinstance(of_timm := getattr(config, "pretrained_cfg", None), dict):  # a network of timm within
        return _of_timm(of_timm, arguments, pretrained)
    told = _processor(name, arguments)
    channels, own = getattr(config, "num_channels", 3), getattr(config, "image_size", None)
    processed = _processed_sides(told)
    asked = "image_size" in arguments or None in processed
    sides = _sides(own, processed) if asked else processed
    shape = _shape((channels, *sides))
    return Expected(shape, _mean_and_std(name, told, channels) if pretrained else None)


def _processed_sides(told: dict[str, Any]) -> tuple[Any, Any]:
    """(H, W) that a processor brings images to; None where it does not say."""
    crops = told.get("do_center_crop", "crop_size" in told)
    size = (told.get("crop_size") if crops else None) or told.get("size") or {}
    if isinstance(size, list | tuple):  # as early versions wrote it
        return (size[0], size[1]) if len(size) == 2 else (None, None)
    if not isinstance(size, dict):
        return size, size
    side = size.get("shortest_edge")
    return size.get("height", side), size.get("width", side)


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
    if told.get("do_normalize") and "feature_extractor_type" in told and "image_mean" not in told:
        raise ValueError(
            f"{name} wants its inputs standardised as {told['feature_extractor_type']} does it: do that in a "
            "module of your own around it, and name that"
        )
    mean, std = told.get("image_mean"), told.get("image_std")
    if told.get("do_normalize") and (mean is None or std is None):
        raise ValueError(
            f"{name} wants its inputs standardised, and its file does not say by which mean and std: do that "
            "in a module of your own around it, and name that"
        )
    if not told.get("do_normalize", not bare) or mean is None or std is None:
        mean, std = [0.0] * channels, [1.0] * channels
    again = std if told.get("include_top", False) else [1.0] * len(std)  # EfficientNet divides twice
    scale = 255 * factor
    means = tuple((each + offset) / scale for each in mean)
    stds = tuple(one * other / scale for one, other in zip(std, again, strict=True))
    plain = max(map(abs, means)) < _CLOSE and max(abs(each - 1) for each in stds) < _CLOSE
    return None if plain else (means, stds)


def _processor(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the folder or repository says of its images; nothing where it says nothing."""
    from transformers.image_processing_base import ImageProcessingMixin

    where = {key: arguments[key] for key in HUB if key in arguments}
    try:
        found: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(name, **where)[0]
    except (OSError, ValueError):  # there is no such file
        return {}
    kind = str(found.get("image_processor_type") or found.get("feature_extractor_type"))
    for key in {
        "image_mean",
        "image_std",
    } - found.keys():  # which some versions leave out where they are usual
        usual = _usual(kind, key)
        if usual is not None:
            found[key] = usual
    return found


def _usual(kind: str, key: str) -> list[float] | None:
    """A default of a kind of processor, of whichever of its forms the installed packages allow."""
    import transformers

    plain = kind.removesuffix("Fast")
    for name in (kind, plain, f"{plain}Pil", f"{plain}Fast"):
        try:
            usual = getattr(getattr(transformers, name), key)
        except (AttributeError, ImportError):  # no such form, or one that needs torchvision
            continue
        if isinstance(usual, list | tuple):
            return list(usual)
    return None
