"""Which levels of the noise give the authors' curve, whose own are not recorded.

Chosen on images that no other experiment attacks: the second half of the test set.
"""

from collections.abc import Sequence

import numpy as np

from ..evaluation.protocol import AttackSpec, JudgeSection, Protocol
from ..report.figures import Line, Panel, draw
from ..report.page import Page, Picture, Table
from .base import Experiment, Measured, Setting
from .curves import by_distortion, steepness, strength_rows
from .judged import accuracy, by_strength, evaluate, rms
from .networks import Network, network
from .published import Curve, citation, published_curve
from .records import Record
from .scales import NoiseLevel, Scale

_ABOUT = """\
The authors recorded RSE's accuracy under their attack, and not the levels of its noise. Here every network is
trained and tested with noise of other levels: *init* on the image, or where it says so behind the first
convolution, as the authors' code places it; *inner* before every other convolution. Each faces the paper's
attack (C&W at a fixed c, one noise draw a step, last iterate), which is weak against randomised defenses.
These networks are smaller and were trained for a shorter time than the authors', so that what counts is the
share of the accuracy without attack that is left. The images are those of the second half of the test set,
which no other page attacks. Accuracies are those of the first seed of the defender's noise."""
_KEPT = """\
Accuracy at c over the accuracy without attack, in %."""
_REACHED = """\
The same at the authors' distortion for each c, interpolated between the strengths; a dash where the attack
has not gone as far. Networks with other margins face another attack at the same c: that difference is gone
here."""
_NEAREST = """\
How far the shares are from the authors', in points: the mean of the absolute differences over all c of the
two tables above. *Steepness* is the authors' distortion over that of the network at the smallest c, about
how much steeper the authors' margins are."""
_AUTHORS = "the authors' RSE"
_DASH = "\N{EN DASH}"


class Levels(Experiment):
    """One network for each pair of levels, under the paper's attack."""

    name = "levels"
    held_out = True

    def networks(self, scale: Scale) -> list[Network]:
        return [of_levels(scale, level) for level in scale.levels.levels]

    def measure(self, setting: Setting) -> Measured:
        scale = setting.scale
        paper = {"attack": "cw-paper", "title": "C&W paper", "c": list(scale.strengths)}
        protocol = Protocol(
            name=f"levels-{scale.name}",
            images=scale.levels.images,
            seed=setting.seed,
            shard=scale.shard,
            precision=scale.precision,
            judge=JudgeSection(seeds=scale.seeds, queries=1),
            attacks=(AttackSpec.model_validate(paper | scale.paper.model_dump()),),
        )
        return evaluate(setting, protocol)

    def page(self, records: Sequence[Record]) -> Page:
        authors = published_curve(self.kin, "rse")
        assert authors is not None
        parts: list[Table | Picture] = [
            Table(
                "Accuracy against the strength c",
                f"In %. {citation()}",
                *_with(authors, *strength_rows(records, lambda record, key: accuracy(record, key).text)),
            ),
            Table(
                "Distortion against the strength c",
                "RMS L2 of the change.",
                *strength_rows(records, lambda record, key: f"{rms(record, key):.3f}"),
            ),
        ]
        strengths = [c for c in authors.c if 0 < c <= max(map(max, map(by_strength, records)))]
        by_c = [_at_strengths(record, strengths) for record in records]
        by_distance = [_at_distortions(record, authors, strengths) for record in records]
        theirs = [_of_authors(authors)[c] for c in strengths]
        titles = [record.facts.title for record in records]
        for title, caption, found in (
            ("Share kept against c", _KEPT, by_c),
            ("Share kept at the authors' distortion", _REACHED, by_distance),
        ):
            rows = [
                [f"{c:g}", _text(theirs[i]), *(_text(each[i]) for each in found)]
                for i, c in enumerate(strengths)
            ]
            parts.append(Table(title, caption, ["c", _AUTHORS, *titles], rows))
        far = [
            [title, _away(of_c, theirs), _away(of_distance, theirs), _steeper(record, authors)]
            for title, record, of_c, of_distance in zip(titles, records, by_c, by_distance, strict=True)
        ]
        head = ["network", "at the same c", "at the same distortion", "steepness"]
        parts.append(Table("Distance from the authors' curve", _NEAREST, head, far))
        parts.append(
            Picture("kept", "Share of the accuracy without attack.", draw([_panels(records, authors)]))
        )
        return Page("Which levels give the authors' curve", _ABOUT, parts)


