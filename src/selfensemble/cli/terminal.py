"""What the command line prints: progress on stderr, results on stdout."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..data.images import ImageData
    from ..ensemble.validators import Issue
    from ..evaluation.certified import Certified
    from ..evaluation.results import CheckRecord, Results
    from ..experiments import Page

# Names that users give to files and classes may hold brackets and colons: nothing that is printed is markup.
_PLAIN: dict[str, Any] = {"markup": False, "emoji": False}
_AT_ALL = 0.01  # a radius that says whether anything is certified
out, err = Console(**_PLAIN), Console(stderr=True, **_PLAIN)


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
            TextColumn("{task.description}", markup=False),
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


def print_results(results: "Results") -> None:
    """An evaluation as a table."""
    from rich.table import Table

    title = f"{results.name}: {results.data.which}, protocol {results.protocol['name']}"
    if (edition := results.protocol.get("version", 1)) > 1:
        title += f", edition {edition}"
    seeds = len(results.clean.seeds)
    caption = "accuracy: first seed, 95 % interval; upper bounds of the robustness"
    if results.worst_case:
        caption += "\nworst case: judged again on fresh noise, so chance can put it above a single attack"
    table = Table(title=title, caption=caption)
    table.add_column("attack")
    for column in ("accuracy", f"right under all {seeds} seeds", "RMS L2", "gradients\nan image"):
        table.add_column(column, justify="right")
    for entry in (results.clean, *results.attacks, *results.worst_case):
        where = f", {entry.norm} {entry.eps:.4g}" if entry.eps is not None else ""
        where += f", c = {entry.c:g}" if entry.c is not None else ""
        accuracy = percent(entry.model_dump())
        if entry.published is not None:
            accuracy += f"\n{100 * entry.published:.1f} % by AutoAttack's own rule"
        cells = (
            accuracy, f"{100 * entry.all_seeds:.1f} %", f"{entry.rms_l2:.3f}",
            f"{entry.gradients:.0f}",
        )  # fmt: skip
        table.add_row(entry.title + where, *cells, style="bold" if entry.attack == "worst case" else None)
    for each in results.impossible:
        where = f", {each.norm} {each.eps:.4g}" if each.eps is not None else ""
        table.add_row(each.title + where, "not possible", "", "", "", style="red")
    out.print(table)
    if results.impossible:
        out.print(
            f"Gradients are masked: {results.impossible[0].reason}. Attacks that need gradients were not "
            "possible, which is no sign of robustness; the figures are what the other attacks left.",
            style="red",
        )
    if results.checks is not None:
        print_checks(results.checks)


def print_checks(checks: "Sequence[CheckRecord]") -> None:
    """Honesty checks as a table."""
    from rich.table import Table

    table = Table(title="Honesty checks")
    for column in ("check", "", "figure", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        verdict = {True: "ok", False: "FAIL", None: "n/a"}[check.passed]
        style = "red" if check.passed is False else None
        table.add_row(check.name, verdict, check.figure, check.advice, style=style)
    out.print(table)


def print_issues(issues: "Sequence[Issue]") -> None:
    """What `validate` found, as a table."""
    from rich.table import Table

    if not issues:
        out.print("Nothing found: noise can go in.")
        return
    table = Table(title="What noise would miss or get wrong")
    for column in ("rule", "", "where", "what is the matter", "what to do"):
        table.add_column(column, overflow="fold")
    for issue in issues:
        style = "red" if issue.severity == "error" else None
        parts = (issue.rule, issue.severity, issue.where or "the network", issue.message, issue.cure)
        table.add_row(*parts, style=style)
    out.print(table)


def print_page(page: "Page") -> None:
    """The tables of an experiment."""
    from rich.table import Table

    for part in page.tables:
        table = Table(title=part.title, caption=part.caption)
        for number, name in enumerate(part.head):
            table.add_column(name, overflow="fold", justify="right" if number else "left")
        for row in part.rows:
            table.add_row(*row)
        out.print(table)


def percent(record: dict[str, Any]) -> str:
    """An accuracy record with its interval."""
    return f"{100 * record['accuracy']:.1f} % ({100 * record['low']:.1f} to {100 * record['high']:.1f})"


def finite(value: float) -> float | None:
    """`value`, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def note(text: str) -> None:
    """Something to know, on stderr."""
    err.print(text, highlight=False, soft_wrap=True, markup=False)


_SHOWN = 5  # of what is left out
SHOWS_ALL: ContextVar[bool] = ContextVar("selfensemble_shows_all", default=False)
# How many images could not be used by the command that runs, whose exit status says so.
UNUSABLE: ContextVar[int] = ContextVar("selfensemble_unusable", default=0)


