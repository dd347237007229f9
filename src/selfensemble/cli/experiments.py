"""Commands that run experiments: the demo, and those of the paper and ours."""

from pathlib import Path
from typing import Annotated

import typer

from ..runtime.devices import device_named
from ..runtime.errors import InputError
from ..runtime.interrupts import Interrupted
from ..runtime.ownership import owned
from ..runtime.packages import needs
from . import terminal
from .base import Device, Json, app


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results and pictures.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, noise, attack and judge.")] = 0,
    n: Annotated[
        int | None, typer.Option(min=10, max=450, help="Test images to attack; by default 100.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a plain network and its self-ensemble on handwritten digits, attack both, write a report."""
    with needs("selfensemble[report,train]"):  # both at once
        import accelerate  # noqa: F401
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    from ..experiments.demo import run_demo

    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: --out takes the folder to write to")
    with owned(out), terminal.progress() as update:
        results = run_demo(out, seed=seed, images=n, progress=update)
    if as_json:
        terminal.print_json(results)
        return
    networks = [results["networks"][kind] for kind in ("plain", "rse")]
    for title, key, unit in (
        ("the paper's attack (C&W, one noise draw a step)", "curve", "c"),
        ("the strongest of five honest attacks, image by image (L-inf)", "worst_case", "eps"),
    ):
        terminal.print_demo([network[key] for network in networks], title, unit, results["shown_strength"])
    shown = results["shown_strength"]
    at = [next(p for p in network["curve"] if p["c"] == shown)["accuracy"] for network in networks]
    terminal.out.print(
        f"At c = {shown:g} the plain network still answers {at[0]:.0%} of the attacked images correctly, "
        f"the Random Self-Ensemble {at[1]:.0%}."
    )
    clean = [terminal.percent(network["training"]["metrics"]["test"]) for network in networks]
    terminal.out.print(f"Without attack, all 450 test images: plain {clean[0]}, self-ensemble {clean[1]}.")
    failed = [check for network in networks for check in network["checks"] if check["passed"] is False]
    terminal.out.print(f"Honesty checks that failed: {len(failed)}.")
    terminal.out.print(results["caveat"], style="yellow")
    terminal.out.print(
        f"Written to {out}: report.html, results.json, accuracy.png, adversarial.png", soft_wrap=True
    )


@app.command()
def reproduce(
    names: Annotated[
        list[str],
        typer.Argument(
            help="headline, draws, noise, levels, targeted, theory, honest, board, certainty, certificates, "
            "certified-noise, resnext, stl10; or all."
        ),
    ],
    scale: Annotated[str, typer.Option(help="quick, quarter, half, wide or full: how much work.")] = "half",
    quick: Annotated[bool, typer.Option("--quick", help="The same as --scale quick.")] = False,
    data: Annotated[
        str | None,
        typer.Option(help="CIFAR-10 (or STL-10 for stl10 alone): a folder of parquet files, or a hub id."),
    ] = None,
    stl10: Annotated[str | None, typer.Option(help="STL-10, in the same way.")] = None,
    models: Annotated[
        Path | None,
        typer.Option(help="Folder of networks, trained if missing; runs/models/SCALE by default."),
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Folder of finished work; runs/experiments/SCALE by default.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of results, with a folder for each experiment; runs/results/SCALE by default."
        ),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this network; repeat for more.")] = None,
    only_render: Annotated[
        bool, typer.Option("--render", help="Only write pages and plots again, from the stored results.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the attacks and the judge.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Run the paper's experiments and ours; run again, it continues where it stopped."""
    from ..experiments import Reproduction, render_all, results_folder

    scale = "quick" if quick else scale
    folder = results_folder(out, scale)
    if only_render:
        pages = render_all(names, folder)
    else:
        try:
            with terminal.progress() as update:
                pages = Reproduction(
                    scale, data, stl10, models, runs, out, tuple(only or ()), seed,
                    device_named(device), update,
                ).run(names)  # fmt: skip
        except (KeyboardInterrupt, Interrupted) as stop:
            said = f"{stop}; " if str(stop) else "stopped; "
            raise Interrupted(f"{said}continue with the same command") from None
    if as_json:
        terminal.print_json({name: page.values() for name, page in pages.items()})
        return
    for name, page in pages.items():
        terminal.print_page(page)
        terminal.out.print(f"Written to {folder / name}: index.md and its plots", soft_wrap=True)
