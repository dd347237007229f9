"""Images that cannot be used: every command works with the others, says so, and so does its exit status."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import selfensemble as rse
from selfensemble.artefacts.config import Architecture

from ..command import call

LEVEL = {"bright": 180, "dark": 0}
QUICK = "attacks: [{attack: fgsm, eps: [0.01]}]\njudge: {queries: 1, seeds: 1}\nchecks: false\nimages: 10\n"
RECIPE = """
data: {source: PLACE, size: 8}
model: {name: small-cnn, width: 0.1}
noise: {init_std: 0.1, inner_std: 0.1, draws: 2}
train: {epochs: 1, batch_size: 16, lr: 0.01, precision: "no"}
"""


def photos(root: Path, damaged: int) -> Path:
    chance = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, level in LEVEL.items():
            for number in range(16 if split == "train" else 105):
                file = root / split / name / f"{number:03}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(chance.integers(0, 70, (8, 8, 3), dtype=np.uint8) + np.uint8(level)).save(
                    file
                )
        for number in range(damaged):
            (root / split / "dark" / f"damaged {number}.png").write_bytes(b"nothing")
        (root / split / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("left-out")
    photos(root / "some", 7)
    photos(root / "none", 0)
    (root / "quick.yaml").write_text(QUICK)
    torch.manual_seed(0)
    network = rse.create_model("small-cnn", classes=2, channels=3, width=0.1)
    made = Architecture.of(network)
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0.1, 0), draws=2)
    rse.save(ensemble, root / "saved", classes=("bright", "dark"), input_shape=(3, 8, 8), architecture=made)
    for kind in ("some", "none"):
        (root / f"{kind}.yaml").write_text(RECIPE.replace("PLACE", json.dumps(str(root / kind))))
    return root


COMMANDS = {
    "evaluate": ("evaluate", "saved", "--protocol", "quick.yaml", "--json"),
    "certify": ("certify", "saved", "--n", "4", "--max-draws", "20", "--n0", "5", "--json"),
    "tune": ("tune", "saved", "--n", "10", "--levels", "0.1:0", "--json"),
    "calibrate": ("calibrate", "saved", "--n", "200", "--epsilon", "0.5", "--json"),
    "pack": ("pack", "saved", "packed"),
    "validate": ("validate", "saved", "--json"),
}


@pytest.mark.parametrize("name", [*COMMANDS, "train"])
@pytest.mark.parametrize("kind", ["some", "none"])
def test_the_exit_status_says_that_images_were_left_out(
    name: str, kind: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = {"saved": place / "saved", "quick.yaml": place / "quick.yaml"}
    if name == "calibrate":  # which writes there
        known["saved"] = Path("own")
        (tmp_path / "own").mkdir()
        for file in (place / "saved").iterdir():
            (tmp_path / "own" / file.name).write_bytes(file.read_bytes())
    if name == "train":
        finished = call("train", place / f"{kind}.yaml", "--out", "out", "--json")
    else:
        words = [known.get(word, word) for word in COMMANDS[name]]
        finished = call(*words, "--data", place / kind)
    assert finished.returncode == (2 if kind == "some" else 0), finished.stderr
    assert finished.stdout
    if name != "pack":
        json.loads(finished.stdout)
    assert "error:" not in finished.stderr
    lines = [line for line in finished.stderr.splitlines() if "cannot be used" in line]
    # In `train` both splits have damaged files, whose names differ in nothing.
    splits = [" (training split)", " (test split)"] if name == "train" else [""]
    assert len(lines) == len(splits) * (kind == "some")
    for line, split in zip(lines, splits, strict=False):
        assert line.startswith(
            f"7 of {place / kind}{split} cannot be used and left out: dark/damaged 0.png: "
        )
        assert line.endswith("; and 2 more (--debug lists all)")
        assert "notes.txt" not in line


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the library, which --debug shows
def test_where_the_whole_list_is(place: Path, tmp_path: Path) -> None:
    command = (
        "evaluate", place / "saved", "--protocol", place / "quick.yaml", "--data", place / "some",
        "--out", tmp_path,
    )  # fmt: skip
    finished = call(*command, "--debug")
    assert finished.returncode == 2
    assert finished.stderr.count("damaged") >= 7
    assert " more (" not in finished.stderr
    skipped = json.loads((tmp_path / "results.json").read_text())["data"]["skipped"]
    assert sum(each.startswith("dark/damaged") for each in skipped) == 7


def test_a_fault_that_doctor_finds_is_told_first(place: Path) -> None:
    quick = ("--n", 8, "--steps", 2, "--eot", 2, "--json")
    finished = call("doctor", place / "saved", "--data", place / "some", *quick)
    failed = any(check["passed"] is False for check in json.loads(finished.stdout)["checks"])
    assert finished.returncode == (3 if failed else 2)
