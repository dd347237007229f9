"""Accuracy against the number of noise draws, without attack and under attack."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..attacks import pgd
from ..ensemble.ensemble import SelfEnsemble
from ..noise.injection import eval_mode
from ..noise.streams import noise_draw, stream_seed
from ..report.figures import Line, Panel, draw
from ..report.intervals import Share, mean
from ..report.page import Page, Picture, Table
from .base import Experiment, Measured, Setting, inputs_of
from .records import Record, column

COUNTS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
_DRAWS = 100
_PAIRS = ((10, 1), (100, 1), (100, 10))
_ABOUT = """\
One set of {repetitions} times 100 softmax outputs an image, each from noise of its own. The answer of n draws
is the argmax of their mean; of 100 draws there are 100 // n disjoint groups of n, and an image's accuracy is
the share of all its groups that classify correctly. Intervals are 95 % normal intervals of the mean over the
images; those of a gain are of the differences of the same images' accuracies, so they are paired. The attack
is PGD in L2 at {eps:g} on the loss of the ensemble, {steps} steps of {eot} draws, one attacked image for all
n."""


@torch.no_grad()
def softmax_draws(ensemble: SelfEnsemble, images: Tensor, draws: int, seed: int) -> Tensor:
    """(draws, B, K) softmax outputs of single draws, noise drawn for each image on its own."""
    with eval_mode(ensemble):
        each = []
        for index in range(draws):
            with noise_draw(seed, index, "per_image"):
                each.append(ensemble.draw_logits(images).float().softmax(dim=1))
    return torch.stack(each)


def right_groups(probabilities: Tensor, labels: Tensor, size: int) -> Tensor:
    """(B,) on the CPU, how many of the disjoint groups of `size` draws classify correctly.

    Args:
        probabilities: (draws, B, K), of single draws.
        labels: (B,).
        size: draws a group; draws that fill no group are left out.
    """
    groups = len(probabilities) // size
    means = probabilities[: groups * size].cpu().double().unflatten(0, (groups, size)).mean(dim=1)
    right: Tensor = means.argmax(dim=2) == labels.cpu()
    return right.sum(dim=0)


class Draws(Experiment):
    """RSE and ours, 1 to 100 draws."""

    name = "draws"
    names = ("rse", "ours")

    def measure(self, setting: Setting) -> Measured:
        settings = setting.scale.draws
        inputs, labels = inputs_of(setting, settings.images)
        units = setting.units(settings.model_dump())
        parts = list(zip(inputs.split(setting.scale.shard), labels.split(setting.scale.shard), strict=True))
        counted: dict[str, list[Tensor]] = {}
        for number, (x, y) in enumerate(parts):
            setting.progress(f"images {number * setting.scale.shard} on", number / len(parts))
            done = units.compute(f"{number:05d}", partial(_count, setting, x, y, number))
            for key, values in done.items():
                counted.setdefault(key, []).append(values)
        columns = {"label": column(labels.numpy())}
        columns |= {key: column(torch.cat(values).numpy()) for key, values in sorted(counted.items())}
        groups = {str(n): settings.repetitions * (_DRAWS // n) for n in COUNTS}
        entries = {kind: {"groups": groups} for kind in ("clean", "attacked")}
        return Measured(settings.model_dump(), entries, columns)

    def page(self, records: Sequence[Record]) -> Page:
        about = _ABOUT.format(**records[0].facts.settings)
        kinds = {"clean": "no attack", "attacked": "attacked"}
        rows = [
            [f"{n}", *(mean(_accuracy(record, kind, n)).text for record in records for kind in kinds)]
            for n in COUNTS
        ]
        titles = [f"{record.facts.title}, {what}" for record in records for what in kinds.values()]
        pairs = [
            [f"{record.facts.title}, {what}", *(_points(_gain(record, kind, *pair)) for pair in _PAIRS)]
            for record in records
            for kind, what in kinds.items()
        ]
        lines = [
            Line(title, look, COUNTS, [mean(_accuracy(record, kind, n)) for n in COUNTS])
            for look, (title, (record, kind)) in enumerate(
                zip(titles, [(record, kind) for record in records for kind in kinds], strict=True)
            )
        ]
        head = ["", *(f"{more} draws over {fewer}" for more, fewer in _PAIRS)]
        parts: list[Table | Picture] = [
            Table("Accuracy by draws", "In %.", ["draws", *titles], rows),
            Table("Gain by more draws", "Difference of accuracies in points, paired interval.", head, pairs),
            Picture(
                "accuracy",
                "Accuracy against the number of draws; bars: 95 % intervals.",
                draw([[Panel("", "draws an answer", "accuracy, %", lines, "log")]]),
            ),
        ]
        return Page("Accuracy against the number of draws", about, parts)


def _count(setting: Setting, x: Tensor, y: Tensor, number: int) -> dict[str, Tensor]:
    """Right groups of every size, of the images as they are and attacked."""
    settings, ensemble = setting.scale.draws, setting.trained.ensemble
    seed = stream_seed(setting.seed, number, 11)
    attacked = pgd(
        setting.attacked, x, y, norm="l2", eps=settings.eps, steps=settings.steps, eot=settings.eot,
        average="probabilities", seed=stream_seed(seed, 0, 0),
    )  # fmt: skip
    found: dict[str, Tensor] = {}
    for place, (kind, images) in enumerate((("clean", x), ("attacked", attacked))):
        for repetition in range(settings.repetitions):
            own = stream_seed(seed, repetition, 1 + place)
            each = softmax_draws(ensemble, images.to(setting.device), _DRAWS, own).cpu()
            for n in COUNTS:
                key = f"{kind}.{n}"
                found[key] = found.get(key, torch.zeros_like(y)) + right_groups(each, y, n)
    return found


def _accuracy(record: Record, kind: str, draws: int) -> NDArray[np.float64]:
    """(N,) share of an image's groups that classify correctly."""
    groups: int = record.facts.entries[kind]["groups"][str(draws)]
    return record.numbers(f"{kind}.{draws}") / groups


def _gain(record: Record, kind: str, more: int, fewer: int) -> Share:
    return mean(_accuracy(record, kind, more) - _accuracy(record, kind, fewer))


def _points(gain: Share) -> str:
    return f"{100 * gain.value:+z.2f} ({100 * gain.low:+z.2f} to {100 * gain.high:+z.2f})"
