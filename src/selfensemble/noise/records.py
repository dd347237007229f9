"""What a network is known to have of noise, beside the noise itself: levels by module, as plain data.

Noise is in no state dict, and a module that is replaced takes its noise along. So the network that noise was
put into keeps a list of it, which each layer keeps up to date. A network of transformers keeps it in its
configuration, which its `save_pretrained` writes and its `from_pretrained` reads.

A copy of a module knows nothing of the list. Where one was put into the place of another, it is found by its
name: when the list is read, and before a network of transformers is saved.
"""

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from .layer import CHILD, GaussianNoise
from .levels import Record, Std, check_stds

KEY = "selfensemble_noise"
_SAVING = "save_pretrained"


def remember_(model: nn.Module, layers: Mapping[str, GaussianNoise]) -> None:
    """Write down the noise that `model` has just got.

    Args:
        model: that noise was put into.
        layers: by the fully qualified name of the module that each precedes, in their order.
    """
    renew_(model, layers.values())
    held, entries = _ids_of_records(model), dict[str, list[Record]]()
    pretrained = _pretrained(model)
    for fqn, layer in layers.items():
        within = [(name, network) for name, network in pretrained.items() if _is_within(fqn, name)]
        name, holder = within[0] if within else _outermost(model)
        if name not in entries:
            known = [entry for entry in _entries(holder) if id(entry) in held]
            if not known and is_pretrained(holder):
                _own_config_(holder)
            entries[name] = known
            setattr(_place(holder), KEY, known)
            if is_pretrained(holder):
                vars(holder)[_SAVING] = _Saving(holder)
        layer.record = {"module": fqn.removeprefix(name).removeprefix("."), "std": layer.std}
        entries[name].append(layer.record)


def forget_(model: nn.Module, layers: Mapping[str, GaussianNoise]) -> None:
    """Strike out the noise of `model`, of which nothing is left.

    Args:
        model: that noise was taken out of.
        layers: that it had.
    """
    for layer in layers.values():
        if layer.record is not None:
            layer.record.clear()  # so that a network around `model` knows, too
    for module in model.modules():
        vars(_place(module)).pop(KEY, None)
        vars(module).pop(_SAVING, None)


def renew_(model: nn.Module, but: Iterable[GaussianNoise] = ()) -> None:
    """Have the layers that stand where `model` knows of some keep what it knows, whose copies they may be.

    Args:
        model: that noise was put into.
        but: layers that it is about to know.

    Raises:
        ValueError: what it knows is damaged.
    """
    left_out, pretrained = {id(layer) for layer in but}, _pretrained(model)
    for fqn, module in model.named_modules():
        if KEY not in vars(module) and fqn not in pretrained:
            continue
        for entry in _entries(module):
            layer = _layer_before(module, entry["module"]) if entry else None
            if layer is None or id(layer) in left_out or layer.record is entry:
                continue
            entry["std"] = None if layer._parameters else layer.std  # none that is being learned
            layer.record = entry


def _layer_before(network: nn.Module, fqn: str) -> GaussianNoise | None:
    try:
        child = network.get_submodule(fqn)._modules.get(CHILD)
    except AttributeError:
        return None
    return child if isinstance(child, GaussianNoise) else None


class _Saving:
    """Instead of `save_pretrained` of a network of transformers, which writes what the list says.

    Args:
        network: whose method it is.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        renew_(self.network)
        method: Any = getattr(type(self.network), _SAVING)
        return method(self.network, *args, **kwargs)


def saved_levels(model: nn.Module) -> dict[str, Std]:
    """The levels that networks of transformers within `model` were saved with, by module; in their order.

    Raises:
        ValueError: what was saved is damaged, does not fit the network, or was still being learned.
    """
    held, levels = _held(model), dict[str, Std]()
    for name, network in _pretrained(model).items():
        for entry in _entries(network):
            if not entry or id(entry) in held:
                continue
            fqn = f"{name}.{entry['module']}".strip(".")
            try:
                model.get_submodule(fqn)
            except AttributeError as error:
                raise ValueError(
                    f"{type(network).__name__} was saved with noise before {entry['module']!r}, and "
                    f"lacks it: load the class that was saved, or delete config.{KEY} and inject noise again"
                ) from error
            if entry["std"] is None:
                raise ValueError(
                    "the network was saved while its noise levels were being learned, and without them: save "
                    "it by SelfEnsemble(network).save_pretrained(folder), whose folder commands take"
                )
            levels[fqn] = check_stds(f"config.{KEY} of {fqn}", entry["std"])
    return levels


def lost_noise(model: nn.Module) -> Iterator[str]:
    """Names of modules that had noise, by what `model` knows, and have none now.

    Raises:
        ValueError: what it knows is damaged.
    """
    held, pretrained = _held(model), _pretrained(model)
    for fqn, module in model.named_modules():
        if KEY in vars(module) or fqn in pretrained:
            for entry in _entries(module):
                if entry and id(entry) not in held:
                    yield f"{fqn}.{entry['module']}".strip(".")


def _held(model: nn.Module) -> set[int]:
    """The records of layers that are there, by their ids."""
    renew_(model)
    return _ids_of_records(model)


def _ids_of_records(model: nn.Module) -> set[int]:
    return {id(module.record) for module in model.modules() if isinstance(module, GaussianNoise)}


def is_pretrained(module: nn.Module) -> bool:
    """Whether it is a network of transformers."""
    theirs = sys.modules.get("transformers.modeling_utils")  # imported, if it made the network
    return theirs is not None and isinstance(module, theirs.PreTrainedModel)


def _pretrained(model: nn.Module) -> dict[str, nn.Module]:
    """Networks of transformers by name; of those within others the outermost."""
    found: dict[str, nn.Module] = {}
    for fqn, module in model.named_modules():
        if is_pretrained(module) and not any(_is_within(fqn, name) for name in found):
            found[fqn] = module
    return found


def _is_within(fqn: str, name: str) -> bool:
    return not name or fqn == name or fqn.startswith(f"{name}.")


def _outermost(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module that keeps the record where no network of transformers does."""
    compiled = model._modules.get("_orig_mod")  # of torch.compile, whose wrapper loses its own in copies
    return ("", model) if compiled is None else ("_orig_mod", compiled)


def _place(module: nn.Module) -> Any:
    """The object that the record is an attribute of."""
    return vars(module).get("config") if is_pretrained(module) else module


def _entries(module: nn.Module) -> list[Record]:
    entries = vars(_place(module)).get(KEY, [])
    sound = isinstance(entries, list) and all(
        isinstance(entry, dict) and (not entry or (isinstance(entry.get("module"), str) and "std" in entry))
        for entry in entries
    )
    if not sound:
        raise ValueError(f"config.{KEY} is damaged: restore it from the network that was saved, or delete it")
    return list(entries)


def _own_config_(network: nn.Module) -> None:
    """Give a network of transformers a configuration that no other network is made from."""
    copies: dict[int, Any] = {}
    copy.deepcopy(network.config, copies)
    for module in network.modules():
        if id(config := vars(module).get("config")) in copies:
            module.config = copies[id(config)]
