"""A sweep over levels finds what was put there, and its command writes what it says."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.ensemble.stopping import Calibrated
from selfensemble.experiments.tuning import levels_named
from selfensemble.report.page import Page

from ..command import error, run


class Thresholds(nn.Module):
    """Two classes by the mean of an image, logits +-40 (mean - .5), behind an idle convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.conv.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        value = 40 * (self.conv(inputs).mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([-value, value], dim=1)


def images_at(distance: float) -> tuple[Tensor, Tensor]:
    """Images of 16 pixels whose L2 distance from the boundary is `distance`, half on each side."""
    side = torch.tensor([1.0, -1.0]).repeat(10)
    images = 0.5 + side[:, None, None, None] * torch.full((1, 1, 4, 4), distance / 4)
    return images, (side > 0).long()


def test_accuracies_are_those_of_the_geometry() -> None:
    """Noise leaves the boundary of a linear network where it is: eps beyond it fools, below it does not."""
    ensemble = rse.SelfEnsemble(Thresholds(), rse.NoiseConfig(0.3, 0.1), draws=200)
    images, labels = images_at(0.4)
    levels = [rse.NoiseConfig(0.0, 0.0), rse.NoiseConfig(0.1, 0.0)]
    for eps, attacked in ((0.2, 1.0), (0.6, 0.0)):
        sweep = rse.tune(ensemble, images, labels, levels, eps=eps, steps=20, eot=8)
        assert [level.clean.value for level in sweep.levels] == [1.0, 1.0]
        assert [level.attacked.value for level in sweep.levels] == [attacked, attacked]
        assert sweep.recommended.name == "0:0"  # of equal ones that with less noise
    assert [layer.std for layer in rse.noise_layers(ensemble.model).values()] == [0.3]
    assert ensemble.draws == 200


def test_rules_of_one_level_stay_behind(tmp_path: Path) -> None:
    ensemble = rse.SelfEnsemble(Thresholds(), rse.NoiseConfig(0.3, 0.0), draws=20)
    images, labels = images_at(0.4)
    ensemble.stopping = Calibrated(
        thresholds=(0.5, 0.0), epsilon=0.1, delta=0.05, mean_draws=1.5, disagreement=0.05, images=500,
        reference_draws=200,
    )  # fmt: skip
    ensemble.sets = rse.conformal_sets(ensemble, images, labels, alpha=0.5).rule
    sweep = rse.tune(ensemble, images, labels, [rse.NoiseConfig(0.1, 0.0)], steps=2)
    found = sweep.recommended.ensemble
    assert (found.stopping, found.sets) == (None, None)
    rse.save(found, tmp_path)
    assert ensemble.predict(images, stop="calibrated").draws.max() <= 2
    assert ensemble.sets is not None


def test_the_recommendation_weighs_resistance_against_clean_accuracy() -> None:
    """`fine_tune` gives networks of known accuracy: a constant one resists everything, half right."""
    ensemble = rse.SelfEnsemble(Thresholds(), rse.NoiseConfig(0.1, 0.0), draws=10)
    images, labels = images_at(0.4)
    seen = []

    def fine_tune(candidate: rse.SelfEnsemble) -> rse.SelfEnsemble | None:
        level = rse.noise_layers(candidate.model)["conv"].std
        assert isinstance(level, float)
        seen.append(level)
        assert candidate.training
        if level < 0.3:
            return None

        class Constant(Thresholds):
            def forward(self, inputs: Tensor) -> Tensor:
                return super().forward(inputs) * 0 + torch.tensor([2.0, 0.0])

        return rse.SelfEnsemble(Constant(), rse.NoiseConfig(level, 0.0))

    levels = [rse.NoiseConfig(std, 0.0) for std in (0.1, 0.3)]
    for give_up, chosen in ((0.05, "0.1:0"), (0.6, "0.3:0")):
        sweep = rse.tune(
            ensemble, images, labels, levels, eps=0.6, eot=8, give_up=give_up, fine_tune=fine_tune
        )
        assert [level.attacked.value for level in sweep.levels] == [0.0, 0.5]
        assert sweep.recommended.name == chosen
        assert "recommended" in sweep.page().markdown()
    assert seen == [0.1, 0.3] * 2


def test_what_cannot_be_swept_is_refused(tiny: nn.Module, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(tiny)
    labels = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least one level"):
        rse.tune(ensemble, images, labels, [])
    for give_up in (-0.1, math.nan):
        with pytest.raises(ValueError, match="give_up"):
            rse.tune(ensemble, images, labels, give_up=give_up)
    rse.remove_noise_(ensemble.model)
    with pytest.raises(ValueError, match="no noise layers"):
        rse.tune(ensemble, images, labels)
    assert levels_named("0.2:0.1,0:0") == (rse.NoiseConfig(0.2, 0.1), rse.NoiseConfig(0, 0))
    for text in ("0.2", "a:b", "0.1:0.2:0.3", ""):
        with pytest.raises(ValueError, match="init:inner"):
            levels_named(text)


def test_the_command_trains_measures_and_goes_on(tmp_path: Path) -> None:
    """With training at each level; asked again, it takes what was trained."""
    arguments = ["tune", "digits-rse", "--n-images", "40", "--levels", "0:0,0.2:0.1", "--epochs", "1"]
    arguments += ["--out", str(tmp_path / "out"), "--json"]
    results = [json.loads(run(*arguments).stdout) for _ in range(2)]
    assert results[0] == results[1]
    assert [level["noise"]["init_std"] for level in results[0]["levels"]] == [0, 0.2]
    assert all(level["clean"]["value"] > 0.5 for level in results[0]["levels"])
    written = {path.name for path in (tmp_path / "out").iterdir()}
    # Of each level and of the weights that it began with.
    trained = {name.rpartition("-")[0] for name in written - {"index.md", "levels.svg", "tune.json"}}
    assert trained == {"0-0", "0.2-0.1"}
    assert json.loads((tmp_path / "out" / "tune.json").read_text()) == results[0]
    assert "init:inner" in error("tune", "digits-rse", "--levels", "high")


def test_figures_are_written_before_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise ValueError("no fonts")

    monkeypatch.setattr(Page, "write", fails)
    arguments = ["tune", "digits-rse", "--n-images", "4", "--levels", "0.2:0.1", "--out", str(tmp_path)]
    assert "no fonts" in error(*arguments)
    (level,) = json.loads((tmp_path / "tune.json").read_text())["levels"]
    assert level["noise"] == {"init_std": 0.2, "inner_std": 0.1}
