"""Options of every command that takes a network, as they are written, and what they say."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.errors import InputError
from ..runtime.texts import parsed_json
from .option_groups import takes

if TYPE_CHECKING:
    from ..noise.levels import NoiseConfig
    from ..noise.streams import Sampling

_NAMED = "Of a named network"


@dataclass(frozen=True)
class NetworkOptions:
    """What a command was told of its network, as it was written."""

    network: Annotated[
        str | None,
        typer.Option(
            help="What makes the network of a saved ensemble of your own: package.module:attribute or "
            "path/to/file.py:attribute. Its code runs."
        ),
    ] = None
    trust_network: Annotated[
        bool,
        typer.Option("--trust-network", help="Import the code that the saved ensemble names. Its code runs."),
    ] = False
    network_args: Annotated[
        str | None, typer.Option(help="Arguments for what makes the network, as JSON: '{\"depth\": 20}'.")
    ] = None
    weights: Annotated[
        Path | None, typer.Option(help=f"{_NAMED}: safetensors, or a state dict saved by torch.")
    ] = None
    noise: Annotated[
        str | None,
        typer.Option(
            help=f"{_NAMED}: INIT:INNER, std of the noise on its input and before its other layers; 0.2:0.1 "
            "by default."
        ),
    ] = None
    draws: Annotated[int | None, typer.Option(min=1, help="Noise draws per prediction.")] = None
    sampling: Annotated[
        str | None,
        typer.Option(
            help="Noise of predictions: shared by the inputs of a batch, or per_image, for networks that put "
            "parts of an input (frames, windows) into the batch."
        ),
    ] = None
    filter_name: Annotated[
        str | None,
        typer.Option(
            "--filter", help=f"{_NAMED}: layers with noise before them: conv, linear or conv+linear."
        ),
    ] = None
    mean: Annotated[
        str | None, typer.Option(help=f"{_NAMED}: mean of the pixels, in [0, 1], e.g. 0.485,0.456,0.406.")
    ] = None
    std: Annotated[
        str | None, typer.Option(help=f"{_NAMED}: std of the pixels; noise is added before both.")
    ] = None
    shape: Annotated[
        str | None,
        typer.Option(help=f"{_NAMED}: shape of an input: 3x224x224 for images, 1x16000 for waveforms."),
    ] = None
    bounds: Annotated[
        str | None, typer.Option(help=f"{_NAMED}: LOW:HIGH, the range of its inputs; 0:1 by default.")
    ] = None


OPTIONS = NetworkOptions()


takes_network = takes(NetworkOptions, "network")


def arguments_of(options: NetworkOptions) -> dict[str, Any] | None:
    """Arguments of what makes the network."""
    if options.network_args is None:
        return None
    try:
        found = parsed_json(options.network_args, "--network-args")
    except ValueError as error:
        raise InputError(f"{error}: write '{{\"depth\": 20}}'") from error
    if not isinstance(found, dict):
        raise InputError(f"--network-args are keywords and values, '{{\"depth\": 20}}', got {found!r}")
    return found


def noise_of(options: NetworkOptions) -> "NoiseConfig | None":
    """Levels as they were written."""
    from ..noise.levels import levels_named

    if options.noise is None:
        return None
    try:
        levels, reason = list(levels_named(options.noise)), ""
    except ValueError as error:
        levels, reason = [], f" ({error})" if ":" in options.noise else ""
    if len(levels) != 1:
        raise InputError(
            "--noise is INIT:INNER, std of the noise on the input and before the other layers, e.g. 0.2:0.1; "
            f"got {options.noise!r}{reason}"
        )
    return levels[0]


def sampling_of(options: NetworkOptions) -> "Sampling | None":
    """How draws are sampled, as it was written."""
    from ..noise.streams import check_sampling

    if options.sampling is None:
        return None
    try:
        return check_sampling(options.sampling)
    except ValueError as error:
        raise InputError(f"--{error}") from error


def channels_of(text: str | None, flag: str) -> list[float] | None:
    """Numbers of the channels as they were written."""
    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{flag} is a number for each channel, 0.485,0.456,0.406, got {text!r}") from None
    if flag == "--mean" and max(found) > 1:
        raise InputError(f"--mean and --std are of pixels in [0, 1], got {text}: divide them by 255")
    return found


def bounds_of(options: NetworkOptions) -> tuple[float, float] | None:
    """The range of inputs as it was written."""
    if (text := options.bounds) is None:
        return None
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise InputError(f"--bounds is LOW:HIGH, the range of inputs, e.g. -1:1, got {text!r}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"--bounds is LOW:HIGH with LOW below HIGH, both finite, got {text!r}")
    return low, high


def shape_of(options: NetworkOptions) -> tuple[int, ...] | None:
    """Of one input, as it was written."""
    if (text := options.shape) is None:
        return None
    parts = re.split("[x,]", text)
    if len(parts) > 4 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(
            f"--shape is that of one input, 1 to 4 numbers: CHANNELSxHEIGHTxWIDTH of an image (3x224x224), "
            f"CHANNELSxSAMPLES of a waveform (1x16000), got {text!r}"
        )
    return tuple(map(int, parts))
