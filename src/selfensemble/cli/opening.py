"""The ensemble that the MODEL of a command stands for: a saved one, or a network by its name."""

import json
import re
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import InputError
from . import terminal
from .class_names import classes_of
from .data_options import NO_DATA, DataOptions
from .loading import test_data_of, with_size
from .options import NetworkOptions, arguments_of, bounds_of, channels_of, noise_of, sampling_of, shape_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..artefacts.config import ArtefactConfig
    from ..artefacts.named import UntrustedNetwork
    from ..artefacts.outline import Outline
    from ..data.images import ImageData
    from ..ensemble.ensemble import SelfEnsemble
    from ..noise.injection import FilterFn
    from ..noise.streams import Sampling

_OF_NAMED = {"weights": "--weights", "noise": "--noise", "filter_name": "--filter", "mean": "--mean",
             "std": "--std", "shape": "--shape", "bounds": "--bounds"}  # fmt: skip
_OF_ITS_OWN = {"network": "--network", "network_args": "--network-args", "draws": "--draws",
               "sampling": "--sampling"}  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """An ensemble that a command works with.

    Attributes:
        ensemble: on the CPU, in eval mode.
        config: what is known of it; of a saved one its `config.json`.
        name: for people and for folders of runs.
        images: test images, where the command wants them.
        folder: of a saved one.
    """

    ensemble: "SelfEnsemble"
    config: "ArtefactConfig"
    name: str
    images: "ImageData | None" = None
    folder: Path | None = None

    @property
    def test(self) -> "ImageData":
        """The test images of a command that asked for them."""
        assert self.images is not None
        return self.images

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input.

        Raises:
            InputError: it is not known.
        """
        if self.config.input_shape is None:
            raise InputError(
                f"{self.name} does not say the shape of its inputs: save it with it, rse.save(ensemble, "
                "folder, input_shape=(3, 32, 32)), or pack it with --data"
            )
        return self.config.input_shape

    @property
    def centre(self) -> float:
        """Side of the central part of an image that it was trained to look at, as a share."""
        return float((self.config.recipe or {}).get("data", {}).get("centre", 1.0))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a command that reads image files.

        Raises:
            InputError: it is not known, or that of something else.
        """
        shape = self.shape
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise InputError(
                f"{self.name} takes inputs of shape {shape}, which are not images of 1 or 3 channels: ask it "
                "in Python, ensemble.predict(inputs)"
            )
        return shape[0], shape[1], shape[2]

    @property
    def architecture(self) -> dict[str, Any] | None:
        """For records of a run."""
        return self.config.architecture.model_dump() if self.config.architecture else None


def open_network(
    model: str | Path, options: NetworkOptions, data: DataOptions = NO_DATA, *, with_data: bool = False
) -> Opened:
    """The ensemble that MODEL stands for, with test images where they are wanted.

    Raises:
        InputError, ValueError, TypeError, OSError: what is wrong, and what to do.
    """
    from ..networks.names import is_network_name

    return (_named if is_network_name(model) else _saved)(str(model), options, data, with_data)


def described_as(model: str, options: NetworkOptions) -> "Outline":
    """What is known of MODEL; of a saved ensemble what is written, without PyTorch."""
    from ..artefacts.outline import Outline, read_as
    from ..networks.names import is_network_name

    if is_network_name(model):
        return _named(model, options, NO_DATA, False).config
    _check_is_saved(model, options)
    for name, flag in _OF_ITS_OWN.items():
        if getattr(options, name) is not None:
            raise InputError(f"info says what is written in {model}, and loads nothing: leave {flag} out")
    return read_as(Outline, model)


