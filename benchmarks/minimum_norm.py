"""Images that PGD breaks within a radius, and attacks for the nearest image that call them unbroken there.

    python benchmarks/minimum_norm.py MODEL --data DATA [--eps 1.0] [--steps 200] [--n 200]

Broken: classified correctly without attack, and wrongly within `--eps` (L2), by the mean of 300 fresh draws.
Of these: *handed back*, the attack's image is the original; *farther*, it lies beyond the radius; *right*,
300 fresh draws classify it correctly where it lies; *unbroken*, they do so when it is brought into the ball,
as an evaluation does. *Gradients* are those of single draws that an image costs: FMN and DDN take `--steps`
steps, C&W a quarter of them for each of four values of c, FAB half of them, with a gradient for every class.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from judged import about
from torch import Tensor

import selfensemble as rse
from selfensemble import attacks
from selfensemble.attacks.budget import count_evaluations
from selfensemble.evaluation.balls import within
from selfensemble.fast.optimize import optimize

DRAWS = 300


@torch.no_grad()
def correct(ensemble: rse.SelfEnsemble, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """(B,) whether the mean of many draws classifies each image correctly."""
    return ensemble.predict_proba(images, draws=DRAWS, seed=seed).argmax(dim=1) == labels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eps", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="beginnings of names of attacks")
    options = parser.parse_args()
    ensemble = rse.load(options.model)
    data = rse.load_data(options.data, "test")
    x, y = data.inputs(slice(options.n)), data.labels[: options.n]
    fast = optimize(ensemble, x[:2])
    seed, steps = options.seed, options.steps
    clean = correct(ensemble, x, y, seed + 1)
    x, y = x[clean], y[clean]
    found = attacks.pgd(
        fast, x, y, norm="l2", eps=options.eps, steps=steps, loss="probability-margin", seed=seed
    )
    broken = ~correct(ensemble, found, y, seed + 2)
    x, y = x[broken], y[broken]
    print(about(options.model, options.n, seed))
    print(f"\nOf {int(clean.sum())} classified correctly, PGD breaks {len(x)} within L2 {options.eps:g}.\n")
    searches: dict[str, Callable[..., Tensor]] = {
        "FMN": partial(attacks.fmn, norm="l2", steps=steps),
        "DDN": partial(attacks.ddn, steps=steps),
        "C&W, 4 searches": partial(attacks.cw_l2, binary_search_steps=4, steps=steps // 4),
        "FAB": partial(attacks.fab, norm="l2", steps=steps // 2),
    }
    print("| attack | handed back | farther | right | unbroken | median L2 | gradients | s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, search in searches.items():
        if options.only and not name.startswith(tuple(options.only)):
            continue
        began = time.monotonic()
        with count_evaluations() as spent:
            nearest = search(fast, x, y, seed=seed)
        seconds = time.monotonic() - began
        length = (nearest - x).flatten(1).norm(dim=1)
        right = correct(ensemble, nearest, y, seed + 3)
        same, farther = int((length == 0).sum()), int((length > options.eps).sum())
        median = float(length.median())
        inside = within(nearest, x, "l2", options.eps, farther=True)
        unbroken = int(correct(ensemble, inside, y, seed + 4).sum())
        row = f"{same} | {farther} | {int(right.sum())} | {unbroken} | {median:.3f}"
        row += f" | {spent.gradients / len(x):.0f} | {seconds:.0f}"
        print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
