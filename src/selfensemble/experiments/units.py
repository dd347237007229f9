"""Units of work in a folder: each is computed once, written when it is complete, and read afterwards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..runtime.files import atomic_write, write_json
from ..runtime.texts import read_json
from ..training.recipe import differing_keys

_IDENTITY = "run.json"


class Units:
    """The folder of one measurement of one network.

    Raises:
        ValueError: it holds another measurement, which is left untouched.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        path = folder / _IDENTITY
        if not path.is_file():
            if next(folder.glob("*.safetensors"), None) is not None:
                raise ValueError(
                    f"{folder} holds units of work of which {_IDENTITY} is missing, which says what they "
                    "are of; they are untouched: restore it, remove them, or pass another --runs"
                )
            write_json(path, identity)
            return
        before = read_json(path, f"remove {folder}, or pass another --runs")
        if before != json.loads(json.dumps(identity)):
            names = ", ".join(differing_keys(before, identity)[:6]) if isinstance(before, dict) else "all"
            raise ValueError(
                f"{folder} holds a measurement that differs in {names}; it is untouched: remove it, or "
                "pass another --runs"
            )

    def compute(self, name: str, work: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `work` returns, now or when it ran before."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in work().items()}
            atomic_write(path, safetensors.torch.save(tensors))
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): remove it and run the same again") from error
