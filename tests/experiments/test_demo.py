"""The demo, shortened: fewer images and steps, the same code."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import selfensemble as rse
from selfensemble.evaluation import Evaluation, load_protocol
from selfensemble.evaluation.results import read_results
from selfensemble.experiments import demo
from selfensemble.experiments.demo import PROTOCOLS, run_demo
from selfensemble.training.recipe import load_recipe


def test_demo_writes_figures_pictures_and_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = ["train.epochs=12", "model.width=0.5"]
    monkeypatch.setattr(demo, "load_recipe", lambda name, given: load_recipe(name, [*given, *sets]))
    seen: list[float] = []
    out = tmp_path / "demo"
    attacks = [
        {"attack": "cw-paper", "c": [0.2, 2], "steps": 30, "lr": 0.02},
        {"attack": "pgd", "eps": [0.1, 0.3], "steps": 5, "eot": 3, "early_stop": True},
        {"attack": "apgd", "eps": [0.1, 0.3], "steps": 10, "surrogate": "base"},
    ]
    short = {"attacks": attacks, "judge": {"seeds": 3, "queries": 5}, "checks": False, "shard": 12}
    earlier = [out / "rse-honest" / name for name in ("shards/0-cw.csv", "gallery.safetensors", "images.csv")]
    for file in earlier:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("of an earlier demo")
    results = run_demo(out, images=20, overrides=short, progress=lambda text, done: seen.append(done))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert json.loads((out / "results.json").read_text()) == results
    for kind in ("plain", "rse"):
        network = results["networks"][kind]
        assert network["training"]["metrics"]["test"]["accuracy"] > 0.95
        assert [point["c"] for point in network["curve"] if point["c"] is not None] == [0.0, 0.2, 2]
        assert network["curve"][0]["rms_l2"] == 0
        assert [point["eps"] for point in network["worst_case"]] == [None, 0.1, 0.3]
        assert network["worst_case"][-1]["accuracy"] < network["worst_case"][0]["accuracy"]
        for protocol in PROTOCOLS:
            run = read_results(out / f"{kind}-{protocol.removeprefix('demo-')}")
            assert run.data.images == 20
    page = (out / "report.html").read_text()
    assert "plain network" in page
    assert "Random Self-Ensemble" in page
    for name in ("accuracy.png", "adversarial.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("L").getcolors(maxcolors=256) or []) > 10
    assert not any(file.exists() and file.read_bytes() == b"of an earlier demo" for file in earlier)
    # What was saved is what was measured; noise of a seed follows the layout that a network is trained in.
    saved = rse.load(out / "rse").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    paper = load_protocol("demo-paper", short | {"seed": 0, "images": 20})
    again = Evaluation(saved, rse.load_data("digits", "test"), paper, tmp_path / "again").run()
    shown = read_results(out / "rse-paper")
    assert (again.clean, again.attacks) == (shown.clean, shown.attacks)


def test_results_are_there_before_they_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["train.epochs=1", "data.images=150", "model.width=0.25"]
    monkeypatch.setattr(demo, "load_recipe", lambda name, sets: load_recipe(name, [*sets, *short]))
    attacks = [
        {"attack": "cw-paper", "c": 1, "steps": 2},
        {"attack": "pgd", "eps": [0.1, 0.2], "steps": 1},
        {"attack": "fgsm", "eps": [0.1, 0.2]},
    ]
    few = {"attacks": attacks, "judge": {"seeds": 1, "queries": 1}, "checks": False}

    def fails(*arguments: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(demo, "_draw", fails)
    with pytest.raises(RuntimeError, match="no fonts"):
        run_demo(tmp_path, images=6, overrides=few)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["networks"].keys() == {"plain", "rse"}
