"""Evaluation runs: a protocol on a model, sharded over images, resumable, results in one folder.

The folder holds `run.json` (what is evaluated), `shards/` (a file an attack and slice of images; what is
there is never computed again), and at the end `results.json`, `images.csv`, `gallery.safetensors` and
`timings.json`. All but the timings depend on model, data,
protocol, `max_batch` and kind of device alone.
"""

import csv
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..attacks.budget import count_evaluations
from ..attacks.norms import check_eps, size
from ..data import ImageData
from ..ensemble import SelfEnsemble
from ..files import atomic_write, write_json
from ..inject import noise_disabled, noise_layers
from ..noise import stream_seed
from ..provenance import provenance
from .judge import Verdict, judge
from .protocol import Protocol, Run, expand
from .results import RESULTS, CheckRecord, DataRecord, Entry, ModelRecord, Results, read_results

RUN, SHARDS, TIMINGS, TABLE, GALLERY = (
    "run.json",
    "shards",
    "timings.json",
    "images.csv",
    "gallery.safetensors",
)
CLEAN, WORST = "clean", "worst"
_GALLERY_IMAGES = 8
_PERSISTENT = (1, 10, 100)
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class _Judged:
    """One entry's outcome on some images, as it lies in a shard."""

    adversarial: Tensor
    answers: Tensor
    lead: Tensor
    l2: Tensor
    linf: Tensor


@dataclass(frozen=True)
class _Plan:
    """An entry of the results before it is measured."""

    key: str
    title: str
    run: Run | None = None
    eps: float | None = None
    norm: str | None = None
    members: tuple[str, ...] = ()  # of a worst case: keys of the entries it chooses from


