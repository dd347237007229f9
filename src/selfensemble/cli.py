"""The command line. Everything heavy is imported by the command that needs it.

Exit status: 0 done, 1 an error of the program, 2 wrong input or surroundings, 130 interrupted.
"""

import errno
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from . import terminal
from .interrupts import Interrupted

if TYPE_CHECKING:
    import torch

    from .data import ImageData
    from .hub import ArtefactConfig

app = typer.Typer(
    help="Random Self-Ensemble: defend a classifier by noise, and say honestly how well.",
    epilog="--debug after any command shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, ...; auto takes an accelerator if there is one.")]
Data = Annotated[
    str | None, typer.Option(help="digits, cifar10, ..., a hub id, or a folder; overrides the recipe's.")
]


class _InputError(Exception):
    """Something the user can mend; the message says how."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results and pictures.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of weights, noise, attack and judge.")] = 0,
    n: Annotated[int, typer.Option(min=10, max=450, help="Test images to attack.")] = 200,
    as_json: Json = False,
) -> None:
    """Train a plain network and its self-ensemble on handwritten digits, attack both, draw the result."""
    from .demo import run_demo

    if out.exists() and not out.is_dir():
        raise _InputError(f"{out} is a file: --out takes the folder to write to")
    with terminal.progress() as update:
        results = run_demo(out, seed=seed, images=n, progress=update)
    if as_json:
        terminal.print_json(results)
        return
    plain, rse = results["networks"]["plain"], results["networks"]["rse"]
    title = f"Accuracy on {n} handwritten digits, attacked ever harder (C&W)"
    table = Table(title=title, caption="in brackets: 95 % interval; distortion: RMS L2 of the change")
    table.add_column("strength\nc", justify="right")
    for name in ("plain network", "self-ensemble"):
        table.add_column(f"{name}\nanswers right", justify="right")
        table.add_column("\ndistortion", justify="right")
    for one, other in zip(plain["curve"], rse["curve"], strict=True):
        cells = [f"{one['c']:g}" if one["c"] else "no attack"]
        for point in (one, other):
            interval = f"[{100 * point['low']:.0f}, {100 * point['high']:.0f}]"
            cells += [f"{100 * point['accuracy']:.1f} % {interval:>9}", f"{point['rms_l2']:.2f}"]
        style = "bold" if one["c"] == results["shown_strength"] else None
        table.add_row(*cells, style=style)
    terminal.out.print(table)
    shown = results["shown_strength"]
    at = [next(p for p in network["curve"] if p["c"] == shown)["accuracy"] for network in (plain, rse)]
    terminal.out.print(
        f"At c = {shown:g} the plain network still answers {at[0]:.0%} of the attacked images correctly, "
        f"the Random Self-Ensemble {at[1]:.0%}."
    )
    clean = [terminal.percent(network["training"]["metrics"]["test"]) for network in (plain, rse)]
    terminal.out.print(f"Without attack, all 450 test images: plain {clean[0]}, self-ensemble {clean[1]}.")
    terminal.out.print(results["caveat"], style="yellow")
    terminal.out.print(f"Written to {out}: accuracy.png, adversarial.png, results.json", soft_wrap=True)


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
    from .recipe import load_recipe
    from .training import Trainer

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
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder that `train` wrote.")],
    data: Data = None,
    c: Annotated[list[float] | None, typer.Option(help="Strengths of the attack; 0.03 by default.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Test images: the first n.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Adam steps of the attack.")] = 300,
    lr: Annotated[float, typer.Option(help="Learning rate of the attack.")] = 1e-3,
    draws: Annotated[int | None, typer.Option(min=1, help="Noise draws a prediction.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise of attack and judge.")] = 0,
    max_batch: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 200,
    out: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Accuracy without attack and under the paper's C&W (fixed c, last iterate, one draw a step)."""
    from . import hub
    from .evaluation import CurvePoint, cw_curve
    from .files import write_json
    from .provenance import provenance

    if out is not None and out.is_dir():
        raise _InputError(f"{out} is a folder: --out takes the file to write")
    config = hub.read_config(model)
    ensemble = hub.load(model).to(_device(device))
    test = _test_data(config, data)
    images = min(n, len(test))
    strengths = [0.0, *(c or [0.03])]
    with terminal.progress() as update:
        finished = 0

        def report(point: CurvePoint) -> None:
            nonlocal finished
            finished += 1
            update(f"c = {point.c:g}: accuracy {point.verdict.accuracy:.1%}", finished / len(strengths))

        update(f"attacking {images} images", 0.0)
        points = cw_curve(
            ensemble,
            test.inputs(slice(images)),
            test.labels[:images],
            strengths,
            steps=steps,
            lr=lr,
            draws=draws,
            seed=seed,
            max_batch=max_batch,
            progress=report,
        )
    results: dict[str, Any] = {
        "model": str(model),
        "protocol": "paper: C&W L2, fixed c, kappa 0, last iterate, one draw a step",
        "settings": {
            "data": test.name, "images": images, "steps": steps, "lr": lr, "seed": seed,
            "draws": draws or ensemble.draws, "noise": config.noise,
        },
        "points": [point.record() for point in points],
        "provenance": provenance(),
    }  # fmt: skip
    if out is not None:
        write_json(out, results)
    if as_json:
        terminal.print_json(results)
        return
    table = Table(title=f"{images} test images, paper protocol (weak against randomised defenses)")
    for title in ("c", "accuracy (95 % interval)", "RMS L2", "median L2"):
        table.add_column(title, justify="right")
    for point in results["points"]:
        name = f"{point['c']:g}" if point["c"] else "no attack"
        table.add_row(name, terminal.percent(point), f"{point['rms_l2']:.3f}", f"{point['median_l2']:.3f}")
    terminal.out.print(table)


