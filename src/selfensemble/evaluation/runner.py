"""Evaluation runs: a protocol on a model, sharded over images, resumable, results in one folder.

The folder holds `run.json` (what is evaluated), `shards/` (a file an attack and slice of images; what is
there is never computed again), and at the end `results.json`, `images.csv`, `gallery.safetensors` and
`timings.json`. All but the timings depend on model, data, protocol, `max_batch` and kind of device alone.
What the attacks found is written before the honesty checks run, which add theirs to `results.json`.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..attacks.autoattack import published_rule
from ..attacks.budget import count_evaluations
from ..attacks.norms import check_eps
from ..attacks.units import bounds_of
from ..data.images import ImageData, Inputs, batch_size
from ..data.labels import class_numbers
from ..ensemble.ensemble import SelfEnsemble
from ..fast.optimize import for_attacks
from ..noise.injection import device_of_parameters, noise_disabled
from ..noise.streams import stream_seed
from ..runtime.files import atomic_write, write_json
from ..runtime.interrupts import Interrupted
from ..runtime.ownership import owned
from ..runtime.processes import wait_for_all
from ..runtime.provenance import provenance
from ..runtime.texts import read_json
from . import collect
from .balls import within
from .eight_bits import in_8_bits
from .estimate import FORWARD, Clock, gradients, seconds_per_gradient
from .identity import claim, data_record, made_by, model_record
from .judge import judge
from .masked import possible
from .protocol import MINIMUM_NORM, Protocol, Run, expand
from .results import RESULTS, CheckRecord, Results, read_results
from .shards import CLEAN, PUBLISHED, Plan, Shards, leading, plans_of
from .turns import earlier, left_over

RUN, TIMINGS = "run.json", "timings.json"
SHARDS, TABLE, GALLERY, CHECKS = "shards", "images.csv", "gallery.safetensors", "checks.json"
Progress = Callable[[str, float], None]
Unit = tuple[int, int, Run | Plan]  # number of the slice, its first image, what is done with it
_AGAIN = "delete it and run the same again"
_BATCH = 200
_EXAMINED = 200  # images at most that the checks look at


@dataclass
class Evaluation:
    """A protocol on a model and its test images, in a folder of its own.

    Args:
        ensemble: the defender.
        data: the test set; the protocol's number of images is taken from its start.
        protocol: what to do.
        out: folder of the run. An earlier, unfinished run of the same is continued.
        name: of the model, for people.
        max_batch: images a forward pass; by default 200, fewer large ones.
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
    max_batch: int | None = None
    architecture: dict[str, Any] | None = None
    progress: Progress = lambda text, done: None
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        self.images = min(self.protocol.images, len(self.data))
        if self.images == 0:
            raise ValueError(f"{self.data.name} has no images to evaluate on")
        self.inputs = Inputs(self.data, self.images)
        self.labels = self.data.labels[: self.images].cpu()
        self.bounds = bounds_of(self.ensemble)
        if self.max_batch is None:
            self.max_batch = batch_size(_BATCH, self.data.shape)
        self.attacked = for_attacks(self.ensemble, self.inputs[:2], self.protocol.precision)
        if self.data.images.dtype != torch.uint8:  # of no file of 256 levels
            self.protocol = self.protocol.model_copy(update={"bits": None})
        self.runs = expand(self.protocol)
        self._try_settings()
        planned = possible(self.protocol, self.runs, self._models(), self.inputs[:4], self.labels[:4])
        self.runs, self.impossible = planned.runs, planned.impossible
        self.plans = list(plans_of(self.runs, math.prod(self.data.shape)))
        # Units of work in order: no attack, the attacks, and the worst cases that choose among them.
        worst = [plan for plan in self.plans if plan.members]
        self.work: list[Run | Plan] = [self.plans[0], *self.runs, *worst]
        self.shards = Shards(self.out / SHARDS, self.plans, self.inputs, self.protocol.shard)
        self.model = model_record(self.ensemble, self.name, self.architecture, self.inputs[:2])
        self.data_record = data_record(self.inputs, self.labels)
        claim(
            self.out / RUN,
            {
                "model": self._identity(),
                "data": {"digest": self.data_record.digest},
                "protocol": self.protocol.record(),
                # Streams of noise follow the batches, and differ between kinds of devices.
                "max_batch": self.max_batch,
                "device": device_of_parameters(self.ensemble).type,
            }
            | made_by(self.ensemble, self.inputs[:2]),
        )

    def _models(self) -> tuple[nn.Module, nn.Module]:
        """The defender, and what attacks follow."""
        return self.ensemble, self.attacked

    def _identity(self) -> dict[str, Any]:
        """What tells the answers of one model from those of another."""
        identity: dict[str, Any] = {"digest": self.model.digest, "draws": self.model.draws}
        # Only where it says something: folders of earlier runs go on being those of their models.
        identity |= {} if self.model.precision == "float32" else {"precision": self.model.precision}
        return identity | (self.model.behaviour or {})

    def _try_settings(self) -> None:
        """Every attack on no images: settings that it would refuse are found before any work is done."""
        classes = self.ensemble.predict(self.inputs[:2], draws=1).probabilities.shape[1]
        class_numbers(self.labels, self.images, device=self.labels.device, classes=classes)
        for run in self.runs:
            try:
                run.call()(self.ensemble, self.inputs[:0], self.labels[:0], **run.settings)
                for eps in run.radii:
                    check_eps(eps, run.norm or "linf", self.inputs[:0], self.bounds)
            except ValueError as error:
                raise ValueError(f"attack {run.key}: {error}") from error

    def run(self) -> Results:
        """Do what is not done yet, then write the results; may be stopped at any time.

        Raises:
            FolderInUseError: another process works in `out`.
        """
        with owned(self.out, self.rank == 0):
            return self._run()

    def _run(self) -> Results:
        starts = enumerate(self.shards.starts)
        units = [(number, start, work) for number, start in starts for work in self.work]
        mine = [unit for unit in units if unit[0] % self.world == self.rank]
        open_ = [unit for unit in mine if not self.shards.path(unit[2], unit[1]).is_file()]
        clock = self._clock(open_) if open_ else None
        for place, unit in enumerate(mine):
            if clock is None or unit not in open_:
                continue
            number, start, work = unit
            text = f"images {start} to {self.shards.part(start).stop - 1}: {work.title}{clock}"
            self.progress(text, place / len(mine))
            self._compute(number, start, work)
            clock.finished(self._gradients(unit), is_attack=isinstance(work, Run))
        self.progress("writing results", 1.0)
        wait_for_all(self.world)
        if self.rank == 0:
            self._finish()
        wait_for_all(self.world)
        return read_results(self.out)

    def _clock(self, units: Sequence[Unit]) -> Clock:
        """For units that are not done yet."""
        some = slice(0, self.protocol.shard)
        rate = seconds_per_gradient(self.attacked, self.inputs[some], self.labels[some])
        return Clock(sum(map(self._gradients, units)), rate)

    def _gradients(self, unit: Unit) -> float:
        """What a unit of work costs at most, the judge included."""
        _, start, work = unit
        part, answer = self.shards.part(start), FORWARD * float(self.ensemble.draws)
        each = answer * self._many()
        if isinstance(work, Run):
            each = gradients(work) + answer * self.protocol.judge.seeds * len(work.radii)
        return float(each * (part.stop - part.start))

    def _seed(self, *numbers: int) -> int:
        seed = self.protocol.seed
        for number in numbers:
            seed = stream_seed(seed, number, 7)
        return seed

    def _compute(self, number: int, start: int, work: "Run | Plan") -> None:
        """One unit of work: an attack on a slice of images, judged; written when it is complete."""
        part = self.shards.part(start)
        x, y = self.inputs[part], self.labels[part]
        order = self.work.index(work)
        began = time.monotonic()
        tensors: dict[str, Tensor] = {}
        if isinstance(work, Run):
            run = work
            with count_evaluations() as budget, published_rule() as robust:
                found = self._attack(run, start, x, y, self._seed(number, order, 0))
            tensors["budget"] = torch.tensor([budget.gradients, budget.forwards], device="cpu")
            if robust and sum(map(len, robust)) == len(x):
                tensors[PUBLISHED] = torch.cat(robust).cpu()
            plans = [plan for plan in self.plans if plan.run is run]
            for index, plan in enumerate(plans):
                images, farther = found, run.attack in MINIMUM_NORM
                if plan.norm is not None and plan.eps is not None:
                    images = within(found, x, plan.norm, plan.eps, farther, self.bounds)
                if self.protocol.bits is not None:
                    images = in_8_bits(images, x, plan.norm, plan.eps, self.bounds)
                seed = self._seed(number, order, 1 + index)
                self._judge(tensors, plan, x, images, y, self.protocol.judge.seeds, seed)
        else:
            # Of each image the attacked version with the largest lead; fresh queries then judge it.
            images = leading([self.shards.read(start, key) for key in work.members]) if work.members else x
            self._judge(tensors, work, x, images, y, self._many(), self._seed(number, order, 1))
        path = self.shards.path(work, start)
        atomic_write(path, safetensors.torch.save(tensors))
        write_json(path.with_suffix(".json"), {"seconds": round(time.monotonic() - began, 3)})

    def _attack(self, run: Run, start: int, x: Tensor, y: Tensor, seed: int) -> Tensor:
        """The images of one attack; where they go in turn, those that need no more as they were found."""
        found, rows = x, torch.arange(len(x), device="cpu")
        if self.protocol.in_turn and not run.everywhere and run.attack not in MINIMUM_NORM:
            keys = earlier(self.plans, self.runs, run, x[0].numel())
            members = [self.shards.read(start, key) for key in keys]
            left = left_over(members, y, self.protocol.judge.seeds)
            found, rows = left.best.clone(), rows[left.open]
        with ExitStack() as base:
            for model in self._models() if run.surrogate is not None else ():
                base.enter_context(noise_disabled(model))
            images = run.call()(
                self.attacked, x[rows], y[rows], seed=seed, max_batch=self.max_batch, **run.settings
            )
        return found.index_copy(0, rows, images)

    def _many(self) -> int:
        return max(self.protocol.judge.seeds, self.protocol.judge.queries)

    def _judge(
        self,
        tensors: dict[str, Tensor],
        plan: Plan,
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
            tensors[f"{plan.key}.images"] = images.cpu().contiguous()
        tensors[f"{plan.key}.answers"] = verdict.answers.cpu().contiguous()
        for name in ("lead", "l2", "linf"):
            tensors[f"{plan.key}.{name}"] = getattr(verdict, name).cpu()

    def _finish(self) -> None:
        """Put the shards together."""
        entries = {
            plan.key: collect.entry(self.shards, plan, self.labels, self.protocol.judge.seeds)
            for plan in self.plans
        }
        about = provenance(device_of_parameters(self.ensemble))
        about.pop("time")
        results = Results(
            name=self.name,
            model=self.model,
            data=self.data_record,
            protocol=self.protocol.record() | {"version": self.protocol.version},
            clean=entries[CLEAN],
            attacks=tuple(entries[plan.key] for plan in self.plans if plan.run is not None),
            worst_case=tuple(entries[plan.key] for plan in self.plans if plan.members),
            checks=self._known_checks(),
            impossible=tuple(self.impossible),
            provenance=about,
        )
        write_json(self.out / RESULTS, results.record())
        atomic_write(self.out / TABLE, collect.table(self.shards, self.labels).encode())
        atomic_write(self.out / GALLERY, collect.gallery(self.shards, self.labels, self.bounds))
        self._write_timings()
        if self.protocol.checks and results.checks is None:
            examined = results.model_copy(update={"checks": self._checks()})
            write_json(self.out / RESULTS, examined.record())
            self._write_timings()

    def _write_timings(self) -> None:
        seconds = {
            path.stem: read_json(path, _AGAIN)["seconds"]
            for path in sorted((self.out / SHARDS).glob("*.json"))
        }
        write_json(self.out / TIMINGS, {"finished": provenance()["time"], "seconds": seconds})

    def _known_checks(self) -> tuple[CheckRecord, ...] | None:
        """The honesty checks, if an earlier run made them."""
        path = self.out / SHARDS / CHECKS
        if not (self.protocol.checks and path.is_file()):
            return None
        found = read_json(path, _AGAIN)
        try:
            return tuple(CheckRecord.model_validate(check) for check in found["checks"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {_AGAIN}") from error

    def _checks(self) -> tuple[CheckRecord, ...]:
        """The honesty checks; where they cannot be made, one that says why and counts as failed."""
        from .doctor.examination import doctor

        began = time.monotonic()
        # The trials' threat model: the first norm of the protocol, at its middle radius.
        bound = [(plan.norm, plan.eps) for plan in self.plans if plan.norm and plan.eps]
        norm = bound[0][0] if bound else "linf"
        low, high = self.bounds
        radii = sorted({eps for other, eps in bound if other == norm}) or [(high - low) * 8 / 255]
        try:
            checks = doctor(
                self.ensemble, self.inputs[:_EXAMINED], self.labels[:_EXAMINED], norm=norm,
                eps=radii[len(radii) // 2],
                seed=self._seed(0, 0, 9), max_batch=self.max_batch or _BATCH,
                progress=lambda text, done: self.progress(f"honesty checks: {text}", 1.0),
            )  # fmt: skip
        except Interrupted:
            raise
        except Exception as error:  # of whatever kind: hours of attacks stand beside it
            reason = " ".join(str(error).split())[:300]
            return (
                CheckRecord(
                    name="honesty checks", passed=False, figure="could not be done",
                    advice=f"{type(error).__name__}: {reason}. Run the same command again, or `doctor`",
                ),
            )  # fmt: skip
        seconds = round(time.monotonic() - began, 3)
        found = [check.model_dump(mode="json") for check in checks]
        write_json(self.out / SHARDS / CHECKS, {"checks": found, "seconds": seconds})
        return tuple(checks)
