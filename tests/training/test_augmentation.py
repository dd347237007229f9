"""Random crop and flip: every image is one of the crops there are, each as often as it should be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.nn import functional

from selfensemble.training.augmentation import augmentation
from selfensemble.training.sections import DataSection


def crops(image: torch.Tensor, padding: int, flip: bool) -> torch.Tensor:
    """All crops of one image, one by one."""
    height, width = image.shape[-2:]
    padded = functional.pad(image, 4 * (padding,))
    found = [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]
    return torch.stack(found + [each.flip(-1) for each in found] if flip else found)


@given(
    count=st.integers(1, 5),
    channels=st.integers(1, 3),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    padding=st.integers(0, 3),
    flip=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_every_image_is_one_of_its_crops(
    count: int, channels: int, height: int, width: int, padding: int, flip: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    images = torch.rand(count, channels, height, width)
    changed = augmentation(DataSection(source="x", crop_padding=padding, flip=flip))(images)
    assert changed.shape == images.shape
    for before, after in zip(images, changed, strict=True):
        assert (crops(before, padding, flip) == after).flatten(1).all(dim=1).any()


def test_every_crop_comes_equally_often() -> None:
    torch.manual_seed(0)
    image = torch.rand(2, 5, 5)
    augment = augmentation(DataSection(source="x", crop_padding=1, flip=True))
    changed = augment(image.expand(9000, -1, -1, -1))
    counts = [(changed == crop).flatten(1).all(dim=1).sum().item() for crop in crops(image, 1, True)]
    assert sum(counts) == 9000  # 18 crops, none twice
    assert chisquare(counts).pvalue > 1e-4


def test_nothing_changes_where_nothing_is_asked_for() -> None:
    images = torch.rand(3, 1, 8, 8)
    assert augmentation(DataSection(source="x", crop_padding=0, flip=False))(images) is images


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    image = torch.rand(2, 5, 5)
    changed = augmentation(DataSection(source="x", crop_padding=1, flip=True))(
        image.expand(64, -1, -1, -1).cuda()
    )
    assert changed.device.type == "cuda"
    assert all((crops(image, 1, True) == each).flatten(1).all(dim=1).any() for each in changed.cpu())
