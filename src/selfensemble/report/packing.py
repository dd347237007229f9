"""A trained network made ready to be given away: small weights, a card, no trace of where it was trained."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ..artefacts.storage import load, read_config, save
from ..data.images import ImageData
from ..ensemble.ensemble import SelfEnsemble
from ..evaluation.certified import Certified
from ..evaluation.identity import model_record
from ..evaluation.results import Results
from ..runtime.files import atomic_write, write_json
from ..runtime.provenance import accuracy_record
from ..training.accuracy import count_correct
from ..training.recipe import public_recipe
from ..training.trainer import RESULTS
from .card import model_card

CARD = "README.md"


def pack(run: str | Path, out: Path, test: ImageData, *, dtype: torch.dtype | None = torch.bfloat16) -> None:
    """Write a copy of a saved ensemble with smaller weights, the record of its training, and its card.

    Test accuracy is measured on what was written, with the draws of the ensemble, per image, seed 0.
    Calibrated rules stay behind: calibrate the copy.

    Args:
        run: the saved ensemble.
        out: a new folder; its name is the network's.
        test: all test images.
        dtype: of the stored weights; None keeps float32.

    Raises:
        FileExistsError: `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: remove it, or pass another folder")
    config, ensemble = read_config(run), load(run)
    ensemble.stopping = ensemble.sets = None  # calibrated on other weights
    recipe = None if config.recipe is None else public_recipe(config.recipe)
    write = partial(
        save, folder=out, architecture=config.architecture, classes=config.classes,
        input_shape=config.input_shape, recipe=recipe, dtype=dtype,
    )  # fmt: skip
    write(ensemble)
    stored = load(out)
    everything = torch.arange(len(test), device="cpu")
    correct = count_correct(stored, test, everything, seed=0)
    metrics = {"test": accuracy_record(correct, len(test))}
    write(stored, metrics=metrics)
    if (trained := Path(run) / RESULTS).is_file():
        made = json.loads(trained.read_text(encoding="utf-8"))
        kept = {key: made[key] for key in ("history", "training_seconds", "provenance") if key in made}
        write_json(out / RESULTS, {"recipe": recipe, "metrics": metrics} | kept)
    write_card(out)


def write_card(
    model: Path,
    results: Sequence[Results] = (),
    *,
    ensemble: SelfEnsemble | None = None,
    licence: str | None = "apache-2.0",
    certificates: Sequence[Certified] = (),
) -> Path:
    """Write `README.md` into the folder of a saved ensemble.

    Args:
        model: the folder.
        results: evaluations of just this network.
        ensemble: what lies there, if it cannot be read without help.
        licence: see `model_card`.
        certificates: certifications of just this network.

    Raises:
        ValueError: an evaluation or a certification is of another network.
    """
    config, name = read_config(model), model.resolve().name
    digest = model_record(ensemble or load(model), name, None).digest
    for command, found in (("evaluate", results), ("certify", certificates)):
        for each in found:
            if each.model.digest != digest:
                raise ValueError(
                    f"what `{command}` wrote of {each.name!r} is of another network: "
                    f"run selfensemble {command} {model}"
                )
    atomic_write(model / CARD, model_card(name, config, results, licence, certificates).encode())
    return model / CARD
