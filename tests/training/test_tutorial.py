"""The tutorial on photos: its files and its commands, as they stand there, on small photos and short."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ..command import call, run

PAGE = (Path(__file__).parents[2] / "docs" / "photos.md").read_text()
SHORT = (
    "data.size=24", "data.workers=1", "train.epochs=2", "train.batch_size=16", "train.warmup_epochs=0.5",
    "noise.draws=2", "train.precision=no", "model.arguments={width: 4}", "train.checkpoint_steps=2",
)  # fmt: skip
CHEAP = {
    "evaluate": ["--c", "1", "--n", "20", "--protocol", "paper"],
    "doctor": ["--n", "5", "--steps", "1", "--eot", "1"],
    "certify": ["--n-images", "4", "--n", "100"],
    "predict": [],
}  # fmt: skip


def block(kind: str) -> str:
    found = re.search(rf"^```{kind}[^\n]*\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def test_a_folder_of_photos_and_a_network_by_commands_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chance = np.random.default_rng(0)
    for name, channel in (("cat", 0), ("dog", 2)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(60):
            pixels = chance.integers(0, 100, (*chance.integers(26, 40, 2), 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number:03}.jpg")
    (tmp_path / "mynets.py").write_text(block("py "))
    (tmp_path / "my.yaml").write_text(block("yaml"))
    commands = [shlex.split(line)[1:] for line in PAGE.splitlines() if line.startswith("selfensemble ")]
    trains = [each for each in commands if each[0] == "train"]
    others = [each for each in commands if each[0] != "train"]
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
