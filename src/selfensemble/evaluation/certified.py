"""Certification runs: certificates of many images, sharded, resumable, results in one folder.

The folder holds `run.json` (what is certified), `shards/` (a file a slice of images; what is there is never
computed again), `certificates.csv` with a row an image and `certified.json` with the curve: after each
slice, of the images until there.
"""

import csv
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from ..certainty.bounds import MeanBound
from ..certainty.certification import VERDICTS, Certificate, Method, certify, check_reach, wanted_radii
from ..certainty.grid import grid_noise
from ..certainty.pixels import pixel_std
from ..certainty.statistics import Rivals
from ..data.images import ImageData, Inputs
from ..ensemble.checks import is_number
from ..ensemble.ensemble import SelfEnsemble
from ..fast.ensemble import precision_of
from ..noise.injection import device_of_parameters, eval_mode
from ..noise.streams import DRAWS, stream_seed
from ..runtime.files import atomic_write, read_versioned, write_json
from ..runtime.ownership import owned
from ..runtime.processes import wait_for_all
from ..runtime.provenance import accuracy_record, provenance
from ..runtime.schema import Count, Positive, Section, Seed
from ..runtime.texts import read_json
from .identity import claim, data_record, duration, made_by, model_record
from .results import DataRecord, ModelRecord, Record

RUN, CERTIFIED, CERTIFICATES, SHARDS = "run.json", "certified.json", "certificates.csv", "shards"
Progress = Callable[[str, float], None]
FORMAT, FORMAT_VERSION = "selfensemble-certification", 1
_AGAIN = "delete it and run the same again"
_STEP = 0.05  # between the radii of the curve


def _one_or_several(radius: object) -> object:
    """In rising order; one is stored as a number, as before there could be several; none as null."""
    if isinstance(radius, list | tuple) and all(map(is_number, radius)):
        radius = sorted(set(radius))
        return radius[0] if len(radius) == 1 else radius or None
    return radius


class Settings(Section):
    """What a run does to each image, see `certify`."""

    images: Count = 500
    alpha: Annotated[float, Field(ge=1e-300, lt=1)] = 0.001
    n0: Count = 100
    n: Annotated[int, Field(ge=2)] = 10_000
    method: Method = "mean"
    rivals: Rivals = "runner_up"
    bound: MeanBound | None = None
    radius: Annotated[Positive | tuple[Positive, ...] | None, BeforeValidator(_one_or_several)] = None
    grid: bool = False
    seed: Seed = 0
    shard: Count = 50


class Point(Record):
    """Certified accuracy at a radius: classified correctly, and certified to at least that radius."""

    radius: float
    accuracy: float
    low: float
    high: float


class WantedRadius(Record):
    """Shares of the images whose answer, right or wrong, is certified within a radius, and others.

    `out_of_reach`: those of which it is proven that no answer is certain there; `open`: the rest.
    """

    radius: float
    reached: float
    out_of_reach: float
    open: float


class Certified(Record):
    """What stands in `certified.json`.

    Attributes:
        precision: that the network computed in.
        std: of the noise on the image.
        curve: certified accuracy by L2 radius, with 95 % intervals over images. Where images stopped at
            wanted radii, more may be certified at the others.
        abstained: share of images of which nothing is certified; an upper bound with wanted radii.
        mean_radius: over all images, 0 where the answer is wrong or missing (the average certified radius);
            a lower bound with wanted radii.
        draws: mean number an image, selection included.
        wanted: what became of the wanted radii.
        done: how many of the first images the figures are of, where the run has not ended; None for all.
    """

    format: Literal["selfensemble-certification"] = "selfensemble-certification"
    format_version: int = FORMAT_VERSION
    name: str
    model: ModelRecord
    data: DataRecord
    settings: dict[str, Any]
    precision: str
    std: float
    curve: tuple[Point, ...]
    abstained: float
    mean_radius: float
    draws: float
    wanted: tuple[WantedRadius, ...] = ()
    done: int | None = None
    provenance: dict[str, Any]

    @property
    def images(self) -> int:
        """How many images the figures are of."""
        return self.data.images if self.done is None else self.done

    @property
    def known(self) -> tuple[Point, ...]:
        """The curve; of wanted radii, if it has them, these alone: elsewhere it is a lower bound."""
        wanted = {each.radius for each in self.wanted}
        points = tuple(point for point in self.curve if point.radius in wanted)
        return points if wanted and len(points) == len(wanted) else self.curve

    @property
    def which(self) -> str:
        """Which images they are, for people."""
        return self.data.which if self.done is None else f"first {self.done} of the {self.data.which}"


