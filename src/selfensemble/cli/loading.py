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
    test = _read(source, recorded, data, config.input_shape)
    terminal.note_left_out(test)
    if config.input_shape is not None and test.shape != config.input_shape:
        channels, *sides = config.input_shape
        square = len(sides) == 2 and sides[0] == sides[1]
        raise InputError(
            f"{source} has inputs of shape {test.shape}, the model takes {config.input_shape}: pass the data "
            "it was trained on" + (f", or --size {sides[0]} --channels {channels}" if square else "")
        )
    return test if config.classes is None else test.with_classes(config.classes)


_OF_A_SOURCE = ("train_split", "test_split", "image_column", "label_column")


def _read(
    source: str, recorded: dict[str, Any], data: DataOptions, shape: tuple[int, ...] | None
) -> "ImageData":
    """The test images, read as in training, for the rest as options say.

    Another source may be the same images elsewhere: splits and columns are those of training where it has
    such, so that no image that was trained on is one of the test set.
    """
    from ..runtime.checking import checked
    from ..training.sections import DataSection

    known = {key: value for key, value in recorded.items() if key in DataSection.model_fields}
    reading = checked(DataSection, known, "data of the recipe in config.json").reading()
    as_usual, chosen = reading, data.size is not None
    if not _is_same(data.data, recorded.get("source")):
        names = ("size", "centre", "test_share", "split_seed")
        reading, as_usual = ({name: reading[name] for name in each} for each in (names + _OF_A_SOURCE, names))
    reading, as_usual = reading | data.given(), as_usual | data.given()
    try:
        return _loaded(source, reading, shape, chosen=chosen)
    except (FileNotFoundError, ValueError):
        asked = {name: reading[name] for name in _OF_A_SOURCE if reading.get(name) != as_usual.get(name)}
        if not asked:
            raise
    found = _loaded(source, as_usual, shape, chosen=chosen)
    said = ", ".join(f"{name} {value}" for name, value in asked.items())
    terminal.note(f"{source} is not read as the training data were ({said}), which it has not: as usual")
    return found


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
