"""The paper's headline: accuracy against the strength c and against distortion, for every defense.

Experiments `headline`, `resnext` and `stl10`. Source: Liu et al., ECCV 2018, section 4.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ..evaluation.protocol import AttackSpec, JudgeSection, Protocol
from ..report.figures import Line, Panel, draw
from ..report.page import Page, Picture, Table
from ..runtime.packages import needs
from .base import Experiment, Measured, Setting
from .distances import RADII, distance_table, gain_table
from .judged import accuracy, by_strength, evaluate, rms
from .published import Curve, citation, published_curve
from .records import Record
from .scales import Scale

with needs("selfensemble[report]"):
    from matplotlib.figure import Figure

_ABOUT = """\
The *paper's protocol*: untargeted C&W L2, fixed c, kappa 0, last iterate, one noise draw a step. It is weak
against randomised defenses, and what a c does depends on the scale of the logits. The table by distance has
another protocol: C&W with binary search over c, averaged over noise. Accuracies are those of the first seed
of the defender's noise, drawn for each image, with 95 % Clopper-Pearson intervals; c = 0 is no attack.
Distances are L2, images in [0, 1]."""
# What a page says of networks whose logits are multiplied, where it has them.
_SCALED = {
    "rescaled": """

*No defense, logits / 10* is the undefended network with its logits divided by ten. That changes none of its
answers, and makes a c a weaker attack: accuracies at a fixed c do not compare defenses.""",
    "sharpened": """

*Adversarial retraining, logits x 1.5* is the retrained network with the slopes that the undefended one has
about: what retraining seems to gain over no defense at a small c is the scale of its logits.""",
    "tempered": """

*Distillation* answers at temperature 1, as published, with margins a hundred times those it was trained at: a
c that is small for others is large for it, and the search over c of the table by distance does not come down
to the c it needs. *Distillation, logits / 100* is the same network, asked at the temperature of its training:
its answers are the same, and what it seems to gain at a distance is gone. The authors' curve is compared with
this one, because their accuracies at c agree; the authors' distortions lie between the two.""",
}
_COMPARED = """\
The authors' accuracy at c, and ours where the attack has gone as far: at the same RMS L2, interpolated
between the strengths. A network with k times the logits faces at c the attack that another faces at k c; that
difference is gone here. The last row is the authors' distortion over ours at the smallest c, for networks of
which that fools few images: the attack then ends about c / 2 times the gradient of the margin away from the
image, so that the row is about how much steeper the authors' margins are."""
_FEW = 0.9  # of the accuracy without attack
_AXES = {"c": ("strength c (0: no attack)", "symlog"), "rms_l2": ("distortion, RMS L2", "linear")}


def curve_protocol(experiment: str, scale: Scale, seed: int) -> Protocol:
    """The paper's attack at every strength, and C&W with binary search for the distances."""
    paper = {"attack": "cw-paper", "title": "C&W paper", "c": list(scale.strengths)}
    search = {"attack": "cw", "title": f"C&W EOT {scale.search.eot}", "eps": list(RADII)}
    return Protocol(
        name=f"{experiment}-{scale.name}",
        images=scale.images,
        seed=seed,
        shard=scale.shard,
        precision=scale.precision,
        judge=JudgeSection(seeds=scale.seeds, queries=1),
        attacks=(
            AttackSpec.model_validate(paper | scale.paper.model_dump()),
            AttackSpec.model_validate(search | scale.search.model_dump()),
        ),
    )


