"""Random layers of all kinds by their settings: how a recipe, and an ensemble on disk, names them."""

from typing import Annotated, Any, cast

from pydantic import Field
from torch import nn

from ..runtime.checking import checked
from .aligned import AlignedNoiseConfig
from .bayesian import BayesianConfig
from .dropping import DropoutConfig, PruningConfig
from .graphs import forget_graphs
from .parametric import ParametricNoiseConfig
from .perturbing import PerturbationConfig
from .placing import PlacedLayer
from .random_filters import RandomFiltersConfig

AnyRandomness = Annotated[
    ParametricNoiseConfig
    | BayesianConfig
    | RandomFiltersConfig
    | PerturbationConfig
    | AlignedNoiseConfig
    | DropoutConfig
    | PruningConfig,
    Field(discriminator="name"),
]
_ATTRIBUTE = "randomised_by"  # of a network: the settings, its places among them


def randomise_(model: nn.Module, config: AnyRandomness, example_inputs: Any = None) -> nn.Module:
    """Put random layers of one kind into `model`, in place; state-dict keys that it has stay.

    Args:
        model: any module; noise may be injected before or after.
        config: which kind, e.g. `ParametricNoiseConfig()`.
        example_inputs: a batch, or a tuple of arguments or a dict of keywords. With it, places are in
            the order in which a pass calls them; kinds with a level for every neuron need it.

    Returns:
        The same model.

    Raises:
        ValueError: the model is random already in this way, or has no place for it. Nothing was changed.
    """
    if randomness_of(model) is not None:
        raise ValueError("the model has random layers already: put them into a fresh network")
    config = cast(AnyRandomness, config.in_place(model, example_inputs))
    for index, fqn in enumerate(config.modules or ()):
        config.put_(model.get_submodule(fqn), index, model)
    if config.fixed:
        for layer in _placed(model):
            layer.fix_()
    setattr(model, _ATTRIBUTE, config)
    forget_graphs()
    return model


def randomness_of(model: nn.Module) -> AnyRandomness | None:
    """What `randomise_` was asked for, its places filled in, and whether `make_static_` was called since.

    None for a network that `randomise_` was not called on.
    """
    config = cast(AnyRandomness | None, getattr(model, _ATTRIBUTE, None))
    if config is None:
        return None
    fixed = all(layer.is_fixed for layer in _placed(model))
    return config.model_copy(update={"fixed": fixed})


def _placed(model: nn.Module) -> list[PlacedLayer]:
    return [module for module in model.modules() if isinstance(module, PlacedLayer)]


def read_randomness(settings: dict[str, Any]) -> AnyRandomness:
    """Settings from a mapping; `name` says of which kind.

    Raises:
        ValueError: an unknown kind or key, or a value out of range.
    """
    kinds: Any = AnyRandomness
    found: AnyRandomness = checked(kinds, settings, "randomness")
    return found
