"""Protocols: which attacks, with which budgets and seeds, on how many images. YAML, validated."""

import inspect
import itertools
import math
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..attacks import ATTACKS
from ..attacks.averaging import NoiseOptions
from ..fast.optimize import Precision
from ..runtime.checking import checked
from ..runtime.schema import Section, Seed
from ..runtime.texts import parsed_yaml, read_text

_FOLDER = "protocols"
_OURS = {"model", "inputs", "labels", "targeted", "max_batch", "noise", "seed", "frozen"}
# Attacks that look for the nearest image: `eps` of their specification judges, and does not bind them. Each
# radius has an entry, whose images are taken on to the radius, and so have the images wherever they are.
MINIMUM_NORM = ("cw", "ddn", "fmn", "fab")


class JudgeSection(Section):
    """How the defender is asked.

    `seeds`: seeds of its noise, a query each, for every attack. `queries`: queries of the worst case and
    of the clean images, for the persistent attacker's curve.
    """

    seeds: Annotated[int, Field(ge=1)] = 3
    queries: Annotated[int, Field(ge=1)] = 100


class AttackSpec(BaseModel):
    """One attack: its name and its settings. Lists of settings are crossed.

    `surrogate`: "base" makes the images on the same network with its noise off (transfer). `title`: for
    people; made from the settings where it is missing. `everywhere`: of attacks that go in turn, this one
    sees all images nonetheless. Numbers may be written as fractions, `8/255`.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    attack: str
    title: str | None = None
    surrogate: Literal["base"] | None = None
    everywhere: bool = False


class Protocol(Section):
    """A way to evaluate a model.

    `images`: how many of the test set, from the first on; `shard`: images at a time. `precision`: of the
    gradients that attacks follow, "float32" or "bf16" (three times as fast where the device has bfloat16
    arithmetic; elsewhere they are in float32); whether an attack succeeds is decided in float32, and so
    judges the judge. `bits`: 8 to judge attacked images as files hold them, rounded to 256 levels; null for
    images as the attacks return them.
    `in_turn`: an attack sees only the images that no earlier one within its ball surely fools, and takes
    over the others: budgets go where they can change something, and its figures are those of all until then.
    `version`: edition of a protocol of this name.
    """

    name: str
    description: str = ""
    version: Annotated[int, Field(ge=1)] = 1
    images: Annotated[int, Field(ge=1)] = 1000
    seed: Seed = 0
    shard: Annotated[int, Field(ge=1)] = 100
    precision: Precision = "float32"
    bits: Literal[8] | None = None
    in_turn: bool = False
    judge: JudgeSection = JudgeSection()
    checks: bool = False
    attacks: tuple[AttackSpec, ...]

    def record(self) -> dict[str, Any]:
        """What results and folders of runs hold of it; newer keys only where they say something."""
        values = self.model_dump(mode="json")
        values["attacks"] = [_said(attack, {"everywhere": False}) for attack in values["attacks"]]
        return _said(values, {"version": 1, "bits": None, "in_turn": False})


def _said(values: dict[str, Any], unsaid: dict[str, Any]) -> dict[str, Any]:
    """`values` without those of `unsaid` that are as there."""
    return {key: value for key, value in values.items() if key not in unsaid or value != unsaid[key]}


@dataclass(frozen=True, slots=True)
class Run:
    """One attack with one set of settings, and the radii within which its images are judged.

    Attributes:
        key: unique within the protocol, for file names.
        title: for people, without the radius.
        settings: keyword arguments of the attack, `eps` among them where it binds the attack.
        norm: of the distances judged, or None.
        radii: where empty, images are judged wherever they are.
        everywhere: whether it sees all images where attacks go in turn.
    """

    key: str
    title: str
    attack: str
    surrogate: Literal["base"] | None
    settings: dict[str, Any]
    norm: str | None
    radii: tuple[float, ...]
    everywhere: bool = False

    def call(self) -> Callable[..., Tensor]:
        """The attack itself."""
        return ATTACKS[self.attack]


def shipped_protocols() -> list[str]:
    """Names of the protocols in the package."""
    folder = resources.files(__package__) / _FOLDER
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_protocol(source: str, overrides: dict[str, Any] | None = None) -> Protocol:
    """Read and validate a protocol.

    Args:
        source: a shipped name, or the path of a YAML file.
        overrides: values for top-level keys.

    Raises:
        FileNotFoundError: no such protocol; the message lists the shipped ones.
        ValueError: YAML, a key, an attack or a value is wrong; the message says which.
    """
    if source in shipped_protocols():
        text = (resources.files(__package__) / _FOLDER / f"{source}.yaml").read_text(encoding="utf-8")
    elif Path(source).suffix in (".yaml", ".yml") and Path(source).is_file():
        text = read_text(Path(source))
    else:
        raise FileNotFoundError(
            f"no protocol {source!r}: pass a .yaml file or one of {', '.join(shipped_protocols())}"
        )
    what = f"protocol {source}"
    values = parsed_yaml(text, what)
    if not isinstance(values, dict):
        raise ValueError(f"{what} must hold keys and values, e.g. `attacks: [...]`")
    values.setdefault("name", Path(source).stem)
    protocol = checked(Protocol, values | (overrides or {}), what)
    try:
        expand(protocol)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    return protocol


def expand(protocol: Protocol) -> list[Run]:
    """The runs of a protocol, its lists of settings crossed, every setting checked.

    Raises:
        ValueError: an attack or a setting is unknown, or a value has a wrong type or range.
    """
    runs: list[Run] = []
    for place, spec in enumerate(protocol.attacks):
        runs += _runs(place, spec)
    if not runs:
        raise ValueError("attacks is empty: name at least one attack")
    return runs


def _runs(place: int, spec: AttackSpec) -> Iterator[Run]:
    if spec.attack not in ATTACKS:
        raise ValueError(f"attacks.{place}: unknown attack {spec.attack!r}; known: {', '.join(ATTACKS)}")
    given = dict(spec.model_extra or {})
    radii: tuple[float, ...] = ()
    if spec.attack in MINIMUM_NORM and "eps" in given:
        value = given.pop("eps")
        each = value if isinstance(value, list) else [value]
        radii = tuple(check_radius(number(eps), f"attacks.{place}.eps") for eps in each)
    known = _parameters(spec.attack)
    for name in given:
        if name not in known:
            raise ValueError(
                f"attacks.{place}: {spec.attack} has no setting {name!r}; known: {', '.join(known)}"
            )
    if empty := [name for name, value in (spec.model_extra or {}).items() if value == []]:
        raise ValueError(f"attacks.{place}.{empty[0]} is an empty list: give a value, or leave it out")
    lists = [value if isinstance(value, list) else [value] for value in given.values()]
    for choice, values in enumerate(itertools.product(*lists)):
        settings = {}
        for name, value in zip(given, values, strict=True):
            settings[name] = checked(known[name], number(value), f"attacks.{place}.{name}")
        default = inspect.signature(ATTACKS[spec.attack]).parameters
        norm = settings.get("norm", default["norm"].default if "norm" in default else None)
        bound = radii
        if "eps" in default and spec.attack not in MINIMUM_NORM:
            bound = (check_radius(settings.get("eps", default["eps"].default), f"attacks.{place}.eps"),)
        if spec.attack in ("cw", "ddn", "cw-paper"):
            norm = "l2"
        title = spec.title or _title(spec, settings)
        yield Run(
            f"{place:02d}-{choice:02d}-{spec.attack}",
            title,
            spec.attack,
            spec.surrogate,
            settings,
            norm,
            bound,
            spec.everywhere,
        )


def check_radius(eps: Any, where: str) -> float:
    """`eps` as a float, or a ValueError unless it is finite and above 0."""
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not math.isfinite(eps) or eps <= 0:
        raise ValueError(
            f"{where} must be a number above 0, in the units of the inputs, such as 8/255; got {eps!r}"
        )
    return float(eps)


def _parameters(attack: str) -> dict[str, Any]:
    """Settings of an attack that a protocol may give, with their types."""
    hints = typing.get_type_hints(ATTACKS[attack])
    own = [name for name in inspect.signature(ATTACKS[attack]).parameters if name not in _OURS]
    shared = {name: hint for name, hint in typing.get_type_hints(NoiseOptions).items() if name not in _OURS}
    return {name: hints[name] for name in own} | shared


def number(value: Any) -> Any:
    """Text such as `8/255` or `0.5` as a number; anything else as it is."""
    if isinstance(value, str):
        above, _, below = value.partition("/")
        try:
            return float(above) / float(below or 1)
        except (ValueError, ZeroDivisionError):
            return value
    return value


def _title(spec: AttackSpec, settings: dict[str, Any]) -> str:
    shown = [f"{name}={value}" for name, value in settings.items() if name not in ("eps", "norm", "c")]
    name = f"{spec.attack} on the static base" if spec.surrogate is not None else spec.attack
    return f"{name} ({', '.join(shown)})" if shown else name
