"""Weights of a network from a file: safetensors, or what `torch.save` wrote; no code is unpickled."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

_WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DataParallel, of torch.compile, of Lightning
_SHOWN = 4


def load_weights_(network: nn.Module, file: str | Path) -> None:
    """Give `network` the weights in a file, all of them, in place.

    Args:
        network: of the class that they are of.
        file: safetensors, or a state dict, alone or within the dictionary of a checkpoint. Prefixes that
            DataParallel, torch.compile or Lightning put before every name are taken off where the names fit
            without them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, holds more than tensors or several state dicts, or does not fit: the
            message says which names.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} with weights: pass a safetensors file or a saved state dict")
    tensors = _fitting(network.state_dict(), _read(path))
    mine = network.state_dict()
    wrong = [
        f"{key} is {tuple(tensor.shape)}, the network's {tuple(mine[key].shape)}"
        for key, tensor in tensors.items()
        if isinstance(mine.get(key), Tensor) and mine[key].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit the network: {_some(wrong, '; ')}")
    try:
        missing, unexpected = network.load_state_dict(tensors, strict=False)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"{path} does not fit the network: {' '.join(str(error).split())}") from error
    there = {_place(mine[key]) for key in tensors if isinstance(mine.get(key), Tensor)}
    absent = [key for key in missing if not isinstance(mine[key], Tensor) or _place(mine[key]) not in there]
    if absent or unexpected:
        faults = {"it lacks": absent, "it also has": unexpected}
        parts = [f"{what} {_some(keys)}" for what, keys in faults.items() if keys]
        raise ValueError(
            f"{path} does not fit the network: {'; '.join(parts)}. Build the network as it was when they "
            "were saved (--network-args, model.arguments of recipes, arguments= in Python)"
        )


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are one (tied weights, saved once)."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


def _some(texts: list[str], separator: str = ", ") -> str:
    more = len(texts) - _SHOWN
    return separator.join(texts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _read(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors" or head[8:] == b"{":  # the length of a header, and the header
        try:
            return safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: restore it") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, which could run code: save "
            "network.state_dict() alone, by torch.save or safetensors.torch.save_file"
        ) from error
    return _state_dict(path, content)


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """The one state dict in what a file holds."""
    if _is_state_dict(content):
        return dict(content)
    found = {}
    if isinstance(content, Mapping):
        found = {key: value for key, value in content.items() if _is_state_dict(value)}
    if not found:
        raise ValueError(f"{path} holds no state dict: save network.state_dict()")
    if len(found) > 1:
        raise ValueError(
            f"{path} holds several state dicts ({', '.join(map(str, found))}): save the one you mean alone"
        )
    return dict(next(iter(found.values())))


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )


def _fitting(mine: Mapping[str, Any], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without prefixes that stand before every name, where the names fit then and do not with them."""
    renamed = theirs
    for _ in _WRAPPERS:
        if mine.keys() & renamed.keys():
            return renamed
        prefix = next((each for each in _WRAPPERS if all(key.startswith(each) for key in renamed)), None)
        if prefix is None:
            break
        renamed = {key.removeprefix(prefix): tensor for key, tensor in renamed.items()}
    return renamed if mine.keys() & renamed.keys() else theirs
