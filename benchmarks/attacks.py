"""Our attacks against the same ones of torchattacks, foolbox and ART, on a saved network.

Everybody gets the same images, numbers of steps and starting constants; the same judge decides. Two
claims come out for each pair: our accuracy is higher by at most 1 point, and the mean distance of our
minimum-norm attacks, over images where both succeeded, is at most 1.02 times theirs.

    python benchmarks/attacks.py MODEL --data DATA [--n 200] [--steps 40] [--only pgd-linf,ddn]

Needs the libraries to compare with; those that are not installed are left out.
"""

import argparse
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import selfensemble as rse
from selfensemble import attacks
from selfensemble.attacks.square import square
from selfensemble.evaluation import judge
from selfensemble.evaluation.adapters import LibraryAttack, art_attack, foolbox_attack, torchattacks_attack
from selfensemble.runtime.files import write_json
from selfensemble.runtime.provenance import accuracy_record, provenance

LIBRARIES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "art": "adversarial-robustness-toolbox"}
MAKE = {"torchattacks": torchattacks_attack, "foolbox": foolbox_attack, "art": art_attack}
SLOW = {"cw-l2-art"}  # image by image, an hour or more: runs only when named
MOST_POINTS, MOST_RATIO = 0.01, 1.02

Ours = Callable[..., Tensor]
Theirs = tuple[str, str, dict[str, Any], str]  # library, attack, settings, note


@dataclass(frozen=True)
class Group:
    """One attack of ours and what it is compared with.

    Attributes:
        norm: "l2" or "linf", the distance reported.
        minimum: whether the attack looks for the smallest distance; else its budget is fixed.
    """

    norm: str
    minimum: bool
    ours: Ours
    theirs: list[Theirs]


@dataclass(frozen=True)
class Run:
    """What one attack did to the images."""

    name: str
    note: str
    record: dict[str, Any]
    fooled: Tensor = field(repr=False)
    distance: Tensor = field(repr=False)


def groups(options: argparse.Namespace, images: int) -> dict[str, Group]:
    steps, linf, l2, queries = options.steps, options.linf, options.l2, options.queries
    searches = options.binary_search_steps
    # Constant steps as long as ours are on average.
    alpha, alpha_l2 = min(linf, 6 * linf / steps), min(l2, 10 * l2 / steps)
    batch = {"batch_size": images}
    pgd_art = {"max_iter": steps, "num_random_init": 1} | batch
    cw = partial(attacks.cw_l2, steps=steps, binary_search_steps=searches, lr=0.01, initial_c=1.0)
    repaired = "L2FMNAttack, repaired"
    return {
        "pgd-linf": Group(
            "linf", False, partial(attacks.pgd, norm="linf", eps=linf, steps=steps),
            [
                ("torchattacks", "PGD", {"eps": linf, "alpha": alpha, "steps": steps}, ""),
                ("foolbox", "LinfPGD", {"eps": linf, "abs_stepsize": alpha, "steps": steps}, ""),
                ("art", "ProjectedGradientDescent", {"eps": linf, "eps_step": alpha} | pgd_art, ""),
            ],
        ),
        "pgd-l2": Group(
            "l2", False, partial(attacks.pgd, norm="l2", eps=l2, steps=steps),
            [
                ("torchattacks", "PGDL2", {"eps": l2, "alpha": alpha_l2, "steps": steps}, ""),
                ("foolbox", "L2PGD", {"eps": l2, "abs_stepsize": alpha_l2, "steps": steps}, ""),
                (
                    "art", "ProjectedGradientDescent",
                    {"norm": 2, "eps": l2, "eps_step": alpha_l2} | pgd_art, "",
                ),
            ],
        ),
        "apgd-linf": Group(
            "linf", False, partial(attacks.apgd, norm="linf", eps=linf, steps=steps, loss="ce"),
            [
                ("torchattacks", "APGD", {"eps": linf, "steps": steps}, "failures stay originals"),
                (
                    "art", "AutoProjectedGradientDescent",
                    {"eps": linf, "eps_step": 2 * linf, "max_iter": steps, "nb_random_init": 1} | batch, "",
                ),
            ],
        ),
        "square-linf": Group(
            "linf", False, partial(square, norm="linf", eps=options.square_linf, queries=queries),
            [
                ("torchattacks", "Square", {"eps": options.square_linf, "n_queries": queries}, ""),
                ("art", "SquareAttack", {"eps": options.square_linf, "max_iter": queries} | batch, ""),
            ],
        ),
        "cw-l2": Group(
            "l2", True, cw,
            [
                (
                    "foolbox", "L2CarliniWagnerAttack",
                    {"steps": steps, "binary_search_steps": searches, "stepsize": 0.01}
                    | {"initial_const": 1.0, "abort_early": False},
                    "defaults: 9 searches of 10000 steps from c = 0.001, aborted early",
                ),
                (
                    "torchattacks", "CW", {"steps": steps * searches, "lr": 0.01, "c": 1.0},
                    "no search over c: all steps at c = 1 (default: 50 steps)",
                ),
            ],
        ),
        "cw-l2-art": Group(
            "l2", True, cw,
            [
                (
                    "art", "CarliniL2Method",
                    {"max_iter": steps, "binary_search_steps": searches, "learning_rate": 0.01}
                    | {"initial_const": 1.0},
                    "line search in every step; defaults: 10 searches of 10 steps from c = 0.01",
                ),
            ],
        ),
        "ddn": Group(
            "l2", True, partial(attacks.ddn, steps=steps),
            [("foolbox", "DDNAttack", {"steps": steps}, "defaults: 100 steps")],
        ),
        "fmn-l2": Group(
            "l2", True, partial(attacks.fmn, norm="l2", steps=steps),
            [
                ("foolbox", "L2FMNAttack", {"steps": steps}, "as released: it projects nothing"),
                ("foolbox", repaired, {"steps": steps}, "with the projection put right here"),
            ],
        ),
        "fmn-linf": Group(
            "linf", True, partial(attacks.fmn, norm="linf", steps=steps),
            [
                ("foolbox", "LInfFMNAttack", {"steps": steps, "max_stepsize": 10.0}, "step size 10"),
                ("foolbox", "LInfFMNAttack", {"steps": steps}, "default step size, 1"),
            ],
        ),
    }  # fmt: skip


