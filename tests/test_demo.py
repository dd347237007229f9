"""The demo, shortened: fewer images and steps, the same code."""

import json
from pathlib import Path

from PIL import Image

from selfensemble.demo import STRENGTHS, run_demo


def test_demo_writes_figures_pictures_and_settings(tmp_path: Path) -> None:
    seen: list[float] = []
    results = run_demo(tmp_path / "demo", images=40, steps=40, progress=lambda text, done: seen.append(done))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert json.loads((tmp_path / "demo" / "results.json").read_text()) == results
    for kind in ("plain", "rse"):
        network = results["networks"][kind]
        assert network["training"]["metrics"]["test"]["accuracy"] > 0.95
        assert [point["c"] for point in network["curve"]] == list(STRENGTHS)
        distances = [point["rms_l2"] for point in network["curve"]]
        assert distances[0] == 0
        assert distances[-1] > 0.1
    assert results["settings"]["seed"] == 0
    assert "upper bounds" in results["caveat"]
    for name in ("accuracy.png", "adversarial.png"):
        with Image.open(tmp_path / "demo" / name) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("L").getcolors(maxcolors=256) or []) > 10
