"""The tutorials on photos and on audio: their files and commands as they stand there, on little data."""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from selfensemble.artefacts.storage import read_config
from selfensemble.evaluation import protocol as protocols
from selfensemble.networks.naming import network_from

from ..command import call, error, run

DOCS = Path(__file__).parents[2] / "docs"
PAGE, AUDIO = ((DOCS / name).read_text() for name in ("photos.md", "audio.md"))
SHORT = (
    "data.size=24", "data.workers=1", "train.epochs=2", "train.batch_size=16", "train.warmup_epochs=0.5",
    "noise.draws=2", "train.precision=no", "model.arguments={width: 4}", "train.checkpoint_steps=2",
)  # fmt: skip
CHEAP = {
    "evaluate": ["--c", "1", "--n", "20", "--protocol", "paper"],
    "doctor": ["--n", "5", "--steps", "1", "--eot", "1"],
    "certify": ["--n", "4", "--max-draws", "100"],
    "predict": [],
}  # fmt: skip

QUICK = """
images: 10
judge: {seeds: 1, queries: 1}
checks: false
attacks: [{attack: pgd, norm: linf, eps: [0.02], steps: 3}]
"""


@pytest.fixture(autouse=True)
def _nothing_stays_imported() -> Iterator[None]:
    """Modules of the pages' files would be those of other tests' files of that name."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in ("mynets", "tones"):
        sys.modules.pop(name, None)


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}[^\n]*\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def commands_of(page: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in page.splitlines() if line.startswith("selfensemble ")]


def photos_of_pets(here: Path, count: int) -> None:
    """So many of each, reddish and bluish, small, of a size each."""
    chance = np.random.default_rng(0)
    for name, channel in (("cat", 0), ("dog", 2)):
        (here / "photos" / name).mkdir(parents=True)
        for number in range(count):
            pixels = chance.integers(0, 100, (*chance.integers(26, 40, 2), 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(here / "photos" / name / f"{number:03}.jpg")


def test_a_folder_of_photos_and_a_network_by_commands_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photos_of_pets(tmp_path, 60)
    (tmp_path / "mynets.py").write_text(blocks(PAGE, "py ")[0])
    (tmp_path / "my.yaml").write_text(blocks(PAGE, "yaml")[0])
    commands = commands_of(PAGE)
    trains = [each for each in commands if each[0] == "train" and "fine-tuned" not in each]
    others = [each for each in commands if each[0] != "train" and "fine-tuned" not in each]
    assert (len(trains), {each[0] for each in others}) == (2, set(CHEAP))
    for command in trains:
        run(*command, *(part for each in SHORT for part in ("--set", each)))
    results = json.loads((tmp_path / "cats" / "results.json").read_text())
    assert results["data"]["cut"] == {"test_share": 0.2, "seed": 0, "test": 24}
    for command in others:
        written = [part.replace('"width": 32', '"width": 4') for part in command]
        finished = call(*written, *CHEAP[command[0]])
        # A network that learned so little may be found unsound, by the command that looks for that.
        assert finished.returncode in ((0, 3) if command[0] == "doctor" else (0,)), finished.stderr
    evaluated = json.loads((tmp_path / "runs" / "cats-paper" / "results.json").read_text())
    assert (evaluated["data"]["images"], evaluated["data"]["drawn"]) == (20, 0)
    certified = json.loads((tmp_path / "runs" / "cats-certified-mean" / "certified.json").read_text())
    assert certified["data"]["images"] == 4


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_a_network_of_a_library_by_commands_alone(
    library: str, torchvision: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 224, which is then known of the folder."""
    pytest.importorskip(library, reason=f"needs {library}")
    monkeypatch.chdir(tmp_path)
    photos_of_pets(tmp_path, 20)
    recipe = blocks(PAGE, "yaml")[1]
    if library == "transformers":
        tiny_network().save_pretrained("my-network")
    else:
        assert "timm:resnet18" in PAGE
        named = '"timm:test_resnet", arguments: {num_classes: 2, pretrained: false}'
        recipe = recipe.replace('"transformers:my-network"', named)
    (tmp_path / "library.yaml").write_text(recipe)
    train, evaluate = (each for each in commands_of(PAGE) if "fine-tuned" in each)
    short = (
        "train.epochs=1",
        "train.batch_size=8",
        "data.workers=0",
        "noise.draws=1",
        "train.warmup_epochs=0",
    )
    run(*train, *(part for each in short for part in ("--set", each)))
    config = read_config("fine-tuned")
    assert (config.input_shape, config.classes) == ((3, 224, 224), ("cat", "dog"))
    assert len(config.noise) > 2
    (tmp_path / "quick.yaml").write_text(QUICK)
    finished = run(*evaluate, "--protocol", "quick.yaml", "--n", 2, "--json")
    assert json.loads(finished.stdout)["data"]["images"] == 2


