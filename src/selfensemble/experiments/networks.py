"""Networks of the experiments: which recipe, how it is shown, where it lies, and training it if need be."""

import functools
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..artefacts import storage
from ..artefacts.zoo import zoo
from ..certainty.flipping import flip_averaged
from ..data.tables import HUB_IDS
from ..ensemble.ensemble import SelfEnsemble
from ..noise.injection import set_levels_
from ..noise.layer import NoiseConfig
from ..runtime.packages import needs
from ..runtime.schema import Section
from ..training.checkpoints import CHECKPOINT, RESULTS
from ..training.recipe import Recipe, load_recipe, public_recipe, shipped_recipes
from ..training.trainer import Progress, Trainer
from .scales import Scale

with needs("selfensemble[train]"):
    import yaml


class Family(Section):
    """Networks of one architecture: the `prefix` of their recipes, the key of `MODELS`, the data."""

    prefix: str
    model: str
    source: str


class Network(Section):
    """One entry of `networks.yaml`, see there; `overrides` of its recipe, `folder` if not the recipe's.

    `after`: the network whose weights it begins with, where its recipe names first weights.
    """

    name: str
    title: str
    recipe: str
    published: str | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    scales: dict[str, dict[str, Any]] = Field(default_factory=dict)
    digits: dict[str, Any] = Field(default_factory=dict)
    folder: str | None = None
    logit_scale: float = 1.0
    flip_average: bool = False
    test_noise: tuple[float, float] | None = None
    after: str | None = None

    @property
    def changes(self) -> str:
        """What is changed after training, for people."""
        if self.test_noise is not None:
            return f"noise {self.test_noise[0]:g}, {self.test_noise[1]:g} in testing"
        if self.flip_average:
            return "mean of an image and its mirror image"
        return f"logits times {self.logit_scale:g}" if self.logit_scale != 1 else ""


class ScaledLogits(nn.Module):
    """A network whose logits are multiplied by a constant: the same answers, other margins."""

    factor: Tensor

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model = model
        self.register_buffer(
            "factor", torch.tensor(factor, dtype=torch.float32, device="cpu")
        )  # a part of the network's digest

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs)
        return self.factor * logits


@dataclass(frozen=True)
class Trained:
    """A trained network, names of its classes, and what `results.json` beside it says of its training."""

    ensemble: SelfEnsemble
    recipe: Recipe
    training: dict[str, Any]
    classes: tuple[str, ...] | None


def family(name: str) -> Family:
    """A family of `networks.yaml`."""
    return Family.model_validate(_file()["families"][name])


def network(entry: str, **changes: Any) -> Network:
    """A network of `networks.yaml`, with other values for some of its keys."""
    return Network.model_validate({"name": entry} | _file()["networks"][entry] | changes)


@functools.cache
def _file() -> dict[str, dict[str, Any]]:
    text = (resources.files(__package__) / "networks.yaml").read_text(encoding="utf-8")
    content: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return content


def recipe_of(network: Network, kin: Family, scale: Scale, source: str | None) -> tuple[str, Recipe]:
    """Folder name and recipe of a network at a scale; `source` overrides where the images come from.

    A family without a recipe of its own for a defense takes that of VGG16, with its network and data.
    """
    name = f"{kin.prefix}-{network.recipe}"
    values: dict[str, Any] = {}
    base = name
    if name not in shipped_recipes():
        base = f"{family('vgg16').prefix}-{network.recipe}"
        values |= {"name": name, "model.name": kin.model, "data.source": kin.source}
    values |= scale.train | network.scales.get(scale.name, {}) | network.overrides
    if source is not None:
        values["data.source"] = source
    if source == "digits":
        values |= scale.digits | network.digits
    if source == "digits":
        values.pop("model.weights", None)  # of a network of another architecture
    elif base != name and "model.weights" in values:
        values["model.weights"] = _of_family(values["model.weights"], kin)
    recipe = load_recipe(base, _written(values))
    steps = getattr(recipe.defense, "steps", None)
    if scale.attack_steps is not None and steps is not None and steps > scale.attack_steps:
        recipe = load_recipe(base, _written(values | {"defense.steps": scale.attack_steps}))
    return name if network.folder is None else _of_family(network.folder, kin), recipe


