"""Random resize-and-pad: closed forms, its distribution, and everything that must know it is random.

Statistical tests use fixed seeds and 4 standard errors (two-sided error rate 6e-5 each).
"""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import selfensemble as rse
from selfensemble.artefacts.config import Architecture
from selfensemble.artefacts.storage import read_config
from selfensemble.evaluation.doctor.examination import doctor
from selfensemble.evaluation.identity import model_record
from selfensemble.noise.injection import make_static_
from selfensemble.noise.resize_pad import ResizePad, ResizePadConfig, ResizePadNetwork, resize_and_place
from selfensemble.noise.streams import Sampling
from selfensemble.training.recipe import load_recipe
from selfensemble.training.trainer import Trainer

CONFIG = ResizePadConfig(smallest=8, largest=10)
ARCHITECTURE = Architecture(name="small-cnn", classes=10, channels=1, width=0.25)


@pytest.fixture
def ensemble() -> rse.SelfEnsemble:
    network = rse.create_model(**ARCHITECTURE.model_dump())
    return rse.SelfEnsemble(ResizePadNetwork(network, CONFIG), rse.NoiseConfig(0, 0), draws=4).eval()


@pytest.fixture
def digits() -> Tensor:
    return rse.load_data("digits", "test").inputs(slice(6))


def boxes(layer: ResizePad, count: int) -> Tensor:
    """(count, 4): top, bottom, left and right of white images, exclusive ends."""
    padded = layer(torch.ones(count, 1, 8, 8))[:, 0]
    rows, columns = padded.amax(dim=2) > 0, padded.amax(dim=1) > 0
    ends = [
        torch.stack([line.int().argmax(dim=1), line.shape[1] - line.flip(1).int().argmax(dim=1)])
        for line in (rows, columns)
    ]
    return torch.cat(ends).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_image_is_resized_as_torch_does_and_placed(dtype: torch.dtype) -> None:
    images = torch.rand(4, 3, 8, 8, dtype=dtype)
    placements = [(8, 0, 2), (9, 1, 0), (10, 0, 0), (5, 4, 3)]
    found = resize_and_place(images, torch.tensor(placements, dtype=torch.float32), 10)
    for image, padded, (side, top, left) in zip(images, found, placements, strict=True):
        resized = functional.interpolate(image[None], size=side, mode="bilinear")[0]
        padding = (left, 10 - side - left, top, 10 - side - top)
        torch.testing.assert_close(padded, functional.pad(resized, padding), rtol=1e-4, atol=1e-5)


def test_sides_and_places_are_uniform() -> None:
    layer, count = ResizePad(CONFIG), 20_000
    with rse.noise_draw(seed=3):
        top, bottom, left, right = boxes(layer, count).unbind(dim=1)
    side = bottom - top
    assert torch.equal(side, right - left)
    expected = {
        (side_, top_, left_): 1 / 3 / (11 - side_) ** 2
        for side_ in (8, 9, 10)
        for top_ in range(11 - side_)
        for left_ in range(11 - side_)
    }
    for (side_, top_, left_), share in expected.items():
        met = ((side == side_) & (top == top_) & (left == left_)).double().mean()
        assert abs(float(met) - share) < 4 * math.sqrt(share * (1 - share) / count)


@pytest.mark.parametrize("sampling", ["per_image", "shared"])
def test_one_draw_a_pass_where_sampling_is_shared(sampling: Sampling) -> None:
    layer = ResizePad(ResizePadConfig(smallest=8, largest=40), sampling=sampling).eval()
    first, *others = (boxes(layer, 20) for _ in range(9))
    assert (len(first.unique(dim=0)) == 1) == (sampling == "shared")
    # Of the largest sides there are few placements: one draw in hundreds is that before it, eight never are.
    assert not all(torch.equal(first, other) for other in others)
    assert len(boxes(layer.train(), 20).unique(dim=0)) > 1


def test_seeds_repeat_and_the_callers_random_state_is_left_alone(ensemble: rse.SelfEnsemble) -> None:
    images = torch.rand(6, 1, 8, 8)
    state = torch.get_rng_state()
    answers = [ensemble.predict_proba(images, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])
    # Shared, a draw does not depend on the batch.
    torch.testing.assert_close(ensemble.predict_proba(images[2:3], seed=1), answers[0][2:3])
    torch.manual_seed(0)
    one = ensemble.draw_logits(images)
    torch.manual_seed(0)
    others = [ensemble.draw_logits(images) for _ in range(8)]
    assert not all(torch.equal(one, other) for other in others)
    torch.set_rng_state(state)
    ensemble.predict_proba(images)
    assert torch.equal(torch.get_rng_state(), state)


