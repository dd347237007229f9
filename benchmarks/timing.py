"""Timing on noisy machines: cases take turns in one process, medians and ratios are what counts."""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from selfensemble.runtime.files import write_json
from selfensemble.runtime.memory import keep_freed_memory
from selfensemble.runtime.provenance import provenance

Case = Callable[[], object]


def in_turn(
    cases: dict[str, Case], repeats: int, warm_up: int = 2, least: float = 0.05
) -> dict[str, list[float]]:
    """Seconds of one call of each case, `repeats` of them, A B C A B C ...

    A case that is faster than `least` seconds is called as often as that takes, and the mean counts.
    """
    loops: dict[str, int] = {}
    for name, case in cases.items():
        took = least  # unknown without a warm-up: called once
        for _ in range(warm_up):
            began = time.perf_counter()
            case()
            took = time.perf_counter() - began
        loops[name] = max(1, round(least / max(took, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    gc.collect()
    for _ in range(repeats):
        for name, case in cases.items():
            began = time.perf_counter()
            for _ in range(loops[name]):
                case()
            seconds[name].append((time.perf_counter() - began) / loops[name])
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Of each case."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], case: str, to: str) -> float:
    """Median over rounds of the ratio within a round: what slows the machine down slows both."""
    return statistics.median(a / b for a, b in zip(seconds[case], seconds[to], strict=True))


def report(
    name: str,
    title: str,
    head: list[str],
    rows: list[list[str]],
    values: dict[str, Any],
    out: Path | None,
) -> None:
    """Print a table; write all values to `out`/name.json."""
    table = Table(title=title)
    for number, column in enumerate(head):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
    if out is not None:
        write_json(out / f"{name}.json", values | {"provenance": provenance()})


def arguments(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, help="of torch; by default those that it chooses")
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with the number of threads that are in use, and freed memory kept."""
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.threads = torch.get_num_threads()
    keep_freed_memory()
    return options


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments as they are written down, without the paths of this machine."""
    return {
        key: value for key, value in vars(options).items() if key not in ("out", "data", "model", "alone")
    }
