"""Commands that train a network, and look for the level of its noise."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.devices import device_named
from ..runtime.errors import InputError
from ..runtime.interrupts import Interrupted
from ..runtime.ownership import owned
from . import terminal
from .base import Device, Json, Model, app, resumable
from .data_options import NO_DATA, DataOptions, takes_data
from .opening import Opened, open_network
from .options import OPTIONS, NetworkOptions, takes_network

if TYPE_CHECKING:
    from ..experiments.tuning import FineTune


@app.command()
@takes_data
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (see `info`) or a YAML file.")],
    data: DataOptions = NO_DATA,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key, e.g. --set train.epochs=5.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/RECIPE by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over in a used folder.")] = False,
    as_json: Json = False,
) -> None:
    """Train a network by a recipe; evaluate it, save it."""
    from ..training.recipe import load_recipe
    from ..training.trainer import Trainer

    config = load_recipe(recipe, overrides).replaced("data", **data.given())
    folder = out or Path("runs") / config.name
    with terminal.progress() as update:
        update("preparing", 0.0)
        trainer = Trainer(
            config,
            folder,
            data=data.data,
            resume=resume,
            overwrite=overwrite,
            progress=lambda step, steps, text: update(text, step / steps),
        )
        here = trainer.accelerator
        if here.is_main_process and here.mixed_precision != config.train.precision:
            terminal.note("this processor has no bfloat16 arithmetic: it trains in float32, which is faster")
        try:
            results = trainer.run()
        except Interrupted as stop:
            raise Interrupted(f"{stop}; continue with the same command and --resume") from None
    if not trainer.accelerator.is_main_process:
        return
    train, test = trainer.batches.train, trainer.batches.test
    if train.cut is not None:  # out of the same images
        share, seed = train.cut
        terminal.note(
            f"{train.name}: training and test split are cut out of one, {share:.0%} of each class "
            f"for the test (data.test_share, data.split_seed={seed})"
        )
        terminal.note_left_out(train)
    else:
        terminal.note_left_out(train, " (training split)")
        terminal.note_left_out(test, " (test split)")
    if as_json:
        terminal.print_json(results)
        return
    for split, record in results["metrics"].items():
        title = f"{split} accuracy, {results['draws']} draw(s)"
        terminal.out.print(f"{title}: {terminal.percent(record)}, {record['images']} images")
    if trainer.batches.streams:
        terminal.out.print(f"Waiting for images: {results['waiting_for_data']:.0%} of the time of training")
    terminal.out.print(f"Written to {folder}: model.safetensors, config.json, results.json", soft_wrap=True)


@app.command()
@takes_network
@takes_data
def tune(
    model: Model,
    data: DataOptions = NO_DATA,
    n_images: Annotated[
        int,
        typer.Option(
            "--n", "--n-images", min=1, help="Number of test images, from the end: the first stay unseen."
        ),
    ] = 200,
    levels: Annotated[
        str | None, typer.Option(help="init:inner,init:inner,...; by default 0:0 to 0.4:0.2.")
    ] = None,
    epochs: Annotated[
        int,
        typer.Option(min=0, help="Epochs of training at each level; 0 measures the network as it is."),
    ] = 0,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe for --epochs; by default that of the network's training.")
    ] = None,
    eps: Annotated[float, typer.Option(help="L2 radius of the attack, images in [0, 1].")] = 0.5,
    give_up: Annotated[float, typer.Option(help="Clean accuracy that the recommendation may cost.")] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the attack and the judge.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder; runs/MODEL-tuned by default.")] = None,
    device: Device = "auto",
    as_json: Json = False,
    network: NetworkOptions = OPTIONS,
) -> None:
    """Sweep the noise level: clean and attacked accuracy, a plot, and a recommendation."""
    from ..experiments.tuning import LEVELS
    from ..experiments.tuning import tune as sweep
    from ..noise.levels import levels_named
    from ..runtime.files import write_json

    wanted = LEVELS if levels is None else levels_named(levels)
    opened = open_network(model, network, data, with_data=True)
    test = opened.test
    if len(test) < n_images:
        raise InputError(f"there are {len(test)} test images: --n asks for {n_images}")
    chosen = slice(len(test) - n_images, len(test))
    ensemble = opened.ensemble.to(device_named(device))
    folder = out or Path("runs") / f"{opened.name}-tuned"
    fine_tune = _training(opened, model, recipe, epochs, folder, data, network)
    with resumable(folder), owned(folder), terminal.progress() as update:
        found = sweep(
            ensemble, test.inputs(chosen), test.labels[chosen], wanted, eps=eps, give_up=give_up, seed=seed,
            fine_tune=fine_tune, progress=update,
        )  # fmt: skip
    values = found.values() | {"model": opened.name, "epochs": epochs}
    write_json(folder / "tune.json", values)
    page = found.page()
    page.write(folder)
    if as_json:
        terminal.print_json(values)
        return
    terminal.print_page(page)
    terminal.out.print(f"Recommended: {found.recommended.name}")
    terminal.out.print(f"Written to {folder}: index.md, levels.svg, tune.json", soft_wrap=True)


def _training(
    opened: Opened,
    model: str,
    recipe: str | None,
    epochs: int,
    folder: Path,
    data: DataOptions,
    network: NetworkOptions,
) -> "FineTune | None":
    """How a network is trained at each level: by a recipe that is named, or its own."""
    from ..experiments.tuning import training
    from ..training.recipe import Recipe, load_recipe

    if not epochs:
        if recipe is not None:
            raise InputError("--recipe says how to train at each level: add --epochs")
        return None
    if recipe is not None:
        chosen = load_recipe(recipe)
    elif opened.config.recipe is not None:
        chosen = Recipe.model_validate(opened.config.recipe)
    else:
        raise InputError(
            f"{model} says no recipe to train it by: pass --recipe, a shipped one (see `info`) or a YAML "
            "file whose data and train sections say how; network, levels and epochs are those of this command"
        )
    if opened.folder is None:
        chosen = chosen.replaced("noise", filter=network.filter_name or "conv")
        chosen = chosen.replaced("data", bounds=opened.ensemble.bounds)
    weights = model if opened.folder is not None else None
    return training(chosen, weights, epochs, folder, data.data, data.given())
