"""Inputs that are no images, in saved folders and in commands: waveforms (C, T) and (T,), of any range."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.artefacts.config import ArtefactConfig
from selfensemble.artefacts.storage import read_config
from selfensemble.data.sources import load_data
from tests.command import error, run

FILE = """
import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(1, 4, 5, stride=2)
        self.second = nn.Conv1d(4, 8, 5, stride=2)
        self.head = nn.Linear(8, 2)

    def forward(self, waves):
        waves = waves[:, None] if waves.dim() == 2 else waves
        return self.head(self.second(self.first(waves).relu()).relu().amax(dim=2))


def waves(count=40):
    turns = torch.linspace(0, 6.28, 64) * torch.tensor([3.0, 9.0]).repeat(count // 2)[:, None]
    return 0.8 * torch.sin(turns + torch.rand(count, 1, generator=torch.Generator().manual_seed(0)))


def pairs(split):
    return TensorDataset(waves()[:, None], torch.arange(40) % 2)


class Arrays:
    def __len__(self):
        return 40

    def __getitem__(self, place):
        return waves()[place, None].numpy(), place % 2
"""
SHAPES = [(64,), (1, 64)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with `waves.py` and arrays of its waves in files."""
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    (tmp_path / "waves.py").write_text(FILE)
    sys.modules.pop("waves", None)
    made = waves()
    labels = np.arange(40) % 2
    np.savez("flat.npz", test_images=made.numpy(), test_labels=labels)
    np.savez("channel.npz", test_images=made[:, None].numpy(), test_labels=labels)
    yield tmp_path
    sys.modules.pop("waves", None)
    sys.path[:] = path


def waves() -> Tensor:
    found: Tensor = rse.network_from("waves.py:Net").forward.__globals__["waves"]()
    return found


def saved(folder: Path, shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    network = rse.network_from("waves.py:Net")
    example = waves().view(40, *shape)
    adam = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(40):
        adam.zero_grad()
        nn.functional.cross_entropy(network(example), torch.arange(40) % 2).backward()
        adam.step()
    ensemble = rse.SelfEnsemble(
        network, rse.NoiseConfig(0.1, 0.05), example_inputs=example[:2], bounds=(-1, 1), draws=3
    )
    rse.save(ensemble.eval(), folder, classes=("0", "1"), input_shape=shape)
    return network


@pytest.mark.parametrize("shape", SHAPES)
def test_a_saved_network_on_waveforms_in_commands(here: Path, shape: tuple[int, ...]) -> None:
    saved(here / "saved", shape)
    assert read_config("saved").input_shape == shape
    named = ("--network", "waves.py:Net")
    data = "flat.npz" if len(shape) == 1 else "channel.npz"
    for source in (data, *(("waves.py:pairs", "waves.py:Arrays") if len(shape) == 2 else ())):
        found = json.loads(
            run("evaluate", "saved", *named, "--data", source, "--n", 8, "--c", 0.1, "--out", source[-6:],
                "--json").stdout
        )  # fmt: skip
        assert found["clean"]["accuracy"] > 0.8, source
    certified = run("certify", "saved", *named, "--data", data, "--n", 4, "--max-draws", 200, "--json")
    assert json.loads(certified.stdout)["std"] == pytest.approx(0.1)
    run("validate", "saved", *named)
    run("pack", "saved", "packed", *named, "--data", data, "--precision", "float32")
    card = (here / "packed" / "README.md").read_text()
    assert f"inputs {' x '.join(map(str, shape))}" in card
    assert f"inputs (B, {', '.join(map(str, shape))}) in [-1, 1]" in card
    for command in (("predict", "waves.py", "--model", "saved"), ("serve", "saved")):
        assert "not images of 1 or 3 channels" in error(*command, *named)
    other = "channel.npz" if len(shape) == 1 else "flat.npz"
    assert "is asked for" in error("evaluate", "saved", *named, "--data", other)


def test_a_named_network_is_told_shape_and_bounds(here: Path) -> None:
    network = saved(here / "saved", (64,))
    torch.save(network.state_dict(), "weights.pt")
    told = ("waves.py:Net", "--weights", "weights.pt", "--noise", "0.1:0.05", "--draws", 3)
    asked = ("--data", "channel.npz", "--n", 8, "--c", 0.1, "--json")
    found = json.loads(run("evaluate", *told, *asked, "--shape", "1x64", "--bounds=-1:1").stdout)
    assert found["clean"]["accuracy"] > 0.8
    assert "inputs must lie in [0, 1]" in error("evaluate", *told, *asked, "--shape", "1x64")
    run("pack", *told, "packed", "--data", "flat.npz", "--shape", "64", "--bounds=-1:1")
    assert (read_config("packed").input_shape, read_config("packed").bounds) == ((64,), (-1, 1))
    for wrong in ("1", "1:-1", "0:inf", "a:b", "0:0"):
        assert "--bounds is LOW:HIGH" in error(
            "validate", "waves.py:Net", "--shape", "64", f"--bounds={wrong}"
        )
    for wrong in ("1x1x1x1x64", "0x64", "a", "-64"):
        assert "--shape is that of one input" in error("validate", "waves.py:Net", f"--shape={wrong}")
    own = ("evaluate", "saved", "--network", "waves.py:Net", "--bounds=-1:1", *asked)
    assert "says that itself: leave --bounds out" in error(*own)


def test_arrays_that_are_no_images_are_taken_by_their_shape(here: Path) -> None:
    assert load_data("flat.npz", "test").shape == (64,)
    assert load_data("channel.npz", "test").shape == (1, 1, 64)  # grey images, as long as nobody says more
    assert load_data("channel.npz", "test", shape=(1, 64)).shape == (1, 64)
    assert load_data("waves.py:Arrays", "test", shape=(1, 64)).shape == (1, 64)
    with pytest.raises(ValueError, match=r"has inputs of shape \(64,\), \(1, 64\) is asked for"):
        load_data("flat.npz", "test", shape=(1, 64))
    with pytest.raises(ValueError, match=r"has inputs of shape \(1, 8, 8\), \(8, 8\) is asked for"):
        load_data("digits", "test", shape=(8, 8))
    np.savez("volume.npz", test_images=np.zeros((6, 2, 3, 4, 5), np.float32), test_labels=np.arange(6) % 2)
    assert load_data("volume.npz", "test").shape == (2, 3, 4, 5)
    np.savez("scalars.npz", test_images=np.zeros(6, np.float32), test_labels=np.arange(6) % 2)
    with pytest.raises(ValueError, match=r"of waveforms"):
        load_data("scalars.npz", "test")


@pytest.mark.parametrize("shape", [(), (1, 2, 3, 4, 5), (0, 3), (-1,)])
def test_shapes_that_are_none_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="input_shape"):
        ArtefactConfig(noise={}, draws=1, input_shape=shape)
