"""What networks of transformers remember of their noise when they are saved."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import selfensemble as rse
from selfensemble.noise.injection import attach_noise_, make_static_, set_levels_
from selfensemble.noise.learned import learn_noise_
from selfensemble.noise.records import KEY

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
STEM = "resnet.embedder.embedder.convolution"


@pytest.fixture
def config() -> Any:
    return transformers.ResNetConfig(
        num_channels=3, embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic", num_labels=5
    )


@pytest.fixture
def network(config: Any) -> Any:
    return transformers.ResNetForImageClassification(config).eval()


def levels(model: nn.Module) -> dict[str, object]:
    return {fqn: layer.std for fqn, layer in rse.noise_layers(model).items()}


def reloaded(network: Any, folder: Path) -> Any:
    network.save_pretrained(folder)
    return transformers.AutoModelForImageClassification.from_pretrained(folder)


def lost(model: nn.Module, images: Tensor) -> list[str]:
    return [issue.where for issue in rse.validate(model, images) if issue.rule == "lost-noise"]


@pytest.mark.parametrize("compiled", [False, True])
def test_levels_come_back_as_they_were_last(
    network: Any, images: Tensor, tmp_path: Path, compiled: bool
) -> None:
    target: Any = torch.compile(network, backend="eager") if compiled else network
    rse.inject_noise_(target, rse.NoiseConfig(0.31, 0.07), example_inputs=images)
    rse.noise_layers(network)[STEM].std = (0.3, 0.2, 0.1)
    other = reloaded(network, tmp_path)
    assert rse.noise_layers(other) == {}
    assert lost(other, images) == list(levels(network))  # in their order
    ensemble = rse.SelfEnsemble(other)
    assert list(levels(other).items()) == list(levels(network).items())
    assert levels(other)[STEM] == (0.3, 0.2, 0.1)
    assert lost(other, images) == []
    expected = rse.SelfEnsemble(network).predict_proba(images, seed=1)
    torch.testing.assert_close(ensemble.predict_proba(images, seed=1), expected)
    # Through a second generation, and by the ensemble's own format.
    set_levels_(other, rse.NoiseConfig(0.4, 0.5))
    again = rse.SelfEnsemble(reloaded(other, tmp_path)).model
    assert set(levels(again).values()) == {0.4, 0.5}
    ensemble.save_pretrained(tmp_path / "own")
    assert levels(rse.load(tmp_path / "own").model) == levels(other)


def test_levels_that_are_given_win(network: Any, images: Tensor, tmp_path: Path) -> None:
    rse.inject_noise_(network, rse.NoiseConfig(0.31, 0.07))
    other = reloaded(network, tmp_path)
    rse.inject_noise_(other, rse.NoiseConfig(0.5, 0.6))
    assert set(levels(other).values()) == {0.5, 0.6}
    assert lost(other, images) == []
    assert set(levels(rse.SelfEnsemble(reloaded(other, tmp_path)).model).values()) == {0.5, 0.6}


def test_a_network_within_another_is_found(network: Any, images: Tensor, tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.mix = inner, nn.Conv2d(3, 3, 1)

        def forward(self, inputs: Tensor) -> Any:
            return self.inner(self.mix(inputs))

    outer = rse.inject_noise_(Scaled(network), rse.NoiseConfig(0.31, 0.07), example_inputs=images)
    other = Scaled(reloaded(network, tmp_path))
    assert lost(other, images) == [name for name in levels(outer) if name != "mix"]
    rse.SelfEnsemble(other)
    assert levels(other) == {name: level for name, level in levels(outer).items() if name != "mix"}


def test_the_users_configuration_is_left_alone(network: Any, config: Any, images: Tensor) -> None:
    """A twin that is made from it has no noise, and nobody misses any."""
    before = config.to_json_string(use_diff=False)
    rse.inject_noise_(network, rse.NoiseConfig(0.31, 0.07))
    assert config.to_json_string(use_diff=False) == before
    assert network.config is network.resnet.config  # one configuration still
    twin = transformers.ResNetForImageClassification(config).eval()
    assert rse.validate(twin, images) == []
    assert set(levels(rse.SelfEnsemble(twin).model).values()) == {0.2, 0.1}


def test_copies_and_removal(network: Any, images: Tensor, tmp_path: Path) -> None:
    rse.inject_noise_(network, rse.NoiseConfig(0.31, 0.07))
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert lost(twin, images) == []
        set_levels_(twin, rse.NoiseConfig(0.5, 0.6))
        assert set(levels(network).values()) == {0.31, 0.07}
        assert set(levels(rse.SelfEnsemble(reloaded(twin, tmp_path)).model).values()) == {0.5, 0.6}
        make_static_(twin)
        assert not hasattr(twin.config, KEY)
        assert set(levels(rse.SelfEnsemble(reloaded(twin, tmp_path)).model).values()) == {0.2, 0.1}
    # Nobody wants the noise that a network was saved with: then nothing is missed.
    other = reloaded(network, tmp_path)
    assert lost(other, images)
    rse.remove_noise_(other)
    assert rse.validate(other, images) == []


@pytest.mark.parametrize("how", ["set_levels_", "by hand", "of a copy"])
def test_a_module_that_is_copied_into_its_place_is_known(
    network: Any, images: Tensor, tmp_path: Path, how: str
) -> None:
    rse.inject_noise_(network, rse.NoiseConfig(0.31, 0.07), example_inputs=images)
    embedder = network.resnet.embedder.embedder
    embedder.convolution = copy.deepcopy(embedder.convolution)
    assert how == "by hand" or lost(network, images) == []
    network = copy.deepcopy(network) if how == "of a copy" else network
    if how == "set_levels_":
        set_levels_(network, rse.NoiseConfig(0.5, 0.6))
    else:
        rse.noise_layers(network)[STEM].std = 0.5
    other = rse.SelfEnsemble(reloaded(network, tmp_path)).model
    assert levels(other) == levels(network)
    assert levels(other)[STEM] == 0.5
    assert lost(network, images) == []
    rse.remove_noise_(network)
    assert not hasattr(network.config, KEY)
    assert lost(network, images) == []
    assert "save_pretrained" not in vars(network)
    rse.inject_noise_(network)
    network.resnet.embedder.embedder.convolution = nn.Conv2d(3, 4, 7, stride=2, padding=3)
    assert lost(network, images) == [STEM]


def test_convolutions_that_torch_fuses_keep_their_noise(images: Tensor) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 6), nn.Flatten()
    ).eval()
    rse.inject_noise_(network)
    network[0] = fuse_conv_bn_eval(network[0], network[1])  # type: ignore[type-var, arg-type]
    network[1] = nn.Identity()
    assert rse.validate(network, images) == []
    # Noise that is put there anew is known once.
    network[0] = nn.Conv2d(3, 4, 3)
    assert lost(network, images) == ["0"]
    attach_noise_(network, {"0": 0.3})
    assert rse.validate(network, images) == []
    assert len(vars(network)[KEY]) == 2


def test_levels_that_are_being_learned_are_refused(network: Any, tmp_path: Path) -> None:
    learn_noise_(rse.inject_noise_(network), "layer")
    with pytest.raises(ValueError, match=r"being learned.*save_pretrained"):
        rse.SelfEnsemble(reloaded(network, tmp_path))
    rse.SelfEnsemble(network).save_pretrained(tmp_path / "own")
    values = list(levels(rse.load(tmp_path / "own").model).values())
    assert values == pytest.approx([0.2, *[0.1] * 5])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("noise", "damaged"),
        ([{"std": 0.1}], "damaged"),
        ([{"module": 3, "std": 0.1}], "damaged"),
        ([{"module": "nowhere", "std": 0.1}], "lacks"),
        ([{"module": STEM, "std": -1}], "finite and >= 0"),
        ([{"module": STEM, "std": "much"}], "must be a number"),
    ],
)
def test_damaged_records_are_refused(
    network: Any, images: Tensor, tmp_path: Path, record: object, message: str
) -> None:
    rse.inject_noise_(network)
    network.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(text | {KEY: record}))
    other = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        rse.SelfEnsemble(other)
    assert rse.noise_layers(other) == {}
    assert len(lost(other, images)) == 1
    rse.inject_noise_(rse.remove_noise_(other))
    assert lost(other, images) == []