def open_bare(
    model: str, options: NetworkOptions, data: DataOptions
) -> tuple["nn.Module", "Tensor", "FilterFn", "Sampling | None"]:
    """A network to be looked at, an example, before what its noise is or would go, and its sampling.

    A named one has got no noise yet, and may be one that cannot get any.
    """
    from ..artefacts.opening import IN_FRONT, in_pixels, seeded_network, with_mean_and_std
    from ..networks.names import is_network_name
    from ..noise.filters import filter_named
    from ..noise.injection import is_convolution, noise_layers

    if not is_network_name(model):
        opened = open_network(model, options, data, with_data=data.data is not None)
        noisy = set(noise_layers(opened.ensemble.model))
        example = (
            _any_images(opened.shape, opened.ensemble.bounds)
            if data.data is None
            else opened.test.inputs(slice(2))
        )
        chosen = lambda module, fqn: fqn in noisy or is_convolution(module)  # noqa: E731
        return opened.ensemble.model, example, chosen, opened.ensemble.sampling
    noise_of(options)  # which has to be one, though nothing depends on it here
    network = seeded_network(model, arguments_of(options), options.weights)
    _, example = _examples(network, model, options, data, data.data is not None)
    mean, std = channels_of(options.mean, "--mean"), channels_of(options.std, "--std")
    network, chosen = (
        with_mean_and_std(network, model, mean, std, bounds_of(options)),
        filter_named(options.filter_name or "conv"),
    )
    if isinstance(network, IN_FRONT):
        with suppress(Exception):  # it may fail in any way, which is then what is found
            chosen = in_pixels(network, chosen, example)
    return network, example, chosen, sampling_of(options)


def _any_images(shape: tuple[int, ...], bounds: tuple[float, float] | None) -> "Tensor":
    """Two random inputs of that shape within the bounds, always the same."""
    import torch

    from ..data.images import in_bounds

    generator = torch.Generator("cpu").manual_seed(0)
    images = torch.rand(2, *shape, generator=generator, dtype=torch.float32, device="cpu")
    return in_bounds(images, bounds)


def saved_folder(model: str, what: str, *, written: bool = True, instead: str = "") -> Path:
    """The folder of a saved ensemble, of a command that works on folders alone.

    Args:
        model: as it was written.
        what: is done to it, for the message.
        written: whether the command writes into the folder, which only a folder of the user allows.
        instead: what else the user can do, for the message.
    """
    from ..artefacts.zoo import is_installed, locate
    from ..networks.names import is_network_name

    if is_network_name(model):
        raise InputError(
            f"{model} names a network, and what {what} is a folder of a saved ensemble: write one, "
            f"selfensemble pack {shlex.quote(model)} FOLDER"
        )
    folder = locate(model)
    if written and (not Path(model).is_dir() or is_installed(folder)):
        raise InputError(
            f"{model} is not your own folder: an included or downloaded network {what} in a copy, made by "
            f"selfensemble pack {shlex.quote(model)} FOLDER{instead}"
        )
    return folder


def _check_is_saved(model: str, options: NetworkOptions) -> None:
    """Raise where an option says what a saved ensemble says itself."""
    for name, flag in _OF_NAMED.items():
        if getattr(options, name) is not None:
            raise InputError(f"{model} is a saved ensemble, which says that itself: leave {flag} out")


def _saved(model: str, options: NetworkOptions, data: DataOptions, with_data: bool) -> Opened:
    from ..artefacts import storage
    from ..artefacts.named import OtherArguments, UntrustedNetwork
    from ..artefacts.zoo import locate

    _check_is_saved(model, options)
    if options.network_args is not None and options.network is None:
        raise InputError("--network-args go with --network: add it")
    config = storage.read_config(model)
    try:
        ensemble = storage.load(
            model, options.network, arguments=arguments_of(options), trust_network=options.trust_network
        )
    except UntrustedNetwork as error:
        raise InputError(_how_to_go_on(error)) from error
    except OtherArguments as error:
        raise InputError(f"{error.said}: {_with_its_arguments()}") from error
    ensemble.draws = options.draws or ensemble.draws
    ensemble.sampling = sampling_of(options) or ensemble.sampling
    images = test_data_of(config, data).within(ensemble.bounds) if with_data else None
    return Opened(ensemble, config, Path(model).resolve().name, images, locate(model))


