"""What a folder of results is of: the same weights can answer in more than one way."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.evaluation.identity import behaviour
from selfensemble.evaluation.protocol import Protocol
from selfensemble.evaluation.runner import Evaluation

ATTACKS = [{"attack": "fgsm", "eps": 0.1, "eot": 1}]
CODE = """
from torch import nn
class Rounded(nn.Module):
    def __init__(self, levels=7):
        super().__init__()
        self.levels = levels
        self.layer = nn.Linear(64, 10)
    def forward(self, x):
        return self.layer((x * self.levels).round().flatten(1))
def deep(dropout=0.0):
    return nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(64, 10))
"""


class Unlike(nn.Module):
    """A network with settings that are in no weights."""

    def __init__(self, levels: int = 7) -> None:
        super().__init__()
        self.levels = levels
        self.conv = nn.Conv2d(1, 10, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.conv((inputs * self.levels).round() / self.levels)
        return found.flatten(1)


def protocol(**changes: Any) -> Protocol:
    values = {"name": "one", "images": 6, "shard": 6, "attacks": ATTACKS, "judge": {"seeds": 1, "queries": 1}}
    return Protocol.model_validate(values | changes)


def evaluate(ensemble: rse.SelfEnsemble, out: Path) -> None:
    Evaluation(ensemble, rse.load_data("digits", "test"), protocol(), out).run()


def test_a_folder_is_of_one_behaviour(tmp_path: Path) -> None:
    first = Unlike()

    def ensemble(levels: int = 7, **changes: Any) -> rse.SelfEnsemble:
        network = Unlike(levels)
        network.load_state_dict(first.state_dict())
        return rse.SelfEnsemble(network, rse.NoiseConfig(0, 0), **changes).eval()

    evaluate(ensemble(), tmp_path / "run")
    evaluate(ensemble(), tmp_path / "run")
    for other in (ensemble(levels=1), ensemble(bounds=(-1.0, 2.0)), ensemble(sampling="per_image")):
        with pytest.raises(ValueError, match=r"differs in model\."):
            evaluate(other, tmp_path / "run")


class Told(nn.Module):
    """A network that is told by a function, a tensor that is no buffer, and an object."""

    def __init__(self, function: Any, tensor: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.function, self.tensor, self.told = function, torch.tensor(tensor), SimpleNamespace(scale=scale)
        self.conv = nn.Conv2d(1, 10, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.function(self.conv(inputs) + self.tensor) * self.told.scale
        return found.flatten(1)


def test_a_run_is_not_continued_by_equal_weights_that_answer_otherwise(tmp_path: Path) -> None:
    """Whatever it is that tells them: what is no setting shows in the answers."""

    def told(*arguments: Any) -> rse.SelfEnsemble:
        torch.manual_seed(0)
        return rse.SelfEnsemble(Told(*arguments), rse.NoiseConfig(0.1, 0)).eval()

    def made(activation: Any) -> rse.SelfEnsemble:
        torch.manual_seed(0)
        network = rse.create_model("small-cnn", classes=10, channels=1, activation=activation)
        return rse.SelfEnsemble(network, rse.NoiseConfig(0.1, 0)).eval()

    first = [told(torch.relu), made("relu")]
    others = [told(torch.tanh), told(torch.relu, 1.0), told(torch.relu, 0.0, 2.0), made("brelu")]
    for number, other in enumerate(others):
        place = tmp_path / str(number)
        evaluate(first[number == 3], place)
        evaluate(first[number == 3], place)
        with pytest.raises(ValueError, match=r"differs in (model\.network|model\.activation|logits);"):
            evaluate(other, place)


def test_runs_of_other_versions_are_not_continued(tmp_path: Path) -> None:
    ensemble = rse.load("digits-rse")
    evaluate(ensemble, tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    identity = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in identity.items() if key != "versions"}))
    evaluate(ensemble, tmp_path / "run")  # which says nothing of it, as before
    identity["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(identity))
    with pytest.raises(ValueError, match="differs in versions; it is untouched"):
        evaluate(ensemble, tmp_path / "run")


class Counting(nn.Module):
    """Keeps how often it was called, and of which shape the last images were."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls, self.last = nn.Conv2d(1, 10, 8), 0, None

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls, self.last = self.calls + 1, (*inputs.shape, torch.is_grad_enabled())  # type: ignore[assignment]
        found: Tensor = self.conv(inputs)
        return found.flatten(1)


