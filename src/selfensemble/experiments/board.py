"""The board: randomised defenses of others, trained at an equal budget and judged by one protocol.

Beside what each paper claims stand what is left under the honest protocol, what a persistent attacker leaves,
and what PGD with one draw a step leaves, which is how most of them were evaluated.
"""

from collections.abc import Sequence
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from ..evaluation.protocol import AttackSpec, Protocol, number
from ..report.figures import Line, Panel, draw
from ..report.intervals import Share, bounded
from ..report.page import Page, Picture, Table
from ..runtime.packages import needs
from ..runtime.schema import Section
from .base import Experiment, Measured, Setting
from .honest import edition_text, honest_protocol, own_rule, worst_keys
from .judged import accuracy, evaluate
from .records import Record
from .scales import Scale

with needs("selfensemble[report]"):
    import yaml

LINF, L2 = 8 / 255, 0.5
_ONE_DRAW = "PGD, one draw a step"
_QUERIES = (1, 10, 100)
_NONE = "\N{EN DASH}"
_ABOUT = """\
VGG16 of the width that the last table but one says, all trained for the same epochs; those that train under
attack have one gradient of it a step (N-FGSM in L-inf, for SmoothAdv one step in L2), where their papers have
2 to 10. So expect figures below those of the papers. Compare the rows with each other, and the
columns of a row. Accuracies are in % with 95 % Clopper-Pearson intervals over the images; each defense was
trained once. Attacks: {attacks}."""
_CAPTION = """\
*Claimed* is what the paper says, see below. *One draw* is PGD with {steps} steps of one draw each, the last
iterate, L-inf 8/255: how most of these were evaluated. *AutoAttack's own rule* calls robust what a single
draw classifies correctly without attack and after each of its parts. *Worst case*: for each image the
strongest attack of the honest protocol, judged again on fresh noise."""


class Claim(Section):
    """What a paper says of its defense; see `board.yaml`."""

    paper: str
    clean: float | None
    attacked: float | None
    attack: str
    where: str

    @property
    def text(self) -> str:
        """Clean and attacked accuracy."""
        if self.clean is None or self.attacked is None:
            return _NONE
        return f"{self.clean:g} / {self.attacked:g}"


def claims() -> dict[str, Claim]:
    """By the network's name, in the order of the tables."""
    text = (resources.files(__package__) / "board.yaml").read_text(encoding="utf-8")
    return {name: Claim.model_validate(entry) for name, entry in yaml.safe_load(text).items()}


def board_protocol(setting: Setting) -> Protocol:
    """The honest protocol at the two radii of the board, and PGD with one draw a step."""
    scale = setting.scale
    honest = honest_protocol(scale, setting.seed)
    kept = [spec for each in honest.attacks if (spec := _at_radius(each)) is not None]
    single = AttackSpec.model_validate(
        {
            "attack": "pgd", "title": _ONE_DRAW, "norm": "linf", "eps": [LINF],
            "steps": scale.board.steps, "step_size": 2 / 255, "eot": 1, "everywhere": True,
        }
    )  # fmt: skip
    # Many queries of one seed rather than few of several: the page is about what asking again gains.
    judge = honest.judge.model_copy(update={"queries": scale.board.queries, "seeds": 1})
    return honest.model_copy(update={"attacks": (*kept, single), "judge": judge, "name": "board"})


def _at_radius(spec: AttackSpec) -> AttackSpec | None:
    """The attack at the radius of the board alone; None where it has not that radius."""
    given = dict(spec.model_extra or {})
    radii = given.get("eps")
    if radii is None:
        return spec
    wanted = LINF if given.get("norm", "l2") == "linf" else L2
    values = radii if isinstance(radii, list) else [radii]
    if not any(abs(number(eps) - wanted) < 1e-6 for eps in values):
        return None
    return AttackSpec.model_validate(spec.model_dump() | {"eps": [wanted]})


class Board(Experiment):
    """Every randomised defense of `board.yaml`, and two that are not random for comparison."""

    name = "board"
    names = tuple(claims())

    def edition(self, scale: Scale) -> int:
        return honest_protocol(scale, 0).version

    def measure(self, setting: Setting) -> Measured:
        return evaluate(setting, board_protocol(setting))

    def page(self, records: Sequence[Record]) -> Page:
        protocol = records[0].facts.settings["protocol"]
        titles = dict.fromkeys(f"{each['title']} ({each.get('norm', 'l2')})" for each in protocol["attacks"])
        about = _ABOUT.format(attacks=", ".join(titles))
        about += edition_text(protocol)
        parts: list[Table | Picture] = [_board(records, protocol["attacks"][-1]["steps"])]
        counts = sorted({1, *np.unique(np.geomspace(1, _least_queries(records), 20).astype(int)).tolist()})
        lines = [
            Line(record.facts.title, look, counts, [kept(record, key, count) for count in counts])
            for look, record in enumerate(records)
            if (key := _worst(record, "linf")) is not None
        ]
        panel = Panel("worst case, L-inf 8/255", "queries", "images without a wrong answer, %", lines, "log")
        caption = (
            "Images that get only right answers, against how often they are asked; bars: 95 % intervals."
        )
        parts += [_persistent(records), Picture("queries", caption, draw([[panel]])), _claimed(records)]
        return Page("The board: randomised defenses of others, judged again", about, parts)


