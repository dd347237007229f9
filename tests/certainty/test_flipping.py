"""The mean of the answers to an image and to its mirror image."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.artefacts.storage import read_config
from selfensemble.certainty.pixels import pixel_std
from selfensemble.ensemble.draws import Draws
from selfensemble.evaluation.identity import model_record
from selfensemble.fast.optimize import Precision, optimize
from selfensemble.networks.flipping import FlipAveraged
from selfensemble.noise.bayesian import BayesianConfig
from selfensemble.noise.dropping import DropoutConfig
from selfensemble.noise.injection import remove_noise_
from selfensemble.noise.random_filters import RandomFiltersConfig
from selfensemble.noise.randomness import AnyRandomness, randomise_, randomness_of
from selfensemble.noise.resize_pad import ResizePadConfig, ResizePadNetwork

LEVELS = rse.NoiseConfig(0.3, 0.1)


@pytest.fixture
def ensemble(tiny: nn.Module) -> rse.SelfEnsemble:
    return rse.SelfEnsemble(tiny, LEVELS, draws=4).eval()


def test_the_mean_of_both_logits(tiny: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        expected = (tiny(images) + tiny(images.flip(3))) / 2
        assert torch.allclose(FlipAveraged(tiny)(images), expected, atol=1e-6)
        assert torch.allclose(FlipAveraged(tiny)(images.flip(3)), expected, atol=1e-6)
        assert torch.equal(FlipAveraged(tiny).train()(images), tiny(images))


def test_one_draw_of_the_noise_on_the_image_is_flipped_with_it(images: Tensor) -> None:
    """By a network that is its own mirror image: with noise of its own, the two halves would differ."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0.3, 0), draws=4).eval()
    flipped = rse.flip_averaged(ensemble, images)
    ours, theirs = (each.predict_proba(images, seed=1) for each in (flipped, ensemble))
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_noise_stays_what_it_was(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    before = ensemble.predict_proba(images, seed=1)
    flipped = rse.flip_averaged(ensemble, images)
    stds = [layer.std for layer in rse.noise_layers(flipped).values()]
    assert stds == [0.3, 0.1, 0.1]
    assert next(iter(rse.noise_layers(flipped.model))) == ""
    assert pixel_std(flipped, images) == pytest.approx(0.3)
    assert flipped.draws == 4
    assert not flipped.training
    assert torch.equal(ensemble.predict_proba(images, seed=1), before)
    digests = {model_record(each, "", None).digest for each in (ensemble, flipped)}
    assert len(digests) == 2


def test_of_a_network_without_noise(tiny: nn.Module, images: Tensor) -> None:
    """Whose weights and noise are those of the network alone, but another network."""
    plain = rse.SelfEnsemble(tiny, rse.NoiseConfig(0, 0), draws=1).eval()
    flipped = rse.flip_averaged(plain, images)
    expected = FlipAveraged(tiny)(images).softmax(dim=1)
    assert torch.allclose(flipped.predict_proba(images), expected, atol=1e-6)
    assert model_record(plain, "", None).digest != model_record(flipped, "", None).digest


@pytest.mark.parametrize("normalized", [False, True])
def test_saved_and_loaded(tmp_path: Path, images: Tensor, normalized: bool) -> None:
    network: nn.Module = rse.create_model("small-cnn", width=0.125).eval()
    if normalized:
        network = rse.Normalized(network, 0.5, 0.25)
    chosen = lambda module, fqn: module is network or fqn.endswith(".1.0")  # noqa: E731
    ensemble = rse.SelfEnsemble(network, LEVELS, filter_fn=chosen if normalized else "conv", draws=4).eval()
    flipped = rse.flip_averaged(ensemble, images)
    rse.save(flipped, tmp_path)
    loaded = rse.load(tmp_path)
    config = read_config(tmp_path)
    assert config.flip_average
    assert config.architecture is not None
    assert (config.normalize is not None) == normalized
    assert torch.equal(loaded.predict_proba(images, seed=1), flipped.predict_proba(images, seed=1))
    assert pixel_std(loaded, images) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="averages over flips already"):
        rse.flip_averaged(loaded, images)


def test_of_a_network_of_ones_own(tmp_path: Path, tiny: nn.Module, images: Tensor) -> None:
    flipped = rse.flip_averaged(rse.SelfEnsemble(copy.deepcopy(tiny), LEVELS).eval(), images)
    rse.save(flipped, tmp_path)
    loaded = rse.load(tmp_path, tiny)
    assert torch.equal(loaded.predict_proba(images, seed=1), flipped.predict_proba(images, seed=1))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_optimised_copy_folds_batch_norm_and_keeps_the_noise(
    ensemble: rse.SelfEnsemble, images: Tensor, precision: Precision
) -> None:
    flipped = rse.flip_averaged(ensemble, images)
    fast = optimize(flipped, images, precision)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    ours, theirs = (each.predict_proba(images, seed=1) for each in (fast, flipped))
    assert torch.allclose(ours, theirs, atol=1e-4 if precision == "float32" else 0.03)
    assert pixel_std(fast, images) == pytest.approx(0.3)


