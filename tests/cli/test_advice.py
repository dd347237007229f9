"""What commands say of mistakes is about commands: the option, or the key of a recipe, not Python alone."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import selfensemble as rse
from selfensemble.runtime.remarks import Remark
from tests.command import error, run

FILE = """
import os

from torch import nn


class Net(nn.Module):
    def __init__(self, width=4, classes=3):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, width, 3), nn.Linear(width, classes)

    def forward(self, inputs):
        return self.head(self.conv(inputs).relu().amax((2, 3)))


class Resizing(Net):
    def forward(self, inputs):
        return super().forward(nn.functional.interpolate(inputs, scale_factor=2, mode="bilinear"))


class Batches(Net):
    def forward(self, batch):
        return super().forward(batch["x"])


class Unready(Net):
    def forward(self, inputs):
        raise RuntimeError("missing variable DATA_ROOT")
"""
SHAPE = ("--shape", "1x8x8")
QUICK = ("--n", 2, "--max-draws", 20, "--n0", 5, "--json")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    (tmp_path / "nets.py").write_text(FILE)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8))
    for name, images, first in (
        ("good", pixels.astype(np.uint8), 0),
        ("wide", pixels.astype(np.float32), 0),
        ("from1", pixels.astype(np.uint8), 1),
    ):
        labels = np.arange(30) % 3 + first
        np.savez(f"{name}.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    yield tmp_path
    sys.modules.pop("nets", None)
    sys.path[:] = path


def test_the_range_of_inputs(here: Path) -> None:
    command = ("certify", "nets.py:Net", "--data", "wide.npz", *QUICK)
    assert "--bounds LOW:HIGH" in error(*command)
    run(*command, "--bounds", "0:255")


def test_noise_in_front_of_the_whole_network(here: Path) -> None:
    command = ("certify", "nets.py:Resizing", "--data", "good.npz", *QUICK)
    assert "--mean 0 --std 1" in error(*command)
    run(*command, "--mean", 0, "--std", 1)
    assert "--mean 0 --std 1" in run("validate", "nets.py:Resizing", *SHAPE, "--json").stdout


@pytest.mark.parametrize(("name", "cure"), [("Batches", "labels apart"), ("Unready", "Its own code fails")])
def test_a_failed_pass_is_said_alike_by_all_commands(here: Path, name: str, cure: str) -> None:
    said = error("info", f"nets.py:{name}", *SHAPE)
    assert cure in said
    found = run("validate", f"nets.py:{name}", *SHAPE, "--json", expect=3).stdout
    assert said.removeprefix("error: ").partition(". ")[0] in found


def test_other_arguments_than_a_folder_was_saved_with(here: Path) -> None:
    run("pack", "nets.py:Net", "saved", "--data", "good.npz", "--network-args", '{"width": 8}')
    command = ("certify", "saved", "--network", "nets.py:Net", "--data", "good.npz", *QUICK)
    for wrong in ('{"width": 5}', '{"depth": 5}'):
        said = error(*command, "--network-args", wrong)
        assert 'with the arguments {"width": 8}' in said
        assert said.endswith(f"selfensemble {' '.join(map(str, command))}")
        assert error(*command, f"--network-args={wrong}") == said
    run(*command)
    said = error("certify", "saved", "--network", "nets.py:Batches", "--network-args", "{}", *QUICK)
    assert "size mismatch" not in said
    with pytest.raises(ValueError, match=r"it has other shapes of conv.weight \(8, 1, 3, 3\)"):
        rse.load("saved", rse.network_from("nets.py:Net"))


def test_labels_that_do_not_begin_at_0(here: Path) -> None:
    with pytest.warns(Remark, match="labels from 1 to 3, which makes 4 classes, and no image of class 0"):
        assert len(rse.load_data("from1.npz", "train").classes) == 4
    command = ("validate", "nets.py:Net", "--network-args", '{"classes": 4}', "--json", "--data")
    assert run(*command, "from1.npz").stderr.count("no image of class 0") == 1
    assert "no image of" not in run(*command, "good.npz").stderr


@pytest.mark.parametrize("text", ["0.2", "0.2:", "0.2:0.1,0.1:0", "0.2:-1"])
def test_levels_are_written_alike_everywhere(here: Path, text: str) -> None:
    for command in ("validate", "info", "export -o net.onnx"):
        name, *rest = command.split()
        assert "--noise is INIT:INNER" in error(name, "nets.py:Net", *rest, *SHAPE, "--noise", text)
    if "," not in text:
        said = error("tune", "nets.py:Net", "--data", "good.npz", "--levels", text)
        assert re.search("init:inner|must be finite", said)
