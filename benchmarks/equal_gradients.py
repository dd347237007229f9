"""Our attacks and those of other libraries at equal gradients an image.

    python benchmarks/equal_gradients.py MODEL --data DATA [--gradients 200] [--n 200]

Fixed budget: accuracy within `--l2` and `--linf`. Minimum norm: the median distance over all images, infinite
where an image does not fool the defender: more than half of 20 fresh answers to it are right. Everybody gets
the same images and the same number of gradients of single draws; a judge asks all of them on fresh noise.
Ours follow the gradients of an optimised copy. Libraries that are not installed are left out: pip install
--no-deps torchattacks foolbox adversarial-robustness-toolbox adv-lib (with torchvision), and AutoAttack from
its repository. `--out` holds the answers; what is there is not computed again.
"""

import argparse
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from judged import Judged, about, judged
from torch import Tensor

import selfensemble as rse
from selfensemble import attacks
from selfensemble.attacks.norms import Norm
from selfensemble.evaluation.adapters import (
    LibraryAttack,
    adv_lib_attack,
    art_attack,
    autoattack_attack,
    foolbox_attack,
    torchattacks_attack,
)
from selfensemble.fast.optimize import optimize

Make = Callable[[], Callable[..., Tensor]]
OURS = "ours"


def fixed(norm: Norm, eps: float, budget: int, images: int) -> dict[str, Make]:
    """Attacks within a radius, a name and how it is made."""
    length = eps * min(1.0, (10 if norm == "l2" else 6) / budget)  # as long as ours on average
    number = 2 if norm == "l2" else np.inf
    own: dict[str, Any] = {"eps": eps, "alpha": length, "steps": budget}
    art: dict[str, Any] = {"norm": number, "eps": eps, "batch_size": images}
    found: dict[str, Make] = {
        f"{OURS}, PGD on the margin of probabilities": lambda: partial(
            attacks.pgd, norm=norm, eps=eps, steps=budget, loss="probability-margin"
        ),
        f"{OURS}, APGD-T, 3 near targets": lambda: partial(
            attacks.apgd_targeted, norm=norm, eps=eps, steps=max(1, budget // 3 - 4), targets=3, order="near"
        ),
        "torchattacks PGD": lambda: torchattacks_attack("PGDL2" if norm == "l2" else "PGD", **own),
        "torchattacks APGD": lambda: torchattacks_attack(
            "APGD", norm="L2" if norm == "l2" else "Linf", eps=eps, steps=budget
        ),
        "foolbox PGD": lambda: foolbox_attack(
            "L2PGD" if norm == "l2" else "LinfPGD", eps=eps, abs_stepsize=length, steps=budget
        ),
        "ART PGD": lambda: art_attack(
            "ProjectedGradientDescent", **art, eps_step=length, max_iter=budget, num_random_init=1
        ),
        "ART APGD": lambda: art_attack(
            "AutoProjectedGradientDescent", **art, eps_step=2 * eps, max_iter=budget, nb_random_init=1
        ),
        "adv-lib APGD": lambda: adv_lib_attack("apgd", eps=eps, norm=float(number), n_iter=budget),
        "adv-lib APGD-T": lambda: adv_lib_attack(
            "apgd_targeted", eps=eps, norm=float(number), n_iter=budget // 9
        ),
        "AutoAttack rand, EOT 5": lambda: autoattack_attack(
            norm=norm, eps=eps, steps=max(1, budget // 10), eot=5
        ),
    }  # fmt: skip
    if norm == "linf":
        found["torchattacks EOTPGD, EOT 5"] = lambda: torchattacks_attack(
            "EOTPGD", eps=eps, alpha=5 * length, steps=budget // 5, eot_iter=5
        )
        found["adv-lib PGD"] = lambda: adv_lib_attack("pgd_linf", ε=eps, steps=budget, loss_function="dlr")
    return found


def nearest(norm: Norm, budget: int) -> dict[str, Make]:
    """Attacks that look for the nearest image."""
    found: dict[str, Make] = {
        f"{OURS}, FMN": lambda: partial(attacks.fmn, norm=norm, steps=budget),
        "adv-lib FMN": lambda: adv_lib_attack("fmn", norm=2 if norm == "l2" else float("inf"), steps=budget),
        "foolbox FMN": lambda: foolbox_attack(
            "L2FMNAttack" if norm == "l2" else "LInfFMNAttack", steps=budget
        ),
    }
    if norm == "l2":
        searches: dict[str, Any] = {"binary_search_steps": 4, "steps": budget // 4}
        found |= {
            f"{OURS}, DDN": lambda: partial(attacks.ddn, steps=budget),
            f"{OURS}, C&W": lambda: partial(attacks.cw_l2, **searches),
            "adv-lib DDN": lambda: adv_lib_attack("ddn", steps=budget),
            "adv-lib ALMA": lambda: adv_lib_attack("alma", distance="l2", num_steps=budget),
            "adv-lib C&W": lambda: adv_lib_attack(
                "carlini_wagner_l2", binary_search_steps=4, max_iterations=budget // 4, initial_const=1.0
            ),
            "foolbox DDN": lambda: foolbox_attack("DDNAttack", steps=budget),
            "foolbox C&W": lambda: foolbox_attack(
                "L2CarliniWagnerAttack", **searches, stepsize=0.01, initial_const=1.0, abort_early=False
            ),
            "torchattacks C&W": lambda: torchattacks_attack("CW", steps=budget, lr=0.01, c=1.0),
        }
    return found


def median(one: Judged) -> float:
    """Median distance where half of the answers are wrong."""
    return float(np.median(np.where(one.right <= 0.5, one.distance, np.inf)))


def table(found: dict[str, Judged], figure: Callable[[Judged], float], claim: str) -> list[str]:
    """Rows in order of the figure, and what ours is against the best of the others."""
    rows = ["| attack | figure | gradients | forwards | seconds |", "|---|---|---|---|---|"]
    for name, one in sorted(found.items(), key=lambda item: figure(item[1])):
        spent = f"{one.gradients:.0f} | {one.forwards:.0f} | {one.seconds:.0f}"
        rows.append(f"| {name} | {figure(one):.4g} | {spent} |")
    own = min(figure(one) for name, one in found.items() if name.startswith(OURS))
    others = [figure(one) for name, one in found.items() if not name.startswith(OURS)]
    best = min(others, default=float("inf"))
    said = f"{own - best:+.1f} points" if claim == "points" else f"{own / best:.3f} times"
    return [*rows, "", f"Ours against the best of the others: {said}." if others else "No other library."]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--gradients", type=int, default=200)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--l2", default="0.5")
    parser.add_argument("--linf", default="8/255")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/equal-gradients"))
    options = parser.parse_args()
    ensemble = rse.load(options.model)
    data = rse.load_data(options.data, "test")
    x, y = data.inputs(slice(options.n)), data.labels[: options.n]
    fast = optimize(ensemble, x[:2], "float32")
    print(about(options.model, options.n, options.seed), end="\n\n")
    norms: tuple[tuple[Norm, str], ...] = (("l2", options.l2), ("linf", options.linf))
    for norm, text in norms:
        eps = float(Fraction(text))
        kinds: list[tuple[str, float | None, dict[str, Make], Callable[[Judged], float]]] = [
            (f"accuracy in % within {norm} {text}", eps, fixed(norm, eps, options.gradients, len(x)),
             lambda one: float(100 * one.right.mean())),
            (f"median distance, {norm}", None, nearest(norm, options.gradients), median),
        ]  # fmt: skip
        for title, radius, makes, figure in kinds:
            found: dict[str, Judged] = {}
            for name, make in makes.items():
                kind = "nearest" if radius is None else text.replace("/", "_")
                file = f"{options.gradients}-{options.n}-{options.seed}-{name.replace(' ', '_')}.npz"
                path = options.out / Path(options.model).name / f"{norm}-{kind}" / file
                try:
                    attack = make()
                except ImportError as error:
                    print(f"{name} left out: {error}")
                    continue
                victim = fast if not isinstance(attack, LibraryAttack) else ensemble
                found[name] = judged(
                    path, ensemble, x, y, partial(attack, victim, x, y, seed=options.seed), norm, radius,
                    False, options.seed,
                )  # fmt: skip
            claim = "points" if radius is not None else "ratio"
            print(
                f"**{title}, {options.gradients} gradients an image**\n",
                *table(found, figure, claim),
                sep="\n",
            )
            print(flush=True)


if __name__ == "__main__":
    main()
