"""The test images that a command works on."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import InputError
from . import terminal
from .data_options import DataOptions

if TYPE_CHECKING:
    from ..artefacts.config import ArtefactConfig
    from ..data.images import ImageData


def test_data_of(config: "ArtefactConfig", data: DataOptions) -> "ImageData":
    """The test images a saved ensemble was trained for, or those that options name.

    Their size is that of the recipe, else, where images of several sizes leave it open, that of the network's
    inputs. Code that the saved ensemble names is not imported: the options have to name it.

    Raises:
        InputError: there are none, or they do not fit.
    """
    from ..data.sources import is_code

    recorded = dict((config.recipe or {}).get("data", {}))
    source = data.data or recorded.get("source")
    if source is None:
        raise InputError("the model does not say what it was trained on: pass --data")
    if data.data is None and "(given in Python" in source:
        raise InputError(f"the model was trained on data of Python, {source}: pass --data")
    if data.data is None and is_code(source):
        raise InputError(
            f"the model was trained on {source}, which is code: it is imported if you say so, --data {source}"
        )
    test = _loaded(source, _reading(recorded, data), config.input_shape, chosen=data.size is not None)
    terminal.note_left_out(test)
    if config.input_shape is not None and test.shape != config.input_shape:
        channels, *sides = config.input_shape
        square = len(sides) == 2 and sides[0] == sides[1]
        raise InputError(
            f"{source} has inputs of shape {test.shape}, the model takes {config.input_shape}: pass the data "
            "it was trained on" + (f", or --size {sides[0]} --channels {channels}" if square else "")
        )
    return test if config.classes is None else test.with_classes(config.classes)


def _reading(recorded: dict[str, Any], data: DataOptions) -> dict[str, Any]:
    """How the images are to be read: as in training, for the rest as options say."""
    from ..runtime.checking import checked
    from ..training.sections import DataSection

    known = {key: value for key, value in recorded.items() if key in DataSection.model_fields}
    reading = checked(DataSection, known, "data of the recipe in config.json").reading()
    if not _is_same(data.data, recorded.get("source")):  # columns and splits of another source are others
        # Where it has no splits of its own it may be the same folder elsewhere: cut as in training.
        reading = {name: reading[name] for name in ("size", "centre", "test_share", "split_seed")}
    return reading | data.given()


def _is_same(given: str | None, recorded: str | None) -> bool:
    """Whether both are one source, however a path is written."""
    if given is None or recorded is None or given == recorded:
        return given in (None, recorded)
    try:
        return Path(given).expanduser().samefile(Path(recorded).expanduser())
    except OSError:  # one of them is no file or folder here
        return False


def _loaded(
    source: str, reading: dict[str, Any], shape: tuple[int, ...] | None, *, chosen: bool
) -> "ImageData":
    """The test images, of the size of the network's inputs where they are photos of other sizes."""
    from ..data.rendering import UnclearError
    from ..data.sources import load_data
    from ..data.streaming import Streamed

    if shape is not None and len(shape) != 3:  # of no images
        return load_data(source, "test", **reading | {"shape": shape})
    fitting = reading if shape is None else reading | {"size": shape[1:], "channels": shape[0]}
    try:
        found = load_data(source, "test", **reading)
    except UnclearError:
        if shape is None or chosen:
            raise
        return load_data(source, "test", **fitting)
    if shape is None or chosen or found.shape == shape or not isinstance(found.images, Streamed):
        return found
    return load_data(source, "test", **fitting)


def with_size(data: DataOptions, size: int | None) -> DataOptions:
    """The same, of a size if none was asked for."""
    return data if data.size is not None or size is None else replace(data, size=size)
