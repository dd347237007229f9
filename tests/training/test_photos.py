"""Random parts and colours of photos, mixed images, and the memory that many of them take."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kstest
from torch import nn

from selfensemble.data.streaming import StoredReader
from selfensemble.training.augmentation import augmentation, mixing
from selfensemble.training.photos import PhotoChanges, jittered, random_part
from selfensemble.training.recipe import load_recipe
from selfensemble.training.sections import DataSection, PhotoSection
from selfensemble.training.trainer import Trainer


def test_parts_have_the_areas_and_proportions_that_were_asked_for() -> None:
    """Of squares of a square the share of the area is uniform, once in 10^4 seeds not; all lie within."""
    generator = np.random.default_rng(0)
    config = PhotoSection(scale=(0.2, 0.8), ratio=(1, 1))
    areas = []
    for _ in range(2000):
        left, top, right, bottom = random_part((1000, 1000), config, generator)
        assert 0 <= left < right <= 1000
        assert 0 <= top < bottom <= 1000
        assert right - left == bottom - top
        areas.append((right - left) * (bottom - top) / 1000**2)
    assert kstest(areas, "uniform", (0.2, 0.6)).pvalue > 1e-4
    for size in ((1000, 300), (3, 40), (1, 1)):
        for _ in range(200):
            left, top, right, bottom = random_part(size, PhotoSection(), generator)
            assert 0 <= left < right <= size[0]
            assert 0 <= top < bottom <= size[1]
    whole = random_part((1000, 100), PhotoSection(scale=(1, 1)), generator)  # fits nowhere
    assert whole == pytest.approx((500 - 200 / 3, 0, 500 + 200 / 3, 100))


def test_a_photo_changes_by_its_number_and_the_seed_alone() -> None:
    reader = StoredReader(torch.randint(256, (3, 3, 40, 50), dtype=torch.uint8))
    change = PhotoChanges(PhotoSection(jitter=0.3), (3, 24, 32), 5)
    one = change(reader, 0, 7)
    assert (one.shape, one.dtype) == ((3, 24, 32), torch.uint8)
    assert torch.equal(one, change(reader, 0, 7))
    assert not torch.equal(one, change(reader, 0, 8))
    assert not torch.equal(one, PhotoChanges(PhotoSection(jitter=0.3), (3, 24, 32), 6)(reader, 0, 7))
    same = PhotoChanges(PhotoSection(scale=(1, 1), ratio=(1.25, 1.25)), (3, 40, 50), 0)
    assert torch.equal(same(reader, 1, 0), reader.images[1])
    grey = StoredReader(torch.randint(256, (1, 1, 9, 9), dtype=torch.uint8))
    assert PhotoChanges(PhotoSection(jitter=0.2), (1, 6, 6), 0)(grey, 0, 0).shape == (1, 6, 6)


def test_colours_change_within_their_bounds() -> None:
    """A flat grey has neither contrast nor saturation: what is left is the factor of its brightness."""
    grey, generator = Image.new("RGB", (4, 4), (100, 100, 100)), np.random.default_rng(0)
    levels = np.array([np.asarray(jittered(grey, 0.4, generator)).mean() for _ in range(500)])
    assert levels.min() < 65 and levels.max() > 135  # noqa: PT018
    assert ((levels >= 60) & (levels <= 140)).all()
    assert jittered(grey, 0.0, generator) is grey


def test_rand_augment_of_timm() -> None:
    pytest.importorskip("timm.data.auto_augment", exc_type=(ImportError, RuntimeError))  # type: ignore[arg-type]
    reader = StoredReader(torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8))
    change = PhotoChanges(PhotoSection(scale=(1, 1), ratio=(1, 1), rand_augment=2), (3, 32, 32), 0)
    found = [change(reader, 0, number) for number in range(40)]
    assert all(torch.equal(each, change(reader, 0, number)) for number, each in enumerate(found))
    assert (
        sum(not torch.equal(each, reader.images[0]) for each in found) > 20
    )  # three in four, by its own chances


def test_without_timm_it_is_said_before_any_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from selfensemble.training import photos

    photos.rand_augment.cache_clear()
    for name in ("timm", "timm.data", "timm.data.auto_augment"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"selfensemble\[photos\]"):
        photos.rand_augment(PhotoSection(rand_augment=2), 3)
    with pytest.raises(ValueError, match="grey"):
        Trainer(load_recipe("digits-rse", ["data.photos={rand_augment: 2}"]), tmp_path / "run")


def test_sections_that_contradict_themselves() -> None:
    for values, reason in (
        ({"photos": {"scale": (0.5, 0.2)}}, "in that order"),
        ({"photos": {}, "size": 224, "stream": False}, "whole photos"),
        ({"photos": {"scale": (0, 1)}}, "greater than 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            DataSection.model_validate(values)
    assert DataSection.model_validate({"photos": {}, "size": 224}).reading()["stream"] is True
    with pytest.raises(ValueError, match="crop_padding and flip are for images"):
        augmentation(DataSection(flip=True))(torch.zeros(2, 1, 16))


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixed_images_are_those_of_mixup(alpha: float) -> None:
    """The share of the labelled image has the moments of mixup's, weighted by itself; 5 standard errors."""
    torch.manual_seed(0)
    count = 4000
    mixed = mixing(alpha)(torch.eye(count))
    torch.testing.assert_close(mixed.sum(dim=1), torch.ones(count))
    assert ((mixed > 0).sum(dim=1) <= 2).all()
    own = mixed.diagonal()[mixed.diagonal() < 1].double()
    theirs = np.random.default_rng(1).beta(alpha, alpha, 10**6)
    for power in (1, 2):
        expected = (theirs ** (power + 1)).mean() / theirs.mean()
        error = float(own.pow(power).std()) / len(own) ** 0.5
        assert abs(float(own.pow(power).mean()) - expected) < 5 * error + 1e-3
    images = torch.rand(3, 1, 4, 4)
    assert mixing(0.0)(images) is images
    assert mixing(alpha)(images[:1]).equal(images[:1])


