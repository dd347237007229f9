"""Optimisers and schedules, against what they do by hand."""

import math

import pytest
import torch
from torch import nn

from selfensemble.training.optimizers import make_optimizer, make_scheduler
from selfensemble.training.sections import TrainSection


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Linear(3, 2)
    )


def moved(config: TrainSection, gradient: float) -> dict[str, float]:
    """Mean change of parameters that are all 1, by a step with that gradient everywhere."""
    model = network()
    optimizer = make_optimizer(model, config)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    return {name: float((1 - parameter.detach()).mean()) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_biases_and_norms_have_no_decay_where_matrices_alone_have(optimizer: str) -> None:
    settings = {"optimizer": optimizer, "lr": 0.1, "weight_decay": 0.5, "momentum": 0.0}
    every = moved(TrainSection.model_validate(settings), 0.0)
    assert all(change == pytest.approx(0.05) for change in every.values())
    some = moved(TrainSection.model_validate(settings | {"decay_of": "matrices"}), 0.0)
    for name, change in some.items():
        matrix = name in ("0.weight", "2.0.weight", "3.weight")
        assert change == pytest.approx(0.05 if matrix else 0.0), name


def test_layers_in_front_learn_more_slowly() -> None:
    config = TrainSection(lr=0.1, weight_decay=0, momentum=0, layer_decay=0.5)
    found = moved(config, 1.0)
    rates = {"0": 0.0125, "1": 0.025, "2.0": 0.05, "3": 0.1}
    assert {name: pytest.approx(rates[name.rpartition(".")[0]]) for name in found} == found


def test_adamw_decays_apart_from_its_steps() -> None:
    """Its first step is as long as the rate, whatever the gradient; the decay is added."""
    config = TrainSection(optimizer="adamw", lr=0.01, weight_decay=0.1)
    assert list(moved(config, 7.0).values()) == pytest.approx([0.01 + 0.001] * 8, rel=1e-4)
    adam = TrainSection(optimizer="adam", lr=0.01, weight_decay=0.1)
    assert list(moved(adam, 7.0).values()) == pytest.approx([0.01] * 8, rel=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "stages"])
def test_the_rate_warms_up(schedule: str) -> None:
    config = TrainSection.model_validate({"schedule": schedule, "epochs": 10, "warmup_epochs": 2, "lr": 0.4})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    scheduler = make_scheduler(optimizer, config, steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:20] == pytest.approx([0.4 * (step + 1) / 20 for step in range(20)])
    if schedule == "cosine":
        expected = [0.2 * (1 + math.cos(math.pi * step / 80)) for step in range(80)]
    else:
        expected = [0.4] * 32 + [0.04] * 24 + [0.004] * 16 + [0.0004] * 8
    assert rates[20:] == pytest.approx(expected)


def test_warm_ups_that_cannot_be() -> None:
    for values, reason in (
        ({"epochs": 2, "warmup_epochs": 2}, "fewer than epochs"),
        ({"schedule": "one_cycle", "warmup_epochs": 1}, "a rise of its own"),
    ):
        with pytest.raises(ValueError, match=reason):
            TrainSection.model_validate(values)