def test_what_passes_change_is_no_setting(tmp_path: Path) -> None:
    ensemble = rse.SelfEnsemble(Counting(), rse.NoiseConfig(0.1, 0.1)).eval()
    evaluate(ensemble, tmp_path / "run")
    ensemble.predict(torch.rand(5, 1, 8, 8), draws=7)
    evaluate(ensemble, tmp_path / "run")
    images = torch.rand(2, 1, 8, 8)
    assert behaviour(ensemble, images) == behaviour(ensemble, images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_looking_at_a_network_leaves_it_as_it_was(dtype: torch.dtype) -> None:
    """Its batch norm, too, where it is in training mode."""
    network = nn.Sequential(nn.Conv2d(1, 10, 8), nn.BatchNorm2d(10), nn.Flatten()).to(dtype)
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0.1, 0.1)).train()
    before = {key: value.clone() for key, value in ensemble.state_dict().items()}
    behaviour(ensemble, torch.rand(2, 1, 8, 8))
    assert ensemble.training
    assert all(torch.equal(value, before[key]) for key, value in ensemble.state_dict().items())


def test_names_arguments_and_code_are_part_of_a_network(tmp_path: Path) -> None:
    file = tmp_path / "nets.py"

    def found(attribute: str = "Rounded", **arguments: Any) -> Any:
        network = rse.network_from(f"{file}:{attribute}", arguments)
        return behaviour(rse.SelfEnsemble(network, filter_fn="linear").eval(), torch.rand(2, 64))["network"]

    file.write_text(CODE)
    assert found(levels=7) == found(levels=7) != found(levels=1)
    assert found("deep") != found("deep", dropout=0.5)
    before = found(levels=7)
    file.write_text(CODE.replace(".round()", ""))
    assert found(levels=7) != before


def test_networks_of_the_package_are_known_as_before() -> None:
    assert behaviour(rse.load("digits-rse"), torch.rand(2, 1, 8, 8)) == {}


def test_floating_point_data_are_not_judged_as_files_of_256_levels(tmp_path: Path) -> None:
    """Whose levels may all lie outside of the ball, so that the originals were judged."""
    torch.manual_seed(0)
    inputs = torch.rand(60, 16, generator=torch.Generator().manual_seed(1)) * 8 - 4
    network = nn.Linear(16, 2)
    labels = network(inputs).argmax(dim=1)
    data = rse.ImageData("waves", inputs, labels, ("0", "1"), bounds=(-4.0, 4.0))
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0, 0), filter_fn="linear", bounds=(-4.0, 4.0)).eval()
    accuracies = []
    for bits in (8, None):
        attacks = [{"attack": "pgd", "norm": "linf", "eps": [0.01], "steps": 5}]
        found = Evaluation(
            ensemble, data, protocol(images=60, bits=bits, attacks=attacks), tmp_path / str(bits)
        ).run()
        accuracies.append([entry.accuracy for entry in found.attacks])
        assert found.protocol.get("bits") is None
    assert accuracies[0] == accuracies[1]


def test_attacks_for_the_nearest_image_begin_anew(tmp_path: Path) -> None:
    """Their distances are not those of an attack before them, whose images are as far as its ball goes."""
    distances = []
    for in_turn in (True, False):
        attacks = [
            {"attack": "pgd", "norm": "l2", "eps": [3.0], "steps": 5},
            {"attack": "ddn", "steps": 20},
        ]
        run = Evaluation(
            rse.load("digits-rse"), rse.load_data("digits", "test"),
            protocol(in_turn=in_turn, attacks=attacks), tmp_path / str(in_turn),
        ).run()  # fmt: skip
        (nearest,) = (entry for entry in run.attacks if "ddn" in entry.key)
        distances.append(nearest.rms_l2)
    assert distances[0] == pytest.approx(distances[1], rel=0.2)
