"""Commands about what is certain: certificates, and how many draws an answer needs."""

from pathlib import Path
from typing import Annotated

import typer

from ..runtime.devices import device_named
from ..runtime.errors import InputError
from ..runtime.processes import this_process
from . import terminal
from .arguments import in_precision, test_data_of
from .base import Data, Device, Json, Model, app, resumable

_PRECISION = "float32, or bf16: an optimised copy, which is then what the result is about."


@app.command()
def certify(
    model: Model,
    data: Data = None,
    n_images: Annotated[int, typer.Option(min=1, help="Test images: the first so many.")] = 500,
    method: Annotated[str, typer.Option(help="mean (what `predict` averages) or vote.")] = "mean",
    rivals: Annotated[str, typer.Option(help="runner_up bounds every rival, all takes 1 - p.")] = "runner_up",
    n: Annotated[int, typer.Option(min=2, help="Noise draws that estimate.")] = 10_000,
    n0: Annotated[int, typer.Option(min=1, help="Noise draws that select the answer.")] = 100,
    alpha: Annotated[float, typer.Option(help="Risk of a wrong certificate, for each image.")] = 0.001,
    radius: Annotated[
        float | None, typer.Option(help="Stop early for images that reach this L2 radius.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    shard: Annotated[int, typer.Option(min=1, help="Images a unit of work.")] = 50,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Images a forward pass.")] = None,
    precision: Annotated[str, typer.Option(help=_PRECISION)] = "float32",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/MODEL-certified-METHOD by default.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Certify L2 radii within which the answer cannot change; goes on where it stopped."""
    from ..artefacts import storage
    from ..evaluation.certified import Certification, Settings

    settings = Settings.model_validate(
        {"images": n_images, "alpha": alpha, "n0": n0, "n": n, "method": method, "rivals": rivals,
         "radius": radius, "seed": seed, "shard": shard}
    )  # fmt: skip
    config = storage.read_config(model)
    rank, world, target = this_process(device)
    test = test_data_of(config, data)
    ensemble = in_precision(storage.load(model).to(target), test.inputs(slice(2)), precision)
    name = model.resolve().name
    folder = out or Path("runs") / f"{name}-certified-{method}"
    with resumable(folder), terminal.progress() as update:
        update("preparing", 0.0)
        results = Certification(
            ensemble,
            test,
            settings,
            folder,
            name=name,
            max_batch=max_batch,
            architecture=config.architecture.model_dump() if config.architecture else None,
            progress=update,
            rank=rank,
            world=world,
        ).run()
    if rank != 0:
        return
    if as_json:
        terminal.print_json(results.model_dump(mode="json"))
        return
    terminal.print_certified(results)
    terminal.out.print(f"Written to {folder}: certified.json, certificates.csv", soft_wrap=True)


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(help="Folder that `train` wrote; its config.json is extended.")],
    data: Data = None,
    n_images: Annotated[
        int, typer.Option(min=200, help="Test images: the last so many, so that the first stay unseen.")
    ] = 4000,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Share of other answers; by default that of the model's fixed number of draws."),
    ] = None,
    delta: Annotated[float, typer.Option(help="Risk that more than epsilon differ.")] = 0.05,
    most: Annotated[int, typer.Option(min=2, help="Draws of an image at most.")] = 32,
    seed: Annotated[int | None, typer.Option(help="Repeatable noise; fresh by default.")] = None,
    precision: Annotated[str, typer.Option(help=_PRECISION)] = "bf16",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Set the margins at which `predict --stop calibrated` stops drawing; needs no labels."""
    from ..artefacts import storage
    from ..certainty.calibration import calibrate as calibrated

    if not model.is_dir():
        raise InputError(f"{model} is no folder: a network of the zoo is calibrated in a copy of its folder")
    config = storage.read_config(model)
    test = test_data_of(config, data)
    if len(test) < n_images:
        raise InputError(f"there are {len(test)} test images: --n-images asks for {n_images}")
    ensemble = in_precision(storage.load(model).to(device_named(device)), test.inputs(slice(2)), precision)
    with terminal.progress() as update:
        update("drawing", 0.0)
        rule = calibrated(
            ensemble,
            test.inputs(slice(len(test) - n_images, len(test))),
            epsilon=epsilon,
            delta=delta,
            most=most,
            seed=seed,
            progress=lambda done, total: update("drawing", done / total),
        )
    storage.save_stopping(model, rule, of=config)
    if as_json:
        terminal.print_json(rule.model_dump(mode="json"))
        return
    terminal.out.print(
        f"Mean draws {rule.mean_draws:.2f} instead of {ensemble.draws}; {rule.disagreement:.2%} of "
        f"{rule.images} images are answered otherwise than by {rule.reference_draws} draws; at most "
        f"{rule.epsilon:.2%} of images like them, at a risk of {rule.delta:g}.",
        soft_wrap=True,
    )
    terminal.out.print(f"Written to {model}/config.json", soft_wrap=True)
