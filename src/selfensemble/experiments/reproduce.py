"""One command an experiment: train or reuse, measure, store, and make the page of what is stored."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..data.images import ImageData
from ..data.sources import load_data
from ..evaluation.identity import model_record
from ..report.page import Page
from ..training.recipe import differing_keys, public_recipe
from .base import Experiment, Report, Setting
from .board import Board
from .certainty import Certainty
from .certificates import CERTIFIED, Certificates
from .curves import Curves
from .draws import Draws
from .honest import Honest
from .levels import Levels
from .making import commit, making_tables, measured_on
from .networks import Network, Trained, local_name, recipe_of, trained
from .noise_levels import NoiseLevels
from .records import Facts, Record, read_record, write_record
from .scales import Scale, load_scale
from .targeted import Targeted
from .theory import Theory

_STL10 = "model_a"
# stl10 last: its data are others, and may not be there.
EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Curves("headline", "vgg16", "rescaled", "sharpened", "tempered"),
        Draws(),
        NoiseLevels(),
        Levels(),
        Targeted(),
        Theory(),
        Honest(),
        Board(),
        Certainty(),
        Certificates("certificates", "Certificates", *CERTIFIED),
        Certificates("certified-noise", "Does noise inside the network help a certificate?"),
        Curves("resnext", "resnext29_2x64d"),
        Curves("stl10", _STL10),
    )
}


@dataclass(frozen=True)
class Reproduction:
    """How experiments are run.

    Attributes:
        scale: name of a scale.
        data, stl10: where the images of CIFAR-10 and of STL-10 come from; None for the recipes' own. Where
            `stl10` is the only experiment, `data` means it as well.
        models: folder of the trained networks, by default runs/models/SCALE.
        runs: folder of units of work, by default runs/experiments/SCALE.
        out: folder of the results, a folder of its own for each experiment; by default runs/results/SCALE.
        only: short names of networks to train and measure; none for all.
        seed: of attacks and judge.
        device: where networks are measured.
        progress: called with what is being done and the share done.
    """

    scale: str = "half"
    data: str | None = None
    stl10: str | None = None
    models: Path | None = None
    runs: Path | None = None
    out: Path | None = None
    only: Sequence[str] = ()
    seed: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    progress: Report = lambda text, done: None
    folder: Path = field(init=False)
    _tests: dict[tuple[str, int | None], ImageData] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", results_folder(self.out, self.scale))

    def run(self, names: Sequence[str]) -> dict[str, Page]:
        """Do what is not done yet of the named experiments; may be stopped at any time.

        Raises:
            ValueError, FileNotFoundError, ConnectionError: an unknown name, data that cannot be had, a
                folder that holds something else; the message says what to do.
        """
        commit()
        scale, chosen = load_scale(self.scale), experiments(names)
        if self.stl10 is None and all(experiment.kin == _STL10 for experiment in chosen):
            return replace(self, stl10=self.data or "stl10").run(names)
        wanted = {experiment.name: self._wanted(experiment, scale) for experiment in chosen}
        known = {network.name for experiment in chosen for network in experiment.networks(scale)}
        if unknown := [name for name in self.only if name not in known]:
            raise ValueError(f"no network {unknown[0]!r} here: choose among {', '.join(sorted(known))}")
        for experiment in chosen:  # before hours of training
            for network in wanted[experiment.name]:
                with suppress(ConnectionError, FileNotFoundError):  # said when it is its turn
                    self._check_stored(experiment, scale, *self._test(experiment, network, scale)[1:])
        pages: dict[str, Page] = {}
        total, done = max(1, sum(map(len, wanted.values()))), 0
        for experiment in chosen:
            for network in wanted[experiment.name]:

                def inner(text: str, part: float, network: Network = network, done: int = done) -> None:
                    self.progress(f"{experiment.name}, {network.name}: {text}", (done + part) / total)  # noqa: B023

                self._network(experiment, network, scale, inner)
                done += 1
                pages[experiment.name] = render(experiment.name, self.folder)
        return pages

    def _wanted(self, experiment: Experiment, scale: Scale) -> list[Network]:
        return [each for each in experiment.networks(scale) if not self.only or each.name in self.only]

    def _network(self, experiment: Experiment, network: Network, scale: Scale, progress: Report) -> None:
        """Train or reuse one network, measure it, store what was measured."""
        progress("preparing", 0.0)
        source = self.stl10 if experiment.kin == _STL10 else self.data
        _, recipe = recipe_of(network, experiment.family, scale, source)
        test, data, everything = self._test(experiment, network, scale)
        models = self.models or Path("runs/models") / scale.name
        found = trained(
            network, experiment.family, scale, source, models,
            lambda step, steps, text: progress(text, step / steps / 2),
        )  # fmt: skip
        found.ensemble.to(self.device)
        runs = self.runs or Path("runs/experiments") / scale.name
        setting = Setting(
            scale,
            network,
            found,
            test.with_classes(found.classes or test.classes),
            runs / experiment.name / network.name,
            model_record(found.ensemble, network.name, None).digest,
            data,
            everything,
            self.device,
            self.seed,
            lambda text, part: progress(text, (1 + part) / 2),
        )
        measured = experiment.measure(setting)
        facts = Facts(
            experiment=experiment.name,
            network=network.name,
            title=network.title,
            published=network.published,
            scale=scale.name,
            seed=self.seed,
            source=local_name(recipe.data.source),
            recipe=_portable(found),
            draws=found.ensemble.draws,
            training=_training(found),
            changed=network.changes,
            model=setting.model,
            data=data,
            test=everything,
            settings=measured.settings,
            entries=measured.entries,
            provenance=measured_on(self.device),
        )
        _store(self.folder, experiment, Record(facts, measured.columns))

    def _test(self, experiment: Experiment, network: Network, scale: Scale) -> tuple[ImageData, str, str]:
        """The test set of a network, and digests of its first images and of all."""
        source = self.stl10 if experiment.kin == _STL10 else self.data
        _, recipe = recipe_of(network, experiment.family, scale, source)
        asked = (recipe.data.source, recipe.data.size)
        if asked not in self._tests:
            self._tests.clear()  # one at a time: they are large
            self._tests[asked] = _test_data(*asked)
        test = self._tests[asked]
        everything = _digest(test, len(test))
        if experiment.held_out:
            test = test.subset(torch.arange(len(test) // 2, len(test), device="cpu"))
        return test, _digest(test, scale.images), everything

    def _check_stored(self, experiment: Experiment, scale: Scale, data: str, everything: str) -> None:
        """Raise before results of two scales, seeds, settings or sets of images come into one table."""
        folder = self.folder / experiment.name
        known = experiment.known_settings(scale)
        for record in _stored(folder, experiment):
            facts = record.facts
            differing = {
                f"the scale {facts.scale}": facts.scale != scale.name,
                f"the seed {facts.seed}": facts.seed != self.seed,
                f"other images ({facts.source})": facts.data != data or facts.test not in (None, everything),
                "another edition of the protocol": _edition(record) != experiment.edition(scale),
            }
            if what := [name for name, differs in differing.items() if differs]:
                raise ValueError(
                    f"{folder} holds results of {' and '.join(what)}; they are untouched: pass another --out"
                )
            own = {key: value for key, value in facts.settings.items() if key in known}
            if known:
                _check_settings(folder, facts.network, own, known)


def _edition(record: Record) -> int:
    return int(record.facts.settings.get("protocol", {}).get("version", 1))


def experiments(names: Sequence[str]) -> list[Experiment]:
    """The named experiments, or those of `all`; a ValueError lists them where a name is unknown."""
    unknown = [name for name in names if name not in EXPERIMENTS and name != "all"]
    if unknown or not names:
        said = f"no experiment {unknown[0]!r}" if unknown else "no experiment named"
        raise ValueError(f"{said}: choose among {', '.join(EXPERIMENTS)}, all")
    return [EXPERIMENTS[name] for name in EXPERIMENTS if name in names or "all" in names]


def results_folder(out: Path | None, scale: str) -> Path:
    """Where results of a scale lie; those of two scales never lie in one folder."""
    return Path("runs/results") / scale if out is None else out


def render_all(names: Sequence[str], out: Path) -> dict[str, Page]:
    """`render` of the named experiments; of `all`, those that have stored results."""
    chosen = [experiment.name for experiment in experiments(names)]
    if "all" in names:
        chosen = [name for name in chosen if any((out / name).glob("*.json"))] or chosen
    return {name: render(name, out) for name in chosen}


def render(name: str, out: Path) -> Page:
    """Write page and plots of one experiment from what is stored in OUT/NAME, and from nothing else.

    Raises:
        FileNotFoundError: nothing is stored there.
    """
    (experiment,) = experiments([name])
    folder = out / name
    records = _stored(folder, experiment)
    if not records:
        raise FileNotFoundError(
            f"no stored results in {folder}: run `selfensemble reproduce {name}` without --render first, or "
            "pass the --out that it had"
        )
    scale = load_scale(records[0].facts.scale)
    others = {other: _stored(out / other, EXPERIMENTS[other]) for other in experiment.beside}
    page = experiment.page_beside(records, others)
    page.making.extend(
        making_tables(records, _command(experiment, records[0].facts), scale.description, experiment.held_out)
    )
    page.write(folder)
    return page


def _command(experiment: Experiment, facts: Facts) -> str:
    """The command that made the results, but for the folders of its machine."""
    command = f"selfensemble reproduce {facts.experiment} --scale {facts.scale}"
    command += f" --data {facts.source}" if facts.source != experiment.family.source else ""
    return command + (f" --seed {facts.seed}" if facts.seed else "")


def _stored(folder: Path, experiment: Experiment) -> list[Record]:
    """The stored records in the order of the experiment's networks."""
    found: dict[str, Record] = {}
    for path in sorted(folder.glob("*.json")):
        record = read_record(folder, path.stem)
        if record is not None:
            found[path.stem] = record
    if not found:
        return []
    scale = load_scale(next(iter(found.values())).facts.scale)
    return [found[each.name] for each in experiment.networks(scale) if each.name in found]


