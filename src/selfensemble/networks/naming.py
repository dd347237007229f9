"""Networks by name: `package.module:attribute`, `path/to/file.py:attribute`, and those of other libraries.

A name is an order to import: only what the caller writes is ever passed here, never what a file says.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ..runtime.errors import MissingPackage
from .importing import attribute_named, described
from .libraries import LIBRARIES
from .names import is_network_name
from .weights import load_weights_

NAMED_AS = "named_as"  # attribute of a network: its name, and the arguments that its factory was called with
GRAMMAR = (
    "package.module:attribute, path/to/file.py:attribute, timm:NAME, torchvision:NAME or "
    "transformers:FOLDER-OR-ID"
)


def network_from(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    *,
    pretrained: bool = True,
) -> nn.Module:
    """The network of that name. Its code runs, with all that this means.

    Args:
        name: "package.module:attribute" or "path/to/file.py:attribute", a network or what returns one,
            imported with the current folder (that of the file) in the search path; "timm:resnet18",
            "torchvision:resnet50", "transformers:FOLDER-OR-ID".
        arguments: keywords of what returns it; of a library those of its own function, "pretrained" among
            them; of transformers what differs from the network's configuration.
        weights: a safetensors file, or a state dict that `torch.save` wrote; read without unpickling code.
        pretrained: whether networks of libraries get the library's weights, where `weights` are not given.

    Returns:
        A separate network, on the CPU, in the mode that its factory gave it. What its weights are drawn
        from, where they are drawn, is torch's global random state. It remembers its name, see `name_of`.
        Mean and std that it wants its images standardised by are not in it: see `expected_images`.

    Raises:
        MissingPackage: the library is not installed.
        FileNotFoundError: no such file, or weights that cannot be had.
        ValueError, TypeError: anything else; the message says what to do.
    """
    library, _, rest = name.partition(":")
    has_its_weights = library in LIBRARIES and pretrained and weights is None
    chosen = dict(arguments or {})
    _check_keywords(chosen)
    if not is_network_name(name):
        raise ValueError(f"{name!r} names no network: write {GRAMMAR}")
    if library in LIBRARIES:
        network = LIBRARIES[library](rest, chosen, pretrained and weights is None)
        has_its_weights &= chosen.pop("pretrained", True)
        if library == "torchvision":
            has_its_weights &= chosen.get("weights", "DEFAULT") is not None
    else:
        network = _own(name, chosen)
    if weights is not None:
        load_weights_(network, weights)
    _remember(network, {"name": name, "arguments": chosen, "pretrained": has_its_weights})
    return network


def _remember(network: nn.Module, known: dict[str, Any]) -> None:
    setattr(network, NAMED_AS, known)
    if isinstance(network, GraphModule):  # copies of which have what their graph needs, and this
        network.meta.setdefault("_user_preserved_attributes", {})[NAMED_AS] = known


def name_of(network: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a network that `network_from` made; None of another."""
    known = vars(network).get(NAMED_AS)
    return None if known is None else (known["name"], known["arguments"])


def was_pretrained(network: nn.Module) -> bool:
    """Whether `network_from` gave it the weights of its library."""
    return bool(vars(network).get(NAMED_AS, {}).get("pretrained", False))


def _check_keywords(arguments: dict[Any, Any]) -> None:
    for key in arguments:
        if not isinstance(key, str):
            raise TypeError(f"arguments of a network are keywords and their values, got the key {key!r}")


def _own(name: str, arguments: dict[str, Any]) -> nn.Module:
    found = attribute_named(name)
    if isinstance(found, nn.Module):
        if arguments:
            raise ValueError(
                f"{name} is a network already and takes no arguments ({', '.join(arguments)}): leave them "
                "out, or name what makes it"
            )
        return copy.deepcopy(found)  # whoever asks again gets it as it was
    if not callable(found):
        raise TypeError(
            f"{name} is a {type(found).__name__}, neither a network (torch.nn.Module) nor a callable that "
            "returns one: name another attribute"
        )
    _check_arguments(name, found, arguments)
    try:
        network = found(**arguments)
    except MissingPackage:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise ValueError(f"{name} failed to make its network: {described(error)}") from error
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"{name} returned a {type(network).__name__}, no network (torch.nn.Module): name a callable that "
            "returns one"
        )
    return network


def _check_arguments(name: str, factory: Callable[..., Any], arguments: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # of what is written in C
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"{name} takes {signature}, and got {arguments or 'no arguments'}: {error}; pass its arguments "
            "as --network-args '{\"name\": value}' (model.arguments of recipes, arguments= in Python)"
        ) from error
