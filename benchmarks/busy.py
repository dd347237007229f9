"""A small network beside a busy process, by how long OpenMP's threads spin before they sleep.

    python benchmarks/busy.py [--rounds 7] [--spins 100 1000 10000] [--out FOLDER]

C&W on 50 digits in a process for each setting, which take turns: alone on the machine, then beside a process
that keeps one core busy. The settings act when PyTorch loads its threads, hence the processes.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from timing import Case, arguments, in_turn, medians, parsed, report, settings

_WORKER = """
import sys, time
import selfensemble as rse
from selfensemble import attacks
ensemble, data = rse.load("digits-rse"), rse.load_data("digits", "test")
x, y = data.inputs(slice(50)), data.labels[:50]
for line in sys.stdin:
    attacks.cw_l2(ensemble, x, y, steps=10, binary_search_steps=2, seed=0)
    print("done", flush=True)
"""
_BUSY = "while True: pass"
_NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def worker(**changes: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in _NAMES} | changes
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip


def asking(process: subprocess.Popen[str]) -> Callable[[], None]:
    def ask() -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"

    return ask


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--spins", type=int, nargs="+", default=[100, 1000, 10_000])
    options = parsed(parser)
    kinds: dict[str, dict[str, str]] = {
        "as PyTorch does": {},
        "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
        **{f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": str(count)} for count in options.spins},
        "one thread": {"OMP_NUM_THREADS": "1"},
    }
    workers = {name: worker(**changes) for name, changes in kinds.items()}
    found: dict[str, Any] = {}
    try:
        cases: dict[str, Case] = {name: asking(process) for name, process in workers.items()}
        found["alone"] = in_turn(cases, options.rounds)
        with subprocess.Popen([sys.executable, "-c", _BUSY]) as busy:
            try:
                found["beside a busy process"] = in_turn(cases, options.rounds)
            finally:
                busy.kill()
    finally:
        for process in workers.values():
            process.kill()
    usual = medians(found["alone"])["as PyTorch does"]
    rows = []
    for name in kinds:
        alone, beside = (statistics.median(found[where][name]) for where in found)
        rows.append([name, f"{alone:.2f}", f"{beside:.2f}", f"{alone / usual:.2f}", f"{beside / usual:.2f}"])
    report(
        "busy",
        f"C&W on 50 digits, {options.threads} threads, seconds, medians of {options.rounds} rounds",
        ["", *found, "alone / as PyTorch does", "beside / alone as PyTorch does"],
        rows,
        {"settings": settings(options), "seconds": found},
        options.out,
    )


if __name__ == "__main__":
    main()
