"""What a saved ensemble is, for its card: how it is loaded, its network, its noise and the units of that."""

import math

import numpy as np
import torch

from ..artefacts.config import ArtefactConfig
from ..certainty.pixels import pixel_std
from ..ensemble.ensemble import SelfEnsemble
from ..noise.layer import describe_std
from ..noise.levels import Std
from .markdown import plain

UNKNOWN = math.nan


def noise_on_pixels(ensemble: SelfEnsemble, config: ArtefactConfig) -> float:
    """What the first noise is worth on the image, see `pixel_std`; NaN where that cannot be told."""
    if config.input_shape is None or not config.is_random:
        return UNKNOWN
    generator = torch.Generator("cpu").manual_seed(0)
    images = torch.rand(2, *config.input_shape, generator=generator, dtype=torch.float32, device="cpu")
    low, high = config.bounds or (0.0, 1.0)
    try:
        return pixel_std(ensemble, low + (high - low) * images)
    except (ValueError, RuntimeError):  # there is no such noise, or it stands elsewhere
        return UNKNOWN


def usage(quoted: str, config: ArtefactConfig) -> str:
    """Lines of Python that load and use it; `quoted` is its name as Python writes it."""
    model, comment = "", ""
    if config.architecture is None and config.transformers is None:
        named = config.network
        if named is None:
            model, comment = ", model=network", "  # a fresh network of its class, whose code is not in here"
        elif named.needs_trust:
            model, comment = f', model="{named.name}"', "  # imports that code, which is not in here"
    low, high = config.bounds or (None, None)
    shape = config.input_shape
    is_image = len(shape) == 3 if shape else config.bounds is not None
    inputs = (
        "images (B, C, H, W)"
        if is_image
        else f"inputs (B, {', '.join(map(str, shape))})"
        if shape
        else "inputs"
    )
    scale = f" in [{low:g}, {high:g}], not standardised" if low is not None else ", as the network takes them"
    return (
        f"```python\nimport selfensemble as rse\n\nensemble = rse.load({quoted}{model}){comment}\n"
        f"ensemble.predict(images)  # {inputs}{scale}\n```"
    )


def facts(config: ArtefactConfig, pixels: float | None = None) -> str:
    """A list of what it is.

    Args:
        config: of the ensemble.
        pixels: what `noise_on_pixels` says; None where nobody asked.
    """
    lines = [_network(config)]
    if config.input_shape is not None:
        low, high = config.bounds or (None, None)
        scale = (
            "" if low is None else f", {'pixels' if _is_image(config) else 'values'} in [{low:g}, {high:g}]"
        )
        lines.append(f"inputs {' x '.join(map(str, config.input_shape))}{scale}")
    if config.normalize is not None:
        mean, std = (", ".join(f"{value:.4g}" for value in each) for each in _mean_and_std(config))
        lines.append(f"standardised by its first layer: mean {mean}, std {std}")
    if config.flip_average:
        lines.append(
            "a draw averages the logits of the image and of its mirror image, with the same noise: two passes"
        )
    if config.classes is not None:
        lines.append(f"classes: {', '.join(map(plain, config.classes))}")
    source = (config.recipe or {}).get("data", {}).get("source")
    if config.architecture is None:
        lines.append(f"trained on {source}" if source else "what it was trained on is not recorded")
    lines += _noise(config, pixels)
    if config.randomness is not None and not config.randomness.fixed:
        lines.append(f"random layers: {config.randomness.name}")
    lines.append(f"a prediction averages {config.draws} noise draw{'s' * (config.draws != 1)}")
    return "\n".join(f"- {line}" for line in lines if line)


def _is_image(config: ArtefactConfig) -> bool:
    return config.input_shape is None or len(config.input_shape) == 3


def _network(config: ArtefactConfig) -> str:
    if config.architecture is not None:
        return f"{config.architecture.name}, width {config.architecture.width:g}"
    if config.transformers is not None:
        return f"{config.transformers.name} of transformers"
    return "a network of its author's own" if config.network is None else f"network: {config.network.name}"


def _mean_and_std(config: ArtefactConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    assert config.normalize is not None
    return config.normalize.mean, config.normalize.std


def _noise(config: ArtefactConfig, pixels: float | None) -> list[str]:
    levels = list(config.noise.values())
    active = [level for level in levels if np.max(level) > 0]
    if not active:
        return []
    inner = [describe_std(level) for level in levels[1:]]
    inside = f", {', '.join(dict.fromkeys(inner))} inside" if inner else ""
    place = _place(config, levels[0], pixels)
    place = (
        place if _is_image(config) else place.replace("the image", "the input").replace("in pixels", "there")
    )
    lines = [f"noise: std {describe_std(levels[0])} {place}{inside}"]
    if len(active) == 1:
        lines.append("noise in one place alone: smoothing by one Gaussian rather than a self-ensemble")
    return lines


def _place(config: ArtefactConfig, first: Std, pixels: float | None) -> str:
    """Where the first noise is, in what units."""
    if ((config.recipe or {}).get("noise") or {}).get("first") == "features":
        return "on the first features"
    if config.normalize is not None and next(iter(config.noise)) != "":
        scale = np.asarray(first) * np.asarray(_mean_and_std(config)[1])
        worth = describe_std(tuple(float(value) for value in np.unique(scale)))
        return f"behind mean and std, which is {worth.partition(' (')[0]} on the image"
    if pixels is None:
        return "on the image"
    if math.isnan(pixels):
        return "before the first layer; its size in pixels is not known"
    if math.isclose(pixels, float(np.min(first)), rel_tol=1e-3):
        return "on the image"
    return f"before the first layer, which is {pixels:.4g} on the image"
