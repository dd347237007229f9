"""Artefacts: round trips, golden files of every format version, and files that must be refused."""

import itertools
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.artefacts.config import Architecture
from selfensemble.artefacts.storage import read_config
from selfensemble.evaluation.identity import model_record
from selfensemble.evaluation.results import ModelRecord

from ..conftest import Aliased, OutOfOrder


@pytest.mark.parametrize("version", [1])
def test_golden_artefacts_load_and_answer_as_they_did(golden: Path, version: int) -> None:
    folder = golden / f"v{version}"
    ensemble = rse.load(folder)
    expected = safetensors.torch.load_file(folder / "outputs.safetensors")
    with rse.noise_disabled(ensemble), torch.no_grad():
        torch.testing.assert_close(ensemble.draw_logits(expected["images"]), expected["logits"])
    answer = ensemble.predict_proba(expected["images"], seed=1)
    torch.testing.assert_close(answer, expected["proba"], rtol=1e-4, atol=1e-5)
    assert ensemble.draws == 3
    assert [layer.std for layer in rse.noise_layers(ensemble.model).values()] == [0.4, 0.2, 0.2, 0.2]


def test_round_trip_keeps_answers_levels_and_order(tmp_path: Path, images: Tensor) -> None:
    """The layer that sees the image is registered last: its number must survive."""
    ensemble = rse.SelfEnsemble(OutOfOrder(), rse.NoiseConfig(0.3, 0.7), draws=4, example_inputs=images)
    rse.save(ensemble, tmp_path)
    loaded = rse.load(tmp_path, model=OutOfOrder())
    assert not loaded.training
    torch.testing.assert_close(loaded.predict_proba(images, seed=2), ensemble.predict_proba(images, seed=2))
    assert {k: v.layer for k, v in rse.noise_layers(loaded.model).items()} == {"stem": 0, "inner": 1}
    with pytest.raises(ValueError, match="model="):
        rse.load(tmp_path)


def test_levels_by_channel_survive(tmp_path: Path, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(OutOfOrder(), rse.NoiseConfig(0.3, 0.7), example_inputs=images)
    rse.noise_layers(ensemble.model)["stem"].std = (0.1, 0.0, 1 / 3)
    rse.save(ensemble, tmp_path)
    assert read_config(tmp_path).noise == {"stem": (0.1, 0.0, 1 / 3), "inner": 0.7}
    loaded = rse.load(tmp_path, model=OutOfOrder())
    assert torch.equal(loaded.predict_proba(images, seed=2), ensemble.predict_proba(images, seed=2))
    assert loaded.state_dict().keys() == ensemble.state_dict().keys()
    records = [model_record(model, "x", None) for model in (ensemble, loaded)]
    assert records[0] == records[1]
    assert ModelRecord.model_validate_json(records[0].model_dump_json()) == records[0]


def test_the_activation_is_kept(tmp_path: Path, images: Tensor) -> None:
    architecture = Architecture(name="small-cnn", classes=4, channels=3, width=0.25, activation="brelu")
    bounded = rse.create_model(**architecture.model_dump()).eval()
    rse.save(rse.SelfEnsemble(bounded, rse.NoiseConfig(0, 0)), tmp_path, architecture=architecture)
    torch.testing.assert_close(rse.load(tmp_path).predict_proba(images), bounded(images).softmax(dim=1))


def test_shared_parameters_are_saved(tmp_path: Path, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(Aliased())
    rse.save(ensemble, tmp_path)
    loaded = rse.load(tmp_path, model=Aliased())
    torch.testing.assert_close(loaded.predict_proba(images, seed=2), ensemble.predict_proba(images, seed=2))


def test_a_plain_network_is_an_ensemble_without_noise(tmp_path: Path, images: Tensor) -> None:
    architecture = Architecture(name="small-cnn", classes=4, channels=3, width=0.25)
    plain = rse.create_model(**architecture.model_dump()).eval()
    expected = plain(images).softmax(dim=1)
    rse.save(rse.SelfEnsemble(plain, rse.NoiseConfig(0, 0)), tmp_path, architecture=architecture)
    torch.testing.assert_close(rse.load(tmp_path).predict_proba(images), expected)


def test_a_network_saved_without_noise_loads_without(tmp_path: Path, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(Aliased())
    rse.remove_noise_(ensemble.model)
    rse.save(ensemble, tmp_path)
    assert not rse.load(tmp_path, model=Aliased()).is_random


def test_loading_into_a_noisy_network_says_what_to_do(tmp_path: Path) -> None:
    rse.save(rse.SelfEnsemble(Aliased()), tmp_path)
    with pytest.raises(ValueError, match="remove_noise_"):
        rse.load(tmp_path, model=rse.inject_noise_(Aliased()))


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_save_keeps_the_earlier_artefact(
    tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The disk fills up at the first or at the second of the two files."""
    ensemble = rse.SelfEnsemble(Aliased())
    rse.save(ensemble, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    nn.init.zeros_(ensemble.model.get_parameter("first.weight"))
    calls = itertools.count(1)

    def full_disk(handle: int) -> None:
        if next(calls) == failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        rse.save(ensemble, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_config_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--out"):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    for text, message in (
        ('{"format": "selfensemble", "format_version": 1}', "damaged: noise"),
        ('{"format": "selfensemble", "format_version": 1, "noise": {"0": -1}, "draws": 1}', "noise.0"),
        ('{"format": "selfensemble", "format_version": 1, "noise": {"0": []}, "draws": 1}', "noise.0"),
        ('{"format": "selfensemble", "format_version": 1, "noise": {}, "draws": 0}', "draws"),
        ("[]", "not written by selfensemble"),
        ("\xff", "damaged"),
    ):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path)