@dataclass
class Certification:
    """Certificates of the first test images, in a folder of its own.

    Args:
        ensemble: what predicts, in the form that predicts.
        data: the test set.
        settings: what to do.
        out: folder of the run. An earlier, unfinished run of the same is continued.
        name: of the model, for people.
        max_batch: images a pass.
        architecture: recorded with the results.
        progress: called with what is being done and the share done.
        rank, world: number of this process and of all; each takes slices of its own.

    Raises:
        ValueError: the network cannot be certified, or `out` holds another run, which is left untouched.
    """

    ensemble: SelfEnsemble
    data: ImageData
    settings: Settings
    out: Path
    name: str = "model"
    max_batch: int | None = None
    architecture: dict[str, Any] | None = None
    progress: Progress = lambda text, done: None
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        self.images = min(self.settings.images, len(self.data))
        self.settings = self.settings.model_copy(update={"images": self.images})
        self.inputs, self.labels = Inputs(self.data, self.images), self.data.labels[: self.images].cpu()
        self.std, self.precision = pixel_std(self.ensemble, self.inputs[:2]), precision_of(self.ensemble)
        self._check()
        self.model = model_record(self.ensemble, self.name, self.architecture, self.inputs[:2])
        self.data_record = data_record(self.inputs, self.labels)
        identity = {
            "model": {"digest": self.model.digest} | (self.model.behaviour or {}),
            "data": {"digest": self.data_record.digest},
            "settings": self.settings.model_dump(mode="json"),
            "precision": self.precision,
            "std": self.std,
            "device": device_of_parameters(self.ensemble).type,
        }
        if self.settings.radius is not None:
            identity["stopping"] = "bets against all"  # earlier versions had other rules
        claim(self.out / RUN, identity | made_by(self.ensemble, self.inputs[:2]))

    def _check(self) -> None:
        """Raise what `certify` would, before a folder is the run's own."""
        settings = self.settings
        if settings.n0 + settings.n > DRAWS:
            raise ValueError(f"n0 + n is {settings.n0 + settings.n:,}, but a run has {DRAWS:,} draws at most")
        check_reach(wanted_radii(settings.radius), self.std, settings.alpha, settings.n)
        if settings.grid:
            with eval_mode(self.ensemble), grid_noise(self.ensemble, self.inputs[:2]):
                pass

    def run(self) -> Certified:
        """Do what is not done yet, then write the results; may be stopped at any time.

        Raises:
            FolderInUseError: another process works in `out`.
        """
        with owned(self.out, self.rank == 0):
            return self._run()

    def _run(self) -> Certified:
        starts = list(enumerate(range(0, self.images, self.settings.shard)))
        mine = [pair for pair in starts if pair[0] % self.world == self.rank]
        began, computed = time.monotonic(), 0
        for place, (number, start) in enumerate(mine):
            if self._path(start).is_file():
                continue
            left = ""
            if computed:
                seconds = (time.monotonic() - began) / computed * (len(mine) - place)
                left = f", about {duration(seconds)} left"
            text = f"images {start} to {min(start + self.settings.shard, self.images) - 1}{left}"

            def inner(done: float, text: str = text, place: int = place) -> None:
                self.progress(text, (place + done) / len(mine))

            self._compute(number, start, inner)
            computed += 1
            if self.rank == 0:
                self._write()
        wait_for_all(self.world)
        if self.rank == 0:
            self._write()
        wait_for_all(self.world)
        return read_certified(self.out)

    def _path(self, start: int) -> Path:
        return self.out / SHARDS / f"{start:07d}.json"

    def _compute(self, number: int, start: int, progress: Callable[[float], None]) -> None:
        settings, began = self.settings, time.monotonic()
        found = certify(
            self.ensemble,
            self.inputs[start : start + settings.shard],
            alpha=settings.alpha,
            n0=settings.n0,
            n=settings.n,
            method=settings.method,
            rivals=settings.rivals,
            bound=settings.bound,
            radius=settings.radius,
            grid=settings.grid,
            max_batch=self.max_batch,
            seed=stream_seed(settings.seed, number, 7),
            progress=lambda done, total: progress(done / total),
        )
        columns = {name: getattr(found, name).tolist() for name in Certificate.__dataclass_fields__}
        for name in ("lower", "upper"):
            columns[name] = [None if math.isnan(bound) else bound for bound in columns[name]]
        write_json(self._path(start), columns | {"seconds": round(time.monotonic() - began, 3)})

    def _write(self) -> None:
        """Put the first slices together, up to one that is missing."""
        shards = []
        for start in range(0, self.images, self.settings.shard):
            if not self._path(start).is_file():
                break
            shards.append(read_json(self._path(start), _AGAIN))
        if not shards:
            return
        names = list(Certificate.__dataclass_fields__)
        for start, shard in zip(range(0, self.images, self.settings.shard), shards, strict=False):
            if not isinstance(shard, dict) or not {"label", "radius", "draws"} <= shard.keys():
                raise ValueError(f"{self._path(start)} holds no certificates, it is damaged: {_AGAIN}")
            shard.setdefault("verdict", [[] for _ in shard["label"]])  # of earlier versions
            shard.setdefault("estimate", [None for _ in shard["label"]])
        kinds = {"lower": float, "upper": float, "estimate": float, "verdict": np.int64}
        columns = {
            name: np.concatenate([np.asarray(each[name], kinds.get(name)) for each in shards])
            for name in names
        }
        done = len(columns["label"])
        truth = self.labels[:done].numpy()
        right = columns["label"] == truth
        radius = np.where(right, columns["radius"], 0.0)
        steps = int(columns["radius"].max(initial=0.0) / _STEP) + 2
        curve, grid = [], {round(step * _STEP, 10) for step in range(steps)}
        for at in sorted(grid | set(wanted_radii(self.settings.radius))):
            count = int((right & (columns["radius"] >= at)).sum())
            curve.append(Point(radius=at, **_share(count, done)))
        about = provenance(device_of_parameters(self.ensemble))
        about.pop("time")
        results = Certified(
            name=self.name,
            model=self.model,
            data=self.data_record,
            settings=self.settings.model_dump(mode="json"),
            precision=self.precision,
            std=self.std,
            curve=tuple(curve),
            abstained=float((columns["label"] < 0).mean()),
            mean_radius=float(radius.mean()),
            draws=float(columns["draws"].mean()),
            wanted=_wanted(self.settings.radius, columns["verdict"]),
            done=None if done == self.images else done,
            provenance=about,
        )
        atomic_write(self.out / CERTIFICATES, _table(truth, columns).encode())
        write_json(self.out / CERTIFIED, results.model_dump(mode="json"))