def repair_foolbox() -> None:
    """Add "L2FMNAttack, repaired" to foolbox: 3.3.4 scales by `norms / norms`, which is no projection."""
    try:
        # As the adapter does, which keeps the warnings of the import to itself.
        foolbox_attack("L2FMNAttack")
    except ImportError:
        return
    library: Any = importlib.import_module("foolbox.attacks")
    base: Any = library.L2FMNAttack

    class Repaired(base):  # type: ignore[misc]
        def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
            norms = (x - x0).flatten(start=1).norms.l2(axis=-1).maximum(1e-12)
            factor = (epsilon / norms).minimum(1.0)
            return x0 + (x - x0) * factor.reshape((-1,) + (1,) * (x.ndim - 1))

    setattr(library, "L2FMNAttack, repaired", Repaired)


def measure(
    name: str, note: str, attack: Ours | LibraryAttack, model: rse.SelfEnsemble, inputs: Tensor,
    labels: Tensor, clean: Tensor, norm: str, options: argparse.Namespace,
) -> Run:  # fmt: skip
    """Attack, judge, count and time."""
    _synchronize(inputs)
    start = time.perf_counter()
    with attacks.count_evaluations() as spent:
        adversarial = attack(model, inputs, labels, seed=options.seed, max_batch=options.max_batch)
    _synchronize(inputs)
    seconds = time.perf_counter() - start
    verdict = judge(model, inputs, adversarial, labels, seed=options.seed + 1, max_batch=options.max_batch)
    distance = verdict.l2 if norm == "l2" else verdict.linf
    fooled = clean & ~verdict.correct
    record = accuracy_record(int(verdict.correct.sum()), len(labels)) | {
        "mean_distance_all": float(distance.mean()),
        "largest_distance": float(distance.max()),
        "gradients_per_image": round(spent.gradients / len(labels), 2),
        "forwards_per_image": round(spent.forwards / len(labels), 2),
        "seconds": round(seconds, 2),
    }
    return Run(name, note, record, fooled, distance)


