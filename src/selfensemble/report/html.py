"""The report: one HTML file, without any request to a network, that compares evaluation runs."""

import base64
import io
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..evaluation.certified import CERTIFIED, Certified, read_certified
from ..evaluation.results import Entry, ModelRecord, Results, read_results
from ..noise.layer import describe_std
from ..runtime.files import atomic_write
from .shown import between, certified_plot, protocol_plots, row_title, threat_model
from .svg import VIEW_BOX, Plot

GALLERY = "gallery.safetensors"
_ATTACKS_SHOWN = 6
_IMAGES_SHOWN = 8
_PIXELS_SHOWN = 200_000  # a row of a gallery; fewer images are shown of large ones
_MAGNIFICATIONS = (1, 2, 5, 10, 20, 50, 100)


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
        sections=_sections(labelled),
        certificates=_certificates(certified, labelled),
        runs=contexts,
        view_box=VIEW_BOX,
        threat_model=threat_model,
        row_title=row_title,
    )
    atomic_write(out, (page.rstrip() + "\n").encode("utf-8"))
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
    for number, (name, members) in enumerate(protocols.items(), 1):
        plots = protocol_plots(members)
        sections.append(
            {
                "id": f"protocol-{number}",
                "name": name,
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


def _notes(members: Sequence[Results]) -> list[str]:
    """What makes a comparison of these runs doubtful."""
    notes = []
    keys = dict.fromkeys(key for results in members for key in results.protocol)
    first = members[0].protocol
    if differing := [k for k in keys if any(each.protocol.get(k) != first.get(k) for each in members)]:
        notes.append(
            "These runs carry the same name of a protocol but differ in its settings: "
            f"{', '.join(differing)}. Compare them with care; the settings stand at the end."
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
            rows = groups.setdefault(threat_model(entry), {})
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
        "gallery": _gallery(run),
        "noise": _noise(results.model),
        "protocol": _yaml(results.protocol),
        "provenance": _yaml(results.provenance),
    }


def _noise(model: ModelRecord) -> str:
    """Levels in the order of the layers, with the number of layers in brackets; then other randomness."""
    counts = Counter(describe_std(std) for std in model.noise.values())
    levels = [f"std {std} ({count} layer{'s' * (count > 1)})" for std, count in counts.items()]
    return ", ".join([*levels, *model.randomness]) or "none"


def _gallery(run: _Run) -> dict[str, Any]:
    """Pictures of the strongest attack of every threat model, then of the others."""
    file = run.folder / GALLERY
    context: dict[str, Any] = {"missing": None, "attacks": [], "left_out": 0, "images": 0}
    if not file.is_file():
        return context | {"missing": f"There are no pictures: the run has no {GALLERY}."}
    tensors = _read_gallery(file, run.results)
    original = tensors["original"]
    if len(original) == 0 or not run.results.attacks:
        return context | {"missing": "There are no pictures: the gallery is empty."}
    if original.shape[1] not in (1, 3):
        channels = f"{original.shape[1]} channels"
        return context | {"missing": f"There are no pictures: images of {channels} can not be shown."}
    entries = _strongest_first(run.results.attacks)
    pixels = original.shape[2] * original.shape[3]
    images = min(len(original), _IMAGES_SHOWN, max(1, _PIXELS_SHOWN // pixels))
    return context | {
        "attacks": [
            _pictures(entry, tensors, images, run.results.data.classes) for entry in entries[:_ATTACKS_SHOWN]
        ],
        "left_out": max(0, len(entries) - _ATTACKS_SHOWN),
        "images": images,
    }


def _strongest_first(attacks: Sequence[Entry]) -> list[Entry]:
    ranked: list[tuple[int, int, Entry]] = []
    threats = list(dict.fromkeys(threat_model(entry) for entry in attacks))
    for place, threat in enumerate(threats):
        group = sorted(
            (entry for entry in attacks if threat_model(entry) == threat), key=lambda each: each.accuracy
        )
        ranked += [(rank, place, entry) for rank, entry in enumerate(group)]
    return [entry for _, _, entry in sorted(ranked, key=lambda item: item[:2])]


def _read_gallery(file: Path, results: Results) -> dict[str, NDArray[Any]]:
    """The checked tensors of a gallery."""
    cure = f"run the evaluation again, or remove {GALLERY} for a report without pictures"
    try:
        tensors: dict[str, NDArray[Any]] = load_file(file)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): {cure}") from error
    images = ["original", *(entry.key for entry in results.attacks)]
    answers = ["label", "answer.clean", *(f"answer.{entry.key}" for entry in results.attacks)]
    if absent := [name for name in (*images, *answers) if name not in tensors]:
        raise ValueError(f"{file} is damaged: it holds no {absent[0]!r}: {cure}")
    shape = tensors["original"].shape
    for name in images:
        tensor = tensors[name]
        if len(shape) != 4 or tensor.shape != shape or tensor.dtype != np.float32:
            raise ValueError(f"{file} is damaged: {name!r} is {tensor.dtype} {tensor.shape}: {cure}")
        if not np.isfinite(tensor).all():
            raise ValueError(f"{file} is damaged: {name!r} holds values that are not finite: {cure}")
    for name in answers:
        tensor = tensors[name]
        if tensor.shape != shape[:1] or tensor.dtype != np.int64:
            raise ValueError(f"{file} is damaged: {name!r} is {tensor.dtype} {tensor.shape}: {cure}")
    return tensors


def _pictures(
    entry: Entry, tensors: Mapping[str, NDArray[Any]], images: int, classes: Sequence[str]
) -> dict[str, Any]:
    def name(label: int) -> str:
        return classes[label] if 0 <= label < len(classes) else f"class {label}"

    original, adversarial = tensors["original"][:images], tensors[entry.key][:images]
    change = adversarial - original
    largest = float(np.abs(change).max())
    fitting = [factor for factor in _MAGNIFICATIONS if factor * largest <= 0.5] if largest else [1]
    factor = max(fitting, default=1)
    samples = []
    for i in range(images):
        label, clean, answer = (
            int(tensors[which][i]) for which in ("label", "answer.clean", f"answer.{entry.key}")
        )
        samples.append(
            {
                "original": _data_uri(original[i]),
                "adversarial": _data_uri(adversarial[i]),
                "difference": _data_uri(0.5 + factor * change[i]),
                "label": name(label),
                "clean": name(clean),
                "clean_right": clean == label,
                "answer": name(answer),
                "right": answer == label,
                "l2": f"{float(np.sqrt(np.square(change[i]).sum())):.3f}",
                "linf": _linf(float(np.abs(change[i]).max())),
            }
        )
    return {
        "entry": entry,
        "title": row_title(entry),
        "threat": threat_model(entry),
        "magnification": factor,
        "samples": samples,
    }


def _data_uri(image: NDArray[Any]) -> str:
    """A PNG of (C, H, W) in [0, 1]; what lies outside is clipped."""
    pixels = np.rint(255 * np.clip(image, 0.0, 1.0)).astype(np.uint8)
    picture = Image.fromarray(
        pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
    )
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _linf(distance: float) -> str:
    return f"{distance:.4f} ({255 * distance:.1f}/255)"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _share(share: float) -> str:
    return f"{100 * share:.1f}"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100).rstrip()
