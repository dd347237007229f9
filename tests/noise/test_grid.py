"""Noise on the grid of 8-bit images: exact sums, the law of rounded normal numbers, and how far from it."""

import itertools

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

import selfensemble as rse
from selfensemble.noise.grid import FINE, LEVELS, GridNoise, distance_from_normal

STEPS = LEVELS * FINE


@pytest.fixture
def pixels() -> Tensor:
    """Two batches of integers, 0 to 255."""
    return torch.randint(256, (2, 6, 3, 5, 5), generator=torch.Generator().manual_seed(0))


def steps_of(noisy: Tensor) -> Tensor:
    """Integers that the numbers stand for, each of which is the float nearest to its multiple."""
    steps = (noisy.double() * STEPS).round()
    assert torch.equal((steps / FINE).to(noisy.dtype) / LEVELS, noisy)
    return steps.long()


@pytest.mark.parametrize("sampling", ["per_image", "shared"])
@pytest.mark.parametrize("std", [0.02, 0.25, 3.0, [0.1, 0.25, 2.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noisy_images_are_shifts_of_each_other(
    pixels: Tensor, sampling: str, std: float | list[float], dtype: torch.dtype
) -> None:
    """Bit for bit, whatever the images; sums of floats are not."""
    grid = GridNoise(std, sampling=sampling).eval()  # type: ignore[arg-type]
    usual = rse.GaussianNoise(std, sampling=sampling).eval()  # type: ignore[arg-type]
    layouts = [torch.contiguous_format, torch.channels_last]
    for layout, count in itertools.product(layouts, (1, 3) if sampling == "shared" else (1,)):
        noisy = []
        for each in pixels:
            images = (each / torch.tensor(LEVELS, dtype=dtype)).to(memory_format=layout)
            with rse.noise_draw(7, 2, count=count):
                noisy.append(steps_of(grid(images)))
        assert torch.equal(noisy[1] - noisy[0], FINE * (pixels[1] - pixels[0]))
        assert len(noisy[0].unique()) > 20
    if dtype == torch.float32:
        exact = []
        for each in pixels:
            with rse.noise_draw(7, 2):
                exact.append(usual(each / LEVELS).double() - each.double() / LEVELS)
        assert not torch.equal(*exact)


def test_draws_within_a_batch_are_those_of_their_own(pixels: Tensor) -> None:
    grid, images = GridNoise(0.25, sampling="shared", layer=3).eval(), pixels[0] / LEVELS
    each = []
    for index in range(4, 7):
        with rse.noise_draw(9, index):
            each.append(grid(images))
    with rse.noise_draw(9, 4, count=3):
        together = grid(images.repeat(3, 1, 1, 1))
    assert torch.equal(together, torch.cat(each))
    assert not torch.equal(each[0], each[1])
    assert not torch.equal(grid(images), grid(images))


def test_the_law_is_that_of_rounded_normal_numbers() -> None:
    """Chi-square of a million numbers against the exact probabilities of 25 cells, at level 1e-3."""
    std = 2.5 / STEPS
    with rse.noise_draw(5):
        found = steps_of(GridNoise(std)(torch.zeros(1, 1, 1000, 1000))).flatten().clamp(-12, 12)
    borders = np.arange(-11.5, 12)
    expected = np.diff(stats.norm.cdf(borders, scale=2.5), prepend=0, append=1) * 1e6
    counts = np.bincount(found.numpy() + 12, minlength=25)
    assert stats.chisquare(counts, expected).pvalue > 1e-3
    with rse.noise_draw(6):
        wide = steps_of(GridNoise(0.25)(torch.zeros(1, 1, 1000, 1000))).double().flatten() / STEPS / 0.25
    assert stats.kstest(wide[:50_000].numpy(), "norm").pvalue > 1e-3
    assert float(wide.abs().max()) > 4.5


@pytest.mark.parametrize("std", [0.003, 0.25, 2.0])
def test_the_distance_from_normal_noise_is_below_its_bound(std: float) -> None:
    """Every border of the grid, by bisection: the share of the 2^53 random numbers that come out below it."""
    scale = std * STEPS
    reach = int(8.5 * scale)
    below = torch.arange(-reach, reach)  # what is rounded to at most these
    low, high = torch.zeros_like(below), torch.full_like(below, 2**53)
    for _ in range(54):  # the first random number that is rounded to more
        middle = (low + high) // 2
        chance = (middle.double() * 2.0**-53).clamp(min=2.0**-54)
        more = (torch.special.ndtri(chance) * scale).round() > below
        low, high = torch.where(more, low, middle + 1), torch.where(more, middle, high)
        high = torch.maximum(low, high)
    share = low.double().numpy() * 2.0**-53
    wrong = np.abs(share - special.ndtr((below.numpy() + 0.5) / scale))
    assert wrong.max() < 2.0**-51
    # Of a cell, at most what both of its borders are wrong by; total variation is half of the sum.
    assert wrong.sum() <= distance_from_normal(1, std)
    assert distance_from_normal(3 * 32 * 32, 0.25) < 3e-8


def test_gradients_rounding_and_off(pixels: Tensor) -> None:
    grid = GridNoise(0.25)
    images = (pixels[0] / LEVELS + 1e-4).requires_grad_()
    weight = torch.randn(images.shape)
    (grid(images) * weight).sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad, weight)
    with rse.noise_disabled(grid):
        assert torch.equal(grid(images), pixels[0] / LEVELS)
    assert grid.train()(images).shape == images.shape


def test_what_cannot_be_exact_is_refused(pixels: Tensor) -> None:
    images = pixels[0] / LEVELS
    with pytest.raises(TypeError, match=r"needs float32 images, got torch\.bfloat16"):
        GridNoise(0.25)(images.bfloat16())
    with pytest.raises(ValueError, match="up to a std of 490"):
        GridNoise(491.0)
    with rse.noise_draw(1, antithetic=True), pytest.raises(ValueError, match="leave antithetic out"):
        GridNoise(0.25)(images)
    with rse.noise_draw(1, count=4), pytest.raises(ValueError, match="cannot hold 4 draws"):
        GridNoise(0.25, sampling="shared").eval()(images)