def note_left_out(data: "ImageData", split: str = "") -> None:
    """On stderr, what lies among images and is not used; for the exit status, how many images are among it.

    Args:
        data: the images.
        split: which of two, where both are told of.
    """
    if int(os.environ.get("RANK", "0")) > 0:  # the first process says it, and ends last
        return
    for text in data.notes:
        note(f"images of {data.name}{split}: {text}")
    images, others = data.skipped[: data.unusable], data.skipped[data.unusable :]
    UNUSABLE.set(UNUSABLE.get() + len(images))
    for found, what in ((images, "cannot be used and left out"), (others, "besides images, or to know")):
        if found:
            shown = found if SHOWS_ALL.get() else found[:_SHOWN]
            more = len(found) - len(shown)
            note(
                f"{len(found)} of {data.name}{split} {what}: {'; '.join(shown)}"
                + (f"; and {more} more (--debug lists all)" if more else "")
            )


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


def print_demo(curves: list[list[dict[str, Any]]], title: str, unit: str, shown: float) -> None:
    """Both networks of the demo against the strength of one attack."""
    from rich.table import Table

    images = curves[0][0]["images"]
    table = Table(
        title=f"Accuracy on {images} handwritten digits: {title}",
        caption="in brackets: 95 % interval; distortion: RMS L2 of the change",
    )
    table.add_column(unit, justify="right")
    for name in ("plain network", "self-ensemble"):
        table.add_column(f"{name}\nanswers right", justify="right")
        table.add_column("\ndistortion", justify="right")
    for points in zip(*curves, strict=True):
        cells = [f"{points[0][unit]:g}" if points[0][unit] else "no attack"]
        for point in points:
            interval = f"[{100 * point['low']:.0f}, {100 * point['high']:.0f}]"
            cells += [f"{100 * point['accuracy']:.1f} % {interval:>9}", f"{point['rms_l2']:.2f}"]
        table.add_row(*cells, style="bold" if unit == "c" and points[0]["c"] == shown else None)
    out.print(table)


def print_predictions(records: list[dict[str, Any]], top: int) -> None:
    """A line a file: its likeliest classes with mean probability and spread."""
    from rich.table import Table

    table = Table(title="Mean over noise draws (+- spread of single draws)")
    table.add_column("file", overflow="fold")
    table.add_column("draws", justify="right")
    for rank in range(top):
        table.add_column("answer" if rank == 0 else f"{rank + 1}.")
    if any("set" in record for record in records):
        table.add_column("possible", overflow="fold")
    for record in records:
        cells = []
        for guess in record["predictions"]:
            spread = "" if guess["spread"] is None else f" +- {guess['spread']:.2f}"
            cells.append(f"{guess['label']} {guess['probability']:.2f}{spread}")
        if "set" in record:
            cells.append(", ".join(record["set"]) or "none")
        table.add_row(record["file"], str(record["draws"]), *cells)
    out.print(table)


def print_certified(results: "Certified") -> None:
    """Certified accuracy by radius, about ten rows of it."""
    from rich.table import Table

    settings = results.settings
    most, least = ("at most ", "at least ") if results.wanted else ("", "")
    table = Table(
        title=f"{results.name}: {results.which}, {settings['method']}, alpha "
        f"{settings['alpha']:g}, at most {settings['n']} + {settings['n0']} draws",
        caption=f"nothing certified: {most}{results.abstained:.1%}; "
        f"mean radius {least}{results.mean_radius:.3f}; "
        f"mean draws {results.draws:.0f}, the {settings['n0']} that select the answer included",
    )
    table.add_column("L2 radius", justify="right")
    table.add_column("certified accuracy (95 % interval)", justify="right")
    alone = 0 < len(results.wanted) == len(results.known)  # the wanted radii
    every = 1 if alone else max(1, math.ceil(len(results.curve) / 12))
    for point in results.known[::every]:
        radius = f"{point.radius:g}" if alone else f"{point.radius:.2f}"
        table.add_row(radius, percent(point.model_dump()))
    out.print(table)
    for each in results.wanted:
        out.print(
            f"within {each.radius:g}: {each.reached:.1%} certified, whether the answers are right or wrong, "
            f"{each.out_of_reach:.1%} proven to be out of reach of any answer, {each.open:.1%} neither",
            highlight=False,
        )
    if results.wanted and results.wanted[0].radius > _AT_ALL:
        out.print(
            "Images stopped when these radii were decided. To know how many answers are certified at all, "
            f"add --radius {_AT_ALL:g}, in another --out.",
            highlight=False,
        )
