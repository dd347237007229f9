"""Certified accuracy by radius: votes against means, and what noise inside a network does to it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..certainty.certification import METHODS, Certificate, Method, certificates
from ..certainty.pixels import pixel_std
from ..fast.optimize import precision_of
from ..noise.streams import stream_seed
from ..report.figures import Line, Panel, draw
from ..report.intervals import mean, share
from ..report.page import Page, Picture, Table
from ..report.published import COHEN, is_theirs
from .base import Beside, Experiment, Measured, Setting, inputs_of
from .certified_tables import (
    RADII,
    against_votes,
    draws,
    draws_head,
    looked_for,
    points,
    probabilities,
    published,
    reach,
    row,
    sought,
)
from .honest import worst_keys, worst_lines
from .judged import accuracy
from .networks import Network, network
from .noise_levels import cell, is_cell, levels_of
from .records import Record, column
from .scales import CertificateScale, Scale
from .within_radius import attacked, withstood

CERTIFIED = (
    "rse", "ours", "gaussian", "smoothadv", "consistency", "consistency-sharp", "consistency-flipped",
)  # fmt: skip
_STEPS = 40  # of a curve
_STD = 0.25  # of the noise on the image, where ways of training are compared, if the grid has it
_CURVES = (
    "Certified accuracy against the radius, published curves (by votes), and accuracy in the worst case of "
    "the honest protocol, which no certificate can exceed."
)
_BETWEEN = """\
Accuracy in %. What the strongest attack of that size would leave of the mean lies between its certificates
and the worst case of the honest protocol, up to the chance in the choice of images and the risk of the
certificates; *open* is what nobody knows, in points. Votes certify the answer by votes, which is another
predictor, mostly of the same answers."""
_ABOUT = """\
Certified accuracy at a radius: the share of the first {images} test images that are classified correctly,
with a certificate that no change within that L2 radius changes the infinite ensemble's answer. {n0} draws
select the answer, n estimate, and each certificate is wrong with probability {alpha:g} at most. *vote* is
the certificate of Cohen et al. for the class that most single draws choose, *mean* that of the mean
probability, which is what the ensemble predicts; both from the same draws, both with bounds of the runner-up.
The network that is certified is the optimised one, in its precision. Intervals are 95 % Clopper-Pearson over
the images; those of differences are paired."""


# How images stopped before a wanted radius was looked for by bets, and now.
_STOPPING = {
    "looks": "Images draw until the radius is certified, which one of four looks finds, at most n times.",
    "bets": "Images draw until the radius is certified, proven to be out of reach, or given up because the "
    "last draw would hardly certify it, at most n times.",
}
_AT_ONCE = """\
In per cent. Where draws are fewer than n, images stopped when each radius of the table, .01 instead of 0, was
certified, proven to be out of reach or given up. Radii that half of n draws cannot certify, whatever the
network answers, are not looked for and left blank. Last rows: published, of other networks with noise of std
on the image alone, by votes, n = 100,000."""


class Certificates(Experiment):
    """Networks with noise on the image."""

    beside = ("honest",)

    def __init__(self, name: str, title: str, *names: str) -> None:
        self.name, self.names, self._title = name, names, title

    def networks(self, scale: Scale) -> list[Network]:
        if self.names:
            return super().networks(scale)
        cells = [cell(scale, init, inner) for init in scale.noise.init if init for inner in scale.noise.inner]
        return cells + trained_for_certificates(scale)

    def settings(self, scale: Scale) -> CertificateScale:
        """Those of this experiment."""
        return scale.certificates if self.names else scale.certified_noise

    def known_settings(self, scale: Scale) -> dict[str, Any]:
        said = self.settings(scale).model_dump(mode="json")
        if not said["radii"]:
            del said["radii"]  # which earlier records and units of work do not name
        return said | {"stopping": "bets"}

    def measure(self, setting: Setting) -> Measured:
        settings = self.settings(setting.scale)
        inputs, labels = inputs_of(setting, settings.images)
        std = pixel_std(setting.attacked, inputs[:2].to(setting.device))
        own: dict[str, Any] = {"std": std, "precision": precision_of(setting.attacked)}
        radii = sought(settings.radii, std, settings.alpha, settings.n)
        if settings.radii:
            own["sought"] = radii
        said = self.known_settings(setting.scale)
        units, size = setting.units(said | own), min(50, setting.scale.shard)
        parts = []
        for number, few in enumerate(inputs.split(size)):
            work = partial(_certified, setting, settings, radii, few, number, number * size / len(inputs))
            parts.append(units.compute(f"{number:05d}", work))
        columns = {"label": column(labels.numpy())}
        found = {name: torch.cat([part[name] for part in parts]) for name in sorted(parts[0])}
        columns |= {name: column(values.numpy()) for name, values in found.items()}
        if settings.attacked:
            columns |= attacked(setting, settings, units, inputs, found)
        return Measured(said, {"certificate": own}, columns)

    def page(self, records: Sequence[Record]) -> Page:
        return self.page_beside(records, {})

    def page_beside(self, records: Sequence[Record], others: Beside) -> Page:
        settings = records[0].facts.settings
        parts: list[Table | Picture] = [
            Table(
                "Certified accuracy by radius",
                _AT_ONCE,
                ["network", *(f"{radius:g}" for radius in RADII), "abstained", "n", "mean draws"],
                [row(record, method) for record in records for method in METHODS] + published(records),
            ),
            Table(
                f"Draws for a radius of {settings['wanted']:g}",
                _STOPPING[settings.get("stopping", "looks")],
                draws_head(),
                [draws(record) for record in records],
            ),
            Table(
                "Means against votes",
                "Certified accuracy by means less that by votes, in points, of the same images and draws.",
                ["network", *(f"{radius:g}" for radius in RADII)],
                [[record.facts.title, *against_votes(record)] for record in records],
            ),
        ]
        parts += probabilities(records)
        if not self.names:
            parts += _compared(records)
        if settings["attacked"]:
            parts.append(withstood(records))
        lines = {
            method: [
                Line(record.facts.title, look, *_curve(record, method, _grid(records)), steps=True)
                for look, record in enumerate(records)
            ]
            for method in METHODS
        }
        honest = others.get("honest", ())
        parts += [table for record in records for table in between(record, honest)]
        under_attack = empirical(records, honest)
        theirs = COHEN if is_theirs(records[0].facts.source) else {}
        lines["vote"] += [
            Line(
                f"Cohen et al., std {std:g}",
                2 * len(records) + place,
                list(known),
                [each / 100 for each in known.values()],
            )
            for place, (std, known) in enumerate(theirs.items())
        ]
        panels = [
            Panel(method, "L2 radius", "accuracy, %", lines[method] + under_attack) for method in METHODS
        ]
        parts.append(Picture("certified", _CURVES, draw([panels])))
        return Page(self._title, _ABOUT.format(**settings), parts)


def trained_for_certificates(scale: Scale) -> list[Network]:
    """Beside the network that Cohen et al. train, of the noise that all have: other ways to train it."""
    std = _STD if _STD in scale.noise.init else max(scale.noise.init)
    levels = {"noise.init_std": std, "noise.inner_std": 0.0, "noise.draws": 10}
    # In float32: not every CPU has units for bfloat16, without which this takes three times as long.
    agreeing = {"defense.name": "cross-entropy", "defense.draws": 2, "defense.consistency": 10.0}
    agreeing |= {"train.precision": "no"}
    return [
        network(
            "rse", name="consistency", title=f"consistency, {std:g}", folder="noise-consistency",
            overrides=scale.noise.train | levels | agreeing,
        ),
        network(
            "smoothadv", title=f"SmoothAdv, {std:g}", folder="noise-smoothadv",
            overrides=scale.noise.train | levels | {"defense.eps": std},
        ),
    ]  # fmt: skip


def _certified(
    setting: Setting,
    settings: CertificateScale,
    radii: tuple[float, ...],
    images: Tensor,
    number: int,
    done: float,
) -> dict[str, Tensor]:
    """Certificates of a few images by both methods, then draws until a wanted radius."""
    found: dict[str, Tensor] = {}
    share_of_all = len(images) / settings.images
    for place, wanted in enumerate((radii or None, settings.wanted)):

        def progress(drawn: int, total: int, place: int = place) -> None:
            setting.progress("certifying", done + share_of_all * (place + drawn / total) / 2)

        by_method = certificates(
            setting.attacked, images.to(setting.device), METHODS, alpha=settings.alpha, n0=settings.n0,
            n=settings.n, radius=wanted, seed=stream_seed(setting.seed, number, 30 + place),
            progress=progress,
        )  # fmt: skip
        for method, certificate in by_method.items():
            if not place:
                found |= {f"{method}.{name}": values for name, values in _parts(certificate).items()}
            else:
                found[f"{method}.draws"] = certificate.draws
                found[f"{method}.reached"] = (certificate.radius >= settings.wanted).long()
    return found


def _parts(certificate: Certificate) -> dict[str, Tensor]:
    return {
        "answer": certificate.label,
        "radius": certificate.radius,
        "estimate": certificate.estimate,
        "all-draws": certificate.draws,
    }


def empirical(records: Sequence[Record], honest: Sequence[Record]) -> list[Line]:
    """Accuracy in the worst case of the honest protocol, of the networks that have one.

    A network of another width may have the same short name: the same is the one with the same digest.
    """
    looks = {record.facts.model: look for look, record in enumerate(records)}
    return [
        Line(f"{each.facts.title}, under attack", len(records) + looks[each.facts.model], line.x, line.y)
        for each in honest
        if each.facts.model in looks
        for line in worst_lines([each], "l2")
    ]


def between(record: Record, honest: Sequence[Record]) -> list[Table]:
    """What is known of a network at each radius that was attacked: at least, and at most."""
    rows = []
    for attacked_one in (each for each in honest if each.facts.model == record.facts.model):
        for radius, key in {0.0: "clean", **worst_keys(attacked_one, "l2")}.items():
            most = accuracy(attacked_one, key)
            mean_least, vote_least = (share(reach(record, method) >= radius) for method in ("mean", "vote"))
            left = f"{100 * (most.value - mean_least.value):.1f}"
            if looked_for(record, radius):
                rows.append([f"{radius:g}", mean_least.text, most.text, left, vote_least.text])
            else:
                rows.append([f"{radius:g}", "", most.text, "", ""])
    if not rows:
        return []
    head = ["L2 radius", "at least: certified, mean", "at most: under attack", "open", "certified, vote"]
    return [Table(f"Between certificate and attack: {record.facts.title}", _BETWEEN, head, rows)]


def _compared(records: Sequence[Record]) -> list[Table | Picture]:
    """Networks against the one of the grid with the same noise on the image and none inside."""
    plain = {
        init: each for each in records if is_cell(each) for init, inner in [levels_of(each)] if not inner
    }
    pairs = [(each, plain[levels_of(each)[0]]) for each in records if levels_of(each)[0] in plain]
    inner = [pair for pair in pairs if levels_of(pair[0])[1]]
    trained = [pair for pair in pairs if not is_cell(pair[0])]
    cohen = "that of the network trained on noisy images alone (Cohen et al.), with the same noise"
    return _less(
        "What inner noise does to the certificate", "that of the network without inner noise", inner
    ) + _less("Training for certificates", cohen, trained)


def _less(title: str, than: str, pairs: Sequence[tuple[Record, Record]]) -> list[Table | Picture]:
    """Certified accuracy by both methods, of the first of each pair less the second."""
    rows = []
    for record, other in pairs:
        for method in METHODS:
            ours, theirs = (reach(each, method) for each in (record, other))
            cells = [
                points((ours >= radius).astype(float) - (theirs >= radius))
                if looked_for(record, radius) and looked_for(other, radius)
                else ""
                for radius in RADII
            ]
            further = mean(np.maximum(ours, 0) - np.maximum(theirs, 0))
            radius = f"{further.value:+z.3f} ({further.low:+z.3f} to {further.high:+z.3f})"
            rows.append([f"{record.facts.title}, {method}", *cells, radius])
    if not rows:
        return []
    head = ["network", *(f"{radius:g}" for radius in RADII), "average radius"]
    caption = (
        f"Certified accuracy less {than}, in points, same images. Each network was trained once: the "
        "intervals are over images, not over trainings."
    )
    return [Table(title, caption, head, rows)]


def _grid(records: Sequence[Record]) -> list[float]:
    largest = max(float(record.numbers(f"{method}.radius").max()) for record in records for method in METHODS)
    return [largest * step / _STEPS for step in range(_STEPS + 1)]


def _curve(record: Record, method: Method, radii: list[float]) -> tuple[list[float], list[float]]:
    """Certified accuracy at radii, or at those that were looked for."""
    at = [each for each in RADII if looked_for(record, each)] if record.facts.settings.get("radii") else radii
    own = reach(record, method)
    return at, [float((own >= radius).mean()) for radius in at]
