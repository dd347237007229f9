"""A trained network made ready to be given away: small weights, a card, no trace of where it was trained."""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from ..artefacts.config import ArtefactConfig
from ..artefacts.storage import load, read_config, save
from ..data.images import ImageData
from ..ensemble.ensemble import SelfEnsemble
from ..evaluation.certified import Certified
from ..evaluation.identity import model_record
from ..evaluation.results import Results
from ..fast.ensemble import checked_original
from ..noise.graphs import unwrapped
from ..noise.injection import remove_noise_
from ..noise.resize_pad import ResizePadNetwork
from ..runtime.files import atomic_write, write_json
from ..runtime.provenance import accuracy_record
from ..runtime.texts import read_json, utf8
from ..training.accuracy import count_correct
from ..training.checkpoints import RESULTS
from ..training.recipe import public_recipe
from .card import model_card
from .facts import noise_on_pixels

CARD = "README.md"


def pack(
    run: str | Path | None,
    out: Path,
    test: ImageData,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    ensemble: SelfEnsemble | None = None,
    config: ArtefactConfig | None = None,
    licence: str | None = None,
) -> None:
    """Write a copy of a saved ensemble with smaller weights, the record of its training, and its card.

    Test accuracy is measured on what was written, with the draws of the ensemble, per image, seed 0.
    Calibrated rules stay behind: calibrate the copy.

    Args:
        run: the saved ensemble; None for one that was not saved.
        out: a new folder, which is there when all of it is; its name is the network's.
        test: all test images.
        dtype: of the stored weights; None keeps float32.
        ensemble, config: what `run` holds, where it cannot be read without help, or there is none.
        licence: of the weights, see `model_card`.

    Raises:
        FileExistsError: `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: remove it, or pass another folder")
    if config is None or ensemble is None:
        if run is None:
            raise TypeError("pack needs a folder, or an ensemble and its config")
        config, ensemble = read_config(run), load(run)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as beside:
        partial_folder = Path(beside) / out.name
        rules, (ensemble.stopping, ensemble.sets) = (ensemble.stopping, ensemble.sets), (None, None)
        try:  # the rules were calibrated on other weights
            stored = _copied(run, partial_folder, test, dtype, ensemble, config)
        finally:
            ensemble.stopping, ensemble.sets = rules
        write_card(partial_folder, ensemble=stored, licence=licence)
        partial_folder.rename(out)


def _copied(
    run: str | Path | None,
    out: Path,
    test: ImageData,
    dtype: torch.dtype | None,
    ensemble: SelfEnsemble,
    config: ArtefactConfig,
) -> SelfEnsemble:
    """Write weights and records; what was written."""
    is_known = config.architecture is not None or config.transformers is not None
    recipe = None if config.recipe is None else public_recipe(config.recipe)
    write = partial(
        save, folder=out, architecture=config.architecture, classes=config.classes,
        input_shape=config.input_shape, recipe=recipe, dtype=dtype,
    )  # fmt: skip
    write(ensemble)
    stored = load(out, None if is_known else _without_noise(ensemble))
    everything = torch.arange(len(test), device="cpu")
    correct = count_correct(stored, test, everything, seed=0)
    metrics = {"test": accuracy_record(correct, len(test))}
    write(stored, metrics=metrics)
    if run is not None and (trained := Path(run) / RESULTS).is_file():
        made = read_json(trained, "restore it, or take it away")
        kept = {key: made[key] for key in ("history", "training_seconds", "provenance") if key in made}
        write_json(out / RESULTS, {"recipe": recipe, "metrics": metrics} | kept)
    return stored


def _without_noise(ensemble: SelfEnsemble) -> nn.Module:
    """A copy of a network that only its owner's code could make again, as `load` wants it."""
    model = unwrapped(checked_original(ensemble).model)
    network = unwrapped(model.network) if isinstance(model, ResizePadNetwork) else model
    return remove_noise_(copy.deepcopy(network))


def licence_of(card: Path) -> str | None:
    """What the front matter of a card says of the weights."""
    try:
        lines = card.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return None
    front = lines[1 : lines.index("---", 1)]
    said = [line.partition(":")[2].strip().strip("\"'") for line in front if line.startswith("license:")]
    return said[0] or None if said else None


def write_card(
    model: Path,
    results: Sequence[Results] = (),
    *,
    ensemble: SelfEnsemble | None = None,
    licence: str | None = None,
    certificates: Sequence[Certified] = (),
    out: Path | None = None,
) -> Path:
    """Write the card of a saved ensemble, `README.md` in its folder.

    Args:
        model: the folder.
        results: evaluations of just this network.
        ensemble: what lies there, if it cannot be read without help.
        licence: see `model_card`.
        certificates: certifications of just this network.
        out: another file to write instead.

    Raises:
        ValueError: an evaluation or a certification is of another network.
    """
    config, name = read_config(model), model.resolve().name
    saved = ensemble or load(model)
    digest = model_record(saved, name, None).digest
    for command, found in (("evaluate", results), ("certify", certificates)):
        for each in found:
            if each.model.digest != digest:
                raise ValueError(
                    f"what `{command}` wrote of {each.name!r} is of another network: "
                    f"run selfensemble {command} {model}"
                )
    pixels = noise_on_pixels(saved, config)
    target = model / CARD if out is None else out
    atomic_write(target, utf8(model_card(name, config, results, licence, certificates, pixels)))
    return target
