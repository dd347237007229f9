"""The tutorial on networks of others: its files and commands as they stand there, on little data.

It needs packages that are no part of this one; where they are not installed, the tests say so.
"""

import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selfensemble.artefacts.storage import read_config

from ..command import call, error, run
from .test_tutorial import DOCS, QUICK, blocks, commands_of

PAGE = (DOCS / "others.md").read_text()
DETECTOR, ONNX = PAGE.split("## An ONNX file")
CHEAP: dict[str, tuple[Any, ...]] = {
    "validate": (),
    "tune": ("--n", 4, "--levels", "0.05:0"),
    "pack": (),
    "evaluate": ("--protocol", "quick.yaml", "--json"),
    "doctor": ("--n", 5, "--steps", 1, "--eot", 1),
    "certify": ("--n", 10, "--max-draws", 100, "--json"),
    "export": (),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with the files of the page."""
    monkeypatch.chdir(tmp_path)
    path, before = list(sys.path), set(sys.modules)
    for name, text in re.findall(r'^```py title="(.*?)"\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE):
        (tmp_path / name).write_text(text)
    (tmp_path / "faces.yaml").write_text(blocks(PAGE, "yaml")[0])
    (tmp_path / "quick.yaml").write_text(QUICK)
    yield tmp_path
    sys.path[:] = path
    for name in {"faces", "converted"} & (set(sys.modules) - before):
        del sys.modules[name]


def printed(page: str) -> dict[str, Any]:
    """What the commands of a page print as JSON, on little data."""
    found = {}
    for command in commands_of(page):
        few = ("--epochs", 1) if "--epochs" in command else ()
        finished = call(*command, *CHEAP[command[0]], *few)
        assert finished.returncode in ((0, 3) if command[0] == "doctor" else (0,)), finished.stderr
        if "--json" in CHEAP[command[0]]:
            found[command[0]] = json.loads(finished.stdout)
    return found


@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_a_detectors_classifier(torchvision: None, here: Path) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("facenet_pytorch", reason="needs pip install --no-deps facenet-pytorch")
    pytest.importorskip("skimage", reason="needs scikit-image")
    runpy.run_path("crops.py")
    found = printed(DETECTOR)
    assert found["evaluate"]["clean"]["accuracy"] >= 0.9  # the real weights, on real crops
    assert found["certify"]["std"] == pytest.approx(0.05)
    assert found["certify"]["curve"][0]["accuracy"] >= 0.9
    inner = {"model.detector.conv2": 0.0, "model.detector.conv3": 0.0}
    assert read_config("noisy").noise == {"": 0.05, **inner}
    crop = next(Path("crops/test/face").iterdir())
    answer = run("predict", crop, "--model", "noisy", "--network", "faces.py:FaceOrNot", "--json").stdout
    assert json.loads(answer)["images"][0]["predictions"][0]["label"] == "face"


@pytest.mark.filterwarnings("ignore")
def test_an_onnx_file(torchvision: None, here: Path) -> None:
    pytest.importorskip("onnx", reason="needs the extra `onnx`")
    pytest.importorskip("torchvision")
    pytest.importorskip("onnx2torch", reason="needs pip install --no-deps onnx2torch")
    runpy.run_path("make_onnx.py")
    found = printed(ONNX)
    assert found["evaluate"]["clean"]["accuracy"] >= 0.8
    assert found["certify"]["std"] == pytest.approx(0.1)
    config = read_config("packed")
    assert config.network is not None
    assert config.network.name == "converted.py:make"
    missing = ("--network-args", '{"file": "nowhere.onnx"}', "--shape", "1x8x8")
    assert "failed to make its network" in error("info", "converted.py:make", *missing)
