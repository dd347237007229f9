"""From a recipe to an untrained network and the schedule of its training."""

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from ..artefacts.config import Architecture
from ..artefacts.storage import copy_weights_
from ..data.images import ImageData
from ..ensemble.ensemble import SelfEnsemble
from ..networks.models import create_model
from ..noise.learned import learn_noise_
from ..noise.resize_pad import ResizePadNetwork
from .recipe import Recipe, TrainSection


def build_ensemble(recipe: Recipe, data: ImageData) -> SelfEnsemble:
    """The ensemble of a recipe, with its first weights, or ones drawn from the global random state."""
    model = create_model(**architecture(recipe, data).model_dump())
    if recipe.resize_pad is not None:
        model = ResizePadNetwork(model, recipe.resize_pad)
    ensemble = SelfEnsemble(
        model, recipe.noise.config(), draws=recipe.noise.draws, example_inputs=data.inputs(slice(2))
    )
    if recipe.model.weights is not None:
        copy_weights_(recipe.model.weights, ensemble)
    if recipe.noise.learn is not None:
        learn_noise_(model, recipe.noise.learn)
    return ensemble


def architecture(recipe: Recipe, data: ImageData) -> Architecture:
    """The network of a recipe, for these images."""
    return Architecture(
        name=recipe.model.name,
        width=recipe.model.width,
        activation=recipe.model.activation,
        classes=len(data.classes),
        channels=data.images.shape[1],
    )


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainSection, steps: int) -> LRScheduler:
    """The schedule over all `steps`, stepped once a training step."""
    if config.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps)
    if config.schedule == "one_cycle":
        return OneCycleLR(optimizer, max_lr=config.lr, total_steps=steps, cycle_momentum=False)
    total = sum(config.stages)
    ends = [sum(config.stages[: i + 1]) / total for i in range(len(config.stages) - 1)]
    return MultiStepLR(optimizer, [round(end * steps) for end in ends], gamma=0.1)
