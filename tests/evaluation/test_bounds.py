"""Ensembles whose inputs have other bounds than [0, 1]: images of files are scaled to them, everywhere."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.artefacts.storage import read_config
from selfensemble.data.images import ImageData
from selfensemble.evaluation import doctor
from selfensemble.evaluation.balls import in_units, within
from selfensemble.evaluation.eight_bits import in_8_bits, write_images
from selfensemble.evaluation.protocol import Protocol
from selfensemble.evaluation.runner import Evaluation
from selfensemble.serving.app import create_app
from selfensemble.serving.settings import Settings
from tests.command import run

BOUNDS = (-1.0, 1.0)
LABELS = tuple("abcdefghij")


class Moved(nn.Module):
    """A network of images in [0, 1] whose inputs are in [-1, 1]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network((inputs + 1) / 2)
        return logits


@pytest.fixture
def twins() -> tuple[rse.SelfEnsemble, rse.SelfEnsemble, ImageData]:
    """The same ensemble in [0, 1] and in [-1, 1], and images that both get."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 10)
    with torch.no_grad():
        linear.weight.mul_(8)
    network = nn.Sequential(nn.Flatten(), linear)
    unit = rse.SelfEnsemble(nn.Sequential(rse.GaussianNoise(0.1), network), rse.NoiseConfig(0, 0), draws=4)
    moved = rse.SelfEnsemble(
        nn.Sequential(rse.GaussianNoise(0.2), Moved(network)), rse.NoiseConfig(0, 0), draws=4, bounds=BOUNDS
    )
    images = torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = unit.eval().predict(images.float() / 255, draws=200, seed=0).label
    return unit, moved.eval(), ImageData("twelve", images, labels, LABELS)


def protocol(scale: float) -> Protocol:
    attacks = [
        {"attack": "pgd", "norm": "l2", "eps": [0.4 * scale], "steps": 6},
        {"attack": "ddn", "eps": [0.4 * scale], "steps": 6},
    ]
    values: dict[str, Any] = {"name": "twins", "images": 12, "shard": 12, "bits": 8, "attacks": attacks}
    return Protocol.model_validate(values | {"judge": {"seeds": 3, "queries": 3}})


def test_an_evaluation_is_the_same_in_other_units(
    twins: tuple[rse.SelfEnsemble, rse.SelfEnsemble, ImageData], tmp_path: Path
) -> None:
    unit, moved, data = twins
    first = Evaluation(unit, data, protocol(1), tmp_path / "unit")
    second = Evaluation(moved, data.within(BOUNDS), protocol(2), tmp_path / "moved")
    one, two = first.run(), second.run()
    assert (one.clean.accuracy, one.clean.wrong_per_query) == (two.clean.accuracy, two.clean.wrong_per_query)
    for mine, other in zip(one.attacks, two.attacks, strict=True):
        assert other.median_l2 == pytest.approx(2 * mine.median_l2, rel=0.05)
        if other.eps is not None:
            assert other.max_linf <= 2
            assert other.accuracy == pytest.approx(mine.accuracy, abs=0.17)
    key = two.attacks[0].key
    images = second.shards.read(0, key).adversarial
    assert images.min() >= -1
    assert images.max() <= 1
    assert images.min() < -0.5
    levels = (images + 1) / 2 * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    write_images(second.shards, tmp_path / "images", second.bounds)
    with Image.open(tmp_path / "images" / key / "0000003.png") as image:
        assert np.array_equal(np.asarray(image), levels[3, 0].round().numpy())


def test_the_doctor_finds_the_same_in_other_units(
    twins: tuple[rse.SelfEnsemble, rse.SelfEnsemble, ImageData],
) -> None:
    unit, moved, data = twins
    budget: dict[str, Any] = {"norm": "l2", "steps": 6, "eot": 3, "images": 12, "seed": 1}
    one = doctor(unit, data.inputs(), data.labels, eps=0.4, **budget)
    two = doctor(moved, data.within(BOUNDS).inputs(), data.labels, eps=0.8, **budget)
    assert [(check.name, check.passed) for check in two] == [(check.name, check.passed) for check in one]
    assert all(check.figure != "could not be done" for check in two)
    found = {check.name: check for check in two}
    assert found["input range"].figure.startswith("100.0 % on [-1, 1], ")
    assert found["success grows with eps"].figure.endswith("at 4")  # a quarter of the diameter, 2 * 8
    assert "in [-1, 1] pixels by channel: 0.2" in found["where noise enters"].figure


class Rounded(nn.Module):
    """Images in 4 levels: no gradient passes."""

    def __init__(self, network: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.network, self.low, self.high = network, low, high

    def forward(self, inputs: Tensor) -> Tensor:
        levels = ((inputs - self.low) / (self.high - self.low) * 3).round() / 3
        logits: Tensor = self.network(self.low + (self.high - self.low) * levels)
        return logits


class Bytes(nn.Module):
    """A network of images from 0 to 255."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(inputs / 255)
        return logits