def test_what_cannot_be_flipped_is_refused(
    ensemble: rse.SelfEnsemble, tiny: nn.Module, images: Tensor
) -> None:
    behind = rse.SelfEnsemble(rse.Normalized(remove_noise_(copy.deepcopy(tiny)), 0.5, 0.25), LEVELS).eval()
    with pytest.raises(ValueError, match="is behind what scales the image"):
        rse.flip_averaged(behind, images)
    centred = rse.Normalized(remove_noise_(copy.deepcopy(tiny)), 0.0, 0.25)
    with pytest.raises(ValueError, match="is behind what scales the image"):  # whatever is looked at
        rse.flip_averaged(rse.SelfEnsemble(centred, LEVELS).eval(), torch.zeros_like(images))
    with pytest.raises(ValueError, match="optimised copy stays"):
        rse.flip_averaged(optimize(ensemble, images), images)
    sounds = nn.Sequential(nn.Conv1d(1, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()).eval()
    with pytest.raises(ValueError, match=re.escape("(B, C, H, W)")):
        rse.flip_averaged(rse.SelfEnsemble(sounds, LEVELS).eval(), torch.rand(2, 1, 16))


def test_outputs_with_logits_are_averaged_and_others_refused(images: Tensor) -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Answering(nn.Module):
        def forward(self, inputs: Tensor) -> object:
            logits = inputs.mean(dim=(1, 2))
            return Output(logits) if self.training else {"logits": logits}

    network = FlipAveraged(Answering().train())
    network.training = False  # itself alone
    assert torch.allclose(network(images), (images.mean((1, 2)) + images.flip(3).mean((1, 2))) / 2)
    with pytest.raises(TypeError, match="got dict: wrap the network"):
        FlipAveraged(Answering().eval())(images)


def test_modes_and_switches_stay(tiny: nn.Module, images: Tensor) -> None:
    network = nn.Sequential(tiny, nn.Dropout(0.5)).eval()
    network[1].train()
    ensemble = rse.SelfEnsemble(network, LEVELS)
    ensemble.training = False
    flipped = rse.flip_averaged(ensemble, images)
    assert [each.training for each in flipped.modules() if isinstance(each, nn.Dropout)] == [True]
    assert not any(each.training for each in flipped.modules() if isinstance(each, nn.BatchNorm2d))
    next(iter(rse.noise_layers(ensemble).values())).enabled = False
    with pytest.raises(ValueError, match="switched off"):
        rse.flip_averaged(ensemble, images)


@pytest.mark.parametrize("config", [DropoutConfig(p=0.2), RandomFiltersConfig(), BayesianConfig()])
def test_random_layers_are_saved_with_it(tmp_path: Path, images: Tensor, config: AnyRandomness) -> None:
    network = randomise_(rse.create_model("small-cnn", width=0.125), config)
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0, 0), draws=8).eval()
    flipped = rse.flip_averaged(ensemble, images)
    rse.save(flipped, tmp_path)
    loaded = rse.load(tmp_path)
    assert read_config(tmp_path).randomness == randomness_of(network)
    assert torch.equal(loaded.predict_proba(images, seed=1), flipped.predict_proba(images, seed=1))
    assert loaded.predict(images, seed=1).spread.max() > 0


def test_flips_go_around_everything_else(tmp_path: Path, images: Tensor) -> None:
    network = rse.create_model("small-cnn", width=0.125)
    padded = rse.SelfEnsemble(ResizePadNetwork(network, ResizePadConfig(smallest=8, largest=9))).eval()
    with pytest.raises(ValueError, match="resizes its images at random"):
        rse.flip_averaged(padded, images)
    for wrong in (rse.Normalized(FlipAveraged(network), 0.5, 0.25), FlipAveraged(FlipAveraged(network))):
        ensemble = rse.SelfEnsemble(remove_noise_(copy.deepcopy(wrong)), LEVELS).eval()
        with pytest.raises(ValueError, match="goes around Normalized"):
            rse.save(ensemble, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_in_double_precision(tiny: nn.Module, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(tiny.double(), LEVELS).eval()
    assert rse.flip_averaged(ensemble, images).predict(images, seed=1).label.shape == (6,)


def test_several_draws_go_in_one_pass(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    """With noise inside, too, of which each draw has its own for an image and its flip."""
    flipped = rse.flip_averaged(ensemble, images)
    assert Draws(flipped, images[:2]).folds()
    one_by_one = flipped.predict_proba(images[:2], seed=1, max_batch=2)
    assert torch.allclose(flipped.predict_proba(images[:2], seed=1), one_by_one, atol=1e-6)


def test_validate_finds_no_fault(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    flipped = rse.flip_averaged(ensemble, images)
    assert rse.validate(flipped, images) == rse.validate(flipped.model, images) == []


def test_exported(tmp_path: Path, ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    flipped = rse.flip_averaged(ensemble, images)
    path = rse.export_onnx(flipped, tmp_path / "flipped.onnx", images[:2], draws=400)
    ours = rse.OnnxEnsemble(path, threads=1).predict(images).probabilities
    theirs = flipped.predict_proba(images, draws=400, seed=1)
    assert (ours - theirs).abs().max() < 0.05


def test_copies_of_the_optimised_copy_keep_the_noise(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    """Copies of a graph lose its hooks."""
    fast = optimize(rse.flip_averaged(ensemble, images), images, "float32")
    expected = fast.predict_proba(images, seed=1)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin.predict_proba(images, seed=1), expected)
        assert pixel_std(twin, images) == pytest.approx(0.3)
    twin = copy.deepcopy(fast)
    rse.remove_noise_(fast)
    with rse.noise_disabled(twin):
        quiet = twin.predict_proba(images)
    assert torch.allclose(fast.predict_proba(images), quiet, atol=1e-6)
    assert rse.noise_layers(fast) == {}