class Curves(Experiment):
    """The paper's attack on the defenses of the paper and ours, for one architecture."""

    def __init__(self, name: str, kin: str, *more: str) -> None:
        self.name, self.kin = name, kin
        self.names = ("plain", "fgsm-retraining", "brelu", "distillation", "rse", "ours", *more)

    def measure(self, setting: Setting) -> Measured:
        return evaluate(setting, curve_protocol(self.name, setting.scale, setting.seed))

    def page(self, records: Sequence[Record]) -> Page:
        head, rows = strength_rows(records, lambda record, key: accuracy(record, key).text)
        parts = [
            Table("Accuracy against the strength c", "Accuracy in %.", head, rows),
            Table(
                "Distortion against the strength c",
                "RMS L2 of the change.",
                *strength_rows(records, lambda record, key: f"{rms(record, key):.3f}"),
            ),
            Picture(
                "accuracy",
                "Accuracy against c and against distortion; bars: 95 % intervals.",
                self._plot(records),
            ),
            *self._authors(records),
            *distance_table(records),
            *gain_table(records),
        ]
        facts = records[0].facts
        there = {record.facts.network for record in records}
        about = _ABOUT + "".join(text for name, text in _SCALED.items() if name in there)
        title = f"The paper's experiment: {facts.recipe['model']['name']} on {facts.source}"
        return Page(title, about, parts)

    def _published(self, record: Record) -> Curve | None:
        """The authors' curve of the same defense of the same network."""
        name, model = record.facts.published, record.facts.recipe["model"]["name"]
        return published_curve(self.kin, name) if name and model == self.family.model else None

    def _authors(self, records: Sequence[Record]) -> list[Table | Picture]:
        """The authors' curves of the networks measured here."""
        curves = {each.facts.title: curve for each in records if (curve := self._published(each))}
        if not curves:
            return []
        rows = [
            [
                f"{c:g}",
                *(f"{100 * curve.accuracy[i]:.1f}, {curve.rms_l2[i]:.3f}" for curve in curves.values()),
            ]
            for i, c in enumerate(next(iter(curves.values())).c)
        ]
        caption = f"Accuracy in % and RMS L2. {citation()}"
        return [Table("The authors' curves", caption, ["c", *curves], rows), *self._compared(records, curves)]

    def _compared(self, records: Sequence[Record], curves: dict[str, Curve]) -> list[Table | Picture]:
        """The authors' curves beside ours where the attack went as far, whatever c it took."""
        ours = {each.facts.title: by_distortion(each) for each in records if each.facts.title in curves}
        rows = [
            [f"{c:g}", *(_beside(curve, i, *ours[title]) for title, curve in curves.items())]
            for i, c in enumerate(next(iter(curves.values())).c)
            if c <= max(max(by_strength(record)) for record in records)
        ]
        strengths = {each.facts.title: list(by_strength(each)) for each in records}
        steeper = [steepness(curve, strengths[title], *ours[title]) for title, curve in curves.items()]
        return [
            Table("At the authors' distortion", _COMPARED, ["c", *curves], [*rows, ["steepness", *steeper]])
        ]

    def _plot(self, records: Sequence[Record]) -> Figure:
        return draw([self._panels(records, x) for x in _AXES], share_x=True)

    def _panels(self, records: Sequence[Record], x: str) -> list[Panel]:
        """Ours and, up to the same c, the authors' curves against `x`, a key of `_AXES`."""
        ours, authors = [], []
        for look, record in enumerate(records):
            keys, title = by_strength(record), record.facts.title
            places = list(keys) if x == "c" else [rms(record, key) for key in keys.values()]
            ours.append(Line(title, look, places, [accuracy(record, key) for key in keys.values()]))
            if curve := self._published(record):
                within = sum(c <= max(keys) for c in curve.c)
                authors.append(Line(title, look, getattr(curve, x)[:within], curve.accuracy[:within]))
        label, scale = _AXES[x]
        panels = [Panel("measured here", label, "accuracy, %", ours, scale)]
        if authors:
            panels.append(Panel("Liu et al. 2018, the authors' own", label, "accuracy, %", authors, scale))
        return panels


def by_distortion(record: Record) -> tuple[list[float], list[float]]:
    """RMS L2 and accuracy by c, both from no attack on."""
    keys = by_strength(record).values()
    return [rms(record, key) for key in keys], [accuracy(record, key).value for key in keys]


def _beside(curve: Curve, place: int, distances: list[float], accuracies: list[float]) -> str:
    """The authors' accuracy and ours at their distortion, within the distortions measured."""
    distance, authors = curve.rms_l2[place], 100 * curve.accuracy[place]
    farther = np.maximum.accumulate(distances)
    if curve.c[place] and not farther[1] * (1 - 1e-6) <= distance <= farther[-1] * (1 + 1e-6):
        return f"{authors:.1f}, \N{EN DASH}"
    return f"{authors:.1f}, {100 * float(np.interp(distance, farther, accuracies)):.1f}"


def steepness(curve: Curve, strengths: list[float], distances: list[float], accuracies: list[float]) -> str:
    """The authors' distortion over ours at the smallest c, where it fools few images of either network."""
    few = all(each[1] >= _FEW * each[0] for each in (curve.accuracy, accuracies))
    if not (few and strengths[1] == curve.c[1] and distances[1] > 0):
        return "\N{EN DASH}"
    return f"{curve.rms_l2[1] / distances[1]:.2f}"


def strength_rows(
    records: Sequence[Record], cell: Callable[[Record, str], str]
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with a row a strength and a column a network."""
    keys = [by_strength(record) for record in records]
    strengths = sorted({c for each in keys for c in each})
    rows = [
        [
            f"{c:g}",
            *(
                cell(record, own[c]) if c in own else "\N{EN DASH}"
                for record, own in zip(records, keys, strict=True)
            ),
        ]
        for c in strengths
    ]
    return ["c", *(record.facts.title for record in records)], rows
