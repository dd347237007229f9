"""Scales: how much work an experiment is, from minutes on two cores to the published size."""

import functools
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import Field

from ..fast.optimize import Precision
from ..runtime.packages import needs
from ..runtime.schema import Count, NonNegative, Positive, Section

with needs("selfensemble[train]"):
    import yaml


class PaperAttack(Section):
    """C&W at fixed c, one noise draw a step."""

    steps: Count
    lr: Positive


class SearchAttack(Section):
    """C&W with binary search over c, averaged over noise."""

    steps: Count
    binary_search_steps: Count
    eot: Count


class PgdAttack(Section):
    """PGD in L2 on the loss of the ensemble."""

    steps: Count
    eot: Count
    eps: Positive


class DrawsScale(PgdAttack):
    """`repetitions`: independent sets of 100 draws an image."""

    images: Count
    repetitions: Count


class NoiseScale(PgdAttack):
    """`train`: overrides of the grid's recipes; `strength`: c of the paper's attack."""

    train: dict[str, Any]
    init: tuple[NonNegative, ...]
    inner: tuple[NonNegative, ...]
    strength: Positive


class NoiseLevel(Section):
    """`first`: whether the noise of `init` is on the image, or on the features of the first convolution."""

    init: NonNegative
    inner: NonNegative
    first: Literal["image", "features"] = "image"


class LevelsScale(Section):
    """`train`: overrides of the recipes."""

    train: dict[str, Any]
    images: Count
    levels: tuple[NoiseLevel, ...]


class TheoryScale(Section):
    """`probes`: of the trace; `steps`, `radius`: of the local Lipschitz estimate."""

    images: Count
    draws: Annotated[int, Field(ge=2)]
    probes: Count
    steps: Count
    radius: Positive


class CertificateScale(Section):
    """What `certify` does to each image.

    `wanted`: the radius until which draws are counted; `radii`: those that are looked for at once, so that an
    image stops when all of them are decided; none to draw n times. `attacked`: images attacked within
    their radius.
    """

    images: Count
    n0: Count = 100
    n: Annotated[int, Field(ge=2)]
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.001
    wanted: Positive = 0.25
    radii: tuple[Positive, ...] = ()
    attacked: Annotated[int, Field(ge=0)] = 0


class CertaintyScale(Section):
    """`alpha`, `max_draws`: of `decide`; `risk`, `radius`, `robust_draws`: of conformal sets."""

    images: Count
    draws: Annotated[int, Field(ge=2)]
    max_draws: Count
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.001
    risk: Annotated[float, Field(gt=0, lt=1)] = 0.1
    radius: Positive = 0.1
    robust_draws: Annotated[int, Field(ge=2)]


class BoardScale(Section):
    """`steps`: of PGD with one draw a step; `queries`: of a persistent attacker."""

    steps: Count
    queries: Count


class Scale(Section):
    """One entry of `scales.yaml`.

    Attributes:
        train: overrides of every recipe.
        digits: further ones where the data are `digits`.
        attack_steps: most steps of an attack within training.
        images, shard: test images, and how many make a unit of work.
        seeds: of the defender's noise.
        strengths: c of the paper's attack.
        precision: of the gradients that attacks follow; success is decided in float32.
        honest: protocol of the experiments `honest` and `board`.
    """

    name: str
    description: str
    train: dict[str, Any]
    digits: dict[str, Any]
    attack_steps: Count | None = None
    images: Count
    shard: Count
    seeds: Annotated[int, Field(ge=3)]
    strengths: tuple[Positive, ...]
    precision: Precision = "float32"
    paper: PaperAttack
    search: SearchAttack
    draws: DrawsScale
    noise: NoiseScale
    levels: LevelsScale
    theory: TheoryScale
    certificates: CertificateScale
    certified_noise: CertificateScale
    certainty: CertaintyScale
    honest: str
    board: BoardScale


@functools.cache
def _file() -> dict[str, dict[str, Any]]:
    text = (resources.files(__package__) / "scales.yaml").read_text(encoding="utf-8")
    content: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return content


def load_scale(name: str) -> Scale:
    """A shipped scale by its name.

    Raises:
        ValueError: no such scale; the message lists them.
    """
    known = _file()
    if name not in known:
        raise ValueError(f"no scale {name!r}: choose one of {', '.join(known)}")
    return Scale.model_validate({"name": name} | known[name])
