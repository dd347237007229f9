"""The honest protocol at once and twice its budget, and the original AutoAttack for random networks.

    python benchmarks/honest_budget.py MODEL --data DATA [--norm l2] [--eps 0.5] [--n 200] [--factors 1 2]
        [--protocol honest] [--autoattack]

One radius of a protocol, every number of steps and queries times the factor; without AutoAttack, whose
figure of the protocol is a verdict and no part of the worst case. `--autoattack`: its authors' code, version
"rand" with 100 steps and 20 draws a step, on an optimised copy in float32. Everybody's images are asked 20
times on fresh noise. `--out` holds what is done.
"""

import argparse
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from judged import QUERIES, about, judged

import selfensemble as rse
from selfensemble.evaluation.adapters import autoattack_attack
from selfensemble.evaluation.protocol import Protocol, load_protocol
from selfensemble.evaluation.results import Results
from selfensemble.evaluation.runner import Evaluation
from selfensemble.fast.optimize import optimize

BUDGETS = ("steps", "queries")


def of_radius(source: str, norm: str, eps: str, factor: float, images: int, precision: str) -> Protocol:
    """The attacks of a protocol in a norm, at one radius, with their budgets times `factor`."""
    protocol = load_protocol(source)
    attacks: list[dict[str, Any]] = []
    for spec in protocol.attacks:
        values = spec.model_dump(exclude_none=True)
        if values.get("norm") != norm or spec.everywhere or spec.attack.startswith("autoattack"):
            continue
        more = {key: max(1, round(values[key] * factor)) for key in BUDGETS if key in values}
        attacks.append(values | more | {"eps": eps})
    if not attacks:
        raise SystemExit(f"{source} has no attack in {norm}: pass another --norm or --protocol")
    changes: dict[str, Any] = {"images": images, "attacks": attacks, "checks": False, "precision": precision}
    changes |= {"judge": {"seeds": protocol.judge.seeds, "queries": QUERIES}}
    return Protocol.model_validate(protocol.model_dump() | changes)


def row(name: str, right: float, images: int, gradients: float, forwards: float) -> str:
    """A line of the table; the error is that of the choice of images."""
    error = 100 * float(np.sqrt(right * (1 - right) / images))
    return f"| {name} | {100 * right:.1f} +- {error:.1f} | {gradients:.0f} | {forwards:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--protocol", default="honest")
    parser.add_argument("--norm", default="l2", choices=["l2", "linf"])
    parser.add_argument("--eps", default="0.5")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--factors", type=float, nargs="*", default=[1.0, 2.0])
    parser.add_argument("--autoattack", action="store_true")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "float32"], help="of our gradients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/honest-budget"))
    options = parser.parse_args()
    ensemble = rse.load(options.model)
    data = rse.load_data(options.data, "test")
    place = options.out / Path(options.model).name / f"{options.norm}-{options.eps.replace('/', '_')}"
    print(about(options.model, options.n, options.seed), flush=True)
    print(
        f"\n{options.norm} {options.eps}\n",
        "| attack | accuracy, % | gradients | forwards |",
        "|---|---|---|---|",
        sep="\n",
    )
    for factor in options.factors:
        protocol = of_radius(
            options.protocol, options.norm, options.eps, factor, options.n, options.precision
        ).model_copy(update={"seed": options.seed})
        folder = place / f"{protocol.name}-{options.n}-{options.seed}-{factor:g}"
        results: Results = Evaluation(ensemble, data, protocol, folder).run()
        (worst,) = results.worst_case
        spent = results.attacks
        gradients, forwards = (
            sum(getattr(each, name) for each in spent) for name in ("gradients", "forwards")
        )
        name = f"`{protocol.name}` {protocol.version}, budget times {factor:g}"
        print(row(name, 1 - worst.wrong_per_query, options.n, gradients, forwards), flush=True)
    if options.autoattack:
        x, y = data.inputs(slice(options.n)), data.labels[: options.n]
        eps = float(Fraction(options.eps))
        attack = autoattack_attack(norm=options.norm, eps=eps)
        file = place / f"autoattack-{options.n}-{options.seed}.npz"
        fast = optimize(ensemble, x[:2], "float32")
        one = judged(
            file, ensemble, x, y, partial(attack, fast, x, y, seed=options.seed), options.norm, eps, False,
            options.seed,
        )  # fmt: skip
        name = "AutoAttack rand, 100 steps, EOT 20"
        print(row(name, float(one.right.mean()), options.n, one.gradients, one.forwards), flush=True)


if __name__ == "__main__":
    main()