# What settings hold that changes no figure.
_SAID = ("levels", "protocol.description")


def _check_settings(folder: Path, other: str, theirs: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise where stored results, of this network or another, were measured with other settings."""
    if keys := [key for key in differing_keys(theirs, own) if key not in _SAID]:
        raise ValueError(
            f"{folder} holds results of {other} that were measured with other settings "
            f"(different: {', '.join(keys[:6])}); they are untouched: pass another --out, or remove them"
        )


def _store(out: Path, experiment: Experiment, record: Record) -> None:
    """Write the record, unless the same is there already, measured earlier.

    Raises:
        ValueError: the other records were measured with other settings; nothing is written.
    """
    folder = out / experiment.name
    for other in _stored(folder, experiment):
        _check_settings(folder, other.facts.network, other.facts.settings, record.facts.settings)
        if other.columns.get("label") != record.columns.get("label"):
            raise ValueError(
                f"{folder} holds results of other images; they are untouched: pass another --out"
            )
    before = read_record(folder, record.facts.network)
    if before is not None and before.columns == record.columns:
        now = record.facts.model_copy(update={"provenance": before.facts.provenance})
        if before.facts.test is None:
            now = now.model_copy(update={"test": None})
        if before.facts == Facts.model_validate_json(now.model_dump_json()):
            return
    write_record(folder, record)


def _test_data(source: str, size: int | None) -> ImageData:
    try:
        return load_data(source, "test", size=size)
    except (ConnectionError, FileNotFoundError) as error:
        raise type(error)(
            f"{error}. How to get it: download the data set's parquet files from the hub on a machine with "
            "a network, then pass their folder (--data, for STL-10 --stl10)"
        ) from error


def _digest(test: ImageData, images: int) -> str:
    """Of the first images and labels of the test set."""
    part = slice(images)
    digest = hashlib.sha256(test.images[part].numpy().tobytes())
    digest.update(test.labels[part].numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _portable(found: Trained) -> dict[str, object]:
    """The recipe without the folders of this machine."""
    return public_recipe(found.recipe.model_dump(mode="json"))


def _training(found: Trained) -> dict[str, object]:
    training = found.training
    if not training:
        return {}
    return {
        "test": training["metrics"]["test"],
        "seconds": training["training_seconds"],
        "provenance": training["provenance"],
    }
