"""Which attacks a worst case cannot do without, at equal gradients an image.

    python benchmarks/ablation.py MODEL --data DATA --radii l2:0.5 linf:8/255 --budgets 500 2000 [--n 100]

Every candidate gets the same number of gradients of single draws an image (forward passes for those that
take no gradients), its images are projected onto the ball, and a judge asks all of them twice on fresh noise:
what leads in the first queries is the worst case of an image, what the others answer is the figure. So the
worst case of any set of candidates is known without another pass. `--out` holds the answers; what is there is
not computed again.
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from judged import Judged, about, judged, worst
from torch import Tensor

import selfensemble as rse
from selfensemble.attacks import ATTACKS
from selfensemble.evaluation.protocol import MINIMUM_NORM
from selfensemble.fast.optimize import optimize
from selfensemble.noise.injection import noise_disabled


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


def attack_of(
    candidate: Candidate, ensemble: rse.SelfEnsemble, fast: Any, x: Tensor, y: Tensor, norm: str, eps: float,
    budget: int, seed: int,
) -> Callable[[], Tensor]:  # fmt: skip
    """The candidate's images, when called."""
    settings = candidate.settings(budget) | ({} if candidate.attack in ("cw", "ddn") else {"norm": norm})
    if candidate.attack not in MINIMUM_NORM:
        settings["eps"] = eps

    def attack() -> Tensor:
        with ExitStack() as stack:
            for model in (ensemble, fast) if candidate.base else ():
                stack.enter_context(noise_disabled(model))
            return ATTACKS[candidate.attack](fast, x, y, seed=seed, **settings)

    return attack


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
    print(about(options.model, options.n, options.seed), end="\n\n")
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
                    attack = attack_of(candidate, ensemble, fast, x, y, norm, eps, budget, options.seed)
                    farther = candidate.attack in MINIMUM_NORM
                    found[name] = judged(path, ensemble, x, y, attack, norm, eps, farther, options.seed)
            print(f"**{norm} {number}, {budget} gradients**\n", *lines(found), sep="\n", flush=True)


if __name__ == "__main__":
    main()