@dataclass
class Evaluation:
    """A protocol on a model and its test images, in a folder of its own.

    Args:
        ensemble: the defender.
        data: the test set; the protocol's number of images is taken from its start.
        protocol: what to do.
        out: folder of the run. An earlier, unfinished run of the same is continued.
        name: of the model, for people.
        max_batch: images a forward pass.
        architecture: recorded with the results.
        progress: called with what is being done and the share done.

    Raises:
        ValueError: `out` holds a run of another model, protocol or data, which is left untouched.
    """

    ensemble: SelfEnsemble
    data: ImageData
    protocol: Protocol
    out: Path
    name: str = "model"
    max_batch: int = 200
    architecture: dict[str, Any] | None = None
    progress: Progress = lambda text, done: None
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        self.images = min(self.protocol.images, len(self.data))
        if self.images == 0:
            raise ValueError(f"{self.data.name} has no images to evaluate on")
        self.inputs = self.data.inputs(slice(self.images))
        self.labels = self.data.labels[: self.images]
        self.runs = expand(self.protocol)
        self.plans = list(_plans(self.runs))
        # Units of work in order: no attack, the attacks, and the worst cases that choose among them.
        worst = [plan for plan in self.plans if plan.members]
        self.work: list[Run | _Plan] = [self.plans[0], *self.runs, *worst]
        self._try_settings()
        self.model = model_record(self.ensemble, self.name, self.architecture)
        self.data_record = DataRecord(
            source=self.data.name,
            images=self.images,
            classes=tuple(self.data.classes),
            digest=_digest([self.inputs, self.labels]),
        )
        self._claim()

    def _try_settings(self) -> None:
        """Every attack on no images: settings that it would refuse are found before any work is done."""
        for run in self.runs:
            try:
                run.call()(self.ensemble, self.inputs[:0], self.labels[:0], **run.settings)
                for eps in run.radii:
                    check_eps(eps, run.norm or "linf", self.inputs)
            except ValueError as error:
                raise ValueError(f"attack {run.key}: {error}") from error

    def _claim(self) -> None:
        """Write what this run is, or find that the folder holds just this run."""
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file: pass the folder to write to")
        identity, path = (
            {
                "model": {"digest": self.model.digest, "draws": self.model.draws},
                "data": {"digest": self.data_record.digest},
                "protocol": self.protocol.model_dump(mode="json"),
                # Streams of noise follow the batches, and differ between kinds of devices.
                "max_batch": self.max_batch,
                "device": next((p.device.type for p in self.ensemble.parameters()), "cpu"),
            },
            self.out / RUN,
        )
        if not path.is_file():
            others = [file for file in self.out.glob("*") if file.name != RUN and file.name[0] != "."]
            if others:
                raise ValueError(f"{self.out} holds other files ({others[0].name}): pass a new folder")
            write_json(path, identity)
            return
        try:
            before = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error}): restore it, or use another folder") from error
        from ..recipe import differing_keys

        if before != identity:
            names = ", ".join(differing_keys(before, identity)[:6]) if isinstance(before, dict) else "all"
            raise ValueError(
                f"{self.out} holds a run that differs in {names}; it is untouched: use another folder"
            )

    def run(self) -> Results:
        """Do what is not done yet, then write the results; may be stopped at any time."""
        starts = range(0, self.images, self.protocol.shard)
        units = [(number, start, work) for number, start in enumerate(starts) for work in self.work]
        mine = [unit for unit in units if unit[0] % self.world == self.rank]
        began, computed = time.monotonic(), 0
        for place, (number, start, work) in enumerate(mine):
            path = self._path(work, start)
            if path.is_file():
                continue
            left = ""
            if computed:
                seconds = (time.monotonic() - began) / computed * (len(mine) - place)
                left = f", about {_duration(seconds)} left"
            text = f"images {start} to {self._end(start) - 1}: {work.title}{left}"
            self.progress(text, place / len(mine))
            self._compute(number, start, work)
            computed += 1
        self.progress("writing results", 1.0)
        self._wait()
        if self.rank == 0:
            self._finish(list(starts))
        self._wait()
        return read_results(self.out)

    def _wait(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def _end(self, start: int) -> int:
        return min(start + self.protocol.shard, self.images)

    def _path(self, work: "Run | _Plan", start: int) -> Path:
        return self.out / SHARDS / f"{start:07d}-{work.key}.safetensors"

    def _seed(self, *numbers: int) -> int:
        seed = self.protocol.seed
        for number in numbers:
            seed = stream_seed(seed, number, 7)
        return seed

    def _compute(self, number: int, start: int, work: "Run | _Plan") -> None:
        """One unit of work: an attack on a slice of images, judged; written when it is complete."""
        part = slice(start, self._end(start))
        x, y = self.inputs[part], self.labels[part]
        order = self.work.index(work)
        began = time.monotonic()
        tensors: dict[str, Tensor] = {}
        if isinstance(work, Run):
            run = work
            base = noise_disabled(self.ensemble) if run.surrogate is not None else nullcontext()
            with count_evaluations() as budget, base:
                found = run.call()(
                    self.ensemble, x, y, seed=self._seed(number, order, 0), max_batch=self.max_batch,
                    **run.settings,
                )  # fmt: skip
            tensors["budget"] = torch.tensor([budget.gradients, budget.forwards])
            plans = [plan for plan in self.plans if plan.run is run]
            for index, plan in enumerate(plans):
                images = found
                if len(run.radii) > 0 and plan.norm is not None and plan.eps is not None:
                    within = size(found - x, plan.norm) <= plan.eps * (1 + 1e-5)
                    images = torch.where(within.reshape(-1, *[1] * (x.dim() - 1)), found, x)
                seed = self._seed(number, order, 1 + index)
                self._judge(tensors, plan, x, images, y, self.protocol.judge.seeds, seed)
        else:
            images = self._worst(start, work, x) if work.members else x
            self._judge(tensors, work, x, images, y, self._many(), self._seed(number, order, 1))
        path = self._path(work, start)
        atomic_write(path, safetensors.torch.save(tensors))
        write_json(path.with_suffix(".json"), {"seconds": round(time.monotonic() - began, 3)})

    def _many(self) -> int:
        return max(self.protocol.judge.seeds, self.protocol.judge.queries)

    def _judge(
        self,
        tensors: dict[str, Tensor],
        plan: _Plan,
        x: Tensor,
        images: Tensor,
        y: Tensor,
        queries: int,
        seed: int,
    ) -> None:
        verdict = judge(
            self.ensemble, x, images, y, queries=queries, seed=seed,
            norm=plan.norm or "l2", eps=plan.eps, max_batch=self.max_batch,
        )  # fmt: skip
        if plan.key != CLEAN:
            tensors[f"{plan.key}.images"] = images.contiguous()
        tensors[f"{plan.key}.answers"] = verdict.answers.contiguous()
        for name in ("lead", "l2", "linf"):
            tensors[f"{plan.key}.{name}"] = getattr(verdict, name)

    def _worst(self, start: int, plan: _Plan, x: Tensor) -> Tensor:
        """Of each image the attacked version with the largest lead; fresh queries then judge it."""
        members = [self._read(start, key) for key in plan.members]
        leads = torch.stack([member.lead for member in members])
        chosen = leads.argmax(dim=0)
        return torch.stack([member.adversarial for member in members])[chosen, torch.arange(len(x))]

    def _read(self, start: int, key: str) -> _Judged:
        plan = next(plan for plan in self.plans if plan.key == key)
        path = self._path(plan.run or plan, start)
        try:
            with safetensors.safe_open(path, "pt") as file:
                names = ("answers", "lead", "l2", "linf")
                values = {name: file.get_tensor(f"{key}.{name}") for name in names}
                part = slice(start, self._end(start))
                images = self.inputs[part] if key == CLEAN else file.get_tensor(f"{key}.images")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and run the same again") from error
        return _Judged(adversarial=images, **values)

    def _finish(self, starts: list[int]) -> None:
        """Put the shards together."""
        entries = {plan.key: self._entry(plan, starts) for plan in self.plans}
        checks = self._checks() if self.protocol.checks else None
        about = provenance()
        about.pop("time")
        results = Results(
            name=self.name,
            model=self.model,
            data=self.data_record,
            protocol=self.protocol.model_dump(mode="json"),
            clean=entries[CLEAN],
            attacks=tuple(entries[plan.key] for plan in self.plans if plan.run is not None),
            worst_case=tuple(entries[plan.key] for plan in self.plans if plan.members),
            checks=checks,
            provenance=about,
        )
        atomic_write(self.out / TABLE, self._table(starts).encode())
        atomic_write(self.out / GALLERY, self._gallery(starts))
        seconds = {
            path.stem: json.loads(path.read_text())["seconds"]
            for path in sorted((self.out / SHARDS).glob("*.json"))
        }
        finished = provenance()["time"]
        write_json(self.out / TIMINGS, {"finished": finished, "seconds": seconds})
        write_json(self.out / RESULTS, results.model_dump(mode="json"))

    def _checks(self) -> tuple[CheckRecord, ...]:
        from .honesty import doctor

        path = self.out / SHARDS / "checks.json"
        if not path.is_file():
            began = time.monotonic()
            # The trials' threat model: the first norm of the protocol, at its middle radius.
            bound = [(plan.norm, plan.eps) for plan in self.plans if plan.norm and plan.eps]
            norm = bound[0][0] if bound else "linf"
            radii = sorted({eps for other, eps in bound if other == norm}) or [8 / 255]
            checks = doctor(
                self.ensemble, self.inputs, self.labels, norm=norm, eps=radii[len(radii) // 2],
                seed=self._seed(0, 0, 9), max_batch=self.max_batch,
                progress=lambda text, done: self.progress(f"honesty checks: {text}", 1.0),
            )  # fmt: skip
            seconds = round(time.monotonic() - began, 3)
            found = [check.model_dump(mode="json") for check in checks]
            write_json(path, {"checks": found, "seconds": seconds})
        return tuple(CheckRecord.model_validate(check) for check in json.loads(path.read_text())["checks"])

    def _entry(self, plan: _Plan, starts: list[int]) -> Entry:
        parts = [self._read(start, plan.key) for start in starts]
        answers = torch.cat([part.answers for part in parts])
        verdict = Verdict(
            answers,
            self.labels,
            torch.cat([part.lead for part in parts]),
            torch.cat([part.l2 for part in parts]),
            torch.cat([part.linf for part in parts]),
        )
        seeds = self.protocol.judge.seeds
        asked = answers.shape[1]
        low, high = verdict.interval
        settings = dict(plan.run.settings) if plan.run is not None else {}
        if plan.run is not None and plan.run.surrogate is not None:
            settings["surrogate"] = plan.run.surrogate
        gradients, forwards = self._budget(plan, starts)
        return Entry(
            key=plan.key,
            title=plan.title,
            attack=plan.run.attack if plan.run is not None else "worst case" if plan.members else "none",
            settings=settings,
            norm=plan.norm,
            eps=plan.eps,
            c=settings.get("c"),
            images=self.images,
            accuracy=verdict.accuracy,
            low=low,
            high=high,
            seeds=tuple((~verdict.wrong[:, :seeds]).double().mean(dim=0).tolist()),
            all_seeds=float((~verdict.wrong[:, :seeds]).all(dim=1).double().mean()),
            wrong_per_query=float(verdict.wrong_per_query.mean()),
            persistent={k: verdict.persistent(k) for k in _PERSISTENT if k <= asked},
            rms_l2=verdict.rms_l2,
            median_l2=float(verdict.l2.median()),
            mean_linf=float(verdict.linf.mean()),
            max_linf=float(verdict.linf.max()),
            gradients=gradients / self.images,
            forwards=forwards / self.images,
        )

    def _budget(self, plan: _Plan, starts: list[int]) -> tuple[int, int]:
        if plan.run is None:
            return 0, 0
        total = torch.zeros(2, dtype=torch.int64)
        for start in starts:
            with safetensors.safe_open(self._path(plan.run, start), "pt") as file:
                total += file.get_tensor("budget")
        return int(total[0]), int(total[1])

    def _table(self, starts: list[int]) -> str:
        """One line an image and entry."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(
            ["image", "label", "entry", "attack", "norm", "eps", "c", "answer", "correct", "wrong_per_query",
             "queries", "lead", "l2", "linf"]
        )  # fmt: skip
        for plan in self.plans:
            attack = plan.run.attack if plan.run is not None else plan.key
            c = plan.run.settings.get("c", "") if plan.run is not None else ""
            for start in starts:
                part = self._read(start, plan.key)
                for row in range(len(part.lead)):
                    label = int(self.labels[start + row])
                    answers = part.answers[row]
                    wrong = float((answers != label).double().mean())
                    table.writerow(
                        [start + row, label, plan.key, attack, plan.norm or "", plan.eps or "", c,
                         int(answers[0]), int(answers[0] == label), f"{wrong:.6g}", len(answers),
                         f"{float(part.lead[row]):.6g}", f"{float(part.l2[row]):.6g}",
                         f"{float(part.linf[row]):.6g}"]
                    )  # fmt: skip
        return text.getvalue()

    def _gallery(self, starts: list[int]) -> bytes:
        """A few images that are answered rightly without attack, and what each attack made of them."""
        clean = [self._read(start, CLEAN) for start in starts]
        answers = torch.cat([part.answers[:, 0] for part in clean])
        chosen = (answers == self.labels).nonzero().squeeze(1)[:_GALLERY_IMAGES]
        tensors = {
            "original": self.inputs[chosen],
            "label": self.labels[chosen],
            "answer.clean": answers[chosen],
        }
        last = int(chosen.max()) if len(chosen) else 0
        for plan in self.plans[1:]:
            parts = [self._read(start, plan.key) for start in starts[: 1 + last // self.protocol.shard]]
            tensors[plan.key] = torch.cat([part.adversarial for part in parts])[chosen]
            tensors[f"answer.{plan.key}"] = torch.cat([part.answers[:, 0] for part in parts])[chosen]
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})


def _plans(runs: list[Run]) -> Iterator[_Plan]:
    """Entries in order: no attack, every attack by radius, the worst case of each threat model."""
    yield _Plan(CLEAN, "no attack")
    threats: dict[tuple[str, float], list[str]] = {}
    for run in runs:
        if not run.radii:
            yield _Plan(run.key, run.title, run, norm=run.norm)
        for index, eps in enumerate(run.radii):
            key = f"{run.key}-{index}"
            yield _Plan(key, run.title, run, eps, run.norm)
            if run.norm is not None:
                threats.setdefault((run.norm, eps), []).append(key)
    for number, ((norm, eps), members) in enumerate(threats.items()):
        if len(members) > 1:
            yield _Plan(f"{WORST}-{number:02d}", "worst case", None, eps, norm, tuple(members))


def model_record(ensemble: SelfEnsemble, name: str, architecture: dict[str, Any] | None) -> ModelRecord:
    """What is evaluated: its noise, and a digest of weights and noise."""
    noise = {fqn: layer.std for fqn, layer in noise_layers(ensemble.model).items()}
    text = json.dumps(noise, sort_keys=True)
    return ModelRecord(
        name=name,
        digest=_digest(list(ensemble.state_dict().values()), text),
        draws=ensemble.draws,
        noise=noise,
        architecture=architecture,
    )


def _digest(tensors: list[Tensor], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{values.dtype}{tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
