"""How much noise: accuracy with and without attack over the levels of the noise, and which to take."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..artefacts.storage import load
from ..attacks import pgd
from ..attacks.norms import Norm
from ..data.labels import class_numbers
from ..data.sources import is_code
from ..ensemble.checks import check_images
from ..ensemble.draws import Draws
from ..ensemble.ensemble import SelfEnsemble
from ..evaluation.identity import model_record
from ..evaluation.judge import judge
from ..fast.optimize import optimize
from ..noise.injection import eval_mode, noise_layers, remove_noise_, set_levels_
from ..noise.layer import NoiseConfig
from ..noise.levels import levels_named as levels_named
from ..report.figures import Line, Panel, draw
from ..report.intervals import Share, share
from ..report.page import Page, Picture, Table
from ..training.building import is_built_in
from ..training.recipe import Recipe
from ..training.trainer import Trainer

# Both published levels, and multiples of them.
LEVELS = tuple(NoiseConfig(2 * inner, inner) for inner in (0.0, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2))
_PLACES = {"init": "first", "inner": "inner"}
_ABOUT = """\
Each level is a network with that much noise on the image (*init*) and before every other convolution
(*inner*). Accuracies are those of the whole ensemble on fresh noise, with 95 % Clopper-Pearson intervals.
Attacked is an upper bound: PGD follows the loss of the ensemble, averaged over its noise; stronger attacks
may exist. *Evaluate the level you choose on other images, by the honest protocol.*"""

FineTune = Callable[[SelfEnsemble], SelfEnsemble | None]


@dataclass(frozen=True)
class Level:
    """One level of the noise.

    Attributes:
        noise: standard deviations.
        clean: accuracy without attack.
        attacked: accuracy under the attack.
        ensemble: the network that was measured.
    """

    noise: NoiseConfig
    clean: Share
    attacked: Share
    ensemble: SelfEnsemble

    @property
    def name(self) -> str:
        """As the command line takes it."""
        return f"{self.noise.init_std:g}:{self.noise.inner_std:g}"


@dataclass(frozen=True)
class Sweep:
    """What `tune` found.

    Attributes:
        levels: in the order they were asked for.
        recommended: the level with the highest attacked accuracy among those within the allowed loss of clean
            accuracy; if two are equal, the one with less noise.
        give_up: what was allowed.
        settings: of the attack.
    """

    levels: tuple[Level, ...]
    recommended: Level
    give_up: float
    settings: dict[str, Any]

    def page(self) -> Page:
        """Table, plot and recommendation."""
        attack = "PGD {norm} {eps:g}".format(**self.settings)
        rows = [
            [level.name + (" (recommended)" if level is self.recommended else ""), level.clean.text,
             level.attacked.text]
            for level in self.levels
        ]  # fmt: skip
        varied = "init" if len({level.noise.inner_std for level in self.levels}) == 1 else "inner"
        x = [getattr(level.noise, f"{varied}_std") for level in self.levels]
        order = sorted(range(len(x)), key=x.__getitem__)
        lines = [
            Line(label, look, [x[i] for i in order], [getattr(self.levels[i], field) for i in order])
            for look, (label, field) in enumerate((("no attack", "clean"), (attack, "attacked")))
        ]
        caption = f"Accuracy in %; {self.settings['images']} images, seed {self.settings['seed']}."
        figure = draw([[Panel("", f"std of the {_PLACES[varied]} noise", "accuracy, %", lines)]])
        chosen = self.recommended
        about = (
            f"{_ABOUT}\n\nRecommended: `{chosen.name}`, the most accurate level under attack of those that "
            f"give up at most {100 * self.give_up:g} points without one."
        )
        return Page("Levels of the noise", about, [
            Table("Accuracy by level", caption, ["init:inner", "no attack", attack], rows),
            Picture("levels", "Accuracy against the level; bars: 95 % intervals.", figure),
        ])  # fmt: skip

    def values(self) -> dict[str, Any]:
        """For JSON."""
        levels = [
            {"noise": {"init_std": level.noise.init_std, "inner_std": level.noise.inner_std},
             "clean": level.clean._asdict(), "attacked": level.attacked._asdict()}
            for level in self.levels
        ]  # fmt: skip
        number = self.levels.index(self.recommended)
        return {"levels": levels, "recommended": levels[number], "give_up": self.give_up} | self.settings


def tune(
    ensemble: SelfEnsemble,
    inputs: Tensor,
    labels: Tensor,
    levels: Sequence[NoiseConfig] = LEVELS,
    *,
    fine_tune: FineTune | None = None,
    norm: Norm = "l2",
    eps: float = 0.5,
    steps: int = 20,
    eot: int = 4,
    give_up: float = 0.05,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> Sweep:
    """Measure an ensemble at several levels of its noise, with and without attack, and recommend one.

    Args:
        ensemble: stays unchanged.
        inputs: (B, C, H, W) in [0, 1], images that later figures must not use: the choice has seen them.
        labels: (B,) integers.
        levels: of the noise.
        fine_tune: trains a copy with a level, in place, or returns another network; None measures the network
            as it is, which shows how much noise it tolerates now, not after training.
        norm, eps, steps, eot: of the PGD attack; eps in [0, 1] pixels.
        give_up: clean accuracy that the recommendation can cost, compared with the best level.
        seed: of attack and judge.
        progress: called with a text and a share.

    Returns:
        Accuracies with intervals, in the order of `levels`.

    Raises:
        ValueError: no levels or no images, or levels that do not fit the network.
    """
    check_images(inputs)
    if not levels or len(inputs) == 0:
        raise ValueError("tune needs at least one level and one image")
    classes = ensemble.predict(inputs[:2], draws=1).probabilities.shape[1]
    labels = class_numbers(labels, len(inputs), device=inputs.device, classes=classes)
    if not (math.isfinite(give_up) and 0 <= give_up <= 1):
        raise ValueError(f"give_up must be in [0, 1], got {give_up}")
    found = []
    for number, noise in enumerate(levels):
        if progress is not None:
            progress(f"noise {noise.init_std:g}:{noise.inner_std:g}", number / len(levels))
        candidate = _candidate(ensemble, noise, inputs)
        if fine_tune is not None:
            candidate = fine_tune(candidate.train()) or candidate
        found.append(_measured(candidate.eval(), noise, inputs, labels, norm, eps, steps, eot, seed))
    least = max(level.clean.value for level in found) - give_up - 1e-9  # of rounding
    bearable = [level for level in found if level.clean.value >= least]
    best = max(
        bearable, key=lambda level: (level.attacked.value, -level.noise.init_std, -level.noise.inner_std)
    )
    settings = {"norm": norm, "eps": eps, "steps": steps, "eot": eot, "images": len(inputs), "seed": seed}
    return Sweep(tuple(found), best, give_up, settings)


def _candidate(ensemble: SelfEnsemble, noise: NoiseConfig, inputs: Tensor) -> SelfEnsemble:
    """A copy with other levels, and no more draws than differ."""
    candidate = copy.deepcopy(ensemble)
    candidate.stopping = candidate.sets = None  # calibrated at one level
    set_levels_(candidate.model, noise)
    with eval_mode(candidate):
        candidate.draws = ensemble.draws if Draws(candidate, inputs).varies() else 1
    return candidate


def _measured(
    ensemble: SelfEnsemble, noise: NoiseConfig, inputs: Tensor, labels: Tensor,
    norm: Norm, eps: float, steps: int, eot: int, seed: int,
) -> Level:  # fmt: skip
    fast = optimize(ensemble, inputs)
    attacked = pgd(
        fast, inputs, labels, norm=norm, eps=eps, steps=steps, eot=eot, average="probabilities",
        early_stop=True, seed=seed,
    )  # fmt: skip
    right = [
        judge(ensemble, inputs, images, labels, seed=seed + 1).correct.cpu().numpy()
        for images in (inputs, attacked)
    ]
    return Level(noise, share(right[0]), share(right[1]), ensemble)


def training(
    base: Recipe,
    weights: str | None,
    epochs: int,
    folder: Path,
    data: str | None = None,
    reading: dict[str, Any] | None = None,
) -> FineTune:
    """A `fine_tune` that trains by a recipe; what it has trained in `folder` is used again.

    Args:
        base: the recipe, but for levels and epochs.
        weights: where those of a saved ensemble are; None for a network that is none, whose own are taken.
        epochs: at each level.
        folder: of the trained networks.
        data: overrides the source of the recipe's.
        reading: overrides how it is read.

    Raises:
        ValueError: the images come from code that nobody named.
    """
    base = base.replaced("data", **(reading or {}))
    if data is None and is_code(base.data.source):
        raise ValueError(f"the recipe's images come from code, {base.data.source}: name it, --data")

    def fine_tune(candidate: SelfEnsemble) -> SelfEnsemble:
        stds = [float(np.max(layer.std)) for layer in noise_layers(candidate.model).values()]
        digest = model_record(candidate, "", None).digest.rpartition(":")[2][:8]  # of its first weights
        place = f"{stds[0]:g}-{stds[-1]:g}-{digest}"
        levels: dict[str, Any] = {"init_std": stds[0], "inner_std": stds[-1], "learn": None}
        levels["sampling"] = candidate.sampling
        own = base.replaced("noise", **levels).replaced("train", epochs=epochs)
        if weights is not None and is_built_in(base):
            network = None
            own = own.replaced("model", weights=weights)
        else:
            network = _without_noise(candidate, base)
            own = own.replaced("model", weights=None)
        Trainer(own, folder / place, data=data, model=network, resume=True).run()
        return load(folder / place, copy.deepcopy(network))

    return fine_tune


def _without_noise(candidate: SelfEnsemble, recipe: Recipe) -> nn.Module:
    """The network of an ensemble, to be trained by a recipe that would have to import it otherwise."""
    if recipe.randomness is not None or recipe.resize_pad is not None:
        raise ValueError(
            "a network of your own with random layers is fine-tuned in Python: rse.tune(..., fine_tune=...)"
        )
    model = copy.deepcopy(candidate.model)
    remove_noise_(model)
    return model