@pytest.mark.parametrize("fault", ["gradients", "input range"])
def test_the_doctor_finds_faults_in_other_units(
    twins: tuple[rse.SelfEnsemble, rse.SelfEnsemble, ImageData], fault: str
) -> None:
    unit, moved, data = twins
    verdicts = []
    for ensemble, bounds in ((unit, (0.0, 1.0)), (moved, BOUNDS)):
        model = Bytes(unit.model) if fault == "input range" else Rounded(ensemble.model, *bounds)
        faulty = rse.SelfEnsemble(model, rse.NoiseConfig(0, 0), draws=4, bounds=bounds).eval()
        inputs, labels = data.within(bounds).inputs(), data.labels
        if fault == "gradients":
            labels = faulty.predict(inputs, draws=200, seed=0).label
        eps = 0.4 * (bounds[1] - bounds[0])
        checks = doctor(faulty, inputs, labels, norm="l2", eps=eps, steps=2, eot=2, images=12, seed=1)
        verdicts.append({check.name: check for check in checks})
    found = [verdict[fault] for verdict in verdicts]
    assert [check.passed for check in found] == [False, False]
    if fault == "input range":
        assert "expects [0, 255] images" in found[1].advice
        assert "units of [-1, 1] pixels" in found[1].advice
    else:
        assert [check.passed for check in verdicts[0].values()] == [
            check.passed for check in verdicts[1].values()
        ]


def test_radii_are_those_of_the_bounds(
    twins: tuple[rse.SelfEnsemble, rse.SelfEnsemble, ImageData],
) -> None:
    _, moved, data = twins
    inputs = data.within(BOUNDS).inputs()
    with pytest.raises(ValueError, match=r"at most 2, the linf diameter of \[-1, 1\]"):
        doctor(moved, inputs, data.labels, eps=2.5)
    with pytest.raises(ValueError, match=r"inputs must lie in \[-1, 1\]"):
        doctor(moved, 2 * inputs, data.labels)
    with pytest.raises(ValueError, match=r"inputs must lie in \[0, 1\]"):
        doctor(moved.model, inputs, data.labels)


def test_an_evaluation_with_checks_in_other_units(
    twins: tuple[rse.SelfEnsemble, rse.SelfEnsemble, ImageData], tmp_path: Path
) -> None:
    """A radius beyond that of [0, 1] among them."""
    _, moved, data = twins
    attacks = [{"attack": "pgd", "norm": "linf", "eps": [0.2, 0.4, 1.5], "steps": 2}]
    values = {"name": "checked", "images": 12, "shard": 12, "checks": True, "attacks": attacks}
    judged = {"judge": {"seeds": 2, "queries": 2}}
    plan = Protocol.model_validate(values | judged)
    results = Evaluation(moved, data.within(BOUNDS), plan, tmp_path / "run").run()
    assert results.checks is not None
    assert len(results.checks) > 10
    assert all(check.figure != "could not be done" for check in results.checks)


