"""From a recipe to an untrained network."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from ..artefacts.config import Architecture
from ..artefacts.named import UntrustedNetwork
from ..artefacts.opening import IN_FRONT, in_pixels, with_mean_and_std
from ..artefacts.storage import WEIGHTS, copy_weights_
from ..data.images import ImageData
from ..ensemble.ensemble import SelfEnsemble
from ..networks.models import create_model
from ..networks.naming import network_from
from ..networks.normalized import Normalized
from ..networks.weights import load_weights_
from ..noise.filters import filter_named, matching
from ..noise.injection import FilterFn, eval_mode, execution_order
from ..noise.learned import learn_noise_
from ..noise.randomness import randomise_
from ..noise.resize_pad import ResizePadNetwork, pad_to
from .recipe import Recipe


def build_ensemble(recipe: Recipe, data: ImageData, given: nn.Module | None = None) -> SelfEnsemble:
    """The ensemble of a recipe, with its first weights, or ones drawn from the global random state.

    Args:
        recipe: what to build.
        data: for which images.
        given: a network instead of the recipe's, left as it is.
    """
    model = fresh_network(recipe, data, given)
    example = data.inputs(slice(2))
    if recipe.randomness is not None:
        side = None if recipe.resize_pad is None else recipe.resize_pad.largest
        randomise_(model, recipe.randomness, example if side is None else pad_to(example, side))
    if recipe.resize_pad is not None:
        model = ResizePadNetwork(model, recipe.resize_pad)
    chosen = _places(recipe, model, example)
    ensemble = SelfEnsemble(
        model, recipe.noise.config(), draws=recipe.noise.draws, filter_fn=chosen, example_inputs=example,
        bounds=recipe.data.bounds, sampling=recipe.noise.sampling,
    )  # fmt: skip
    if not is_built_in(recipe, given):
        _check_answers(ensemble, example, data)
    if recipe.model.weights is not None and not _is_file(recipe.model.weights):
        _copy_weights_(recipe.model.weights, ensemble)
    if recipe.noise.learn is not None:
        learn_noise_(model, recipe.noise.learn)
    return ensemble


def _copy_weights_(folder: str, ensemble: SelfEnsemble) -> None:
    try:
        copy_weights_(folder, ensemble)
    except UntrustedNetwork as error:
        raise ValueError(
            f"{folder} holds a network of code that is not in it: name its file, model.weights: "
            f"{Path(folder) / WEIGHTS}, beside model.network and model.arguments"
        ) from error


def is_built_in(recipe: Recipe, given: nn.Module | None = None) -> bool:
    """Whether the network is one of `MODELS`, which a saved ensemble can build by itself."""
    return given is None and recipe.model.network is None and recipe.model.normalize is None


def fresh_network(recipe: Recipe, data: ImageData, given: nn.Module | None = None) -> nn.Module:
    """The network of a recipe without noise, before any training here.

    Raises:
        ValueError, TypeError, FileNotFoundError: it cannot be made; the message says what to do.
    """
    config = recipe.model
    weights = config.weights if config.weights is not None and _is_file(config.weights) else None
    if given is not None:
        model = copy.deepcopy(given)
    elif config.network is not None:
        model = network_from(config.network, config.arguments, weights)
        if config.normalize is None:  # of weights of a library, what they were trained with
            model = with_mean_and_std(model, config.network, None, None, recipe.data.bounds)
    else:
        model = create_model(**architecture(recipe, data).model_dump())
    if weights is not None and (given is not None or config.network is None):
        load_weights_(model, Path(weights).expanduser())
    if config.normalize is not None and not isinstance(model, Normalized):
        each = [
            value if isinstance(value, tuple) else (value,) * data.shape[0]  # of every channel its own
            for value in (config.normalize.mean, config.normalize.std)
        ]
        model = Normalized(model, *each)
    return model


def _is_file(weights: str) -> bool:
    return Path(weights).expanduser().is_file()


def _check_answers(ensemble: SelfEnsemble, example: Tensor, data: ImageData) -> None:
    """A network of a user answers with as many classes as there are.

    Raises:
        ValueError: it does not.
    """
    with torch.no_grad(), eval_mode(ensemble):
        found = tuple(ensemble.draw_logits(example).shape)
    if found != (len(example), len(data.classes)):
        raise ValueError(
            f"the network answers {len(example)} images of {data.name} with the shape {found}; a logit for "
            "each "
            f"of the {len(data.classes)} classes is needed: set its number of classes (model.arguments)"
        )


def _places(recipe: Recipe, model: nn.Module, example: Tensor) -> FilterFn:
    """Before what noise goes. Where mean and std come first, the first noise is before them."""
    chosen = filter_named(recipe.noise.filter)
    if recipe.noise.first == "features":
        return _behind_first(model, chosen, example)
    return in_pixels(model, chosen, example) if isinstance(model, IN_FRONT) else chosen


def _behind_first(model: nn.Module, chosen: FilterFn, example: Tensor) -> FilterFn:
    """All chosen layers but the first that a pass calls, which sees the image.

    Raises:
        ValueError: there is none behind it.
    """
    names = execution_order(model, matching(model, chosen), example)
    if len(names) < 2:
        raise ValueError(
            f"noise.first: features puts no noise before the first layer of noise.filter, and there are "
            f"{len(names)} in the network: set noise.first: image, or another noise.filter"
        )
    return lambda module, fqn: chosen(module, fqn) and fqn != names[0]


def architecture(recipe: Recipe, data: ImageData) -> Architecture:
    """The network of a recipe, for these images."""
    return Architecture(
        name=recipe.model.name,
        width=recipe.model.width,
        activation=recipe.model.activation,
        classes=len(data.classes),
        channels=data.shape[0],
    )
