"""Every defense under the honest protocol: expectation over noise, worst case per image, fresh noise."""

from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..evaluation.protocol import Protocol, load_protocol
from ..report.figures import Line, Panel, draw
from ..report.page import Page, Picture, Table
from .base import Experiment, Measured, Setting
from .distances import by_radius, distance_lines, distance_table, gain_table
from .judged import accuracy, all_seeds, evaluate, seed_range
from .records import Record
from .scales import Scale

_DEFENSES = (
    "plain", "fgsm-retraining", "brelu", "distillation", "resize-pad", "gaussian", "smoothadv", "adversarial",
    "trades", "rse", "rse-learned", "ours",
)  # fmt: skip
_ABOUT = """\
The *honest protocol*: several attacks, most of them averaged over the noise, for every image and radius the
strongest one, judged again on fresh noise. Accuracies are those of the first of {seeds} seeds of the
defender's noise, with 95 % Clopper-Pearson intervals over the images; each defense was trained once, and how
much another training would differ is in no interval. They are upper bounds of the robustness. The attacks:
{attacks}."""
_TURNS = """\
; each attack saw only the images that no earlier attack within its ball had clearly fooled, and took over the
others, so its figures are those of all attacks up to that point"""
_RULE = """\
 AutoAttack's own rule: the share of the images that one draw classifies correctly without attack and one
after each of its parts, which counts lucky draws as successes; the accuracy beside it is judged on fresh
noise."""
_WORST = """\
Accuracy in %: for each image the strongest attack among those of this radius and all balls within it,
L-inf ones in L2 included. It is judged again on fresh noise, so it can lie slightly above the accuracy
under a single attack that was lucky; see the last table."""


def honest_protocol(scale: Scale, seed: int) -> Protocol:
    """The protocol of a scale."""
    file = resources.files(__package__) / "protocols" / f"{scale.honest}.yaml"
    with resources.as_file(file) as path:
        return load_protocol(
            str(path),
            {"images": scale.images, "shard": scale.shard, "seed": seed, "precision": scale.precision},
        )


def worst_keys(record: Record, norm: str) -> dict[float, str]:
    """Keys of the worst cases of a norm by radius."""
    entries = record.facts.entries
    found = {
        entry["eps"]: key
        for key, entry in entries.items()
        if entry["norm"] == norm and entry["attack"] == "worst case"
    }
    return dict(sorted(found.items()))


def _radius(norm: str, eps: float) -> str:
    return f"L2 {eps:g}" if norm == "l2" else f"L-inf {round(255 * eps)}/255"


class Honest(Experiment):
    """L2 and L-inf, all defenses."""

    name = "honest"
    names = _DEFENSES

    def edition(self, scale: Scale) -> int:
        return honest_protocol(scale, 0).version

    def measure(self, setting: Setting) -> Measured:
        return evaluate(setting, honest_protocol(setting.scale, setting.seed))

    def page(self, records: Sequence[Record]) -> Page:
        protocol = records[0].facts.settings["protocol"]
        titles = dict.fromkeys(f"{each['title']} ({each.get('norm', 'l2')})" for each in protocol["attacks"])
        about = _ABOUT.format(seeds=protocol["judge"]["seeds"], attacks=", ".join(titles))
        about += edition_text(protocol)
        parts: list[Table | Picture] = [_worst_table(records, "l2"), _worst_table(records, "linf")]
        panels = [
            Panel("worst case" if norm == "l2" else "worst case, L-inf", x_label, "accuracy, %", lines)
            for norm, x_label in (("l2", "L2 distance"), ("linf", "L-inf distance, in 1/255"))
            if (lines := worst_lines(records, norm))
        ]
        searched = [record for record in records if len(by_radius(record)) > 1]
        figure = draw([panels])
        if searched:
            nearest = Panel("C&W with binary search", "L2 distance", "accuracy, %", distance_lines(searched))
            figure = draw([[panels[0], nearest], panels[1:]])
        parts.append(Picture("accuracy", "Accuracy against the distance; bars: 95 % intervals.", figure))
        parts += [*(distance_table(searched) if searched else ()), *gain_table(records, _gains)]
        parts.append(_seeds_table(records))
        parts.append(_attacks_table(records))
        return Page("Every defense under the honest protocol", about, parts)