def test_images_come_into_balls_and_levels_of_any_range() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(256, (5, 1, 6, 6), generator=generator) / 127.5 - 1
    found = (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
    for farther in (False, True):
        images = within(found, x, "l2", 0.8, farther, BOUNDS)
        unit = within(in_units(found, BOUNDS), in_units(x, BOUNDS), "l2", 0.4, farther)
        torch.testing.assert_close(images, 2 * unit - 1)
        assert ((images - x).flatten(1).norm(dim=1) <= 0.8 * (1 + 1e-4)).all()
    rounded = in_8_bits(images, x, "l2", 0.8, BOUNDS)
    torch.testing.assert_close(rounded, 2 * in_8_bits(unit, in_units(x, BOUNDS), "l2", 0.4) - 1)


def test_images_of_256_levels_are_scaled_and_floats_are_not(
    twins: tuple[rse.SelfEnsemble, rse.SelfEnsemble, ImageData],
) -> None:
    *_, data = twins
    torch.testing.assert_close(data.within(BOUNDS).inputs(), 2 * data.inputs() - 1)
    (batch, _), *_ = data.within(BOUNDS).batches(torch.arange(4), 2)
    torch.testing.assert_close(batch, 2 * data.inputs(slice(2)) - 1)
    assert data.within(None).inputs().min() >= 0
    floats = ImageData("floats", data.inputs(), data.labels, LABELS).within(BOUNDS)
    torch.testing.assert_close(floats.inputs(), data.inputs())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An ensemble in [-1, 1] that a command loads, and an image."""
    trained = rse.load("digits-rse")
    ensemble = rse.SelfEnsemble(trained.model, None, draws=4, bounds=BOUNDS).eval()
    architecture = read_config("digits-rse").architecture
    rse.save(ensemble, tmp_path / "model", architecture=architecture, input_shape=(1, 8, 8))
    image = (255 * rse.load_data("digits", "test").inputs(slice(1))[0, 0]).round().to(torch.uint8)
    Image.fromarray(image.numpy()).save(tmp_path / "image.png")
    return tmp_path


def expected(folder: Path) -> tuple[Tensor, Tensor]:
    """Of the image as it should be seen, and of the image as it was: probabilities."""
    with Image.open(folder / "image.png") as image:
        pixels = torch.from_numpy(np.array(image))[None, None].float() / 255
    ensemble = rse.load(folder / "model")
    right, wrong = (ensemble.predict_proba(each, draws=400, seed=0)[0] for each in (2 * pixels - 1, pixels))
    assert (right - wrong).abs().max() > 0.01
    return right, wrong


def test_predict_scales_images_to_the_bounds(folder: Path) -> None:
    asked = ("predict", folder / "image.png", "--model", folder / "model", "--draws", 400, "--top", 10)
    (found,) = json.loads(run(*asked, "--seed", 0, "--json").stdout)["images"]
    right, wrong = expected(folder)
    seen = {entry["label"]: entry["probability"] for entry in found["predictions"]}
    values = torch.tensor([seen[str(label)] for label in range(10)])
    assert (values - right).abs().max() < 0.3 * (values - wrong).abs().max()


def test_the_server_scales_images_to_the_bounds(folder: Path) -> None:
    ensemble = rse.load(folder / "model")
    right, wrong = expected(folder)
    text = base64.b64encode((folder / "image.png").read_bytes()).decode()
    settings = Settings.model_validate({"attacks": True})
    with TestClient(create_app(ensemble, LABELS, (1, 8, 8), settings)) as http:
        answer = http.post("/v1/predict", json={"images": [text], "draws": 400, "top": 10}).json()
        (image,) = answer["images"]
        seen = {each["label"]: each["probability"] for each in image["classes"]}
        values = torch.tensor([seen[label] for label in LABELS])
        assert (values - right).abs().max() < 0.3 * (values - wrong).abs().max()
        asked = {"image": text, "target": "plain", "attack": "pgd", "eps": 1.0}
        found = http.post("/v1/attack", json=asked).json()
    # Distances of the page are those of images in [0, 1], and the pictures are whole.
    assert found["l2"] <= 1.0 + 0.05
    assert found["l2"] > 0.8
    with (
        Image.open(io.BytesIO(base64.b64decode(found["before"]))) as before,
        Image.open(folder / "image.png") as original,
    ):
        assert np.array_equal(np.asarray(before), np.asarray(original))


def test_commands_evaluate_within_the_bounds(folder: Path) -> None:
    protocol_file = folder / "short.yaml"
    protocol_file.write_text("images: 8\nattacks: [{attack: pgd, norm: l2, eps: [1.0], steps: 2}]\n")
    out = folder / "run"
    run("evaluate", folder / "model", "--protocol", protocol_file, "--data", "digits", "--out", out)
    results = json.loads((out / "results.json").read_text())
    ensemble, test = rse.load(folder / "model"), rse.load_data("digits", "test")
    inputs, labels = 2 * test.inputs(slice(8)) - 1, test.labels[:8]
    wrong = rse.judge(ensemble, inputs, inputs, labels, queries=50, seed=0).wrong_per_query.mean()
    assert results["clean"]["wrong_per_query"] == pytest.approx(float(wrong), abs=0.1)
    assert results["attacks"][0]["max_linf"] > 0
