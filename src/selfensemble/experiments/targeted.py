"""Targeted C&W: how often the class that the attacker wants is answered, and how far the image goes."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..attacks import cw_l2, cw_l2_paper
from ..ensemble.ensemble import SelfEnsemble
from ..fast.exact import exact_float32
from ..noise.streams import stream_seed
from ..report.figures import Line, Panel, draw
from ..report.intervals import Share, share
from ..report.page import Page, Picture, Table
from .base import Experiment, Measured, Setting, inputs_of
from .records import Record, column, words

RADII = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
_SEARCH = "search"
_ABOUT = """\
The seed draws the target class of each image among the classes that the image does not belong to. An
attack at fixed c succeeds when the first seed of the defender's noise answers with the wanted class; 95 %
Clopper-Pearson intervals. The paper's protocol is C&W at fixed c, one noise draw a step, last iterate:
what a c does depends on the scale of the logits. The table by distance is of C&W with binary search over
c, averaged over noise: how near it found an image of which its own draws confirm that the mean answers
with the wanted class. Such images lie at the boundary, where one answer is wrong about as often as right;
the column *one answer* says how often it is the wanted class."""


def targets_of(labels: Tensor, classes: int, seed: int) -> Tensor:
    """(B,) a class for each image, uniform among those that are not its own."""
    generator = torch.Generator("cpu").manual_seed(stream_seed(seed, 0, 13))
    steps = torch.randint(1, classes, labels.shape, generator=generator, device="cpu")
    return (labels + steps.to(labels.device)) % classes


@torch.no_grad()
def answers_of(ensemble: SelfEnsemble, images: Tensor, seeds: int, seed: int, max_batch: int) -> Tensor:
    """(B, seeds) answers under fresh noise, drawn for each image and seed on its own."""
    with exact_float32():
        each = [
            ensemble.predict(
                images, seed=stream_seed(seed, number, 0), sampling="per_image", max_batch=max_batch
            )
            for number in range(seeds)
        ]
    return torch.stack([answer.label for answer in each], dim=1)


class Targeted(Experiment):
    """No defense against RSE and ours."""

    name = "targeted"
    names = ("plain", "rse", "ours")

    def measure(self, setting: Setting) -> Measured:
        scale = setting.scale
        inputs, labels = inputs_of(setting, scale.images)
        targets = targets_of(labels, len(setting.test.classes), setting.seed)
        attacks: dict[str, dict[str, float]] = {
            f"c={c:g}": {"c": c} | scale.paper.model_dump() for c in scale.strengths
        }
        attacks[_SEARCH] = scale.search.model_dump()
        units = setting.units({"attacks": attacks, "images": len(labels), "seeds": scale.seeds})
        columns = {"label": column(labels.numpy()), "target": column(targets.numpy())}
        starts = range(0, len(labels), scale.shard)
        for place, (key, settings) in enumerate(attacks.items()):
            parts = []
            for number, start in enumerate(starts):
                part_done = (place + number / len(starts)) / len(attacks)
                setting.progress(f"{key}, images {start} on", part_done)
                part = slice(start, start + scale.shard)
                seed = stream_seed(stream_seed(setting.seed, number, 17), place, 0)
                work = partial(_attack, setting, inputs[part], targets[part], settings, seed)
                parts.append(units.compute(f"{number:05d}-{key}", work))
            columns[f"{key}.success"] = words(torch.cat([part["success"] for part in parts]).numpy())
            columns[f"{key}.l2"] = column(torch.cat([part["l2"] for part in parts]).numpy())
        shown = {"paper": scale.paper.model_dump(), _SEARCH: scale.search.model_dump()}
        entries = {key: {"settings": settings} for key, settings in attacks.items()}
        return Measured(shown, entries, columns)

    def page(self, records: Sequence[Record]) -> Page:
        titles = [record.facts.title for record in records]
        strengths = [key for key in records[0].facts.entries if key != _SEARCH]
        fixed = [
            [
                key.removeprefix("c="),
                *(f"{_success(each, key).text}, {_rms(each, key):.3f}" for each in records),
            ]
            for key in strengths
        ]
        nearest = [
            [
                record.facts.title,
                *(share(_distances(record) <= radius).text for radius in RADII),
                _success(record, _SEARCH).text,
                _median(_distances(record)),
            ]
            for record in records
        ]
        head = ["defense", *(f"within L2 {radius:g}" for radius in RADII), "one answer", "median L2"]
        parts: list[Table | Picture] = [
            Table("Success at fixed c", "Success in %, and RMS L2 of all images.", ["c", *titles], fixed),
            Table("Success by distance", "Success in %; the median is that of all images.", head, nearest),
            Picture(
                "success", "Success against c and against distance.", draw([_panels(records, strengths)])
            ),
        ]
        return Page("Targeted attacks", _ABOUT, parts)


def _panels(records: Sequence[Record], keys: Sequence[str]) -> list[Panel]:
    radii = [float(radius) for radius in np.linspace(0, 3, 31)]
    strengths = [float(key.removeprefix("c=")) for key in keys]
    fixed, nearest = [], []
    for look, record in enumerate(records):
        distances, title = _distances(record), record.facts.title
        fixed.append(Line(title, look, strengths, [_success(record, key) for key in keys]))
        nearest.append(Line(title, look, radii, [float((distances <= radius).mean()) for radius in radii]))
    return [
        Panel("C&W at fixed c, one draw a step", "strength c", "success, %", fixed, "symlog"),
        Panel("C&W with binary search", "L2 distance", "success, %", nearest),
    ]


def _attack(
    setting: Setting, x: Tensor, targets: Tensor, settings: dict[str, float], seed: int
) -> dict[str, Tensor]:
    """Attack, and judge on fresh noise."""
    attack = cw_l2_paper if "c" in settings else cw_l2
    ensemble = setting.trained.ensemble
    found = attack(
        setting.attacked,
        x,
        targets,
        targeted=True,
        seed=seed,
        max_batch=setting.max_batch,
        **settings,  # type: ignore[arg-type]
    )
    answers = answers_of(ensemble, found, setting.scale.seeds, stream_seed(seed, 0, 1), setting.max_batch)
    return {"success": answers == targets[:, None], "l2": (found - x).flatten(1).norm(dim=1)}


def _rms(record: Record, key: str) -> float:
    return float(np.sqrt(np.square(record.numbers(f"{key}.l2")).mean()))


def _success(record: Record, key: str) -> Share:
    return share(record.bits(f"{key}.success")[:, 0])


def _distances(record: Record) -> NDArray[np.float64]:
    """(N,) distance of the nearest image that succeeds, infinite where there is none.

    An image that has moved was confirmed while the attack ran; at the boundary one answer proves little.
    """
    distance = record.numbers(f"{_SEARCH}.l2")
    success = record.bits(f"{_SEARCH}.success")[:, 0] | (distance > 0)
    found: NDArray[np.float64] = np.where(success, distance, np.inf)
    return found


def _median(distances: NDArray[np.float64]) -> str:
    median = float(np.median(distances))
    return f"{median:.3f}" if np.isfinite(median) else "no success"
