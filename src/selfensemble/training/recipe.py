"""Recipes: what to train on what, as validated YAML.

A recipe is a file, or the name of one shipped in `training/recipes/`.
"""

import functools
from collections.abc import Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, field_validator, model_validator

from ..networks.models import MODELS
from ..noise.randomness import AnyRandomness
from ..noise.resize_pad import ResizePadConfig
from ..runtime.checking import checked
from ..runtime.schema import Section, Seed
from ..runtime.texts import parsed_yaml, read_text
from .defenses import AnyDefense, CrossEntropy
from .sections import DataSection, ModelSection, NoiseSection, TrainSection

# Keys that change nothing of what a training ends in.
_WITHOUT_EFFECT = {"description", "data.workers", "train.checkpoint_steps"}


class Recipe(Section):
    """Everything that a training run depends on, except the machine.

    `resize_pad`: random resize-and-pad before the network, in training and at test time. `randomness`:
    random layers of another kind within it, see `selfensemble.noise.randomness`.
    """

    name: str
    description: str = ""
    seed: Seed = 0
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    resize_pad: ResizePadConfig | None = None
    randomness: AnyRandomness | None = None
    noise: NoiseSection = NoiseSection()
    defense: AnyDefense = CrossEntropy()
    train: TrainSection = TrainSection()

    @field_validator("defense", mode="before")
    @classmethod
    def _is_cross_entropy(cls, values: Any) -> Any:
        """A defense without a name is the one that a recipe without a defense has."""
        named = not isinstance(values, Mapping) or "name" in values
        return values if named else {"name": CrossEntropy().name} | dict(values)

    @model_validator(mode="after")
    def _has_what_its_defense_trains(self) -> Self:
        needed, name = self.defense.trains, None if self.randomness is None else self.randomness.name
        if needed is not None and name != needed:
            raise ValueError(
                f"defense {self.defense.name} trains random layers of the kind {needed}: set "
                f"randomness: {{name: {needed}}}"
            )
        return self

    def teacher(self) -> "Recipe | None":
        """The recipe of a network that has to be trained first, if the defense wants one."""
        defense = self.defense.teacher()
        if defense is None:
            return None
        return self.model_copy(update={"name": f"{self.name}-teacher", "defense": defense})

    def replaced(self, section: str, **values: Any) -> "Recipe":
        """The same recipe but for some values of a section."""
        own: Section = getattr(self, section)
        return self.model_copy(update={section: own.model_copy(update=values)})

    def differs_from(self, saved: dict[str, Any]) -> list[str]:
        """Dotted names of the keys in which a saved recipe is another one, with other weights in the end.

        A key that has come since it was saved has its default.
        """
        with suppress(ValidationError):  # what is no recipe is compared as it is
            saved = Recipe.model_validate(saved).model_dump(mode="json")
        keys = differing_keys(saved, self.model_dump(mode="json"))
        return [key for key in keys if key not in _WITHOUT_EFFECT]


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return list(_shipped())


@functools.cache
def _shipped() -> tuple[str, ...]:
    folder = resources.files(__package__) / "recipes"
    return tuple(sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def load_recipe(source: str, overrides: list[str] | None = None) -> Recipe:
    """Read and validate a recipe.

    Args:
        source: a shipped name, or the path of a YAML file.
        overrides: "section.key=value" each; values are YAML.

    Raises:
        FileNotFoundError: no such recipe; the message lists the shipped ones.
        ValueError: YAML or a key or a value is wrong; the message says which.
    """
    text = _read(source)
    values = parsed_yaml(text, f"recipe {source}", "selfensemble[train]")
    if not isinstance(values, dict):
        raise ValueError(f"recipe {source} must hold keys and values, e.g. `train: {{epochs: 5}}`")
    values.setdefault("name", Path(source).stem)
    for override in overrides or []:
        _override(values, override)
    recipe = checked(Recipe, values, f"recipe {source}")
    if recipe.model.name not in MODELS:
        raise ValueError(
            f"recipe {source}: unknown model.name {recipe.model.name!r}; choose one of {', '.join(MODELS)}"
        )
    return recipe


def differing_keys(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the keys in which two recipes differ."""
    names: list[str] = []
    for key in sorted(left.keys() | right.keys()):
        one, other = left.get(key), right.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            names += differing_keys(one, other, f"{prefix}{key}.")
        elif one != other:
            names.append(f"{prefix}{key}")
    return names


def public_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the folders that images and first weights lay in on someone's machine."""
    shown = dict(recipe)
    for section, key in (("data", "source"), ("model", "weights"), ("model", "network")):
        value = recipe.get(section, {}).get(key)
        if isinstance(value, str) and ("/" in value or "\\" in value):
            shown[section] = shown[section] | {key: value.replace("\\", "/").rstrip("/").rpartition("/")[2]}
    return shown


def _read(source: str) -> str:
    if source in shipped_recipes():
        return (resources.files(__package__) / "recipes" / f"{source}.yaml").read_text(encoding="utf-8")
    path = Path(source)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return read_text(path)
    raise FileNotFoundError(
        f"no recipe {source!r}: pass a .yaml file or one of {', '.join(shipped_recipes())}"
    )


def _override(values: dict[str, Any], override: str) -> None:

    path, found, text = override.partition("=")
    *sections, key = path.strip().split(".")
    if not found or not key:
        raise ValueError(f"cannot read override {override!r}: write section.key=value")
    value = parsed_yaml(text, f"the value in {override!r}")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"cannot set {path!r}: {section!r} is not a section")
    values[key] = value
