"""Conformal sets: coverage on classifiers with known probabilities, with and without attack."""

import math

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.certainty.conformal import ConformalSets, conformal_sets


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
    robust = conformal_sets(model, *calibration, alpha=alpha, radius=radius, draws=300, seed=0)
    spread = 3 * math.sqrt(alpha * (1 - alpha) * (1 / 1000 + 1 / 2000))
    assert held(plain, moved, labels) < 1 - alpha - spread
    assert held(robust, moved, labels) >= 1 - alpha - spread
    assert held(robust, images, labels) >= 1 - alpha - spread
    sizes = [each.predict(images, seed=1).sum(dim=1).double().mean() for each in (plain, robust)]
    assert sizes[0] < sizes[1]
    assert robust.std == pytest.approx(0.5, rel=1e-3)


def test_too_few_images_give_every_label() -> None:
    sets = conformal_sets(ensemble(), *sampled(5, 4), alpha=0.1)
    assert sets.threshold == 0
    assert sets.predict(sampled(3, 5)[0]).all()
    assert sets.predict(sampled(0, 5)[0]).shape[0] == 0


def test_mistakes_are_named() -> None:
    model, (images, labels) = ensemble(), sampled(20, 6)
    with pytest.raises(ValueError, match="a label an image"):
        conformal_sets(model, images, labels[:3])
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