@app.command()
def predict(
    paths: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    model: Annotated[Path, typer.Option(help="Folder that `train` wrote.")],
    draws: Annotated[int | None, typer.Option(min=1, help="Noise draws a prediction.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 3,
    seed: Annotated[int | None, typer.Option(help="Repeatable noise; fresh by default.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Label images, with mean probabilities and their spread over the noise draws."""
    import torch

    from . import hub

    config = hub.read_config(model)
    if config.input_shape is None:
        raise _InputError(f"{model} does not say the shape of its inputs: use the Python interface")
    files = _image_files(paths)
    images = torch.stack([_read_image(path, config.input_shape) for path in files])
    ensemble = hub.load(model).to(_device(device))
    answer = ensemble.predict(images.float() / 255, draws=draws, seed=seed, max_batch=256)
    classes = config.classes or tuple(str(label) for label in range(answer.probabilities.shape[1]))
    records: list[dict[str, Any]] = []
    for path, mean, spread in zip(files, answer.probabilities, answer.spread, strict=True):
        best = mean.topk(min(top, len(classes))).indices.tolist()
        shown = [
            {"label": classes[k], "probability": mean[k].item(), "spread": terminal.finite(spread[k].item())}
            for k in best
        ]
        records.append({"file": str(path), "predictions": shown})
    if as_json:
        terminal.print_json({"draws": draws or ensemble.draws, "images": records})
        return
    table = Table(title=f"Mean over {draws or ensemble.draws} noise draws (+- spread of single draws)")
    table.add_column("file", overflow="fold")
    for rank in range(min(top, len(classes))):
        table.add_column("answer" if rank == 0 else f"{rank + 1}.")
    for record in records:
        cells = []
        for guess in record["predictions"]:
            spread_text = "" if guess["spread"] is None else f" +- {guess['spread']:.2f}"
            cells.append(f"{guess['label']} {guess['probability']:.2f}{spread_text}")
        table.add_row(record["file"], *cells)
    terminal.out.print(table)


@app.command()
def info(
    model: Annotated[Path | None, typer.Argument(help="Folder that `train` wrote.")] = None,
    as_json: Json = False,
) -> None:
    """What a saved ensemble is, or what is installed here."""
    if model is not None:
        from . import hub

        described = hub.read_config(model).model_dump(mode="json")
    else:
        from .models import MODELS
        from .provenance import provenance
        from .recipe import load_recipe, shipped_recipes

        recipes = {name: load_recipe(name).description for name in shipped_recipes()}
        described = provenance() | {"models": list(MODELS), "recipes": recipes}
    if as_json:
        terminal.print_json(described)
        return
    terminal.print_tree(described)


def main() -> None:
    """Entry point: runs the app and turns errors into one line and an exit status."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if not debug:
        warnings.simplefilter("ignore")
    sys.exit(_run(arguments, debug))


def _run(arguments: list[str], debug: bool) -> int:
    try:
        status = app(arguments, prog_name="selfensemble", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    except Exception as error:
        return _report(error, debug)
    if status == _INTERRUPTED:  # newer releases of typer turn KeyboardInterrupt into this
        _fail("interrupted; files that were complete before are intact", debug)
    return int(status or 0)


def _report(error: Exception, debug: bool) -> int:
    """Print one line for `error`; the exit status that fits it."""
    show = getattr(error, "show", None)
    if show is not None:  # click's own usage errors
        show()
        return 2
    if isinstance(error, Interrupted):
        _fail(str(error), debug)
        return _INTERRUPTED
    known = (_InputError, ValueError, TypeError, OSError, FloatingPointError)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        _fail(f"no room to write ({error.strerror}): free some space; earlier files are intact", debug)
        return 2
    if isinstance(error, known):
        _fail(" ".join(str(error).split()), debug)
        return 2
    _fail(f"{type(error).__name__}: {error} (--debug shows where)", debug)
    return 1


def _fail(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    terminal.err.print(f"error: {message}", style="red", highlight=False, soft_wrap=True, markup=False)


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        (torch.ones(1, device=device) + 1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _InputError(f"cannot use device {name!r}: {str(error)[:200]}") from error
    return device


def _test_data(config: "ArtefactConfig", data: str | None) -> "ImageData":
    from .data import load_data

    trained_on = (config.recipe or {}).get("data", {})
    source = data or trained_on.get("source")
    if source is None:
        raise _InputError("the model does not say what it was trained on: pass --data")
    test = load_data(source, "test", size=trained_on.get("size"))
    if config.input_shape is not None and tuple(test.images.shape[1:]) != config.input_shape:
        raise _InputError(
            f"{source} has images of shape {tuple(test.images.shape[1:])}, the model takes "
            f"{config.input_shape}: pass the data it was trained on"
        )
    return test if config.classes is None else test.with_classes(config.classes)


def _image_files(paths: list[Path]) -> list[Path]:
    from .data import IMAGE_SUFFIXES

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise _InputError(f"no images in {path}")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise _InputError(f"no file {path}")
    return files


def _read_image(path: Path, shape: tuple[int, int, int]) -> "torch.Tensor":
    from PIL import Image, UnidentifiedImageError

    from .data import prepare_image

    try:
        with Image.open(path) as image:
            return prepare_image(image, shape[0], (shape[1], shape[2]))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise _InputError(f"cannot read {path} as an image: {error}") from error
