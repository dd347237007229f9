"""What an evaluation writes: `results.json`, its schema and its version."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..fast.ensemble import Precision
from ..noise.layer import Std
from ..runtime.files import read_versioned

RESULTS = "results.json"
FORMAT_VERSION = 1


class Record(BaseModel):
    """A part of a results file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(Record):
    """One attack (or none) on all images, as judged.

    Attributes:
        key: unique within the results; names the files of its images.
        title: for people.
        attack: name in `ATTACKS`, "none", or "worst case".
        settings: keyword arguments of the attack.
        norm: the threat model of a fixed budget, "linf", "l2" or "l1"; None for other attacks.
        eps: its radius, in the units of the inputs: of pixels in [0, 1], unless the network has other bounds.
        c: strength of a C&W attack at fixed c.
        images: attacked images.
        accuracy: share answered correctly by the first seed of the defender's noise.
        low, high: 95 % Clopper-Pearson interval of `accuracy`.
        seeds: accuracy by each seed of the defender's noise.
        all_seeds: share answered correctly under every one of them.
        wrong_per_query: mean probability of a wrong answer to one query.
        persistent: by number of queries k, the share of images of which at least one of k queries gets
            a wrong answer: the mean of `1 - (1 - p)^k`.
        rms_l2, median_l2, mean_linf, max_linf: distances to the originals, in the same units.
        gradients, forwards: evaluations an image that the attack spent, one noise draw each.
        published: of AutoAttack, the share of the images that are robust by the published code's own rule, a
            single pass for each part; see `attacks.published_rule`.
    """

    key: str
    title: str
    attack: str
    settings: dict[str, Any] = {}
    norm: str | None = None
    eps: float | None = None
    c: float | None = None
    images: int
    accuracy: float
    low: float
    high: float
    seeds: tuple[float, ...]
    all_seeds: float
    wrong_per_query: float
    persistent: dict[int, float]
    rms_l2: float
    median_l2: float
    mean_linf: float
    max_linf: float
    gradients: float
    forwards: float
    published: float | None = None


class CheckRecord(Record):
    """One honesty check, see `evaluation.honesty`."""

    name: str
    passed: bool | None  # None: it does not apply, `advice` says why
    figure: str
    advice: str


class Impossible(Record):
    """An attack of the protocol that could not be made; this is no sign of robustness.

    Attributes:
        title, attack, norm, eps: see `Entry`.
        reason: why not.
    """

    title: str
    attack: str
    norm: str | None = None
    eps: float | None = None
    reason: str


class DataRecord(Record):
    """The images of an evaluation, the first of a test set.

    Attributes:
        drawn: the seed of the order that the set was put into, for it is stored in no random one.
        cut: share and seed of a test set that was cut off the images.
        skipped: files that could not be used, and why.
        revision: of a data set of the Hub.
    """

    source: str
    images: int
    classes: tuple[str, ...]
    digest: str
    drawn: int | None = None
    cut: tuple[float, int] | None = None
    skipped: tuple[str, ...] = ()
    revision: str | None = None

    @property
    def which(self) -> str:
        """Which images they are, for people."""
        if self.drawn is None:
            return f"first {self.images} test images"
        return f"{self.images} test images drawn by seed {self.drawn}"

    def agrees(self, other: "DataRecord") -> bool:
        """Whether both are images of one set, as far as is known where they are of different numbers."""
        if self.images == other.images:
            return self.digest == other.digest
        sets = [(each.source, each.classes, each.drawn, each.cut, each.revision) for each in (self, other)]
        return sets[0] == sets[1]


class ModelRecord(Record):
    """The network of an evaluation; `digest` covers weights and randomness.

    Attributes:
        precision: that it answers in, "bf16" for an optimised copy that does.
        noise: standard deviation, or one for each channel, by the module that the noise precedes.
        randomness: other random layers, in words.
        behaviour: what answers depend on besides, where it is not as usual: bounds, sampling, and of other
            people's networks a digest of code and settings; empty where all is, None of earlier versions.
    """

    name: str
    digest: str
    draws: int
    precision: Precision = "float32"
    noise: dict[str, Std]
    randomness: tuple[str, ...] = ()
    architecture: dict[str, Any] | None = None
    behaviour: dict[str, Any] | None = None

    def is_same(self, other: "ModelRecord") -> bool:
        """Whether both are one network with one noise; precision and draws may differ."""
        known = self.behaviour is not None and other.behaviour is not None
        return self.digest == other.digest and not (known and self.behaviour != other.behaviour)


class Results(Record):
    """The content of `results.json`; see `Entry` for the figures.

    Attributes:
        impossible: attacks of the protocol that the model made impossible; empty for most models.
    """

    format: Literal["selfensemble-evaluation"] = "selfensemble-evaluation"
    format_version: int = FORMAT_VERSION
    name: str
    model: ModelRecord
    data: DataRecord
    protocol: dict[str, Any]
    clean: Entry
    attacks: tuple[Entry, ...]
    worst_case: tuple[Entry, ...]
    checks: tuple[CheckRecord, ...] | None = None
    impossible: tuple[Impossible, ...] = ()
    provenance: dict[str, Any]

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Of the inputs, in whose units radii and distances are; None where they lie in [0, 1]."""
        given = (self.model.behaviour or {}).get("bounds")
        return None if given is None else (float(given[0]), float(given[1]))

    def record(self) -> dict[str, Any]:
        """What the file holds; `impossible` only where there is one, as earlier versions read it."""
        return self.model_dump(mode="json", exclude=None if self.impossible else {"impossible"})


def is_weak(members: Sequence[Results]) -> bool:
    """Whether a protocol has no worst case of several attacks at a radius: it was not made to judge."""
    return not any(entry.eps is not None for each in members for entry in each.worst_case)


def read_results(path: str | Path) -> Results:
    """The checked results of a run: its folder, or the file itself.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is damaged, foreign, or written by a newer version.
    """
    file = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"no {RESULTS} in {path}: pass the folder of a finished `selfensemble evaluate --protocol ...`"
        )
    return read_versioned(
        file, Results, "selfensemble-evaluation", FORMAT_VERSION, "run the evaluation again"
    )
