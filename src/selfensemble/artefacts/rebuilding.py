"""The network of a saved ensemble, built again without its weights; of a user only when told so."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..networks.models import create_model
from ..networks.naming import network_from
from ..networks.normalized import Normalized
from ..noise.randomness import randomise_, randomness_of
from .config import ArtefactConfig
from .named import UntrustedNetwork


def rebuilt(config: ArtefactConfig, folder: str | Path, *, trust_network: bool = False) -> nn.Module:
    """The network that a `config.json` describes, with fresh weights and its random layers but for noise.

    Args:
        config: of the ensemble.
        folder: that it lies in, for messages.
        trust_network: whether code of a user may be imported by the name that stands there.

    Raises:
        UntrustedNetwork: it is of a user, and nobody said what to import.
        ValueError: it cannot be built.
    """
    if config.transformers is not None:
        return wrapped(config.transformers.build(), config)
    if config.architecture is None:
        if config.network is None or (config.network.needs_trust and not trust_network):
            raise UntrustedNetwork(folder, config.network)
        return wrapped(config.network.build(), config)
    try:
        return wrapped(create_model(**config.architecture.model_dump()), config)
    except (TypeError, RuntimeError) as error:  # of sizes beyond all bounds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the network that {folder} describes cannot be built: {reason}") from error


def is_meta_safe(config: ArtefactConfig) -> bool:
    """Whether the network can be built without memory first: not where code of others asks for numbers."""
    return config.architecture is not None or config.transformers is not None


def network_named(config: ArtefactConfig, name: str, arguments: Mapping[str, Any] | None) -> nn.Module:
    """The network of that name, called with the arguments that it was saved with, or with others."""
    known = None if config.network is None else config.network.arguments
    return network_from(name, known if arguments is None else arguments, pretrained=False)


def wrapped(model: nn.Module, config: ArtefactConfig) -> nn.Module:
    """The network with the first layer and the random layers that it was saved with, where it has none."""
    if config.normalize is not None and type(model) is not Normalized:
        model = config.normalize.around(model)
    if config.randomness is None or randomness_of(model) == config.randomness:
        return model
    return randomise_(model, config.randomness)


def in_float32_(model: nn.Module) -> None:
    """What was made in the program's default dtype, as it would have been made in torch's."""
    for own in [*model.parameters(), *model.buffers()]:
        if own.dtype == torch.get_default_dtype():
            own.data = own.data.to(torch.float32)
