"""Commands about saved networks: what they answer, and how they are given away."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.devices import device_named
from ..runtime.errors import InputError
from . import terminal
from .arguments import image_files, in_precision, inputs_of
from .base import MODEL_HELP, Device, Json, Model, app
from .data_options import NO_DATA, DataOptions, takes_data
from .opening import described_as, open_network, saved_folder
from .options import OPTIONS, NetworkOptions, takes_network

if TYPE_CHECKING:
    from torch import Tensor

    from ..ensemble.ensemble import SelfEnsemble

_SOME_UNREADABLE = 2
Licence = Annotated[
    str | None, typer.Option(help="Licence of the weights, for the card, as hubs name it: mit, apache-2.0.")
]


@app.command()
@takes_network
def predict(
    paths: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    draws: Annotated[int | None, typer.Option(min=1, help="Noise draws per prediction.")] = None,
    stop: Annotated[
        str | None,
        typer.Option(help="exact or calibrated: an image stops drawing when its answer is settled."),
    ] = None,
    sets: Annotated[
        bool, typer.Option("--sets", help="Also show all possible labels, by the rule of `calibrate --sets`.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 3,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the noise; by default the noise is fresh.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
    network: NetworkOptions = OPTIONS,
) -> None:
    """Label images, with mean probabilities and spread; exit status 2 if some files cannot be read."""
    from ..data.decoding import told

    opened = open_network(model, network)
    shape = opened.image_shape
    bad, records = list[tuple[Path, str]](), list[dict[str, Any]]()
    files, others = image_files(paths, bad)
    ensemble = opened.ensemble.to(device_named(device))
    assumed: list[str] = []
    for group, inputs in inputs_of(files, shape, opened.centre, bad, ensemble.bounds, assumed):
        if not records:
            ensemble = _as_calibrated(ensemble, inputs, stop, sets)
        asked = {"draws": draws, "seed": seed, "stop": stop}
        records += _answers(ensemble, group, inputs, opened.config.classes, top, sets, asked)
    if not records:
        raise InputError(f"cannot read {bad[0][0]} as an image: {bad[0][1]}")
    if as_json:
        unreadable = [{"file": str(path), "reason": why} for path, why in bad]
        terminal.print_json({"images": records, "unreadable": unreadable})
    else:
        terminal.print_predictions(records, len(records[0]["predictions"]))
    for text in others + [f"images: {each}" for each in told(assumed)]:
        terminal.note(text)
    for path, why in bad:
        terminal.note(f"cannot read {path} as an image: {why}")
    if bad:
        raise typer.Exit(_SOME_UNREADABLE)


def _answers(
    ensemble: "SelfEnsemble",
    files: list[Path],
    inputs: "Tensor",
    classes: tuple[str, ...] | None,
    top: int,
    sets: bool,
    asked: dict[str, Any],
) -> list[dict[str, Any]]:
    """What is printed of each of these files."""
    possible = None
    if sets:
        from ..certainty.conformal import ConformalSets  # with scipy, which takes time

        possible = ConformalSets.of(ensemble).predict(inputs, max_batch=256, seed=asked["seed"])
    answer = ensemble.predict(inputs, max_batch=256, **asked)
    count = answer.probabilities.shape[1]
    names = classes or tuple(str(label) for label in range(count))
    if len(names) != count:
        raise InputError(
            f"the network has {count} outputs and the names of {len(names)} classes: save it with as many"
        )
    records: list[dict[str, Any]] = []
    columns = (files, answer.probabilities, answer.spread, answer.draws.tolist())
    for path, mean, spread, used in zip(*columns, strict=True):
        best = mean.topk(min(top, len(names))).indices.tolist()
        shown = [
            {"label": names[k], "probability": mean[k].item(), "spread": terminal.finite(spread[k].item())}
            for k in best
        ]
        records.append({"file": str(path), "draws": used, "predictions": shown})
    if possible is not None:
        for record, held in zip(records, possible.tolist(), strict=True):
            record["set"] = [label for label, inside in zip(names, held, strict=True) if inside]
    return records


def _as_calibrated(
    ensemble: "SelfEnsemble", inputs: "Tensor", stop: str | None, sets: bool
) -> "SelfEnsemble":
    """The ensemble in the precision of the rules that it is to follow."""
    rules = [ensemble.stopping if stop == "calibrated" else None, ensemble.sets if sets else None]
    precisions = {rule.precision for rule in rules if rule is not None}
    if len(precisions) > 1:
        raise InputError(
            "--stop calibrated and --sets were calibrated in other precisions: calibrate one of them again, "
            "or ask for one at a time"
        )
    return in_precision(ensemble, inputs, *precisions) if precisions else ensemble


@app.command()
@takes_network
@takes_data
def pack(
    model: Model,
    out: Annotated[Path, typer.Argument(help="New folder; its name is the network's.")],
    data: DataOptions = NO_DATA,
    precision: Annotated[
        str, typer.Option(help="Precision of the stored weights: bf16 or float32.")
    ] = "bf16",
    flip_average: Annotated[
        bool,
        typer.Option(
            "--flip-average",
            help="Answer by the mean of an image and its mirror image: larger certificates, two passes.",
        ),
    ] = False,
    licence: Licence = None,
    network: NetworkOptions = OPTIONS,
) -> None:
    """Copy a saved ensemble with small weights and a model card; test accuracy is measured again."""
    import torch

    from ..certainty.flipping import flip_averaged
    from ..report.packing import pack as write

    known = {"bf16": torch.bfloat16, "float32": None}
    if precision not in known:
        raise InputError(f"--precision must be one of {', '.join(known)}, got {precision!r}")
    opened = open_network(model, network, data, with_data=True)
    ensemble = opened.ensemble
    if flip_average:
        ensemble = flip_averaged(ensemble, opened.test.inputs(slice(2)))
    write(
        opened.folder,
        out,
        opened.test,
        dtype=known[precision],
        ensemble=ensemble,
        config=opened.config,
        licence=licence,
    )
    terminal.out.print(f"Written to {out}: model.safetensors, config.json, README.md", soft_wrap=True)


@app.command()
@takes_network
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, NAME.onnx.")],
    draws: Annotated[
        int | None, typer.Option(min=1, help="Noise draws per run; by default those of the ensemble.")
    ] = None,
    network: NetworkOptions = OPTIONS,
) -> None:
    """Write a saved ensemble as ONNX, in which the noise stays random at run time."""
    import torch

    from ..artefacts.onnx_export import export_onnx

    opened = open_network(model, network)
    example = torch.zeros(2, *opened.shape, dtype=torch.float32, device="cpu")
    written = export_onnx(opened.ensemble, out, example, draws=draws, classes=opened.config.classes)
    terminal.out.print(f"Written to {written}", soft_wrap=True)


@app.command()
@takes_network
def card(
    model: Annotated[
        str, typer.Argument(help="Folder of a saved ensemble; with --out, a name of the zoo too.")
    ],
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="Folder that `evaluate` wrote for it; repeat for more.")
    ] = None,
    certificate: Annotated[
        list[Path] | None, typer.Option(help="Folder that `certify` wrote for it; repeat for more.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write; README.md in the folder by default."),
    ] = None,
    licence: Licence = None,
    network: NetworkOptions = OPTIONS,
) -> None:
    """Write the model card README.md of a saved ensemble from its evaluations and certifications."""
    from ..evaluation.certified import read_certified
    from ..evaluation.results import read_results
    from ..report.packing import CARD, licence_of, write_card

    folder = saved_folder(model, "gets a card", written=out is None, instead=", or pass --out card.md")
    written = write_card(
        folder,
        [read_results(folder) for folder in evaluation or ()],
        certificates=[read_certified(folder) for folder in certificate or ()],
        ensemble=open_network(model, network).ensemble,
        licence=licence or licence_of(folder / CARD),
        out=out,
    )
    terminal.out.print(f"Written to {written}", soft_wrap=True)


@app.command()
@takes_network
def info(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    as_json: Json = False,
    network: NetworkOptions = OPTIONS,
) -> None:
    """Describe a saved ensemble, or what is installed here."""
    if model is not None:
        described = described_as(model, network).model_dump(mode="json")
    else:
        from .inventory import inventory

        described = inventory()
    if as_json:
        terminal.print_json(described)
        return
    terminal.print_tree(described)
