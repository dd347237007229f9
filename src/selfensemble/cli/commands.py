"""Commands that train, attack and compare. Everything heavy is imported by the command that needs it.

Exit status: 0 done, 1 an error of the program, 2 wrong input or surroundings, 3 `doctor` found a fault,
130 interrupted.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.devices import device_named
from ..runtime.errors import InputError
from ..runtime.interrupts import Interrupted
from ..runtime.processes import this_process
from . import terminal
from .arguments import test_data_of
from .base import Data, Device, Json, Model, app, resumable

_UNSOUND = 3


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results and pictures.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of weights, noise, attack and judge.")] = 0,
    n: Annotated[
        int | None, typer.Option(min=10, max=450, help="Test images to attack; 200 and 100 by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a plain network and its self-ensemble on handwritten digits, attack both, write a report."""
    from ..experiments.demo import run_demo

    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: --out takes the folder to write to")
    with terminal.progress() as update:
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
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (see `info`) or a YAML file.")],
    data: Data = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key, e.g. --set train.epochs=5.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/RECIPE by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start afresh in a used folder.")] = False,
    as_json: Json = False,
) -> None:
    """Train a network by a recipe; evaluate it, save it."""
    from ..training.recipe import load_recipe
    from ..training.trainer import Trainer

    config = load_recipe(recipe, overrides)
    folder = out or Path("runs") / config.name
    with terminal.progress() as update:
        update("preparing", 0.0)
        trainer = Trainer(
            config,
            folder,
            data=data,
            resume=resume,
            overwrite=overwrite,
            progress=lambda step, steps, text: update(text, step / steps),
        )
        try:
            results = trainer.run()
        except Interrupted as stop:
            raise Interrupted(f"{stop}; go on with the same command and --resume") from None
    if not trainer.accelerator.is_main_process:
        return
    if as_json:
        terminal.print_json(results)
        return
    for split, record in results["metrics"].items():
        title = f"{split} accuracy, {results['draws']} draw(s)"
        terminal.out.print(f"{title}: {terminal.percent(record)}, {record['images']} images")
    terminal.out.print(f"Written to {folder}: model.safetensors, config.json, results.json", soft_wrap=True)


