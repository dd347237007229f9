"""Commands about what is certain: certificates, and how many draws an answer needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.devices import device_named
from ..runtime.errors import InputError
from ..runtime.processes import this_process
from . import terminal
from .arguments import checked_options, in_precision
from .base import Device, Json, Model, app, resumable
from .data_options import NO_DATA, DataOptions, takes_data
from .opening import open_network, saved_folder
from .options import OPTIONS, NetworkOptions, takes_network

if TYPE_CHECKING:
    from ..artefacts.config import ArtefactConfig
    from ..data.images import ImageData
    from ..ensemble.ensemble import SelfEnsemble
    from ..ensemble.sets import SetRule
    from ..ensemble.stopping import Calibrated

_PRECISION = "float32, or bf16: an optimised copy, which is then what the result is about."


@app.command()
@takes_network
@takes_data
def certify(
    model: Model,
    data: DataOptions = NO_DATA,
    n: Annotated[
        int | None, typer.Option(min=1, help="Number of test images, from the first on; 500 by default.")
    ] = None,
    n_images: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,
    method: Annotated[str, typer.Option(help="mean (what `predict` averages) or vote.")] = "mean",
    rivals: Annotated[str, typer.Option(help="runner_up bounds every rival, all takes 1 - p.")] = "runner_up",
    max_draws: Annotated[
        int | None,
        typer.Option(min=2, help="Maximum number of noise draws for the estimate; 10,000 by default."),
    ] = None,
    n0: Annotated[int, typer.Option(min=1, help="Number of noise draws that select the answer.")] = 100,
    alpha: Annotated[float, typer.Option(help="Risk of a wrong certificate, for each image.")] = 0.001,
    radius: Annotated[
        list[float] | None,
        typer.Option(help="Target radius: stop images once it is decided; repeat for more."),
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Noise on the grid of 8-bit images: exact in floating point.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    shard: Annotated[int, typer.Option(min=1, help="Images per unit of work.")] = 50,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Images per forward pass.")] = None,
    precision: Annotated[str, typer.Option(help=_PRECISION)] = "float32",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/MODEL-certified-METHOD by default.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
    network: NetworkOptions = OPTIONS,
) -> None:
    """Certify L2 radii within which the answer cannot change; continues where it stopped."""
    from ..evaluation.certified import Certification, Settings

    images, most = _images_and_draws(n, n_images, max_draws, network.draws)
    settings = checked_options(
        Settings,
        {"images": images, "alpha": alpha, "n0": n0, "n": most, "method": method, "rivals": rivals,
         "radius": radius, "grid": grid, "seed": seed, "shard": shard},
    )  # fmt: skip
    rank, world, target = this_process(device)
    opened = open_network(model, network, data, with_data=True)
    test, name = opened.test, opened.name
    ensemble = in_precision(opened.ensemble.to(target), test.inputs(slice(2)), precision)
    folder = out or Path("runs") / f"{name}-certified-{method}"
    with resumable(folder), terminal.progress() as update:
        update("preparing", 0.0)
        results = Certification(
            ensemble, test, settings, folder, name=name, max_batch=max_batch, progress=update, rank=rank,
            architecture=opened.architecture, world=world,
        ).run()  # fmt: skip
    if rank != 0:
        return
    if as_json:
        terminal.print_json(results.model_dump(mode="json"))
        return
    terminal.print_certified(results)
    terminal.out.print(f"Written to {folder}: certified.json, certificates.csv", soft_wrap=True)


def _images_and_draws(
    n: int | None, n_images: int | None, max_draws: int | None, draws: int | None
) -> tuple[int, int]:
    """How many images, and how many draws of each; `--n DRAWS --n-images IMAGES` is the old spelling."""
    if draws is not None:
        terminal.note("--draws is of predictions: a certificate takes up to --max-draws, 10,000 if not said")
    if n is None or n_images is None:
        return n or n_images or 500, max_draws or 10_000
    if max_draws is not None:
        raise InputError("--n and --n-images are both images beside --max-draws: leave one out")
    terminal.note(f"--n beside --n-images counts draws: write --n {n_images} --max-draws {n}")
    if n < 2:
        raise InputError("a certificate takes 2 draws or more")
    return n_images, n


@app.command()
@takes_network
@takes_data
def calibrate(
    model: Annotated[str, typer.Argument(help="Folder that `train` wrote; config.json gets the rule.")],
    data: DataOptions = NO_DATA,
    n_images: Annotated[
        int,
        typer.Option("--n", "--n-images", min=1, help="Test images, from the end: the first stay unseen."),
    ] = 4000,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Largest share of other answers; by default that of the model's draws."),
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Risk that more differ; .05 by default.")] = None,
    most: Annotated[int | None, typer.Option(min=2, help="Maximum draws per image; 32 by default.")] = None,
    sets: Annotated[
        bool, typer.Option("--sets", help="Calibrate conformal sets for `predict --sets`; uses labels.")
    ] = False,
    alpha: Annotated[
        float | None, typer.Option(help="With --sets: risk of a set without the right label; .1 by default.")
    ] = None,
    radius: Annotated[
        float | None, typer.Option(help="With --sets: hold for images changed by up to this L2 distance too.")
    ] = None,
    draws: Annotated[
        int | None, typer.Option(min=1, help="With --sets: draws per image; 1,000 by default with a radius.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise; fresh noise by default.")] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Images per forward pass.")] = None,
    precision: Annotated[str | None, typer.Option(help=f"{_PRECISION} Default: the faster one.")] = None,
    device: Device = "auto",
    as_json: Json = False,
    network: NetworkOptions = OPTIONS,
) -> None:
    """Set the margins at which `predict --stop calibrated` stops drawing, or the sets of `predict --sets`."""
    from ..data.images import batch_size

    of_stops = {"epsilon": epsilon, "delta": delta, "most": most}
    of_sets = {"alpha": alpha, "radius": radius, "draws": draws}
    for name, value in (of_stops if sets else of_sets).items():
        if value is not None:
            raise InputError(
                f"--{name} is {'not ' if sets else ''}of --sets: {'leave it out' if sets else 'add it'}"
            )
    folder = saved_folder(model, "is calibrated")
    opened = open_network(model, network, data, with_data=True)
    config, test = opened.config, opened.test
    if len(test) < n_images:
        raise InputError(f"there are {len(test)} test images: --n asks for {n_images}")
    target = device_named(device)
    if max_batch is None and target.type != "cpu":  # where a pass holds half of all images by default
        max_batch = batch_size(2000, test.shape)
    ensemble = in_precision(opened.ensemble.to(target), test.inputs(slice(2)), precision)
    work = _sets if sets else _stopping
    chosen = (of_sets if sets else of_stops) | {"seed": seed, "max_batch": max_batch}
    options = {name: value for name, value in chosen.items() if value is not None}
    rule, told = work(ensemble, test, n_images, options, folder, config)
    if as_json:
        terminal.print_json(rule.model_dump(mode="json"))
        return
    terminal.out.print(told, soft_wrap=True)
    terminal.out.print(f"Written to {model}/config.json", soft_wrap=True)


def _stopping(
    ensemble: "SelfEnsemble",
    test: "ImageData",
    count: int,
    options: dict[str, Any],
    folder: Path,
    of: "ArtefactConfig",
) -> tuple["Calibrated", str]:
    """The rule that is written to the folder, and what to say of it."""
    from ..artefacts.storage import save_stopping
    from ..certainty.calibration import calibrate
    from ..data.images import Inputs

    with _drawing() as progress:
        rule = calibrate(ensemble, Inputs(test, count, len(test) - count), progress=progress, **options)
    save_stopping(folder, rule, of=of)
    return rule, (
        f"Mean draws {rule.mean_draws:.2f} instead of {ensemble.draws}; {rule.disagreement:.2%} of "
        f"{rule.images} images are answered otherwise than by {rule.reference_draws} draws; at most "
        f"{rule.epsilon:.2%} of images like them, at a risk of {rule.delta:g}."
    )


def _sets(
    ensemble: "SelfEnsemble",
    test: "ImageData",
    count: int,
    options: dict[str, Any],
    folder: Path,
    of: "ArtefactConfig",
) -> tuple["SetRule", str]:
    """The same of conformal sets."""
    from ..artefacts.storage import save_sets
    from ..certainty.conformal import conformal_sets
    from ..data.images import Inputs

    with _drawing() as progress:
        last = Inputs(test, count, len(test) - count)
        rule = conformal_sets(ensemble, last, test.labels[-count:], progress=progress, **options).rule
    save_sets(folder, rule, of=of)
    moved = f", moved by up to {rule.radius:g} in L2" if rule.radius else ""
    return rule, (
        f"Sets hold the right label of {1 - rule.alpha:.1%} of images like the {rule.images} calibrated on"
        f"{moved}; {rule.draws} draws an image, threshold {rule.threshold:.4f}."
    )


@contextmanager
def _drawing() -> Iterator[Callable[[int, int], None]]:
    """Progress of images, or of their draws."""
    with terminal.progress() as update:
        update("drawing", 0.0)
        yield lambda done, total: update("drawing", done / total)
