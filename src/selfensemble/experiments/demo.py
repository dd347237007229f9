"""The demo: a plain network and its Random Self-Ensemble on real images, attacked by both protocols."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ..data.sources import load_data
from ..evaluation.protocol import Protocol, load_protocol
from ..evaluation.results import Entry, Results
from ..evaluation.runner import GALLERY, Evaluation
from ..runtime.files import write_json
from ..runtime.provenance import provenance
from ..training.recipe import load_recipe
from ..training.trainer import Trainer

Progress = Callable[[str, float], None]
CAVEAT = (
    "The paper's attack follows one noisy gradient at a fixed c, which is weak against a randomised "
    "defense. The report shows what attacks make of it that average over the noise."
)
PROTOCOLS = ("demo-paper", "demo-honest")
_EPOCHS = 20  # half of the recipes': at seed 0 as accurate on the test images
_QUERIES = 30  # of the honest protocol's judge, which has 100 elsewhere
_NAMES = {"plain": "plain network", "rse": "Random Self-Ensemble"}
# Shares of the time that each part takes, for the progress bar.
_WORK = {"train": 0.07, "demo-paper": 0.17, "demo-honest": 0.24}


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    images: int | None = None,
    overrides: dict[str, Any] | None = None,
    progress: Progress = lambda text, done: None,
) -> dict[str, Any]:
    """Train both networks on digits, evaluate them by both protocols, write everything to `out`.

    Args:
        out: gets results.json, report.html, accuracy.png, adversarial.png, a folder for each network and
            one for each evaluation. What an earlier demo left there is replaced.
        seed: of weights, order, noise, attacks and judge.
        images: test images to attack; by default the protocols' own numbers.
        overrides: other values for top-level keys of the protocols.
        progress: called with what is being done and the share of the work that is done.

    Returns:
        What results.json holds.
    """
    from ..report.html import write_report

    test = load_data("digits", "test")
    done = 0.0
    record: dict[str, dict[str, Any]] = {}
    runs: dict[tuple[str, str], tuple[Path, Results]] = {}
    chosen = {"seed": seed} | ({} if images is None else {"images": images}) | (overrides or {})
    for kind, name in _NAMES.items():
        progress(f"training the {name}", done)
        recipe = load_recipe(f"digits-{kind}", [f"seed={seed}", f"train.epochs={_EPOCHS}"])
        trainer = Trainer(recipe, out / kind, overwrite=True)
        record[kind] = {"training": trainer.run()}
        done += _WORK["train"]
        for protocol in PROTOCOLS:
            folder, share = out / f"{kind}-{protocol.removeprefix('demo-')}", _WORK[protocol]
            inner = partial(_report, progress, name, done, share)
            ensemble, plan = trainer.ensemble.cpu().eval(), _protocol(protocol, chosen)
            evaluation = Evaluation(ensemble, test, plan, _emptied(folder), name=name, progress=inner)
            runs[kind, protocol] = (folder, evaluation.run())
            done += share
        record[kind] |= _figures(*(runs[kind, protocol][1] for protocol in PROTOCOLS))
    shown = _shown(runs["plain", PROTOCOLS[0]][1])
    results = {
        "settings": {"data": "digits", "seed": seed, "draws": runs["rse", PROTOCOLS[0]][1].model.draws},
        "networks": record,
        "shown_strength": record["plain"]["curve"][shown]["c"],
        "caveat": CAVEAT,
        "provenance": provenance(torch.device("cpu")),
    }
    write_json(out / "results.json", results)
    progress("drawing", 1.0)
    _draw(out, {kind: runs[kind, PROTOCOLS[0]] for kind in _NAMES}, shown)
    order = [(kind, protocol) for protocol in PROTOCOLS for kind in _NAMES]
    write_report([runs[key][0] for key in order], out / "report.html")
    progress("done", 1.0)
    return results


def _protocol(name: str, chosen: dict[str, Any]) -> Protocol:
    plan = load_protocol(name, chosen)
    if "judge" in chosen:
        return plan
    judge = plan.judge.model_copy(update={"queries": min(plan.judge.queries, _QUERIES)})
    return plan.model_copy(update={"judge": judge})


def _report(progress: Progress, name: str, start: float, share: float, text: str, part: float) -> None:
    progress(f"the {name}: {text}", start + share * part)


def _figures(paper: Results, honest: Results) -> dict[str, Any]:
    """The figures of a network that are shown."""
    return {
        "curve": [_point(entry) for entry in (paper.clean, *_by_strength(paper))],
        "worst_case": [_point(entry) for entry in (honest.clean, *honest.worst_case)],
        "checks": [check.model_dump(mode="json") for check in honest.checks or ()],
    }


def _emptied(folder: Path) -> Path:
    """The folder without what an earlier evaluation left in it."""
    for pattern in ("shards/*", "*.json", "*.csv", "*.safetensors"):
        for file in folder.glob(pattern):
            file.unlink()
    if (folder / "shards").is_dir():
        (folder / "shards").rmdir()
    return folder


def _point(entry: Entry) -> dict[str, Any]:
    """The figures of an entry that the command line shows."""
    names = (
        "c",
        "eps",
        "accuracy",
        "low",
        "high",
        "all_seeds",
        "persistent",
        "rms_l2",
        "median_l2",
        "images",
    )
    values: dict[str, Any] = entry.model_dump(mode="json")
    return {name: values[name] for name in names} | ({"c": 0.0} if entry.attack == "none" else {})


def _shown(plain: Results) -> int:
    """Index in the curve of the strength at which the plain network has fallen below 10 %, or of the last."""
    entries = _by_strength(plain)
    fallen = (i for i, entry in enumerate(entries, start=1) if entry.accuracy < 0.1)
    return next(fallen, len(entries))


def _by_strength(results: Results) -> list[Entry]:
    """The attacks of a fixed strength c."""
    return [entry for entry in results.attacks if entry.c is not None]


def _draw(out: Path, runs: dict[str, tuple[Path, Results]], shown: int) -> None:
    from ..report.plots import accuracy_curves, gallery, save_figure

    images = runs["plain"][1].data.images
    names = {_NAMES[kind]: (results.clean, *_by_strength(results)) for kind, (_, results) in runs.items()}
    title = f"Digits under the single-draw C&W attack ({images} test images)"
    save_figure(accuracy_curves(names, title), out / "accuracy.png")
    rows: dict[str, tuple[torch.Tensor, list[str]]] = {}
    for kind, (folder, results) in runs.items():
        tensors = safetensors.torch.load_file(folder / GALLERY)
        key, labels = _by_strength(results)[shown - 1].key, tensors["label"].tolist()
        originals, attacked = tensors["original"], tensors[key]
        rows[f"original\n({_NAMES[kind]})"] = (originals, [f"is {label}" for label in labels])
        answers = tensors[f"answer.{key}"].tolist()
        captions = [
            f"says {answer}" + ("" if answer == label else " (wrong)")
            for answer, label in zip(answers, labels, strict=True)
        ]
        change = attacked - originals
        rows[f"attack on the\n{_NAMES[kind]}"] = (attacked, captions)
        sizes = [f"L2 {float(size):.2f}" for size in change.flatten(1).norm(dim=1)]
        rows[f"its change\n(grey: none)\n{_NAMES[kind]}"] = ((0.5 + change / 2).clamp(0, 1), sizes)
    strength = _by_strength(runs["plain"][1])[shown - 1].c
    save_figure(gallery(rows, f"Adversarial digits at c = {strength:g}"), out / "adversarial.png")
