"""How long attacks take until an accuracy is reached, and how much memory: ours and those of other libraries.

    python benchmarks/attacks_to_aim.py MODEL --data DATA [--l2 0.5 | --linf 8/255] [--n 100] [--out FOLDER]

The aim is what the strongest attack of all leaves, and one point. Every attack runs with 5, 10, 20, ...
gradients an image, each time in a process of its own, until a judge finds the aim reached; the time is the
processor's for the attack alone, ours with the making of the optimised copy. `--aim` sets another: what
the honest protocol leaves, say. Ours stops with images that are clearly fooled, as that protocol does, and
takes its gradients in the precision of `optimize`. Libraries as in `equal_gradients.py`.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from fractions import Fraction
from functools import partial
from typing import Any

from equal_gradients import OURS, Make, fixed
from judged import about

import selfensemble as rse
from selfensemble import attacks
from selfensemble.attacks.norms import Norm
from selfensemble.evaluation import judge
from selfensemble.evaluation.balls import within
from selfensemble.fast.optimize import optimize

QUERIES = 20


def cases(norm: Norm, eps: float, budget: int, images: int) -> dict[str, Make]:
    """Attacks within a radius; ours as the honest protocol runs it."""
    found = {
        name: make for name, make in fixed(norm, eps, budget, images).items() if not name.startswith(OURS)
    }
    own = partial(attacks.pgd, norm=norm, eps=eps, steps=budget, loss="probability-margin", early_stop=True)
    return {OURS: lambda: own} | found


def measure(options: argparse.Namespace, norm: Norm, eps: float, name: str, budget: int) -> dict[str, float]:
    """Seconds of the processor, accuracy left in % and peak memory in MiB of one attack, in this process."""
    ensemble = rse.load(options.model)
    data = rse.load_data(options.data, "test")
    x, y = data.inputs(slice(options.n)), data.labels[: options.n]
    attack = cases(norm, eps, budget, len(x))[name]()
    began = time.process_time()
    victim = optimize(ensemble, x[:2]) if name == OURS else ensemble
    found = attack(victim, x, y, seed=options.seed)
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    images = within(found, x, norm, eps, False)
    asked: dict[str, Any] = {"norm": norm, "eps": eps, "max_batch": 200}
    verdict = judge(ensemble, x, images, y, queries=QUERIES, seed=options.seed + 1, **asked)
    return {
        "seconds": seconds,
        "accuracy": float(100 * (1 - verdict.wrong_per_query).mean()),
        "memory": peak,
    }


def alone(options: argparse.Namespace, name: str, budget: int) -> dict[str, float] | None:
    """The same in a process of its own; None where the library is not installed."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, "--budget", str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name} left out: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return None
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--n", type=int, default=100)
    radius = parser.add_mutually_exclusive_group()
    radius.add_argument("--l2", default="0.5")
    radius.add_argument("--linf")
    parser.add_argument("--aim", type=float, help="accuracy in %% that may be left; by default see above")
    parser.add_argument("--most", type=int, default=320, help="largest number of gradients an image")
    parser.add_argument("--only", nargs="+", help="names of attacks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    norm: Norm = "linf" if options.linf else "l2"
    text = options.linf or options.l2
    eps = float(Fraction(text))
    if options.one:
        print(json.dumps(measure(options, norm, eps, options.one, options.budget)))
        return
    names = [name for name in cases(norm, eps, 10, options.n) if not options.only or name in options.only]
    print(about(options.model, options.n, options.seed), f"{norm} {text}.", flush=True)
    budgets = [5 * 2**k for k in range(12) if 5 * 2**k <= options.most]
    strongest = None if options.aim is not None else alone(options, OURS, 2 * budgets[-1])
    aim = options.aim if strongest is None else strongest["accuracy"] + 1
    print(f"\nAim: {aim:.1f} % at most.\n")
    print(
        "| attack | gradients | seconds | left, % | peak MiB |", "|---|---|---|---|---|", sep="\n", flush=True
    )
    for name in names:
        for budget in budgets:
            found = alone(options, name, budget)
            if found is None:
                break
            reached = found["accuracy"] <= aim
            if reached or budget == budgets[-1]:
                row = f"{found['seconds']:.1f} | {found['accuracy']:.1f} | {found['memory']:.0f}"
                print(f"| {name} | {budget}{'' if reached else ', not reached'} | {row} |", flush=True)
            if reached:
                break


if __name__ == "__main__":
    main()
