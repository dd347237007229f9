"""The demo: a plain network and its Random Self-Ensemble on real images, both under attack."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import load_data
from .ensemble import SelfEnsemble
from .evaluation import CurvePoint, cw_curve
from .files import write_json
from .provenance import provenance
from .recipe import load_recipe
from .training import Trainer

STRENGTHS = (0.0, 0.1, 0.2, 0.4, 0.8, 1.0, 2.0, 5.0)
CAVEAT = (
    "Not shown: this attack follows one noisy gradient at a fixed c, which is weak against a randomised "
    "defense; attacks that average over the noise go further, so take these figures as upper bounds."
)
_NAMES = {"plain": "plain network", "rse": "Random Self-Ensemble"}


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    images: int = 200,
    steps: int = 300,
    lr: float = 1e-2,
    progress: Callable[[str, float], None] = lambda text, done: None,
) -> dict[str, Any]:
    """Train both networks on digits, attack them over `STRENGTHS`, write everything to `out`.

    Args:
        out: gets results.json, accuracy.png, adversarial.png, and a folder for each network.
        seed: of weights, order, noise, attack and judge.
        images: test images to attack.
        steps, lr: of the single-draw C&W attack.
        progress: called with what is being done and the share of the work that is done.

    Returns:
        What results.json holds.
    """
    test = load_data("digits", "test")
    images = min(images, len(test))
    inputs, labels = test.inputs(slice(images)), test.labels[:images]
    ensembles: dict[str, SelfEnsemble] = {}
    curves: dict[str, list[CurvePoint]] = {}
    record: dict[str, Any] = {}
    # Shares of the time that each part takes, for the progress bar.
    work = {"train": 0.1, "attack": 0.4}
    done = 0.0
    for kind, name in _NAMES.items():
        recipe = load_recipe(f"digits-{kind}", [f"seed={seed}"])
        progress(f"training the {name}", done)
        trainer = Trainer(recipe, out / kind, overwrite=True)
        record[kind] = {"training": trainer.run()}
        ensembles[kind] = trainer.ensemble.cpu()
        done += work["train"]
    for kind, name in _NAMES.items():
        progress(f"attacking the {name}", done)
        start = done

        def report(point: CurvePoint, name: str = name) -> None:
            nonlocal done
            done += work["attack"] / len(STRENGTHS)
            progress(f"attacking the {name}", min(done, 1.0))

        curves[kind] = cw_curve(
            ensembles[kind], inputs, labels, STRENGTHS, steps=steps, lr=lr, seed=seed, progress=report
        )
        record[kind]["curve"] = [point.record() for point in curves[kind]]
        done = start + work["attack"]
    progress("drawing", 1.0)
    shown = _shown_strength(curves)
    results = {
        "about": "C&W L2, fixed c, kappa 0, last iterate, one noise draw a step; judged on fresh noise",
        "settings": {
            "data": "digits", "images": images, "seed": seed, "strengths": list(STRENGTHS),
            "steps": steps, "lr": lr, "draws": ensembles["rse"].draws,
        },
        "networks": record,
        "shown_strength": STRENGTHS[shown],
        "caveat": CAVEAT,
        "provenance": provenance(),
    }  # fmt: skip
    _draw(out, curves, ensembles, inputs, labels, shown, seed)
    write_json(out / "results.json", results)
    progress("done", 1.0)
    return results


def _shown_strength(curves: dict[str, list[CurvePoint]]) -> int:
    """Index of the strength at which the plain network has fallen below 10 %, or of the last one."""
    fallen = (i for i, point in enumerate(curves["plain"]) if point.verdict.accuracy < 0.1)
    return next(fallen, len(STRENGTHS) - 1)


def _draw(
    out: Path,
    curves: dict[str, list[CurvePoint]],
    ensembles: dict[str, SelfEnsemble],
    inputs: Tensor,
    labels: Tensor,
    shown: int,
    seed: int,
) -> None:
    from .report.plots import accuracy_curves, gallery, save_figure

    names = {_NAMES[kind]: points for kind, points in curves.items()}
    title = f"Digits under the single-draw C&W attack ({len(labels)} test images)"
    save_figure(accuracy_curves(names, title), out / "accuracy.png")
    first = torch.stack([curve[0].verdict.correct for curve in curves.values()]).all(dim=0)
    chosen = first.nonzero().squeeze(1)[:8]
    rows: dict[str, tuple[Tensor, list[str]]] = {
        "original": (inputs[chosen], [f"is {int(label)}" for label in labels[chosen]])
    }
    for kind, name in _NAMES.items():
        point = curves[kind][shown]
        attacked = point.adversarial[chosen]
        answers = ensembles[kind].predict(attacked, seed=seed, sampling="per_image").label
        captions = [
            f"says {int(answer)}" + ("" if answer == label else " (wrong)")
            for answer, label in zip(answers, labels[chosen], strict=True)
        ]
        change = attacked - inputs[chosen]
        rows[f"attack on the\n{name}"] = (attacked, captions)
        sizes = [f"L2 {float(size):.2f}" for size in change.flatten(1).norm(dim=1)]
        rows[f"its change\n(grey: none)\n{name}"] = ((0.5 + change / 2).clamp(0, 1), sizes)
    title = f"Adversarial digits at c = {curves['plain'][shown].c:g}"
    save_figure(gallery(rows, title), out / "adversarial.png")
