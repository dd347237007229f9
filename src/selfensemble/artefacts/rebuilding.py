"""The network of a saved ensemble, built again without its weights; of a user only when told so."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ensemble.checks import floating_dtype
from ..networks.flipping import FlipAveraged
from ..networks.models import create_model
from ..networks.naming import network_from
from ..networks.normalized import Normalized
from ..noise.randomness import randomise_, randomness_of
from .config import ArtefactConfig
from .named import OtherArguments, UntrustedNetwork


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


@contextmanager
def with_its_arguments(
    folder: str | Path, config: ArtefactConfig, given: Mapping[str, Any] | None
) -> Iterator[None]:
    """Within this context errors say that the network was saved with other arguments, where it was."""
    named = config.network
    try:
        yield
    except (ValueError, TypeError) as error:
        if given is None or named is None or named.arguments in (None, given):
            raise
        raise OtherArguments(folder, named, given) from error


def misfit(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> str:
    """How weights in a file differ from a network's in names and shapes; "" where they do not."""
    shapes = {key: tuple(tensor.shape) for key, tensor in mine.items()}
    found = {
        "it lacks": [key for key in mine if key not in theirs],
        "it also has": [key for key in theirs if key not in mine],
        "it has other shapes of": [
            f"{key} {tuple(theirs[key].shape)}, not {shape}"
            for key, shape in shapes.items()
            if key in theirs and tuple(theirs[key].shape) != shape
        ],
    }
    return "; ".join(
        f"{what} {', '.join(keys[:4])}" + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        for what, keys in found.items()
        if keys
    )


def wrapped(model: nn.Module, config: ArtefactConfig) -> nn.Module:
    """The network with the first layer and the random layers that it was saved with, where it has none."""
    if type(model) is FlipAveraged:
        return model
    if config.normalize is not None and type(model) is not Normalized:
        model = config.normalize.around(model)
    if config.randomness is not None and randomness_of(model) != config.randomness:
        model = randomise_(model, config.randomness)
    return FlipAveraged(model) if config.flip_average else model


def in_float32_(model: nn.Module) -> None:
    """What was made in the program's default dtype, as it would have been made in torch's."""
    for own in [*model.parameters(), *model.buffers()]:
        if own.dtype == torch.get_default_dtype():
            own.data = own.data.to(torch.float32)


def as_saved(model: nn.Module, tensors: dict[str, Tensor], is_ours: bool) -> nn.Module:
    """The network in float64 where all parameters are; one that was passed has to be. Buffers stay."""
    own = {name: each for name, each in model.named_parameters() if name in tensors}
    saved = {tensors[name].dtype for name in own if tensors[name].is_floating_point()}
    if saved != {torch.float64} or floating_dtype(model) == torch.float64:
        return model
    if not is_ours:
        raise ValueError(
            "the weights are float64, and the network that was passed is not: pass model.double()"
        )
    for name, each in [*own.items(), *model.named_buffers()]:
        if name in tensors and tensors[name].is_floating_point():
            each.data = each.data.to(tensors[name].dtype)
    return model