def _wanted(radius: float | Sequence[float] | None, verdicts: np.ndarray) -> tuple[WantedRadius, ...]:
    shares = [{word: float((verdicts == number).mean(axis=0)[column]) for number, word in VERDICTS.items()}
              for column in range(verdicts.shape[1])]  # fmt: skip
    return tuple(
        WantedRadius(radius=each, **{word.replace("-", "_"): share for word, share in found.items()})
        for each, found in zip(wanted_radii(radius), shares, strict=True)
    )


def _share(count: int, images: int) -> dict[str, float]:
    record = accuracy_record(count, images)
    return {key: record[key] for key in ("accuracy", "low", "high")}


def _table(truth: np.ndarray, columns: dict[str, np.ndarray]) -> str:
    """A row an image."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "truth", "answer", "radius", "lower", "upper", "estimate", "draws", "verdict"])
    for index, row in enumerate(zip(truth, *columns.values(), strict=True)):
        right, answer, radius, lower, upper, estimate, draws, verdict = row
        bounds = ["" if np.isnan(bound) else repr(float(bound)) for bound in (lower, upper, estimate)]
        words = " ".join(VERDICTS[int(each)] for each in verdict)
        writer.writerow([index, right, answer, repr(float(radius)), *bounds, draws, words])
    return text.getvalue()


def read_certified(path: str | Path) -> Certified:
    """The checked results of a certification run: its folder, or the file itself.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is damaged, foreign, or written by a newer version.
    """
    file = Path(path) / CERTIFIED if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no {CERTIFIED} in {path}: pass the folder of a `selfensemble certify`")
    return read_versioned(file, Certified, FORMAT, FORMAT_VERSION, "certify again")
