"""Optimisers and their schedules."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, MultiStepLR, OneCycleLR

from ..noise.learned import parameter_groups
from .sections import TrainSection


def make_optimizer(ensemble: nn.Module, config: TrainSection) -> torch.optim.Optimizer:
    """The optimiser of all parameters; levels of noise that are learned have no weight decay."""
    groups: list[dict[str, Any]] = list(parameter_groups(ensemble))
    if config.decay_of == "matrices" or config.layer_decay < 1:
        groups = [*_by_layer(ensemble, groups[0]["params"], config), *groups[1:]]
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )  # fmt: skip


def _by_layer(model: nn.Module, parameters: list[nn.Parameter], config: TrainSection) -> list[dict[str, Any]]:
    """Groups of parameters of one learning rate and one weight decay.

    Layers are the modules with their own parameters, in the order of their registration. The last one has
    the whole rate.
    """
    depth: dict[int, int] = {}
    layers = 0
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in depth]
        depth |= {id(parameter): layers for parameter in own}
        layers += bool(own)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        decays = config.decay_of == "all" or parameter.dim() > 1
        groups.setdefault((depth[id(parameter)], decays), []).append(parameter)
    return [
        {
            "params": members,
            "lr": config.lr * config.layer_decay ** (layers - 1 - layer),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (layer, decays), members in groups.items()
    ]


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainSection, steps: int) -> LRScheduler:
    """The schedule over all `steps`, stepped once a training step."""
    if config.warmup_epochs:
        return LambdaLR(optimizer, _warmed_up(config, steps))
    if config.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps)
    if config.schedule == "one_cycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, max_lr=rates, total_steps=steps, cycle_momentum=False)
    return MultiStepLR(optimizer, _ends(config, steps), gamma=0.1)


def _ends(config: TrainSection, steps: int) -> list[int]:
    """The steps at which a stage ends and the next one begins."""
    total = sum(config.stages)
    ends = [sum(config.stages[: i + 1]) / total for i in range(len(config.stages) - 1)]
    return [round(end * steps) for end in ends]


def _warmed_up(config: TrainSection, steps: int) -> Callable[[int], float]:
    """The factor of the learning rate at each step: a straight rise, then the schedule over what is left."""
    rise = max(1, min(round(config.warmup_epochs / config.epochs * steps), steps - 1))
    ends = _ends(config, steps - rise)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        done = step - rise
        if config.schedule == "stages":
            return float(0.1 ** sum(done >= end for end in ends))
        return 0.5 * (1 + math.cos(math.pi * done / max(1, steps - rise)))

    return factor
