"""`info`: what is there, told without loading PyTorch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from selfensemble.artefacts.config import ArtefactConfig
from selfensemble.artefacts.outline import Outline, read_as
from selfensemble.artefacts.storage import read_config
from selfensemble.artefacts.zoo import zoo
from selfensemble.cli.inventory import accelerators, inventory
from selfensemble.evaluation.protocol import load_protocol, shipped_protocols
from selfensemble.networks.libraries import LIBRARIES
from selfensemble.networks.models import MODELS
from selfensemble.networks.names import LIBRARY_NAMES, MODEL_NAMES
from selfensemble.runtime.provenance import provenance
from selfensemble.training.recipe import load_recipe, shipped_recipes

from ..command import error, run

GOLDEN = Path(__file__).parents[1] / "golden" / "v1"


def test_what_is_loaded(tmp_path: Path) -> None:
    """For `info` no PyTorch, for `predict` nothing else that takes as long."""
    Image.new("L", (8, 8), 128).save(tmp_path / "picture.png")
    script = (
        "import sys\n"
        "from selfensemble.__main__ import main\n"
        "for more in ([], ['--json'], ['digits-rse'], ['digits-rse', '--json']):\n"
        "    sys.argv = ['selfensemble', 'info', *more]\n"
        "    try: main()\n"
        "    except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "    loaded = {'torch', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "    assert not loaded, (more, loaded)\n"
        f"picture = {str(tmp_path / 'picture.png')!r}\n"
        "sys.argv = ['selfensemble', 'predict', picture, '--model', 'digits-rse']\n"
        "try: main()\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "slow = {'scipy', 'accelerate', 'datasets', 'pandas', 'sklearn', 'matplotlib', 'lightning', 'timm'}\n"
        "loaded = slow & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "digits-rse" in finished.stdout


@pytest.mark.parametrize("saved", [*zoo(), GOLDEN], ids=str)
def test_the_outline_of_a_saved_ensemble_is_what_stands_in_it(saved: str | Path) -> None:
    whole = read_config(saved).model_dump(mode="json")
    outline = read_as(Outline, saved).model_dump(mode="json")
    assert outline == whole
    assert list(outline) == list(whole) == list(ArtefactConfig.model_fields)


def test_what_is_installed_is_what_pytorch_would_say() -> None:
    told, known = inventory(), provenance()
    assert tuple(told["models"]) == tuple(MODELS) == MODEL_NAMES
    assert tuple(LIBRARIES) == LIBRARY_NAMES
    assert told["versions"] == known["versions"]
    assert told["recipes"] == {name: load_recipe(name).description for name in shipped_recipes()}
    assert told["protocols"] == {name: load_protocol(name).description for name in shipped_protocols()}
    assert told["zoo"] == list(zoo())
    for name in ("cpu", "cores"):
        assert told["hardware"][name] == known["hardware"][name]
    assert json.loads(run("info", "--json").stdout)["models"] == list(MODELS)


def test_threads_are_told_where_the_environment_says_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert inventory()["hardware"]["threads"] == 3
    for unclear in ("", "0", "many", "-1"):
        monkeypatch.setenv("OMP_NUM_THREADS", unclear)
        assert "threads" not in inventory()["hardware"]


def test_accelerators_are_those_that_the_driver_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert accelerators("2.9.0", tmp_path / "none") is None
    for number in range(2):
        card = tmp_path / f"0000:0{number}:00.0"
        card.mkdir()
        (card / "information").write_text(f"Model: \t\t NVIDIA X{number}\nIRQ:   \t\t 5\n")
    assert accelerators("2.9.0+cu128", tmp_path) == "NVIDIA X0, NVIDIA X1"
    assert accelerators("2.9.0+cpu", tmp_path) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert accelerators("2.9.0", tmp_path) is None


@pytest.mark.parametrize(
    "damage",
    [
        {"draws": 0},
        {"noise": {"0": -1}},
        {"sets": 3},
        {"randomness": "dropout"},
        {"bounds": [0]},
        {"architecture": {"name": "vgg16"}},
        {"network": {"name": "evil:make; rm -r ."}},
        {"later": 1},
        {"format_version": 99},
    ],
    ids=str,
)
def test_a_damaged_folder_is_refused(damage: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    said = error("info", tmp_path / "model")
    assert "config.json" in said
    assert next(iter(damage)) in said or "version" in said
