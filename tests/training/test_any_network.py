"""Networks and data of one's own, from Python and from recipes: trained, killed, resumed, defended."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import selfensemble as rse
from selfensemble.training import defenses
from selfensemble.training.checkpoints import CHECKPOINT
from selfensemble.training.recipe import Recipe, load_recipe
from selfensemble.training.trainer import Trainer

from ..forked import Forked, run_forked

NETS = """
import torch
from torch import nn

def make(width=8, classes=2):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
"""
RECIPE = """
data:
  {{source: {data}, size: 24, stream: true, workers: 2, validation: 0.2, flip: true,
    photos: {{scale: [0.5, 1]}}}}
model: {{network: "{nets}:make", arguments: {{width: 6}}, normalize: {{mean: 0.5, std: [0.2, 0.25, 0.3]}}}}
noise: {{init_std: 0.1, inner_std: 0.1, learn: channel, draws: 2}}
defense: {{name: adversarial, steps: 1, eps: 0.03}}
train:
  {{epochs: 3, batch_size: 16, optimizer: adamw, lr: 0.01, warmup_epochs: 0.5, clip: 1.0, accumulate: 2,
    average: 0.9, decay_of: matrices, layer_decay: 0.9, checkpoint_steps: 1}}
"""


def photos(root: Path, count: int = 100, splits: tuple[str, ...] = ("train", "test")) -> Path:
    """Blue cats and red dogs of several sizes."""
    chance = np.random.default_rng(0)
    for split in splits:
        for number in range(count):
            place = root / split / ("cat", "dog")[number % 2] / f"{number:03}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            pixels = chance.integers(0, 120, (*chance.integers(24, 40, 2), 3), dtype=np.uint8)
            pixels[..., 2 * (1 - number % 2)] += 130
            Image.fromarray(pixels).save(place)
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root, path = tmp_path_factory.mktemp("own"), list(sys.path)
    photos(root / "photos")
    (root / "mynets.py").write_text(NETS)
    (root / "my.yaml").write_text(RECIPE.format(data=root / "photos", nets="mynets.py"))
    yield root
    # Or it would be the module of this name in other tests too.
    sys.modules.pop("mynets", None)
    sys.path[:] = path


def command(out: str, *more: str) -> list[str]:
    return ["train", "my.yaml", "--out", out, *more]


def weights(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def killed(place: Path, out: str) -> None:
    """Start, or go on, and kill it behind its next checkpoint."""
    path = place / out / CHECKPOINT
    before = path.stat().st_mtime_ns if path.exists() else 0
    process = Forked(*command(out, "--resume"), cwd=place)
    while not (path.exists() and path.stat().st_mtime_ns > before):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL


def test_streamed_photos_of_an_own_network_killed_twice_and_resumed(place: Path) -> None:
    """RSE with adversarial training, learned levels, averaged weights; to the last bit."""
    whole = run_forked(*command("whole"), cwd=place)
    assert whole.returncode == 0, whole.stderr
    assert "waited for data" in whole.stderr
    for _ in range(2):
        killed(place, "broken")
    assert not (place / "broken" / "model.safetensors").exists()
    of_no_effect = ("--set", "data.workers=2", "--set", "train.checkpoint_steps=3")
    finished = run_forked(*command("broken", "--resume", *of_no_effect), cwd=place)
    assert finished.returncode == 0, finished.stderr
    assert same(weights(place / "whole"), weights(place / "broken"))
    found = [json.loads((place / name / "results.json").read_text()) for name in ("whole", "broken")]
    assert found[0]["history"] == found[1]["history"]
    assert found[0]["metrics"] == found[1]["metrics"]
    assert 0 < found[0]["waiting_for_data"] < 1


def recipe_of(place: Path, *overrides: str) -> Recipe:
    nets = f"model.network={place}/mynets.py:make"
    return load_recipe(str(place / "my.yaml"), [nets, "train.epochs=1", *overrides])


@pytest.mark.parametrize("workers", [0, 1])
def test_how_many_workers_decode_changes_nothing(place: Path, tmp_path: Path, workers: int) -> None:
    results = [
        Trainer(recipe_of(place, f"data.workers={count}"), tmp_path / str(count)).run()
        for count in (workers, 2)
    ]
    assert same(weights(tmp_path / str(workers)), weights(tmp_path / "2"))
    assert results[0]["metrics"] == results[1]["metrics"]


def test_streamed_and_memory_mapped_images_train_alike(place: Path, tmp_path: Path) -> None:
    for stream in ("true", "false"):
        recipe = recipe_of(place, f"data.stream={stream}", "data.photos=null")
        trainer = Trainer(recipe, tmp_path / stream)
        assert trainer.batches.streams is (stream == "true")
        trainer.run()
    assert same(weights(tmp_path / "true"), weights(tmp_path / "false"))


def test_other_images_do_not_go_on_with_a_checkpoint(place: Path, tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", 60)
    recipe = recipe_of(place, f"data.source={data}")
    Trainer(recipe, tmp_path / "run").run()
    Trainer(recipe, tmp_path / "run", resume=True)
    (data / "train" / "cat" / "000.jpg").rename(data / "train" / "dog" / "000.jpg")
    with pytest.raises(ValueError, match="other images"):
        Trainer(recipe, tmp_path / "run", resume=True)


class Own(nn.Module):
    """A network that no name leads to."""

    def __init__(self, classes: int = 3, channels: int = 1) -> None:
        super().__init__()
        self.stem, self.next = nn.Conv2d(channels, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, classes)
        self.first, self.last = nn.ReLU(), nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.last(self.norm(self.next(self.first(self.stem(inputs))))).mean(dim=(2, 3))
        logits: Tensor = self.head(found)
        return logits


def brightness(count: int) -> TensorDataset:
    """Dark, middle and bright images."""
    labels = torch.arange(count) % 3
    images = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(count)) * 0.3
    return TensorDataset(images + 0.33 * labels[:, None, None, None], labels)


def small(*overrides: str) -> Recipe:
    sets = ["train.epochs=1", "train.batch_size=20", "noise.draws=2", "noise.init_std=0.1", *overrides]
    return load_recipe("digits-rse", sets)


def test_a_network_and_data_sets_from_python(tmp_path: Path) -> None:
    model = Own()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainer = Trainer(
        small("train.epochs=12"), tmp_path / "run", model=model, train_data=brightness(120),
        test_data=brightness(30),
    )  # fmt: skip
    results = trainer.run()
    assert results["metrics"]["test"]["accuracy"] > 0.8
    assert same(before, model.state_dict())  # left as it is
    assert not rse.noise_layers(model)
    loaded = rse.load(tmp_path / "run", model=Own())
    inputs = brightness(30).tensors[0]
    mine, theirs = (each.eval().predict(inputs, seed=0) for each in (trainer.ensemble, loaded))
    torch.testing.assert_close(mine.probabilities, theirs.probabilities)  # in another memory format
    again = Trainer(
        small("train.epochs=12"), tmp_path / "run", model=Own(), train_data=brightness(120),
        test_data=brightness(30), resume=True,
    )  # fmt: skip
    assert again.step == again.steps


def test_what_was_passed_wrongly_is_said(tmp_path: Path) -> None:
    data = brightness(60)
    for arguments, error, reason in (
        ({"train_data": data}, ValueError, "both train_data and test_data"),
        ({"train_data": data, "test_data": data, "data": "digits"}, ValueError, "or data alone"),
        ({"train_data": [1, 2], "test_data": data}, TypeError, "must be|begins|Dataset|has"),
        (
            {"train_data": data, "test_data": data, "model": Own(classes=5)},
            ValueError,
            "each of the 3 classes",
        ),
    ):
        with pytest.raises((error, ValueError), match=reason):
            Trainer(small(), tmp_path / "run", **{"model": Own(), **arguments})  # type: ignore[arg-type]
    images, labels = data.tensors
    beyond: Dataset[Any] = TensorDataset(images * 255, labels)
    with pytest.raises(ValueError, match=r"go from .* to .*\[0, 1\]"):
        Trainer(small(), tmp_path / "run", model=Own(), train_data=beyond, test_data=data).run()
    assert not (tmp_path / "run" / "config.json").exists()


KINDS = {
    kind.model_fields["name"].default: kind
    for kind in (getattr(defenses, name) for name in defenses.__all__)
    if "name" in getattr(kind, "model_fields", {})
}


@pytest.mark.parametrize("name", KINDS)
def test_every_defense_trains_an_own_network(name: str, tmp_path: Path) -> None:
    sets, trains = [f"defense={{name: {name}}}"], KINDS[name].trains
    if trains is not None:
        sets += [f"randomness={{name: {trains}}}", "noise.init_std=0", "noise.inner_std=0"]
    data = brightness(60)
    trainer = Trainer(small(*sets), tmp_path / "run", model=Own(), train_data=data, test_data=data)
    before = {key: tensor.clone() for key, tensor in trainer.network.state_dict().items()}
    results = trainer.run()
    assert not same(before, trainer.network.state_dict())
    assert results["metrics"]["test"]["images"] == 60
    answer = rse.load(tmp_path / "run", model=Own()).predict(data.tensors[0][:4])
    assert answer.probabilities.shape == (4, 3)


def test_sound_of_one_dimension(tmp_path: Path) -> None:
    """What is no image has neither a memory format nor a shape that images have."""
    labels = torch.arange(80) % 2
    time_ = torch.arange(32) * (0.2 + 0.5 * labels[:, None])
    data = TensorDataset((0.5 + 0.5 * time_.sin()).unsqueeze(1), labels)
    model = nn.Sequential(
        nn.Conv1d(1, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    results = Trainer(
        small("defense={name: adversarial, steps: 1}"), tmp_path / "run", model=model, train_data=data,
        test_data=data,
    ).run()  # fmt: skip
    assert results["metrics"]["test"]["images"] == 80
    with pytest.raises(ValueError, match="leave them out"):
        Trainer(
            small("data.flip=true"), tmp_path / "other", model=model, train_data=data, test_data=data
        ).run()


def test_noise_where_a_recipe_wants_it(tmp_path: Path) -> None:
    """In front of linear layers; and in pixels, in front of mean and std."""
    data = brightness(60)
    both = Trainer(
        small("noise.filter=conv+linear"), tmp_path / "1", model=Own(), train_data=data, test_data=data
    )
    assert list(rse.noise_layers(both.network.model)) == ["stem", "next", "head"]
    scaled = Trainer(
        small("model.normalize={mean: 0.5, std: 0.25}"), tmp_path / "2", model=Own(), train_data=data,
        test_data=data,
    )  # fmt: skip
    levels = {name: layer.std for name, layer in rse.noise_layers(scaled.network.model).items()}
    assert levels == {"": 0.1, "model.next": 0.1}
    assert rse.certify(scaled.network.eval(), data.tensors[0][:2], n=50, n0=10).radius.shape == (2,)


def test_a_recipe_for_inputs_of_another_range(tmp_path: Path) -> None:
    """Waveforms in [-1, 1] are refused until the recipe says so, and are then trained on as they are."""
    turns = torch.linspace(0, 20, 64) * torch.tensor([1.0, 3.0]).repeat(30)[:, None]
    data = rse.ImageData("waves", torch.sin(turns)[:, None], torch.arange(60) % 2, ("low", "high"))
    network = nn.Sequential(
        nn.Conv1d(1, 8, 5), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    settings = ["train.epochs=2", "train.batch_size=16", "data.crop_padding=0", "data.flip=false"]

    def trainer(*more: str) -> Trainer:
        recipe = load_recipe("digits-rse", [*settings, *more])
        return Trainer(recipe, tmp_path / "out", model=network, train_data=data, test_data=data)

    with pytest.raises(ValueError, match=r"trained on \[0, 1\].* or set data.bounds"):
        trainer()
    with pytest.raises(ValueError, match=r"trained on \[-0.5, 1\]"):
        trainer("data.bounds=[-0.5, 1]")
    with pytest.raises(ValueError, match="write them in that order"):
        load_recipe("digits-rse", ["data.bounds=[1, -1]"])
    made = trainer("data.bounds=[-1, 1]", "defense={name: adversarial, eps: 0.1, steps: 1}")
    assert tuple(made.ensemble.bounds or ()) == (-1, 1)
    made.run()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bounds"], config["input_shape"]) == ([-1.0, 1.0], [1, 64])


def test_bytes_are_scaled_to_the_bounds_of_a_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("digits-rse", ["data.bounds=[-1, 3]", "data.crop_padding=1", "train.epochs=1"])
    batches = Trainer(recipe, tmp_path / "out").batches
    inputs, _ = batches.batch(torch.arange(64))
    assert (float(inputs.min()), float(inputs.max())) == (-1, 3)
    assert batches.test.inputs(slice(50)).min() == -1
    assert not (inputs == 0).any()  # of 256 levels none is 0: what is put around an image is black
