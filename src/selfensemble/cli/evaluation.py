"""Commands that attack a network, ask whether the attacks can be trusted, and compare."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.devices import device_named
from ..runtime.errors import InputError
from ..runtime.processes import this_process
from . import terminal
from .base import Device, Json, Model, app, resumable
from .data_options import NO_DATA, DataOptions, takes_data
from .opening import open_bare, open_network
from .options import OPTIONS, NetworkOptions, takes_network

if TYPE_CHECKING:
    import torch

    from ..ensemble.ensemble import SelfEnsemble
    from ..evaluation.protocol import Protocol
    from ..evaluation.results import Results
    from .opening import Opened


_UNSOUND = 3
_PROTOCOL_HELP = (
    "A shipped protocol (see `info`) or a YAML file; default: honest; demo-honest for digits; paper with --c."
)


@app.command()
@takes_network
@takes_data
def evaluate(
    model: Model,
    protocol: Annotated[str | None, typer.Option(help=_PROTOCOL_HELP)] = None,
    data: DataOptions = NO_DATA,
    n: Annotated[
        int | None,
        typer.Option(min=1, help="Number of test images, from the first on; folders in random order."),
    ] = None,
    c: Annotated[
        list[float] | None,
        typer.Option(help="Strengths c of the paper's attack, instead of those of the protocol."),
    ] = None,
    draws: Annotated[int | None, typer.Option(min=1, help="Noise draws per answer of the defender.")] = None,
    static: Annotated[bool, typer.Option("--static", help="Evaluate the network without its noise.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the attacks and the judge.")] = None,
    shard: Annotated[int | None, typer.Option(min=1, help="Images per unit of work.")] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Images per forward pass.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Precision of the attacks' gradients: float32 or bf16 (faster).")
    ] = None,
    save_images: Annotated[
        bool,
        typer.Option("--save-images", help="Judge attacked images in 8 bits, and keep them as PNG files."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/MODEL-PROTOCOL by default.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
    network: NetworkOptions = OPTIONS,
) -> None:
    """Attack a model by a protocol, judge it on fresh noise; run again, it continues where it stopped."""
    from ..evaluation.eight_bits import check_png, write_images
    from ..evaluation.runner import Evaluation

    bits = 8 if save_images else None
    overrides = {"images": n, "seed": seed, "shard": shard, "precision": precision, "bits": bits}
    given = {key: value for key, value in overrides.items() if value is not None}
    plan = None if protocol is None and c is None else _protocol(protocol or "paper", c, given)
    rank, world, target = this_process(device)
    opened = open_network(model, replace(network, draws=draws), data, with_data=True)
    plan = plan or _protocol("demo-honest" if opened.test.name == "digits" else "honest", c, given)
    ensemble, name = _defender(opened, target, static)
    folder = out or Path("runs") / f"{name}-{plan.name}"
    if save_images:
        check_png(opened.test)
    with resumable(folder), terminal.progress() as update:
        update("preparing", 0.0)
        evaluation = Evaluation(
            ensemble, opened.test, plan, folder, name=name, max_batch=max_batch,
            architecture=opened.architecture, progress=update, rank=rank, world=world,
        )  # fmt: skip
        results = evaluation.run()
        if save_images and rank == 0:
            update("writing images", 1.0)
            write_images(evaluation.shards, folder / "images", evaluation.bounds)
    if rank == 0:
        _show(results, folder, as_json)


def _defender(opened: "Opened", device: "torch.device", static: bool) -> "tuple[SelfEnsemble, str]":
    """What is evaluated, and its name."""
    from ..noise.injection import make_static_

    ensemble = opened.ensemble.to(device)
    if static:
        make_static_(ensemble.model)
    return ensemble, f"{opened.name}-static" if static else opened.name


def _show(results: "Results", folder: Path, as_json: bool) -> None:
    from ..evaluation.results import is_weak

    if as_json:
        terminal.print_json(results.record())
        return
    terminal.print_results(results)
    if results.bounds is not None:
        low, high = results.bounds
        terminal.note(
            f"radii and distances are in the units of the inputs, [{low:g}, {high:g}]: divide them by "
            f"{high - low:g} to compare them with those of images in [0, 1]"
        )
    if is_weak([results]):
        terminal.note(
            f"Protocol {results.protocol['name']} is weak: it takes no worst case of several attacks "
            "within a radius. To judge a defense, run --protocol honest (demo-honest for digits)."
        )
    terminal.out.print(
        f"Written to {folder}: results.json, images.csv; for people: selfensemble report {folder}",
        soft_wrap=True,
    )


def _protocol(name: str, c: list[float] | None, overrides: dict[str, Any]) -> "Protocol":
    """The protocol of that name, with strengths `c` of the paper's attack."""
    from ..evaluation.protocol import load_protocol

    if c is not None:
        overrides["attacks"] = [{"attack": "cw-paper", "title": "C&W paper", "c": c}]
    protocol = load_protocol(name, overrides)
    if c is not None and protocol.name != "paper":
        raise InputError("--c sets the strengths of --protocol paper; write a YAML file for others")
    return protocol


