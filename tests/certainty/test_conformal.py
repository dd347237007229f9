"""Conformal sets: coverage on classifiers with known probabilities, with and without attack."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.certainty.conformal import ConformalSets, conformal_sets
from selfensemble.ensemble.sets import SetRule


class Linear(nn.Module):
    """Two classes by the side of a line, soft; 1x1 images of 2 channels."""

    def __init__(self, slope: float = 2.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[slope, 0.0], [-slope, 0.0]]).view(2, 2, 1, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.conv(inputs).flatten(1)
        return logits


def sampled(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images around 0 and labels of which some are on the wrong side."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    images = torch.randn(count, 2, 1, 1, generator=generator)
    images[:, 0] += (1 - 2.0 * labels).view(-1, 1, 1)
    return images, labels


def ensemble(std: float = 0.5, draws: int = 20) -> rse.SelfEnsemble:
    return rse.SelfEnsemble(Linear(), rse.NoiseConfig(std, 0.0), draws=draws, bounds=None).eval()


def held(sets: ConformalSets, images: Tensor, labels: Tensor) -> float:
    found = sets.predict(images, seed=5)
    return float(found.gather(1, labels[:, None]).double().mean())


def test_labels_without_values_are_refused() -> None:
    images, labels = sampled(99, 1)
    with pytest.raises(ValueError, match="meta device"):
        conformal_sets(ensemble(), images, labels.to("meta"))


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_sets_hold_the_right_label_as_often_as_promised(alpha: float) -> None:
    """Over 30 calibrations of 99 images each, the mean coverage is 1 - alpha, at most 1 / 100 above it."""
    model, coverage = ensemble(), []
    images, labels = sampled(2000, 1)
    for seed in range(30):
        sets = conformal_sets(model, *sampled(99, 100 + seed), alpha=alpha, seed=seed)
        coverage.append(held(sets, images, labels))
    mean, error = float(torch.tensor(coverage).mean()), float(torch.tensor(coverage).std()) / math.sqrt(30)
    assert mean >= 1 - alpha - 3 * error
    assert mean <= 1 - alpha + 0.01 + 3 * error


def test_moved_images_keep_their_labels() -> None:
    """Moved against their class, straight at the line: plain sets lose them, robust ones do not."""
    model, alpha, radius = ensemble(), 0.1, 0.5
    calibration, (images, labels) = sampled(1000, 2), sampled(2000, 3)
    moved = images.clone()
    moved[:, 0] -= radius * (1 - 2.0 * labels).view(-1, 1, 1)
    plain = conformal_sets(model, *calibration, alpha=alpha, seed=0)
    robust = conformal_sets(model, *calibration, alpha=alpha, radius=radius, draws=150, seed=0)
    spread = 3 * math.sqrt(alpha * (1 - alpha) * (1 / 1000 + 1 / 2000))
    assert held(plain, moved, labels) < 1 - alpha - spread
    assert held(robust, moved, labels) >= 1 - alpha - spread
    assert held(robust, images, labels) >= 1 - alpha - spread
    sizes = [each.predict(images, seed=1).sum(dim=1).double().mean() for each in (plain, robust)]
    assert sizes[0] < sizes[1]
    assert robust.std == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(("alpha", "radius", "needed"), [(0.1, 0.0, 9), (0.3, 0.0, 3), (0.1, 0.2, 11)])
def test_too_few_images_are_refused_with_the_number_that_is_needed(
    alpha: float, radius: float, needed: int
) -> None:
    """The threshold is the ceil((n + 1) level)-th smallest value from below, which n values have or not."""
    level = alpha * (1 - 2 / 20 * bool(radius))
    assert needed == next(n for n in range(1, 100) if math.floor((n + 1) * level + 1e-9) >= 1)
    with pytest.raises(ValueError, match=f"want {needed} images or more, got {needed - 1}: give more"):
        conformal_sets(ensemble(), *sampled(needed - 1, 4), alpha=alpha, radius=radius, draws=20)
    sets = conformal_sets(ensemble(), *sampled(needed, 4), alpha=alpha, radius=radius, draws=20)
    assert sets.threshold > 0
    assert sets.predict(sampled(0, 5)[0]).shape[0] == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    images, labels = sampled(50, 6)
    rules = [conformal_sets(ensemble(), images, each, seed=1).rule for each in (labels, labels.to(dtype))]
    assert rules[0] == rules[1]


def test_mistakes_are_named() -> None:
    model, (images, labels) = ensemble(), sampled(20, 6)
    with pytest.raises(ValueError, match="a label an image"):
        conformal_sets(model, images, labels[:3])
    for wrong, high in ((-1, -1), (2, 2), (300, 300)):
        with pytest.raises(ValueError, match=f"classes of the network, 0 to 1, got {high}"):
            conformal_sets(model, images, labels.index_fill(0, torch.tensor([3]), wrong))
    for bad in (labels.float(), labels > 0, labels.tolist()):
        with pytest.raises(TypeError, match="labels must be"):
            conformal_sets(model, images, bad)  # type: ignore[arg-type]
    for shape in (labels[:, None], labels[:0]):
        with pytest.raises(ValueError, match="a label an image"):
            conformal_sets(model, images, shape)
    with pytest.raises(ValueError, match="draws must be"):
        conformal_sets(model, images, labels, draws=0)
    with pytest.raises(ValueError, match="2 or more"):
        conformal_sets(model, images, labels, radius=0.1, draws=1)
    with pytest.raises(ValueError, match="radius must be"):
        conformal_sets(model, images, labels, radius=math.inf)
    with pytest.raises(ValueError, match="beta must be"):
        conformal_sets(model, images, labels, radius=0.1, beta=0.05)
    with pytest.raises(ValueError, match="alpha must lie"):
        conformal_sets(model, images, labels, alpha=1.5)
    quiet = rse.SelfEnsemble(Linear(), rse.NoiseConfig(0.0, 0.0), bounds=None).eval()
    assert conformal_sets(quiet, images, labels, draws=1).threshold > 0
    with pytest.raises(ValueError, match="noise"):
        conformal_sets(quiet, images, labels, radius=0.1)


# on an ensemble, and on disk


def test_sets_are_about_the_ensemble_they_were_calibrated_on() -> None:
    model, (images, labels) = ensemble(), sampled(60, 7)
    sets = conformal_sets(model, images, labels, seed=0)
    held = sets.predict(images, seed=1)
    model.draws = 3  # theirs are their own
    assert torch.equal(sets.predict(images, seed=1), held)
    fast = rse.optimize(model, images, "bf16")
    model.sets = sets.rule
    for change, back in (
        ({"std": 0.7}, {"std": 0.5}),
        ({"sampling": "per_image"}, {"sampling": "shared"}),
    ):
        for values, allowed in ((change, False), (back, True)):
            for name, value in values.items():
                setattr(rse.noise_layers(model.model)["conv"], name, value)
            if allowed:
                assert torch.equal(ConformalSets.of(model).predict(images, seed=1), held)
                continue
            with pytest.raises(ValueError, match="sets was calibrated on other noise"):
                sets.predict(images)
            with pytest.raises(ValueError, match="sets was calibrated on other noise"):
                ConformalSets.of(model)
    with pytest.raises(ValueError, match=r"no calibrated sets: set ensemble\.sets"):
        ConformalSets.of(fast)
    with pytest.raises(ValueError, match="computes in bf16"):
        ConformalSets.of(rse.optimize(model, images, "bf16"))
    with torch.no_grad():
        next(model.parameters()).mul_(0.5)
    with pytest.raises(ValueError, match="other weights"):
        sets.predict(images)


@pytest.mark.parametrize("radius", [0.0, 0.2])
def test_sets_are_saved_and_loaded(tmp_path: Path, radius: float) -> None:
    model, (images, labels) = ensemble(), sampled(60, 7)
    sets = conformal_sets(model, images, labels, radius=radius, draws=30, seed=0)
    model.sets = sets.rule
    rse.save(model, tmp_path)
    loaded = rse.load(tmp_path, Linear())
    assert loaded.sets == sets.rule
    assert torch.equal(ConformalSets.of(loaded).predict(images, seed=1), sets.predict(images, seed=1))
    config = (tmp_path / "config.json").read_text()
    next(iter(rse.noise_layers(model.model).values())).std = 0.6
    with pytest.raises(ValueError, match=r"other noise than would be saved .* ensemble\.sets = None"):
        rse.save(model, tmp_path)
    assert (tmp_path / "config.json").read_text() == config
    model.sets = None
    rse.save(model, tmp_path)
    assert rse.load(tmp_path, Linear()).sets is None


def test_rules_that_promise_nothing_are_not_read() -> None:
    rule = conformal_sets(ensemble(), *sampled(60, 7), radius=0.2, draws=30, seed=0).rule
    assert SetRule.model_validate_json(rule.model_dump_json()) == rule
    for wrong in (
        {"std": 0.0},
        {"beta": 0.0},
        {"beta": 0.05},
        {"draws": 1},
        {"threshold": 2.0},
        {"alpha": 0.0},
    ):
        with pytest.raises(ValueError, match=r"radius needs|should be"):
            SetRule.model_validate(rule.model_dump() | wrong)
