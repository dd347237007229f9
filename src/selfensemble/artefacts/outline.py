"""What the `config.json` of a saved ensemble says, checked without PyTorch, which takes seconds to load."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..networks.names import Activation
from ..runtime.files import read_versioned
from ..runtime.schema import Bounds
from .zoo import locate

FORMAT_VERSION = 1
CONFIG = "config.json"

_MANY = 10**8  # nobody means more, and a stranger may have written the file
_Level = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Config = TypeVar("_Config", bound="Outline")


def _keys_and_values(value: object) -> object:
    if not isinstance(value, dict | BaseModel | None):
        raise ValueError("must hold keys and values")
    return value


def _recipe(value: dict[str, Any]) -> dict[str, Any]:
    """Recipes of other versions have other keys; what is read without them must be as it is in all."""
    for name in ("data", "model", "noise", "train"):
        section = value.get(name, {})
        if not isinstance(section, dict):
            raise ValueError(f"{name} must hold keys and values, got {section!r}")
        for key in ("source", "network", "weights"):
            if not isinstance(section.get(key), str | None):
                raise ValueError(f"{name}.{key} must be text, got {section[key]!r}")
    return value


_Part = Annotated[Any, BeforeValidator(_keys_and_values)]


class NormalizationRecord(BaseModel):
    """Mean and standard deviation of the channels of the images, see `Normalized`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mean: Annotated[tuple[float, ...], Field(min_length=1)]
    std: Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=1)]


class ArchitectureRecord(BaseModel):
    """Arguments of `create_model`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    classes: Annotated[int, Field(ge=2, le=_MANY)]
    channels: Annotated[int, Field(ge=1, le=_MANY)]
    width: float = 1.0
    activation: Activation = "relu"


class TransformersRecord(BaseModel):
    """A network of the package transformers: the name of its class there, and its configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, Field(pattern=r"^\w+$")]
    config: dict[str, Any]


class NamedRecord(BaseModel):
    """A network that is neither one of `MODELS` nor of transformers.

    Attributes:
        name: see `network_from`; of a file its path below the folder that it was saved from, or its name.
        arguments: what its factory was called with; None where that is not known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, Field(pattern=r"^[\w ./\\+-]+:[\w./+-]+$", max_length=300)]
    arguments: dict[str, Any] | None = None


class Outline(BaseModel):
    """The keys of `config.json`; `ArtefactConfig` also checks what random layers and rules hold."""

    # Built when something is read: a command reads one of the two.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    format: Literal["selfensemble"] = "selfensemble"
    format_version: int = FORMAT_VERSION
    weights: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    architecture: ArchitectureRecord | None = None
    transformers: TransformersRecord | None = None
    network: NamedRecord | None = None
    normalize: NormalizationRecord | None = None
    flip_average: bool = False
    noise: dict[str, _Level | Annotated[tuple[_Level, ...], Field(min_length=1)]]
    resize_pad: _Part = None
    randomness: _Part = None
    draws: Annotated[int, Field(ge=1, le=_MANY)]
    sampling: Literal["per_image", "shared"] = "shared"
    bounds: Bounds | None = (0.0, 1.0)
    classes: tuple[str, ...] | None = None
    input_shape: (
        Annotated[tuple[Annotated[int, Field(ge=1, le=_MANY)], ...], Field(min_length=1, max_length=4)] | None
    ) = None
    metrics: dict[str, Any] = {}
    recipe: Annotated[dict[str, Any], AfterValidator(_recipe)] | None = None
    stopping: _Part = None
    sets: _Part = None

    @model_validator(mode="after")
    def _names_its_classes(self) -> Self:
        if self.architecture and self.classes and len(self.classes) != self.architecture.classes:
            raise ValueError(
                f"classes has {len(self.classes)} names, the network {self.architecture.classes} classes"
            )
        return self


def read_as(schema: type[_Config], folder: str | Path) -> _Config:
    """The checked `config.json` of a saved ensemble; a folder, or a name of the zoo.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: the file is damaged, foreign, or written by a newer version.
    """
    path = locate(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"no {CONFIG} in {folder}: pass the folder that `selfensemble train` wrote (its --out)"
        )
    return read_versioned(path, schema, "selfensemble", FORMAT_VERSION, "train again or restore the file")
