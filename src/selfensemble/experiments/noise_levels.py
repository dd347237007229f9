"""A grid over the levels of the noise, and noise in training only, in testing only, in both, in neither."""

from collections.abc import Sequence

from ..evaluation.protocol import AttackSpec, JudgeSection, Protocol
from ..report.figures import Line, Panel, draw
from ..report.page import Page, Picture, Table
from .base import Experiment, Measured, Setting
from .judged import accuracy, evaluate
from .networks import Network, network
from .records import Record
from .scales import Scale

_ABOUT = """\
Every cell of the grid is a separate network, trained and tested with noise of these levels: *init* on the
image, *inner* before every other convolution. Accuracies are those of the first seed of the defender's
noise, with 95 % Clopper-Pearson intervals. The paper's attack, C&W at a fixed c with one noise draw a step,
is weak against randomised defenses; PGD follows the loss of the ensemble, averaged over its noise."""
_MODES = {
    "plain": "neither",
    "train-noise": "training only",
    "test-noise": "testing only",
    "rse": "training and testing",
}


class NoiseLevels(Experiment):
    """The grid and the four modes."""

    name = "noise"

    def networks(self, scale: Scale) -> list[Network]:
        modes = [network(name, title=f"noise in {mode}") for name, mode in _MODES.items()]
        return modes + [cell(scale, init, inner) for init in scale.noise.init for inner in scale.noise.inner]

    def measure(self, setting: Setting) -> Measured:
        settings, scale = setting.scale.noise, setting.scale
        paper = {
            "attack": "cw-paper",
            "title": "C&W paper",
            "c": settings.strength,
        } | scale.paper.model_dump()
        pgd = {
            "attack": "pgd", "title": f"PGD EOT {settings.eot}", "norm": "l2", "eps": settings.eps,
            "steps": settings.steps, "eot": settings.eot, "average": "probabilities", "early_stop": True,
        }  # fmt: skip
        protocol = Protocol(
            name="noise",
            images=scale.images,
            seed=setting.seed,
            shard=scale.shard,
            precision=scale.precision,
            judge=JudgeSection(seeds=scale.seeds, queries=1),
            attacks=(AttackSpec.model_validate(paper), AttackSpec.model_validate(pgd)),
        )
        return evaluate(setting, protocol)

    def page(self, records: Sequence[Record]) -> Page:
        attacks = _attacks(records[0])
        modes = [record for record in records if record.facts.network in _MODES]
        cells = [record for record in records if is_cell(record)]
        parts: list[Table | Picture] = []
        if modes:
            rows = [
                [_MODES[record.facts.network], *(accuracy(record, key).text for key in attacks)]
                for record in modes
            ]
            head = ["noise in", *attacks.values()]
            caption = "Accuracy in %. Testing only: the undefended network with RSE's levels."
            parts.append(Table("Noise in training and in testing", caption, head, rows))
        if cells:
            parts += [_grid(cells, key, title) for key, title in attacks.items()]
            panels = [
                Panel(title, "std of the first noise (init)", "accuracy, %", _lines(cells, key))
                for key, title in attacks.items()
            ]
            parts.append(
                Picture("grid", "Accuracy against the levels; bars: 95 % intervals.", draw([panels]))
            )
        return Page("Levels of the noise", _ABOUT, parts)


def cell(scale: Scale, init: float, inner: float) -> Network:
    """The network trained and tested with these levels."""
    name = f"init{init:g}-inner{inner:g}"
    levels = {"noise.init_std": init, "noise.inner_std": inner, "noise.draws": 10 if init or inner else 1}
    return network(
        "rse",
        name=name,
        title=f"init {init:g}, inner {inner:g}",
        overrides=scale.noise.train | levels,
        folder=f"noise-{name}",
    )


def _attacks(record: Record) -> dict[str, str]:
    """Keys of the entries, and their titles."""
    titles = {}
    for key, entry in record.facts.entries.items():
        at = f", c = {entry['c']:g}" if entry["c"] is not None else ""
        at += f", L2 {entry['eps']:g}" if entry["eps"] is not None else ""
        titles[key] = entry["title"] + at
    return titles


def is_cell(record: Record) -> bool:
    """Whether the network is one of the grid."""
    return record.facts.network.startswith("init")


def levels_of(record: Record) -> tuple[float, float]:
    """Of a network of the grid: on the image, and inside."""
    noise = record.facts.recipe["noise"]
    return noise["init_std"], noise["inner_std"]


def _grid(cells: Sequence[Record], key: str, title: str) -> Table:
    by_levels = {levels_of(record): record for record in cells}
    inner = sorted({levels[1] for levels in by_levels})
    rows = [
        [
            f"{init:g}",
            *(
                accuracy(by_levels[init, each], key).text if (init, each) in by_levels else "\N{EN DASH}"
                for each in inner
            ),
        ]
        for init in sorted({levels[0] for levels in by_levels})
    ]
    return Table(f"Levels: {title}", "Accuracy in %.", ["init", *(f"inner {each:g}" for each in inner)], rows)


def _lines(cells: Sequence[Record], key: str) -> list[Line]:
    """A line for each level of the inner noise."""
    lines = []
    for look, inner in enumerate(sorted({levels_of(record)[1] for record in cells})):
        own = sorted((record for record in cells if levels_of(record)[1] == inner), key=levels_of)
        points = [accuracy(record, key) for record in own]
        lines.append(Line(f"inner {inner:g}", look, [levels_of(record)[0] for record in own], points))
    return lines