@app.command()
def tune(
    model: Model,
    data: Data = None,
    n_images: Annotated[
        int, typer.Option(min=1, help="Test images: the last so many, so that the first stay unseen.")
    ] = 200,
    levels: Annotated[
        str | None, typer.Option(help="init:inner,init:inner,...; by default 0:0 to 0.4:0.2.")
    ] = None,
    epochs: Annotated[
        int,
        typer.Option(min=0, help="Of training at each level; 0 asks how much noise the network bears now."),
    ] = 0,
    eps: Annotated[float, typer.Option(help="L2 radius of the attack, images in [0, 1].")] = 0.5,
    give_up: Annotated[float, typer.Option(help="Clean accuracy that the recommendation may cost.")] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Of attack and judge.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder; runs/MODEL-tuned by default.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Sweep the level of the noise: clean and attacked accuracy, a plot, and which to take."""
    from ..artefacts import storage
    from ..experiments.tuning import LEVELS, levels_named, training
    from ..experiments.tuning import tune as sweep
    from ..runtime.files import write_json

    wanted = LEVELS if levels is None else levels_named(levels)
    config = storage.read_config(model)
    test = test_data_of(config, data)
    if len(test) < n_images:
        raise InputError(f"there are {len(test)} test images: --n-images asks for {n_images}")
    chosen = slice(len(test) - n_images, len(test))
    ensemble = storage.load(model).to(device_named(device))
    folder = out or Path("runs") / f"{model.resolve().name}-tuned"
    with resumable(folder), terminal.progress() as update:
        found = sweep(
            ensemble, test.inputs(chosen), test.labels[chosen], wanted, eps=eps, give_up=give_up, seed=seed,
            fine_tune=training(config.recipe, str(model), epochs, folder, data) if epochs else None,
            progress=update,
        )  # fmt: skip
    values, page = found.values() | {"model": model.resolve().name, "epochs": epochs}, found.page()
    page.write(folder)
    write_json(folder / "tune.json", values)
    if as_json:
        terminal.print_json(values)
        return
    terminal.print_page(page)
    terminal.out.print(f"Recommended: {found.recommended.name}")
    terminal.out.print(f"Written to {folder}: index.md, levels.svg, tune.json", soft_wrap=True)


@app.command()
def evaluate(
    model: Model,
    protocol: Annotated[str, typer.Option(help="A shipped protocol (see `info`) or a YAML file.")] = "paper",
    data: Data = None,
    n: Annotated[int | None, typer.Option(min=1, help="Test images: the first n.")] = None,
    c: Annotated[
        list[float] | None, typer.Option(help="Strengths of the paper's attack, instead of the protocol's.")
    ] = None,
    draws: Annotated[int | None, typer.Option(min=1, help="Noise draws of the defender's answer.")] = None,
    static: Annotated[bool, typer.Option("--static", help="The network with its noise taken out.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Of attacks and judge.")] = None,
    shard: Annotated[int | None, typer.Option(min=1, help="Images a unit of work.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 200,
    precision: Annotated[
        str | None, typer.Option(help="Of the gradients that attacks follow: float32 or bf16 (faster).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/MODEL-PROTOCOL by default.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Attack a model by a protocol, judge it on fresh noise; started again, it goes on where it stopped."""
    from ..artefacts import storage
    from ..evaluation.protocol import load_protocol
    from ..evaluation.runner import Evaluation
    from ..noise.injection import make_static_

    overrides: dict[str, Any] = {"images": n, "seed": seed, "shard": shard, "precision": precision}
    if c is not None:
        overrides["attacks"] = [{"attack": "cw-paper", "title": "C&W paper", "c": c}]
    plan = load_protocol(protocol, {key: value for key, value in overrides.items() if value is not None})
    if c is not None and plan.name != "paper":
        raise InputError("--c sets the strengths of --protocol paper; write a YAML file for others")
    config = storage.read_config(model)
    rank, world, target = this_process(device)
    ensemble = storage.load(model).to(target)
    ensemble.draws = draws or ensemble.draws
    test = test_data_of(config, data)
    name = model.resolve().name
    if static:
        make_static_(ensemble.model)
        name += "-static"
    folder = out or Path("runs") / f"{name}-{plan.name}"
    with resumable(folder), terminal.progress() as update:
        update("preparing", 0.0)
        evaluation = Evaluation(
            ensemble,
            test,
            plan,
            folder,
            name=name,
            max_batch=max_batch,
            architecture=config.architecture.model_dump() if config.architecture else None,
            progress=update,
            rank=rank,
            world=world,
        )
        results = evaluation.run()
    if rank != 0:
        return
    if as_json:
        terminal.print_json(results.model_dump(mode="json"))
        return
    terminal.print_results(results)
    terminal.out.print(
        f"Written to {folder}: results.json, images.csv; for people: selfensemble report {folder}",
        soft_wrap=True,
    )


@app.command()
def reproduce(
    names: Annotated[
        list[str],
        typer.Argument(
            help="headline, draws, noise, targeted, theory, honest, certainty, certificates, "
            "certified-noise, resnext, stl10; or all."
        ),
    ],
    scale: Annotated[str, typer.Option(help="quick, half, wide or full: how much work.")] = "half",
    quick: Annotated[bool, typer.Option("--quick", help="The same as --scale quick.")] = False,
    data: Annotated[
        str | None, typer.Option(help="CIFAR-10 (or of stl10 alone): a folder of parquet files, or a hub id.")
    ] = None,
    stl10: Annotated[str | None, typer.Option(help="STL-10, likewise.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Trained networks, trained if missing; runs/models/SCALE by default.")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Finished parts of the work; runs/experiments/SCALE by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Results, a folder an experiment.")] = Path("docs/results"),
    only: Annotated[list[str] | None, typer.Option(help="Only this network; may be repeated.")] = None,
    only_render: Annotated[
        bool, typer.Option("--render", help="Only write pages and plots again, from the stored results.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of attacks and judge.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Run the paper's experiments and ours; started again, it goes on where it stopped."""
    from ..experiments import Reproduction, render_all

    if only_render:
        pages = render_all(names, out)
    else:
        try:
            with terminal.progress() as update:
                pages = Reproduction(
                    "quick" if quick else scale, data, stl10, models, runs, out, tuple(only or ()), seed,
                    device_named(device), update,
                ).run(names)  # fmt: skip
        except (KeyboardInterrupt, Interrupted) as stop:
            said = f"{stop}; " if str(stop) else "stopped; "
            raise Interrupted(f"{said}go on with the same command") from None
    if as_json:
        terminal.print_json({name: page.values() for name, page in pages.items()})
        return
    for name, page in pages.items():
        terminal.print_page(page)
        terminal.out.print(f"Written to {out / name}: index.md and its plots", soft_wrap=True)


@app.command()
def doctor(
    model: Model,
    data: Data = None,
    n: Annotated[int, typer.Option(min=5, help="Test images for the trial attacks.")] = 50,
    norm: Annotated[str, typer.Option(help="linf, l2 or l1.")] = "linf",
    eps: Annotated[str, typer.Option(help="Radius of the trial attacks, e.g. 8/255.")] = "8/255",
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps of the trial attacks.")] = 20,
    eot: Annotated[int, typer.Option(min=1, help="Noise draws of each step.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the trial attacks.")] = 0,
    max_batch: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 200,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check whether an evaluation of a model can be trusted; exit status 3 if a check fails."""
    from ..artefacts import storage
    from ..evaluation.doctor.doctor import doctor as examine
    from ..evaluation.protocol import check_radius, number

    config = storage.read_config(model)
    ensemble = storage.load(model).to(device_named(device))
    test = test_data_of(config, data)
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
            expect_random=config.is_random,
            max_batch=max_batch,
            seed=seed,
            progress=update,
        )
    if as_json:
        terminal.print_json([check.model_dump(mode="json") for check in checks])
    else:
        terminal.print_checks(checks)
    if any(check.passed is False for check in checks):
        raise typer.Exit(_UNSOUND)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `evaluate` and `certify` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")] = Path("report.html"),
) -> None:
    """Compare evaluation runs in one HTML file that needs no network."""
    from ..report.html import write_report

    write_report(runs, out)
    terminal.out.print(f"Written to {out}", soft_wrap=True)