@app.command()
@takes_network
@takes_data
def doctor(
    model: Model,
    data: DataOptions = NO_DATA,
    n: Annotated[int, typer.Option(min=5, help="Test images for the trial attacks.")] = 50,
    norm: Annotated[str, typer.Option(help="linf, l2 or l1.")] = "linf",
    eps: Annotated[
        str, typer.Option(help="Radius of the trial attacks, e.g. 8/255, in units of the inputs.")
    ] = "8/255",
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps of the trial attacks.")] = 20,
    eot: Annotated[int, typer.Option(min=1, help="Noise draws in each step.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the trial attacks.")] = 0,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Images per forward pass.")] = None,
    device: Device = "auto",
    as_json: Json = False,
    network: NetworkOptions = OPTIONS,
) -> None:
    """Check whether an evaluation of a model can be trusted; exit status 3 if a check fails."""
    from ..data.images import batch_size
    from ..evaluation.doctor.examination import doctor as examine
    from ..evaluation.protocol import check_radius, number

    opened = open_network(model, network, data, with_data=True)
    ensemble, test = opened.ensemble.to(device_named(device)), opened.test
    images = slice(4 * n)
    with terminal.progress() as update:
        checks = examine(
            ensemble,
            test.inputs(images),
            test.labels[images],
            norm=norm,
            eps=check_radius(number(eps), "--eps"),
            steps=steps,
            eot=eot,
            images=n,
            expect_random=opened.config.is_random or None,  # a network may have randomness of its own
            max_batch=max_batch or batch_size(200, test.shape),
            seed=seed,
            progress=update,
        )
    if as_json:
        terminal.print_json({"checks": [check.model_dump(mode="json") for check in checks]})
    else:
        terminal.print_checks(checks)
    if any(check.passed is False for check in checks):
        raise typer.Exit(_UNSOUND)


@app.command()
@takes_network
@takes_data
def validate(
    model: Model,
    data: DataOptions = NO_DATA,
    as_json: Json = False,
    network: NetworkOptions = OPTIONS,
) -> None:
    """Report what noise would miss or get wrong in a network; exit status 3 if it finds an error."""
    from ..ensemble.validators import validate as look

    examined, example, chosen, sampling = open_bare(model, network, data)
    issues = look(examined, example, filter_fn=chosen, sampling=sampling)
    if as_json:
        terminal.print_json({"issues": [asdict(issue) for issue in issues]})
    else:
        terminal.print_issues(issues)
    if any(issue.severity == "error" for issue in issues):
        raise typer.Exit(_UNSOUND)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `evaluate` and `certify` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")] = Path("report.html"),
) -> None:
    """Compare evaluation runs in one HTML file that needs no network connection."""
    from ..report.html import write_report

    write_report(runs, out)
    terminal.out.print(f"Written to {out}", soft_wrap=True)