def of_levels(scale: Scale, level: NoiseLevel) -> Network:
    """RSE trained and tested with noise of these levels."""
    name = f"init{level.init:g}-inner{level.inner:g}" + ("-features" if level.first == "features" else "")
    noise = {"noise.init_std": level.init, "noise.inner_std": level.inner, "noise.draws": 10}
    first = {"noise.first": level.first} if level.first != "image" else {}
    behind = ", behind the first convolution" if first else ""
    return network(
        "rse",
        name=name,
        title=f"init {level.init:g}, inner {level.inner:g}{behind}",
        overrides=scale.levels.train | noise | first,
        folder=f"level-{name}",
    )


def _with(authors: Curve, head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table with a row a strength, and the authors' accuracies as its second column."""
    known = {f"{c:g}": f"{100 * value:.1f}" for c, value in zip(authors.c, authors.accuracy, strict=True)}
    named = [[row[0], known.get(row[0], _DASH), *row[1:]] for row in rows]
    return [head[0], _AUTHORS, *head[1:]], named


def _of_authors(authors: Curve) -> dict[float, float]:
    """Shares of the authors' accuracy that are left, by c."""
    return {c: value / authors.accuracy[0] for c, value in zip(authors.c, authors.accuracy, strict=True)}


def _at_strengths(record: Record, strengths: Sequence[float]) -> list[float | None]:
    """Share of the accuracy without attack that is left at each c; None where it was not measured."""
    keys = by_strength(record)
    clean = accuracy(record, keys[0.0]).value
    return [accuracy(record, keys[c]).value / clean if c in keys and clean else None for c in strengths]


def _at_distortions(record: Record, authors: Curve, strengths: Sequence[float]) -> list[float | None]:
    """The same at the authors' distortion for each c; None beyond what was measured."""
    distances, accuracies = by_distortion(record)
    farther, wanted = np.maximum.accumulate(distances), dict(zip(authors.c, authors.rms_l2, strict=True))
    if not accuracies[0]:
        return [None for _ in strengths]
    farthest = farther[-1] * (1 + 1e-6)
    return [
        float(np.interp(wanted[c], farther, accuracies)) / accuracies[0] if wanted[c] <= farthest else None
        for c in strengths
    ]


def _away(found: Sequence[float | None], theirs: Sequence[float]) -> str:
    """Mean absolute difference in points, of the strengths where there is one."""
    off = [abs(ours - their) for ours, their in zip(found, theirs, strict=True) if ours is not None]
    said = f" ({len(off)} of {len(theirs)})" if len(off) < len(theirs) else ""
    return f"{100 * float(np.mean(off)):.1f}{said}" if off else _DASH


def _steeper(record: Record, authors: Curve) -> str:
    return steepness(authors, list(by_strength(record)), *by_distortion(record))


def _text(share: float | None) -> str:
    return _DASH if share is None else f"{100 * share:.1f}"


def _panels(records: Sequence[Record], authors: Curve) -> list[Panel]:
    """Shares that are left against c and against distortion, the authors' beside them."""
    most = max(map(max, map(by_strength, records)))
    within = sum(c <= most for c in authors.c)
    shares = list(_of_authors(authors).values())[:within]
    panels = []
    for label, scale, x in (
        ("strength c (0: no attack)", "symlog", authors.c),
        ("distortion, RMS L2", "linear", authors.rms_l2),
    ):
        lines = [Line(_AUTHORS, 0, x[:within], shares)]
        for look, record in enumerate(records, start=1):
            keys = by_strength(record)
            clean = accuracy(record, keys[0.0]).value or 1.0
            places = list(keys) if x is authors.c else [rms(record, key) for key in keys.values()]
            kept = [accuracy(record, key).value / clean for key in keys.values()]
            lines.append(Line(record.facts.title, look, places, kept))
        panels.append(Panel("share kept", label, "of the accuracy without attack, %", lines, scale))
    return panels