def _worst(record: Record, norm: str) -> str | None:
    """Key of the worst case at the board's radius."""
    wanted = LINF if norm == "linf" else L2
    return next((key for eps, key in worst_keys(record, norm).items() if abs(eps - wanted) < 1e-6), None)


def _one_draw(record: Record) -> str | None:
    entries = record.facts.entries.items()
    return next((key for key, entry in entries if entry["title"] == _ONE_DRAW), None)


def _rule(record: Record) -> str:
    """AutoAttack's own verdict at the board's radius in L-inf."""
    found = [entry for entry in record.facts.entries.values() if entry["attack"] == "autoattack-rand"]
    return next((own_rule(entry) for entry in found if entry["norm"] == "linf"), _NONE)


def _text(record: Record, key: str | None) -> str:
    return _NONE if key is None else accuracy(record, key).text


def _board(records: Sequence[Record], steps: int) -> Table:
    known = claims()
    rows = [
        [
            record.facts.title,
            known[record.facts.network].text,
            accuracy(record, "clean").text,
            _text(record, _one_draw(record)),
            _rule(record),
            _text(record, _worst(record, "linf")),
            _text(record, _worst(record, "l2")),
            *(_kept_text(record, _worst(record, "linf"), count) for count in _QUERIES[1:]),
        ]
        for record in records
    ]
    head = ["defense", "claimed, clean / attacked", "no attack", "one draw, L-inf 8/255"]
    head += ["AutoAttack's own rule, L-inf 8/255", "worst case, L-inf 8/255", "worst case, L2 0.5"]
    head += [f"{count} queries, L-inf 8/255" for count in _QUERIES[1:]]
    return Table("The board", _CAPTION.format(steps=steps), head, rows)


def _queries(record: Record, key: str) -> int:
    return int(record.facts.entries[key]["queries"])


def _least_queries(records: Sequence[Record]) -> int:
    found = [_queries(record, key) for record in records if (key := _worst(record, "linf")) is not None]
    return min(found, default=1)


def kept(record: Record, key: str, count: int) -> Share:
    """Images whose next `count` answers are all right, with the interval of shares over them.

    Of an image with w wrong answers among Q, `count` of them drawn without replacement are all right with
    probability C(Q - w, count) / C(Q, count), which is unbiased; see `Verdict.persistent`.
    """
    asked = _queries(record, key)
    if f"{key}.wrong" in record.columns:
        right = asked - record.numbers(f"{key}.wrong")
    else:
        right = record.bits(f"{key}.right").sum(axis=1).astype(float)
    return bounded(all_right(right, asked, count))


def all_right(right: NDArray[np.float64], asked: int, count: int) -> NDArray[np.float64]:
    """(N,) probability that `count` of the answers are right, of `asked` ones with `right` right ones."""
    if not 1 <= count <= asked:
        raise ValueError(f"{asked} answers were stored: count must be 1 to {asked}, got {count}")
    left = np.maximum(right - count, 0)
    ways = gammaln(right + 1) - gammaln(left + 1) - gammaln(asked + 1) + gammaln(asked - count + 1)
    return np.where(right >= count, np.exp(ways), 0.0)


def _kept_text(record: Record, key: str | None, count: int) -> str:
    return _NONE if key is None or count > _queries(record, key) else kept(record, key, count).text


def _persistent(records: Sequence[Record]) -> Table:
    rows = [
        [
            record.facts.title,
            *(_kept_text(record, "clean", count) for count in _QUERIES),
            *(_kept_text(record, _worst(record, "linf"), count) for count in _QUERIES),
        ]
        for record in records
    ]
    head = ["defense", *(f"{where}, {count}" for where in ("clean", "L-inf 8/255") for count in _QUERIES)]
    caption = (
        "Share of images, in %, that get only right answers in that many queries, each with fresh noise: "
        "clean ones, and those of the worst case. What is not random always gives the same answer."
    )
    return Table("A persistent attacker", caption, head, rows)


def _claimed(records: Sequence[Record]) -> Table:
    known = claims()
    rows = []
    for record in records:
        claim = known[record.facts.network]
        rows.append(
            [record.facts.title, claim.paper, claim.text, claim.attack or _NONE, claim.where or _NONE]
        )
    caption = "On CIFAR-10, full-size networks and trainings; where it was not read in the paper, it says so."
    head = ["defense", "paper", "clean / attacked, %", "attack", "network and source"]
    return Table("What the papers claim", caption, head, rows, numbers=False)