def _named(model: str, options: NetworkOptions, data: DataOptions, with_data: bool) -> Opened:
    from ..artefacts import storage
    from ..artefacts.opening import ensemble_of, seeded_network
    from ..ensemble.checks import ShapeError
    from ..networks.expected import expected_images

    network = seeded_network(model, arguments_of(options), options.weights)
    images, example = _examples(network, model, options, data, with_data)
    told = expected_images(network, model).mean_and_std if options.mean is options.std is None else None
    if told is not None:
        mean, std = (", ".join(f"{value:.4g}" for value in each) for each in told)
        terminal.err.print(
            f"{model} wants standardised images: --mean {mean} --std {std} are put in", soft_wrap=True
        )
    try:
        ensemble = ensemble_of(
            network, model, noise=noise_of(options), draws=options.draws,
            filter_name=options.filter_name or "conv", mean=channels_of(options.mean, "--mean"),
            std=channels_of(options.std, "--std"), example_inputs=example, bounds=bounds_of(options),
            sampling=sampling_of(options),
        )  # fmt: skip
    except ShapeError as error:
        if images is None:
            raise
        raise InputError(f"{error}: read {data.data} as it wants them, --size and --channels") from error
    images = None if images is None else images.within(ensemble.bounds)
    classes, images = classes_of(network, ensemble, images, example, model)
    shape = tuple(example.shape[1:])
    config = storage.describe(ensemble, classes=classes, input_shape=shape)
    return Opened(ensemble, config, re.sub(r"[^\w.-]+", "-", model).strip("-."), images)


def _examples(
    network: "nn.Module", model: str, options: NetworkOptions, data: DataOptions, with_data: bool
) -> tuple["ImageData | None", "Tensor"]:
    """Test images, where they are wanted, and two images of the shape that the network takes."""
    from ..artefacts.config import ArtefactConfig
    from ..networks.expected import expected_images

    shape, bounds = shape_of(options) or expected_images(network, model).shape, bounds_of(options)
    if not with_data:
        if shape is None:
            raise InputError(
                f"{model} does not say the shape of its inputs: pass --shape, e.g. 3x224x224, or 1x16000"
            )
        return None, _any_images(shape, bounds)
    if data.data is None:
        raise InputError(f"{model} does not say what it was trained on: pass --data")
    if shape is not None and len(shape) != 3:
        images = test_data_of(ArtefactConfig(noise={}, draws=1, input_shape=shape), data).within(bounds)
        return images, images.inputs(slice(2))
    square = shape is not None and shape[1] == shape[2]
    wanted = with_size(data, shape[2] if shape is not None and square else None)
    images = test_data_of(ArtefactConfig(noise={}, draws=1), wanted).within(bounds)
    found = images.shape
    if options.shape is not None and found != shape:
        raise InputError(f"{data.data} has images of shape {found}, --shape says {shape}: change it")
    return images, images.inputs(slice(2))


def _with_its_arguments() -> str:
    """The command as it was given, without arguments of the network: it then gets those that were saved."""
    words, kept = iter(sys.argv[1:]), ["selfensemble"]
    for word in words:
        if word == "--network-args":
            next(words, None)
        elif not word.startswith("--network-args="):
            kept.append(word)
    return shlex.join(kept)


def _how_to_go_on(error: "UntrustedNetwork") -> str:
    """What to say where the network of a saved ensemble is a user's own: the command to give."""
    named = error.named
    command = ["selfensemble", *sys.argv[1:], "--network"]
    if named is not None and named.is_here:
        arguments = ["--network-args", json.dumps(named.arguments)] if named.arguments else []
        return (
            f"{error.folder} holds a network that {named.name} makes, whose code is not in it; code of that "
            "name is here, and runs only if you say so. If you trust it: "
            + shlex.join([*command, named.name, *arguments])
        )
    made = "does not say what makes its network" if named is None else (
        f"holds a network that {named.name} makes, and no such code is here"
    )  # fmt: skip
    return f"{error.folder} {made}: say where it is, " + shlex.join([*command, "path/to/file.py:attribute"])