def edition_text(protocol: dict[str, Any]) -> str:
    """What is to be said of a later edition of the protocol."""
    if protocol.get("version", 1) == 1:
        return ""
    text = f"\n\nThis is edition {protocol['version']} of the protocol"
    if protocol.get("in_turn"):
        text += _TURNS
    if protocol.get("bits"):
        text += f"; images are judged as files of {protocol['bits']} bits hold them"
    return text + "."


def _gains(record: Record) -> dict[str, str]:
    """Keys of what ours is compared with RSE in."""
    found = {
        _radius(norm, eps): key for norm in ("l2", "linf") for eps, key in worst_keys(record, norm).items()
    }
    return {"no attack": "clean"} | {f"worst case, {name}": key for name, key in found.items()}


def _worst_table(records: Sequence[Record], norm: str) -> Table:
    keys = [worst_keys(record, norm) for record in records]
    radii = sorted({eps for each in keys for eps in each})
    rows = [
        [
            record.facts.title,
            accuracy(record, "clean").text,
            *(accuracy(record, own[eps]).text if eps in own else "\N{EN DASH}" for eps in radii),
        ]
        for record, own in zip(records, keys, strict=True)
    ]
    head = ["defense", "no attack", *(_radius(norm, eps) for eps in radii)]
    title = "Worst case, L2" if norm == "l2" else "Worst case, L-inf"
    return Table(title, _WORST, head, rows)


def worst_lines(records: Sequence[Record], norm: str) -> list[Line]:
    """A line a network: accuracy in the worst case."""
    unit = 255 if norm == "linf" else 1
    return [
        Line(
            record.facts.title,
            look,
            [0.0, *(unit * eps for eps in keys)],
            [accuracy(record, key) for key in ("clean", *keys.values())],
        )
        for look, record in enumerate(records)
        if (keys := worst_keys(record, norm))
    ]


def _seeds_table(records: Sequence[Record]) -> Table:
    rows = []
    for record in records:
        for norm in ("l2", "linf"):
            for eps, key in worst_keys(record, norm).items():
                low, high = seed_range(record, key)
                wrong = _wrong(record, key)
                rows.append(
                    [
                        f"{record.facts.title}, {_radius(norm, eps)}",
                        f"{100 * low:.1f} to {100 * high:.1f}",
                        f"{100 * all_seeds(record, key):.1f}",
                        f"{100 * float(wrong.mean()):.1f}",
                    ]
                )
    head = ["worst case", "accuracy by seed", "right under every seed", "wrong answers to one query"]
    return Table("Seeds of the defender", "In %; smallest and largest accuracy of one seed.", head, rows)


def _wrong(record: Record, key: str) -> NDArray[np.float64]:
    """(N,) share of wrong answers to the queries of an image."""
    share: NDArray[np.float64] = 1 - record.bits(f"{key}.right").mean(axis=1)
    if f"{key}.wrong" in record.columns:
        share = record.numbers(f"{key}.wrong") / record.facts.entries[key]["queries"]
    return share


def _attacks_table(records: Sequence[Record]) -> Table:
    """What each attack achieved, and what it spent."""
    ruled = any(entry.get("published") is not None for r in records for entry in r.facts.entries.values())
    rows = []
    for record in records:
        for key, entry in record.facts.entries.items():
            if entry["attack"] in ("none", "worst case") or entry["eps"] is None:
                continue
            rows.append(
                [
                    f"{record.facts.title}, {entry['title']}, {_radius(entry['norm'], entry['eps'])}",
                    accuracy(record, key).text,
                    *([own_rule(entry)] if ruled else []),
                    f"{entry['gradients']:.0f}",
                    f"{entry['forwards']:.0f}",
                ]
            )
    rule = ["AutoAttack's own rule"] if ruled else []
    head = ["attack", "accuracy", *rule, "gradients an image", "forward passes an image"]
    caption = "Accuracy in %; evaluations of one image by one draw." + (_RULE if ruled else "")
    return Table("Attack by attack", caption, head, rows)


def own_rule(entry: dict[str, Any]) -> str:
    """AutoAttack's own verdict of an entry, in %."""
    share = entry.get("published")
    return "\N{EN DASH}" if share is None else f"{100 * share:.1f}"
