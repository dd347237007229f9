"""Which attacks a worst case cannot do without, at equal gradients an image.

    python benchmarks/ablation.py MODEL --data DATA --radii l2:0.5 linf:8/255 --budgets 500 2000 [--n 100]

Every candidate gets the same number of gradients of single draws an image (forward passes for those that
take no gradients), its images are projected onto the ball, and a judge asks all of them twice on fresh noise:
what leads in the first queries is the worst case of an image, what the others answer is the figure. So the
worst case of any set of candidates is known without another pass. `--out` holds the answers; what is there is
not computed again.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import selfensemble as rse
from selfensemble.attacks import ATTACKS
from selfensemble.attacks.budget import count_evaluations
from selfensemble.evaluation import judge
from selfensemble.evaluation.protocol import MINIMUM_NORM
from selfensemble.evaluation.runner import within
from selfensemble.fast.optimize import optimize
from selfensemble.noise.injection import noise_disabled
from selfensemble.runtime.provenance import provenance

LOOKS, QUERIES = 3, 20


@dataclass(frozen=True)
class Candidate:
    """An attack and its settings for a budget of gradients; `base`: made on the network without noise."""

    attack: str
    settings: Callable[[int], dict[str, Any]]
    norms: tuple[str, ...] = ("l2", "linf")
    base: bool = False


def _pgd(loss: str, eot: int = 1, restarts: int = 1, **more: Any) -> Candidate:
    def settings(budget: int) -> dict[str, Any]:
        steps = max(1, budget // (eot * restarts))
        return {"steps": steps, "eot": eot, "restarts": restarts, "loss": loss, "early_stop": True} | more

    return Candidate("pgd", settings)


CANDIDATES = {
    "PGD, cross-entropy": _pgd("ce"),
    "PGD, margin": _pgd("margin"),
    "PGD, probability margin": _pgd("probability-margin"),
    "PGD, probability margin, 4 restarts": _pgd("probability-margin", restarts=4),
    "PGD, probability margin, EOT 4": _pgd("probability-margin", eot=4),
    "PGD, cross-entropy of the mean, EOT 8": _pgd("ce", eot=8, average="probabilities"),
    "APGD, probability margin, EOT 10": Candidate(
        "apgd", lambda b: {"steps": b // 10, "eot": 10, "loss": "probability-margin", "early_stop": True}
    ),
    "APGD-T, near targets, EOT 4": Candidate(
        "apgd-t", lambda b: {"steps": b // 20, "eot": 4, "targets": 5, "order": "near", "early_stop": True}
    ),
    "AutoAttack rand, EOT 10": Candidate("autoattack-rand", lambda b: {"steps": b // 20, "eot": 10}),
    "C&W, EOT 4": Candidate("cw", lambda b: {"steps": b // 16, "binary_search_steps": 4, "eot": 4}, ("l2",)),
    "DDN": Candidate("ddn", lambda b: {"steps": b}, ("l2",)),
    "FMN": Candidate("fmn", lambda b: {"steps": b}),
    "Square, EOT 5": Candidate("square", lambda b: {"queries": b // 5, "eot": 5}),
    "transfer from the static base": Candidate(
        "apgd", lambda b: {"steps": b, "loss": "dlr", "early_stop": True}, base=True
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """One candidate's images: (N,) lead in the first queries, (N,) share of right answers to the others."""

    lead: NDArray[np.float64]
    right: NDArray[np.float64]
    gradients: float
    forwards: float
    seconds: float


def measured(
    path: Path, ensemble: rse.SelfEnsemble, fast: Any, x: Tensor, y: Tensor, candidate: Candidate,
    norm: str, eps: float, budget: int, seed: int,
) -> Judged:  # fmt: skip
    """The candidate's images, judged; read from `path` where it is there."""
    if not path.is_file():
        settings = candidate.settings(budget) | ({} if candidate.attack in ("cw", "ddn") else {"norm": norm})
        if candidate.attack not in MINIMUM_NORM:
            settings["eps"] = eps
        began = time.monotonic()
        with count_evaluations() as spent:
            if candidate.base:
                with noise_disabled(ensemble), noise_disabled(fast):
                    found = ATTACKS[candidate.attack](fast, x, y, seed=seed, **settings)
            else:
                found = ATTACKS[candidate.attack](fast, x, y, seed=seed, **settings)
        seconds = time.monotonic() - began
        images = within(found, x, norm, eps, candidate.attack in MINIMUM_NORM)
        options: dict[str, Any] = {"norm": norm, "eps": eps, "max_batch": 200}
        first = judge(ensemble, x, images, y, queries=LOOKS, seed=seed + 1, **options)
        second = judge(ensemble, x, images, y, queries=QUERIES, seed=seed + 2, **options)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path, lead=first.lead.numpy(), right=1 - second.wrong_per_query.numpy(),
            spent=np.array([spent.gradients / len(x), spent.forwards / len(x), seconds]),
        )  # fmt: skip
    with np.load(path) as stored:
        gradients, forwards, seconds = stored["spent"].tolist()
        return Judged(stored["lead"], stored["right"], gradients, forwards, seconds)


def worst(members: Sequence[Judged]) -> float:
    """Accuracy in % where of each image the candidate that leads most is kept."""
    leads, right = np.stack([m.lead for m in members]), np.stack([m.right for m in members])
    return float(100 * right[leads.argmax(axis=0), np.arange(leads.shape[1])].mean())


def lines(found: dict[str, Judged]) -> list[str]:
    """A table in the order of greedy choice: each by itself, the worst case of all but it, and until it."""
    everything = worst(list(found.values()))
    order: list[str] = []
    after: dict[str, float] = {}
    while len(order) < len(found):
        rest = {name: worst([found[n] for n in (*order, name)]) for name in found if name not in order}
        best = min(rest, key=lambda name: rest[name])
        order.append(best)
        after[best] = rest[best]
    table = ["| attack | by itself | all but it | chosen so far, in this order | gradients | forwards | s |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in order:
        one, others = found[name], [each for other, each in found.items() if other != name]
        table.append(
            f"| {name} | {worst([one]):.1f} | {worst(others) if others else 100:.1f} | {after[name]:.1f} "
            f"| {one.gradients:.0f} | {one.forwards:.0f} | {one.seconds:.0f} |"
        )
    return [*table, "", f"All together: {everything:.1f}."]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--radii", nargs="+", default=["l2:0.5", "linf:8/255"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[500, 2000])
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    options = parser.parse_args()
    ensemble = rse.load(options.model)
    data = rse.load_data(options.data, "test")
    x, y = data.inputs(slice(options.n)), data.labels[: options.n]
    fast = optimize(ensemble, x[:2], "float32")
    made = provenance()
    hardware = f"{made['hardware']['cores']} cores of an {made['hardware']['cpu']}"
    print(f"{Path(options.model).name}, first {options.n} images, seed {options.seed}; {hardware}, "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads.\n")  # fmt: skip
    for text in options.radii:
        norm, number = text.split(":")
        eps = float(Fraction(number))
        for budget in options.budgets:
            found: dict[str, Judged] = {}
            for name in options.only:
                candidate = CANDIDATES[name]
                if norm in candidate.norms:
                    unit = f"{budget}-{options.n}-{options.seed}-{name.replace(' ', '_')}.npz"
                    path = options.out / Path(options.model).name / text.replace("/", "_") / unit
                    found[name] = measured(
                        path, ensemble, fast, x, y, candidate, norm, eps, budget, options.seed
                    )
            print(f"**{norm} {number}, {budget} gradients**\n", *lines(found), sep="\n", flush=True)


if __name__ == "__main__":
    main()
