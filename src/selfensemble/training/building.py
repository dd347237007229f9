"""From a recipe to an untrained network and the schedule of its training."""

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from ..artefacts.config import Architecture
from ..artefacts.storage import copy_weights_
from ..data.images import ImageData
from ..ensemble.ensemble import SelfEnsemble
from ..networks.models import create_model
from ..noise.injection import FilterFn, execution_order, is_convolution
from ..noise.learned import learn_noise_, parameter_groups
from ..noise.randomness import randomise_
from ..noise.resize_pad import ResizePadNetwork, pad_to
from .recipe import Recipe, TrainSection


def build_ensemble(recipe: Recipe, data: ImageData) -> SelfEnsemble:
    """The ensemble of a recipe, with its first weights, or ones drawn from the global random state."""
    model = create_model(**architecture(recipe, data).model_dump())
    example = data.inputs(slice(2))
    if recipe.randomness is not None:
        side = None if recipe.resize_pad is None else recipe.resize_pad.largest
        randomise_(model, recipe.randomness, example if side is None else pad_to(example, side))
    if recipe.resize_pad is not None:
        model = ResizePadNetwork(model, recipe.resize_pad)
    chosen = _behind_first(model, example) if recipe.noise.first == "features" else is_convolution
    ensemble = SelfEnsemble(
        model, recipe.noise.config(), draws=recipe.noise.draws, filter_fn=chosen, example_inputs=example
    )
    if recipe.model.weights is not None:
        copy_weights_(recipe.model.weights, ensemble)
    if recipe.noise.learn is not None:
        learn_noise_(model, recipe.noise.learn)
    return ensemble


def _behind_first(model: nn.Module, example: Tensor) -> FilterFn:
    """All convolutions but the first that a pass calls, which sees the image."""
    names = [fqn for fqn, module in model.named_modules() if is_convolution(module)]
    first = execution_order(model, names, example)[0]
    return lambda module, fqn: is_convolution(module) and fqn != first


def architecture(recipe: Recipe, data: ImageData) -> Architecture:
    """The network of a recipe, for these images."""
    return Architecture(
        name=recipe.model.name,
        width=recipe.model.width,
        activation=recipe.model.activation,
        classes=len(data.classes),
        channels=data.shape[0],
    )


def make_optimizer(ensemble: nn.Module, config: TrainSection) -> torch.optim.Optimizer:
    """The optimiser of all parameters; levels of noise that are learned have no weight decay."""
    groups = parameter_groups(ensemble)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )  # fmt: skip


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainSection, steps: int) -> LRScheduler:
    """The schedule over all `steps`, stepped once a training step."""
    if config.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps)
    if config.schedule == "one_cycle":
        return OneCycleLR(optimizer, max_lr=config.lr, total_steps=steps, cycle_momentum=False)
    total = sum(config.stages)
    ends = [sum(config.stages[: i + 1]) / total for i in range(len(config.stages) - 1)]
    return MultiStepLR(optimizer, [round(end * steps) for end in ends], gamma=0.1)
