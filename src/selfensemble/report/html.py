"""The report: one HTML file, without any request to a network, that compares evaluation runs."""

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..evaluation.certified import CERTIFIED, Certified, read_certified
from ..evaluation.results import CheckRecord, Entry, ModelRecord, Results, is_weak, read_results
from ..noise.layer import describe_std
from ..runtime.files import atomic_write
from ..runtime.packages import needs
from ..runtime.texts import utf8
from .alike import answering_alike
from .gallery import gallery
from .shown import between, certified_plot, protocol_plots, row_title, threat_model
from .svg import VIEW_BOX, Plot
from .verdict import verdicts

with needs("selfensemble[report]"):
    import jinja2
    import yaml


@dataclass(frozen=True)
class _Run:
    folder: Path
    results: Results


@dataclass(frozen=True)
class _Row:
    """An attack in the summary; a cell is what it did to a run, or None where that has no such attack."""

    title: str
    worst: bool
    cells: list[Entry | None]


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Compare evaluation runs in one self-contained HTML file.

    Args:
        runs: folders with `results.json` and, for pictures, `gallery.safetensors`, or with `certified.json`.
        out: the file to write; an older one is replaced. The same runs give the same bytes.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: a run has no results.
        ValueError: there are no runs, a run is named twice or damaged, or `out` is a folder.
    """
    if not runs:
        raise ValueError("no runs to report on: pass the folder of at least one evaluation")
    if out.is_dir():
        raise ValueError(f"{out} is a folder: pass the name of the file to write, {out / 'report.html'} say")
    folders = [(path if path.is_dir() else path.parent).resolve() for path in runs]
    if twice := [str(path) for path, folder in zip(runs, folders, strict=True) if folders.count(folder) > 1]:
        raise ValueError(f"{twice[0]} was given twice: pass every run once")
    loaded, certified = [], {}
    for path in runs:
        if path.name == CERTIFIED or (path / CERTIFIED).is_file():
            each = read_certified(path)
            certified[each.name if each.name not in certified else f"{each.name} ({path})"] = each
        else:
            loaded.append(_Run(path if path.is_dir() else path.parent, read_results(path)))
    labelled = dict(zip(_labels(loaded), loaded, strict=True))
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": _percent, "share": _share, "yaml": _yaml, "number": _number}
    source = resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8")
    contexts = [_run_context(label, run) for label, run in labelled.items()]
    page = environment.from_string(source).render(
        verdicts=verdicts({label: run.results for label, run in labelled.items()}, certified),
        sections=_sections(labelled),
        checked=_checked(labelled),
        certificates=_certificates(certified, labelled),
        runs=contexts,
        view_box=VIEW_BOX,
        threat_model=threat_model,
        row_title=row_title,
    )
    atomic_write(out, utf8(page.rstrip() + "\n"))
    return out


def _labels(runs: Sequence[_Run]) -> list[str]:
    """Names of runs; where two are equal, with as many parts of their folders as tell them apart."""
    names = [run.results.name for run in runs]
    labels = list(names)
    depth = 0
    while len(set(labels)) < len(labels):
        depth += 1
        for i, run in enumerate(runs):
            if names.count(names[i]) > 1 or depth > 1:
                labels[i] = f"{names[i]} ({'/'.join(run.folder.resolve().parts[-depth:])})"
    return labels


def _sections(runs: Mapping[str, _Run]) -> list[dict[str, Any]]:
    """One section a protocol: figures of two protocols must not be compared."""
    protocols: dict[str, dict[str, Results]] = {}
    for label, run in runs.items():
        if not (name := run.results.protocol.get("name")):
            raise ValueError(f"the results in {run.folder} do not name their protocol: run it again")
        protocols.setdefault(str(name), {})[label] = run.results
    sections = []
    # A weak protocol comes last, whichever run was named first.
    ordered = sorted(protocols.items(), key=lambda each: is_weak(list(each[1].values())))
    for number, (name, members) in enumerate(ordered, 1):
        plots = protocol_plots(members)
        sections.append(
            {
                "id": f"protocol-{number}",
                "name": name,
                "weak": is_weak(list(members.values())),
                "edition": max(int(each.protocol.get("version", 1)) for each in members.values()),
                "in_turn": any(each.protocol.get("in_turn") for each in members.values()),
                "published": any(e.published is not None for each in members.values() for e in each.attacks),
                "runs": list(members.items()),
                "notes": _notes(list(members.values())),
                "groups": _summary(list(members.values())),
                "plots": [_shown(plot, f"plot-{number}-{index}") for index, plot in enumerate(plots, 1)],
            }
        )
    return sections


def _shown(plot: Plot, identity: str) -> dict[str, Any]:
    return {"id": identity, "plot": plot, "svg": plot.svg(identity)}


def _certificates(certified: Mapping[str, Certified], runs: Mapping[str, _Run]) -> dict[str, Any] | None:
    """Runs of `certify`, with what attacks leave of the same networks."""
    if not certified:
        return None
    results = {label: run.results for label, run in runs.items()}
    plot = certified_plot(certified, results)
    return {
        "runs": list(certified.items()),
        "between": [(label, each, between(each, results)) for label, each in certified.items()],
        "plots": [_shown(plot, "plot-certified")],
    }


def _checked(runs: Mapping[str, _Run]) -> list[dict[str, Any]]:
    """By network: its honesty checks, each table once, and the evaluations that have none."""
    found = []
    for group in answering_alike({label: run.results for label, run in runs.items()}):
        labels = list(group)
        tables: dict[tuple[CheckRecord, ...], list[str]] = {}
        for label in labels:
            if checks := runs[label].results.checks:
                tables.setdefault(checks, []).append(label)
        without = [label for label in labels if not runs[label].results.checks]
        found.append({"labels": labels, "tables": list(tables.items()), "without": without})
    return found


def _notes(members: Sequence[Results]) -> list[str]:
    """What makes a comparison of these runs doubtful."""
    notes = []
    keys = dict.fromkeys(key for each in members for key in each.protocol if key != "description")
    first = members[0].protocol
    if differing := [k for k in keys if any(each.protocol.get(k) != first.get(k) for each in members)]:
        notes.append(
            "These runs have the same protocol name but different settings: "
            f"{', '.join(differing)}. Compare them with care; the settings are at the end."
        )
    if len({results.data.digest for results in members}) > 1:
        notes.append("These runs were judged on different images.")
    return notes


def _summary(members: Sequence[Results]) -> list[dict[str, Any]]:
    """Rows of the summary table, by threat model."""
    groups: dict[str, dict[str, list[Entry | None]]] = {}
    for column, results in enumerate(members):
        for entry in (results.clean, *results.attacks, *results.worst_case):
            same = repr(
                (entry.key, entry.attack, entry.norm, entry.eps, entry.c, sorted(entry.settings.items()))
            )
            rows = groups.setdefault(threat_model(entry, results.bounds), {})
            rows.setdefault(same, [None] * len(members))[column] = entry
    summary = []
    for name, rows in groups.items():
        table = []
        for cells in rows.values():
            entry = next(cell for cell in cells if cell is not None)
            table.append(_Row(row_title(entry), entry.attack == "worst case", cells))
        # The worst case stands below its attacks, those that only a later run has among them.
        summary.append({"name": name, "rows": sorted(table, key=operator.attrgetter("worst"))})
    return summary


def _run_context(label: str, run: _Run) -> dict[str, Any]:
    results = run.results
    return {
        "label": label,
        "results": results,
        "entries": [results.clean, *results.attacks, *results.worst_case],
        "gallery": gallery(run.folder, results),
        "noise": _noise(results.model),
        "protocol": _yaml(results.protocol),
        "provenance": _yaml(results.provenance),
    }


def _noise(model: ModelRecord) -> str:
    """Levels in the order of the layers, with the number of layers in brackets; then other randomness."""
    counts = Counter(describe_std(std) for std in model.noise.values())
    levels = [f"std {std} ({count} layer{'s' * (count > 1)})" for std, count in counts.items()]
    return ", ".join([*levels, *model.randomness]) or "none"


def _percent(share: float) -> str:
    return f"{100 * share:z.1f}\N{NO-BREAK SPACE}%"


def _share(share: float) -> str:
    return f"{100 * share:z.1f}"


def _number(value: float) -> str:
    return f"{value:z.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100).rstrip()