def _of_family(folder: str, kin: Family) -> str:
    """The folder of the same network in another family; `networks.yaml` names those of VGG16."""
    return folder.replace(family("vgg16").prefix, kin.prefix, 1)


def _written(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def trained(
    wanted: Network, kin: Family, scale: Scale, source: str | None, models: Path, progress: Progress
) -> Trained:
    """The network in its folder of `models`; if that is not there, the zoo's, or it is trained to the end.

    Raises:
        ValueError: the folder holds a network of another recipe; the message names the differing keys.
    """
    name, recipe = recipe_of(wanted, kin, scale, source)
    folder = _place_of(models / name, recipe)
    if not _is_whole(folder):
        begun = recipe
        if wanted.after is not None and recipe.model.weights is not None:
            before = network(wanted.after)
            trained(before, kin, scale, source, models, progress)
            its_name, its_recipe = recipe_of(before, kin, scale, source)
            first = {"weights": str(_place_of(models / its_name, its_recipe))}
            begun = recipe.model_copy(update={"model": recipe.model.model_copy(update=first)})
        saved = folder / CHECKPOINT
        progress(0, 1, "continuing its training" if saved.is_file() else "training")
        Trainer(begun, folder, data=recipe.data.source, resume=True, progress=progress).run()
    config = storage.read_config(folder)
    if config.recipe is None:
        raise ValueError(f"{folder} holds a network without a recipe: pass another --models")
    differing = _differing(config.recipe, recipe)
    if differing:
        raise ValueError(
            f"{folder} holds a network of another recipe (different: {', '.join(differing)}); it is "
            "untouched: pass another --models, or remove it to train again"
        )
    results = folder / RESULTS
    training = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    own = Recipe.model_validate(config.recipe)
    ensemble = changed(storage.load(folder), wanted, config.input_shape)
    return Trained(ensemble, own, training, config.classes)


def _place_of(folder: Path, recipe: Recipe) -> Path:
    """`folder`, or where it holds nothing the network of this name in the zoo, if its recipe is the same."""
    if not (_is_whole(folder) or (folder / CHECKPOINT).exists()):
        known = zoo().get(folder.name)
        saved = None if known is None else storage.read_config(known).recipe
        if known is not None and saved is not None and not _differing(saved, recipe):
            return known
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a network lies there whose training is over, its evaluation at the end included."""
    saved = (folder / storage.CONFIG).is_file() and (folder / storage.WEIGHTS).is_file()
    return saved and ((folder / RESULTS).is_file() or not (folder / CHECKPOINT).is_file())


def _differing(saved: dict[str, Any], wanted: Recipe) -> list[str]:
    """Keys that matter in which the recipes differ: where images lie does not."""
    # Folders may move; two known sets of images are different images.
    sources = {saved.get("data", {}).get("source"), wanted.data.source}
    keys = wanted.differs_from(public_recipe(saved))
    return keys if sources <= {"digits", *HUB_IDS} else [key for key in keys if key != "data.source"]


def changed(ensemble: SelfEnsemble, network: Network, shape: tuple[int, ...] | None) -> SelfEnsemble:
    """The ensemble, of inputs of that shape, with what the network changes of it after training."""
    if network.flip_average:
        if shape is None:
            raise ValueError(
                f"the folder of {network.name} does not say the shape of its images: train it again"
            )
        ensemble = flip_averaged(ensemble, torch.zeros(2, *shape, dtype=torch.float32, device="cpu"))
    if network.logit_scale != 1:
        ensemble.model = ScaledLogits(ensemble.model, network.logit_scale)
    if network.test_noise is not None:
        set_levels_(ensemble.model, NoiseConfig(*network.test_noise))
        ensemble.draws = 10 if any(network.test_noise) else 1
    for parameter in ensemble.parameters():
        parameter.requires_grad_(False)
    return ensemble.eval()


def local_name(source: str) -> str:
    """Where images come from, without the folders of this machine."""
    return Path(source).name if Path(source).is_dir() else source
