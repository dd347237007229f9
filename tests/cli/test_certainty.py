"""Rules that the command calibrates on a saved ensemble, and answers by them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from scipy import stats

import selfensemble as rse
from selfensemble.artefacts.storage import save_stopping
from selfensemble.artefacts.zoo import locate
from selfensemble.ensemble.stopping import Calibrated

from ..command import error, run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Handwritten digits, in a folder of its own."""
    shutil.copytree(locate("digits-rse"), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    file = tmp_path / "digit.png"
    Image.fromarray(rse.load_data("digits", "test").images[0, 0].numpy()).save(file)
    return file


def test_sets_that_are_calibrated_by_the_command_hold_the_right_label(model: Path, digit: Path) -> None:
    """The last 200 test images calibrate, the first 250 are asked.

    How many of these hold their label has a known law, a beta-binomial one: of the share that the threshold
    covers, and of images given that. At level 1e-3 in each direction; more than promised would be no merit.
    """
    asked = ("--sets", "--alpha", 0.2, "--n-images", 200, "--seed", 0, "--precision", "bf16")
    told = run("calibrate", model, *asked, "--json").stdout
    rule = json.loads(told)
    saved = json.loads((model / "config.json").read_text())
    assert (saved["sets"], saved["stopping"]) == (rule, None)
    assert (rule["images"], rule["draws"], rule["precision"]) == (200, 20, "bf16")
    data = rse.load_data("digits", "test")
    images, labels = data.inputs(slice(250)), data.labels[:250]
    sets = rse.ConformalSets.of(rse.optimize(rse.load(model), images, "bf16"))
    held = sets.predict(images, seed=1)
    right = int(held.gather(1, labels[:, None]).sum())
    law = stats.betabinom(250, 161, 40)  # the threshold is the 161st of 200 falling values
    assert law.ppf(0.001) <= right <= law.ppf(0.999)
    assert held.sum(dim=1).double().mean() < 2

    told = run("predict", "--model", model, digit, "--sets", "--seed", 1, "--json").stdout
    (record,) = json.loads(told)["images"]
    assert record["set"] == [str(label) for label in torch.nonzero(held[0])[:, 0].tolist()]
    assert "possible" in run("predict", "--model", model, digit, "--sets").stdout
    assert "set" not in json.loads(run("predict", "--model", model, digit, "--json").stdout)["images"][0]


def test_sets_of_moved_images(model: Path, digit: Path) -> None:
    arguments = ("calibrate", model, "--sets", "--radius", 0.2, "--draws", 50, "--n-images", 40)
    line = run(*arguments, "--precision", "float32").stdout
    assert "90.0% of images like the 40 calibrated on, moved by up to 0.2 in L2; 50 draws" in line
    rule = json.loads((model / "config.json").read_text())["sets"]
    assert (rule["alpha"], rule["radius"], rule["std"]) == (0.1, 0.2, pytest.approx(0.47))
    told = run("predict", "--model", model, digit, "--sets", "--json").stdout
    assert len(json.loads(told)["images"][0]["set"]) >= 1


def test_calibrations_that_cannot_be(model: Path, digit: Path) -> None:
    before = (model / "config.json").read_bytes()
    assert "--alpha is of --sets: add it" in error("calibrate", model, "--alpha", 0.1)
    assert "--epsilon is not of --sets: leave it out" in error("calibrate", model, "--sets", "--epsilon", 0.1)
    assert "want 9 images or more, got 8" in error("calibrate", model, "--sets", "--n-images", 8)
    assert "200 images or more, got 8" in error("calibrate", model, "--n-images", 8)
    assert "radius must be" in error("calibrate", model, "--sets", "--radius", -1, "--n-images", 50)
    assert "selfensemble calibrate --sets" in error("predict", "--model", model, digit, "--sets")
    assert (model / "config.json").read_bytes() == before


def test_rules_of_two_precisions_are_not_followed_at_once(model: Path, digit: Path) -> None:
    run("calibrate", model, "--sets", "--precision", "float32", "--n-images", 40)
    rule = Calibrated(
        thresholds=(0.5, 0.0), epsilon=0.1, delta=0.05, mean_draws=1.5, disagreement=0.05, images=500,
        reference_draws=200, precision="bf16",
    )  # fmt: skip
    save_stopping(model, rule)
    for asked in (("--sets",), ("--stop", "calibrated")):
        run("predict", "--model", model, digit, *asked)
    line = error("predict", "--model", model, digit, "--sets", "--stop", "calibrated")
    assert "in other precisions" in line


def test_certificates_on_the_grid_of_images(model: Path, tmp_path: Path) -> None:
    arguments = ("certify", model, "--n-images", 4, "--n", 100, "--out", tmp_path / "out")
    results = json.loads(run(*arguments, "--grid", "--json").stdout)
    assert results["settings"]["grid"] is True
    assert results["mean_radius"] > 0
    assert "differs in settings.grid" in error(*arguments)
