"""What the command line prints: progress on stderr, results on stdout."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

out, err = Console(), Console(stderr=True)


@contextmanager
def progress() -> Iterator[Any]:
    """A bar on a terminal; elsewhere a line on stderr whenever the text changes. Main process only."""
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        yield lambda text, done: None
    elif err.is_terminal:
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=err) as bar:
            task = bar.add_task("", total=1.0)
            yield lambda text, done: bar.update(task, description=text, completed=done)
    else:
        last = ""

        def line(text: str, done: float) -> None:
            nonlocal last
            if text != last:
                err.print(f"{done:4.0%} {text}", highlight=False, soft_wrap=True, markup=False)
                last = text

        yield line


def percent(record: dict[str, Any]) -> str:
    """An accuracy record with its interval."""
    return f"{100 * record['accuracy']:.1f} % ({100 * record['low']:.1f} to {100 * record['high']:.1f})"


def finite(value: float) -> float | None:
    """`value`, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def print_json(value: Any) -> None:
    """One JSON value on stdout, and nothing else."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def print_tree(value: dict[str, Any], indent: int = 0) -> None:
    """Nested keys and values, a line each."""
    for key, item in value.items():
        if isinstance(item, dict):
            out.print(f"{' ' * indent}{key}:", highlight=False, markup=False)
            print_tree(item, indent + 2)
        else:
            shown = ", ".join(str(part) for part in item) if isinstance(item, list) else item
            out.print(f"{' ' * indent}{key}: {shown}", highlight=False, soft_wrap=True, markup=False)