def test_switched_off_the_image_stands_in_the_middle_unchanged(ensemble: rse.SelfEnsemble) -> None:
    images = torch.rand(2, 1, 8, 8)
    random = [ensemble.is_random]
    with rse.noise_disabled(ensemble):
        random.append(ensemble.is_random)
        middle = ensemble.get_submodule("model.resize_pad")(images)
        assert torch.equal(middle, functional.pad(images, (1, 1, 1, 1)))
        expected = ensemble.draw_logits(images)
    random.append(ensemble.is_random)
    assert random == [True, False, True]
    static = make_static_(copy.deepcopy(ensemble))
    assert isinstance(static, rse.SelfEnsemble)
    assert not static.is_random
    torch.testing.assert_close(static.draw_logits(images), expected)


def test_gradients_reach_the_image() -> None:
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    placement = torch.tensor([[9.0, 1.0, 0.0], [8.0, 0.0, 2.0]])
    assert torch.autograd.gradcheck(lambda x: resize_and_place(x, placement, 10), (images,))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_compiled_whole_equals_eager_draw_by_draw(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    config = ResizePadConfig(smallest=8, largest=16)
    ensemble = rse.SelfEnsemble(ResizePadNetwork(network, config), draws=2).eval()
    compiled = torch.compile(ensemble, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        with rse.noise_draw(seed):
            eager = ensemble(images)
        with rse.noise_draw(seed):
            torch.testing.assert_close(compiled(images), eager)


def test_round_trip(ensemble: rse.SelfEnsemble, digits: Tensor, tmp_path: Path) -> None:
    rse.save(ensemble, tmp_path, architecture=ARCHITECTURE)
    config = read_config(tmp_path)
    assert (config.resize_pad, config.is_random) == (CONFIG, True)
    loaded = rse.load(tmp_path)
    assert torch.equal(loaded.predict_proba(digits, seed=2), ensemble.predict_proba(digits, seed=2))
    rse.save(loaded, tmp_path / "again", architecture=ARCHITECTURE)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_network_saved_with_noise_as_well(digits: Tensor, tmp_path: Path) -> None:
    network = ResizePadNetwork(rse.create_model(**ARCHITECTURE.model_dump()), CONFIG)
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0.2, 0.1), example_inputs=digits).eval()
    rse.save(ensemble, tmp_path, architecture=ARCHITECTURE)
    assert list(read_config(tmp_path).noise) == ["0", "3", "7", "10"]
    loaded = rse.load(tmp_path)
    assert torch.equal(loaded.predict_proba(digits, seed=2), ensemble.predict_proba(digits, seed=2))


def test_wrong_settings_and_images_are_named() -> None:
    with pytest.raises(ValueError, match="smallest must be below largest"):
        load_recipe("digits-plain", ["resize_pad={smallest: 10, largest: 10}"])
    with pytest.raises(ValueError, match="known here: smallest, largest"):
        load_recipe("digits-plain", ["resize_pad={smallest: 8, largest: 10, place: 1}"])
    for shape in ((2, 1, 8, 9), (2, 1, 11, 11), (1, 8, 8)):
        with pytest.raises(ValueError, match="square images of at most 10"):
            ResizePad(CONFIG)(torch.rand(shape))


def test_a_recipe_trains_and_the_doctor_passes_it(tmp_path: Path) -> None:
    overrides = [
        "resize_pad={smallest: 8, largest: 10}",
        "noise.draws=5",
        "train.epochs=6",
        "model.width=0.5",
    ]
    results = Trainer(load_recipe("digits-plain", overrides), tmp_path).run()
    assert results["metrics"]["test"]["accuracy"] > 0.9
    model = rse.load(tmp_path)
    assert set(model.state_dict()) == {
        f"model.network.{key}" for key in rse.create_model("small-cnn").state_dict()
    }
    record = model_record(model, "resized", None)
    assert set(record.noise.values()) == {0.0}
    assert "8 to 10" in record.randomness[0]
    static = model_record(make_static_(copy.deepcopy(model)), "static", None)  # type: ignore[arg-type]
    assert static.digest != record.digest
    test = rse.load_data("digits", "test")
    images, labels = test.inputs(slice(80)), test.labels[:80]
    checks = {
        check.name: check
        for check in doctor(
            model, images, labels, eps=0.1, steps=10, eot=5, images=20, expect_random=True, seed=0
        )
    }
    assert not [name for name, check in checks.items() if check.passed is False], checks
    with rse.noise_disabled(model):
        off = doctor(model, images, labels, eps=0.1, steps=2, eot=1, images=10)
    assert [check.name for check in off if check.passed is False and "random layers" in check.figure]


def test_any_network_can_stand_behind_it(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    ensemble = rse.SelfEnsemble(ResizePadNetwork(network, CONFIG)).eval()
    assert rse.noise_layers(ensemble) == {}  # no noise beside it unless levels are given
    assert ensemble.is_random
    assert not torch.equal(ensemble(images), ensemble(images))