class Flat(nn.Module):
    """Nothing that looks at a whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.conv(inputs).relu().mean(dim=(2, 3)))
        return logits


def trained(folder: Path, *sets: str) -> dict[str, torch.Tensor]:
    plain = [
        "noise.init_std=0",
        "noise.inner_std=0",
        "data.images=200",
        "train.epochs=1",
        "train.batch_size=60",
    ]
    torch.manual_seed(0)
    trainer = Trainer(load_recipe("digits-rse", [*plain, *sets]), folder, model=Flat())
    trainer.run()
    return {key: tensor.clone() for key, tensor in trainer.network.state_dict().items()}


def test_a_batch_in_parts_is_the_batch(tmp_path: Path) -> None:
    whole, parts = trained(tmp_path / "1"), trained(tmp_path / "3", "train.accumulate=3")
    other = trained(tmp_path / "2", "train.batch_size=20")
    for key in whole:
        torch.testing.assert_close(whole[key], parts[key], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(whole["model.head.weight"], other["model.head.weight"], rtol=1e-4)


def test_gradients_are_cut_to_their_norm(tmp_path: Path) -> None:
    """One step of SGD at a rate of 1 moves the weights as far as the gradient is long."""
    sets = [
        "train.batch_size=180",
        "train.lr=1",
        "train.momentum=0",
        "train.weight_decay=0",
        "train.clip=0.01",
    ]
    torch.manual_seed(0)
    before = Flat().state_dict()
    after = trained(tmp_path / "run", *sets)
    moved = torch.cat([(after[f"model.{key}"] - before[key]).flatten() for key in before]).norm()
    assert float(moved) == pytest.approx(0.01, rel=1e-3)


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from torch import nn
import selfensemble as rse
from selfensemble.evaluation.protocol import load_protocol
from selfensemble.evaluation.runner import Evaluation
from selfensemble.training.recipe import load_recipe
from selfensemble.training.trainer import Trainer

def peak():
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(each.ru_maxrss for each in usage) // 1024

root = Path(sys.argv[1])
protocol = load_protocol(str(root / "quick.yaml"))
model = nn.Sequential(
    nn.Conv2d(3, 2, 9, stride=8), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
found = []
for count in (20, 400):
    recipe = load_recipe("digits-rse", [f"data.source={root / str(count)}", "data.size=224", "train.epochs=1",
        "data.workers=1", "noise.draws=1", "train.batch_size=20"])
    trainer = Trainer(recipe, root / f"run-{count}", model=model)
    trainer.run()
    evaluation = Evaluation(trainer.ensemble, trainer.batches.test, protocol, root / f"evaluation-{count}")
    assert evaluation.run().data.images == count
    found.append(peak())
print(*found)
"""


def test_memory_does_not_grow_with_the_number_of_photos(tmp_path: Path) -> None:
    """Of 400 photos the numbers alone would take 240 MB."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 230, 240, 3), dtype=np.uint8)
    for number, each in enumerate(pixels):
        Image.fromarray(each).resize((120, 115)).resize((240, 230)).save(
            tmp_path / f"{number}.jpg", quality=50
        )
    for count in (20, 400):
        for split in ("train", "test"):
            for number in range(count):
                place = tmp_path / str(count) / split / "ab"[number % 2] / f"{number}.jpg"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(tmp_path / f"{number % 8}.jpg")
    (tmp_path / "quick.yaml").write_text(
        "attacks: [{attack: fgsm, eps: [0.03], eot: 1, confirm_draws: 2}]\n"
        "judge: {queries: 1, seeds: 1}\nimages: 400\nchecks: false\nshard: 20\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    few, many = map(int, finished.stdout.split())
    assert many - few < 120, (few, many)