def tiny_network() -> Any:
    """Of transformers, with fresh weights."""
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=2
    )
    return transformers.ResNetForImageClassification(config)


def shorten(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The protocol that is used where none is named has all of its attacks, and a hundredth of the steps."""
    shipped = Path(protocols.__file__).parent / "protocols" / "honest.yaml"
    less = re.sub(
        r"(steps|queries): (\d+)",
        lambda found: f"{found[1]}: {max(2, int(found[2]) // 100)}",
        shipped.read_text(encoding="utf-8"),
    )
    (folder / "honest.yaml").write_text(less)
    load = protocols.load_protocol

    def shorter(source: str, overrides: dict[str, Any] | None = None) -> protocols.Protocol:
        return load(str(folder / "honest.yaml") if source == "honest" else source, overrides)

    monkeypatch.setattr(protocols, "load_protocol", shorter)


@pytest.fixture
def tones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder, with the files of the page."""
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(AUDIO, "py ")
    few = code.replace("Tones(800", "Tones(160").replace("1024", "256")
    assert few.count("256") == 1
    (tmp_path / "tones.py").write_text(few)
    recipe, protocol = blocks(AUDIO, "yaml")
    (tmp_path / "tones.yaml").write_text(recipe)
    for long, short in (
        ("steps: 100", "steps: 5"),
        ("queries: 300", "queries: 40"),
        ("queries: 10}", "queries: 2}"),
    ):
        assert long in protocol
        protocol = protocol.replace(long, short)
    (tmp_path / "sounds.yaml").write_text(protocol)


SOUNDS: dict[str, tuple[str | float, ...]] = {
    "train": ("--set", "train.epochs=8", "--set", "train.batch_size=32", "--set", "noise.draws=2"),
    "evaluate": ("--n", 8), "doctor": ("--n", 5, "--steps", 2, "--eot", 2),
    "certify": ("--n", 4, "--max-draws", 200), "calibrate": ("--epsilon", 0.9, "--most", 4),
    "export": (), "validate": (),
}  # fmt: skip


def run_on_sounds(*, heard: bool) -> set[str]:
    """Those commands of the page that do, or do not, know the network by its folder."""
    commands = [command for command in commands_of(AUDIO) if ("heard" in command) == heard]
    for command in commands:
        written = [part.replace("1x1024", "1x256") for part in command]
        finished = call(*written, *SOUNDS[command[0]])
        assert finished.returncode in ((0, 3) if command[0] == "doctor" else (0,)), finished.stderr
    return {command[0] for command in commands}


def test_a_network_on_waveforms_by_commands_alone(tmp_path: Path, tones: None) -> None:
    assert run_on_sounds(heard=True) == set(SOUNDS) - {"validate"}
    config = json.loads((tmp_path / "heard" / "config.json").read_text())
    assert (config["input_shape"], config["bounds"]) == ([1, 256], [-1.0, 1.0])
    assert config["metrics"]["test"]["accuracy"] > 0.4  # chance is 0.25, and 200 images tell them apart
    evaluated = json.loads((tmp_path / "runs" / "heard-sounds" / "results.json").read_text())
    assert len(evaluated["attacks"]) == 8
    assert all(each["max_linf"] <= 0.0401 for each in evaluated["attacks"] if each["norm"] == "linf")
    run("report", "runs/heard-sounds", "--out", "report.html")
    assert "no images" in (tmp_path / "report.html").read_text()
    named = ("--network", "tones.py:network")
    assert "not images of 1 or 3 channels" in error("predict", "tones.py", "--model", "heard", *named)
    assert "not images of 1 or 3 channels" in error("serve", "heard", *named)


def test_a_named_network_on_waveforms(tmp_path: Path, tones: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is evaluated by the protocol that is used where none is named."""
    shorten(monkeypatch, tmp_path)
    torch.save(network_from("tones.py:network").state_dict(), "tones.pt")
    assert run_on_sounds(heard=False) == {"validate", "evaluate"}
