"""Networks that put frames of a video into the batch: commands and recipes can draw for each of them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import selfensemble as rse
from selfensemble.artefacts.storage import read_config, save_stopping
from selfensemble.ensemble.stopping import Calibrated
from tests.command import call, error, run

FILE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, videos):
        frames = self.conv(videos.flatten(0, 1)).relu().amax((2, 3))
        return self.head(frames.unflatten(0, videos.shape[:2]).mean(1))


class Videos(torch.utils.data.Dataset):
    def __init__(self):
        self.videos = torch.rand(30, 4, 1, 6, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        return self.videos[index], index % 3
"""
RECIPE = """
data: {source: "videos.py:Videos", validation: 0}
model: {network: "videos.py:Net"}
noise: {init_std: 0.2, inner_std: 0.1, draws: 2, sampling: per_image}
train: {epochs: 2, batch_size: 8}
"""
DATA = ("--data", "videos.py:Videos")
CERTIFY = (*DATA, "--n", 2, "--max-draws", 20, "--n0", 5, "--json")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    (tmp_path / "videos.py").write_text(FILE)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    yield tmp_path
    sys.modules.pop("videos", None)
    sys.path[:] = path


def test_the_message_names_the_option_which_then_works(here: Path) -> None:
    command = ("certify", "videos.py:Net", *CERTIFY)
    assert "--sampling per_image" in error(*command)
    assert json.loads(run(*command, "--sampling", "per_image").stdout)["std"] == pytest.approx(0.2)
    assert "--sampling must be one of" in error(*command, "--sampling", "per-image")


def test_validate_warns_unless_each_frame_has_its_own(here: Path) -> None:
    command = ("validate", "videos.py:Net", *DATA, "--json")
    (issue,) = json.loads(run(*command).stdout)["issues"]
    assert (issue["rule"], issue["where"]) == ("folded-batch", "conv")
    assert "--sampling per_image" in issue["cure"]
    assert json.loads(run(*command, "--sampling", "per_image").stdout) == {"issues": []}


def test_a_recipe_keeps_it_for_resumed_runs_and_in_the_folder(here: Path) -> None:
    train = ("train", "recipe.yaml", *DATA, "--out", "run")
    shared = run(*train, "--set", "noise.sampling=shared")
    assert shared.stderr.count("parts of one input") == 1  # said before hours are spent
    said = "noise.sampling of recipes"
    assert said in shared.stderr
    own = ("--network", "videos.py:Net")
    assert "--sampling per_image" in error("certify", "run", *own, *CERTIFY)
    assert json.loads(run("certify", "run", *own, *CERTIFY, "--sampling", "per_image").stdout)["std"] > 0

    assert said not in run(*train, "--overwrite").stderr
    assert read_config("run").sampling == "per_image"
    assert run(*train, "--resume").returncode == 0
    assert "noise.sampling" in error(*train, "--resume", "--set", "noise.sampling=shared")
    assert call("certify", "run", *own, *CERTIFY, "--out", "radii").returncode == 0


def test_rules_of_another_sampling_are_not_written_into_a_folder(here: Path) -> None:
    run("pack", "videos.py:Net", "packed", *DATA, "--sampling", "per_image", "--precision", "float32")
    ensemble = rse.load("packed", "videos.py:Net")
    assert ensemble.sampling == "per_image"
    ensemble.sampling = "shared"
    rule = rse.calibrate(ensemble, torch.rand(200, 4, 1, 6, 6), epsilon=0.9, most=4)
    assert isinstance(rule, Calibrated)
    with pytest.raises(ValueError, match="--sampling shared"):
        save_stopping("packed", rule)