def compare(group: Group, ours: Run, theirs: Run) -> dict[str, Any]:
    """Their record, and ours against theirs over the images where both succeeded."""
    both = ours.fooled & theirs.fooled
    points = ours.record["accuracy"] - theirs.record["accuracy"]
    mine, other = (float(run.distance[both].mean()) if both.any() else None for run in (ours, theirs))
    ratio = mine / other if mine is not None and other else None
    claims = {"accuracy": points <= MOST_POINTS + 1e-9}
    if group.minimum:
        claims["distance"] = ratio is not None and ratio <= MOST_RATIO
    return theirs.record | {
        "attack": theirs.name, "note": theirs.note, "both_fooled": int(both.sum()), "our_distance_both": mine,
        "their_distance_both": other, "accuracy_gap": points, "distance_ratio": ratio, "claims": claims,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a saved network, best one without noise")
    parser.add_argument("--data", required=True, help="the data set, as for `selfensemble evaluate`")
    parser.add_argument("--n", type=int, default=200, help="first images of the test split")
    parser.add_argument("--steps", type=int, default=40, help="gradient steps, of C&W for each value of c")
    parser.add_argument("--binary-search-steps", type=int, default=6, help="values of c of C&W")
    parser.add_argument("--queries", type=int, default=500, help="of Square")
    parser.add_argument("--linf", type=float, default=1 / 255)
    parser.add_argument("--l2", type=float, default=0.1)
    parser.add_argument("--square-linf", type=float, default=2 / 255)
    parser.add_argument("--max-batch", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help="groups to run, separated by commas; cw-l2-art (slow) runs only so")
    parser.add_argument("--out", type=Path, default=Path("attacks.json"))
    options = parser.parse_args()

    repair_foolbox()
    data = rse.load_data(options.data, "test")
    inputs = data.inputs(slice(options.n)).to(options.device)
    labels = data.labels[: options.n].to(options.device)
    model = rse.load(options.model).to(options.device)
    clean = judge(model, inputs, inputs, labels, seed=options.seed, max_batch=options.max_batch)
    chosen = groups(options, min(options.max_batch or len(labels), len(labels)))
    if not options.only:
        chosen = {name: group for name, group in chosen.items() if name not in SLOW}
    else:
        if unknown := set(options.only.split(",")) - set(chosen):
            parser.error(f"unknown groups {', '.join(sorted(unknown))}; known: {', '.join(chosen)}")
        chosen = {name: chosen[name] for name in options.only.split(",")}
    print(f"{len(labels)} images, without attack {clean.accuracy:.1%}\n")
    print(HEADER)
    record: dict[str, Any] = {
        "settings": {key: value for key, value in vars(options).items() if key not in ("model", "out")},
        "model": str(options.model),
        "clean": accuracy_record(int(clean.correct.sum()), len(labels)),
        "groups": {},
    }  # fmt: skip
    for name, group in chosen.items():
        judged = (model, inputs, labels, clean.correct, group.norm, options)
        ours = measure("ours", "", group.ours, *judged)
        print(row(name, "ours", ours.record))
        others = []
        for library, attack, settings, note in group.theirs:
            try:
                built = MAKE[library](attack, **settings)
            except ImportError as error:
                print(f"{name:12} left out: {error}")
                continue
            others.append(compare(group, ours, measure(f"{library} {attack}", note, built, *judged)))
            print(row(name, others[-1]["attack"], others[-1]))
        record["groups"][name] = {"norm": group.norm, "ours": ours.record, "theirs": others}
        # Written after every group, so that a long run that breaks keeps what it measured.
        write_json(options.out, record | {"provenance": origin()})
    broken = [
        f"{name} against {other['attack']}: {claim}"
        for name, group_record in record["groups"].items()
        for other in group_record["theirs"]
        for claim, holds in other["claims"].items()
        if not holds
    ]
    print("\nclaims that fail: " + ("; ".join(broken) if broken else "none"))


HEADER = (
    f"{'group':12} {'attack':36} {'accuracy':>8} {'both':>5} {'distance':>9} {'ours':>9} {'ratio':>6} "
    f"{'mean all':>9} {'grads':>7} {'forwards':>8} {'seconds':>8}  claims"
)


def row(group: str, attack: str, record: dict[str, Any]) -> str:
    both, claims = record.get("both_fooled", ""), record.get("claims", {})
    return (
        f"{group:12} {attack:36} {record['accuracy']:>8.1%} {both:>5} "
        f"{number(record.get('their_distance_both')):>9} {number(record.get('our_distance_both')):>9} "
        f"{number(record.get('distance_ratio'), 3):>6} {number(record['mean_distance_all']):>9} "
        f"{record['gradients_per_image']:>7} {record['forwards_per_image']:>8} {record['seconds']:>8}  "
        + ", ".join(f"{claim} {'holds' if holds else 'FAILS'}" for claim, holds in claims.items())
    )


def number(value: float | None, digits: int = 5) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def origin() -> dict[str, Any]:
    """Provenance with the versions of the libraries that are installed."""
    found = provenance()
    for library in LIBRARIES.values():
        try:
            found["versions"][library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def _synchronize(inputs: Tensor) -> None:
    if inputs.is_cuda:
        torch.cuda.synchronize(inputs.device)


if __name__ == "__main__":
    main()
