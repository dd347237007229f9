"""Settings of recipes that meet: first weights, places of the noise, schedules, folders."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import selfensemble as rse
from selfensemble.training.building import build_ensemble
from selfensemble.training.optimizers import make_scheduler
from selfensemble.training.recipe import Recipe, load_recipe
from selfensemble.training.trainer import Trainer


def recipe(*settings: str) -> Recipe:
    return load_recipe("digits-rse", ["train.epochs=1", "data.images=60", *settings])


def test_the_first_weights_are_those_of_a_file_whatever_the_network(tmp_path: Path) -> None:
    data = rse.load_data("digits", "train")
    own = rse.create_model("small-cnn", channels=1)
    safetensors.torch.save_file(own.state_dict(), tmp_path / "own.safetensors")
    asked = recipe(f"model.weights={tmp_path / 'own.safetensors'}")
    for given in (None, rse.create_model("small-cnn", channels=1)):
        found = build_ensemble(asked, data, given)
        for one, other in zip(found.parameters(), own.parameters(), strict=True):
            assert torch.equal(one, other)
    with pytest.raises(ValueError, match="does not fit"):
        build_ensemble(asked.replaced("model", width=0.5), data)


def test_noise_behind_the_first_layer_is_before_the_chosen_layers() -> None:
    data = rse.load_data("digits", "train")
    for chosen in ("conv", "conv+linear"):
        places = [
            list(rse.noise_layers(build_ensemble(recipe(f"noise.filter={chosen}", *more), data).model))
            for more in ((), ("noise.first=features",))
        ]
        assert places[1] == places[0][1:] != []


@pytest.mark.parametrize("layers", [[nn.Flatten(), nn.Linear(64, 10)], [nn.Conv2d(1, 10, 8), nn.Flatten()]])
def test_noise_behind_the_only_layer_is_refused(layers: list[nn.Module]) -> None:
    asked = recipe("noise.filter=conv+linear", "noise.first=features")
    with pytest.raises(ValueError, match=r"noise\.first: features puts no noise before the first layer"):
        build_ensemble(asked, rse.load_data("digits", "train"), nn.Sequential(*layers))


def test_a_folder_with_an_evaluation_is_not_trained_into(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds an evaluation"):
        Trainer(recipe(), tmp_path, overwrite=True)


def test_a_warm_up_of_a_single_step() -> None:
    asked = recipe("train.schedule=cosine", "train.epochs=2", "train.warmup_epochs=1").train
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = make_scheduler(optimizer, asked, 1)
    optimizer.step()
    scheduler.step()
    assert 0 <= scheduler.get_last_lr()[0] <= 0.1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("{name: fgsm-retraining, smallest_eps: 0.3, largest_eps: 0.1}", "at most largest_eps"),
        ("{name: adversarial, label_smoothing: 1.5}", "must be below 1"),
    ],
)
def test_settings_of_defenses_out_of_range_are_refused(settings: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        recipe(f"defense={settings}")
