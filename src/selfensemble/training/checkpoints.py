"""Checkpoints of a training run: written whole or not at all, read only by the run that they are of."""

import io
from pathlib import Path
from typing import Any

import torch

from ..runtime.files import atomic_write
from .recipe import Recipe

# In the folder of a run; RESULTS comes last.
CHECKPOINT, RESULTS, TEACHER = "checkpoint.pt", "results.json", "teacher"
_VERSION = 2


def write_checkpoint(path: Path, recipe: Recipe, processes: int, state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path`.

    Args:
        path: of the file.
        recipe: of the run.
        processes: of the run.
        state: tensors and plain values.
    """
    about = {"version": _VERSION, "recipe": recipe.model_dump(mode="json"), "processes": processes}
    # By way of memory: torch.save into a file on a full disk hides the reason for its failure.
    buffer = io.BytesIO()
    torch.save(about | state, buffer)
    atomic_write(path, buffer.getvalue())


def read_checkpoint(path: Path, recipe: Recipe, processes: int) -> dict[str, Any]:
    """What `write_checkpoint` wrote, on the CPU.

    Raises:
        ValueError: the file is damaged, or of another version, recipe or number of processes.
    """
    try:
        # weights_only: tensors and plain values, no code.
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version, saved_recipe = state["version"], state["recipe"]
    except Exception as error:
        raise ValueError(
            f"{path} is damaged or not a checkpoint ({type(error).__name__}): remove it, or start "
            "afresh with --overwrite"
        ) from error
    if version != _VERSION:
        raise ValueError(f"{path} has version {version}, this release reads {_VERSION}")
    if differing := recipe.differs_from(saved_recipe):
        raise ValueError(
            f"{path} belongs to another recipe (different: {', '.join(differing)}): pass the same "
            "recipe and overrides, or another --out"
        )
    if state.get("processes") not in (None, processes):
        raise ValueError(f"{path} was written by {state['processes']} processes: resume with as many")
    return state
