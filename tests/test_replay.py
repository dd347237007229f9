"""Steps that are replayed on a GPU are the steps that would have been taken one by one."""

from pathlib import Path

import pytest
import torch

from selfensemble.recipe import load_recipe
from selfensemble.training import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ADVERSARIAL = [
    "defense.name=adversarial",
    "defense.norm=l2",
    "defense.eps=0.5",
    "defense.steps=2",
    "defense.eot=2",
]


def losses(folder: Path, overrides: list[str], *, replays: bool, skipped: int = 0) -> list[float]:
    recipe = load_recipe("digits-rse", ["data.crop_padding=1", "train.lr=0.001", *overrides])
    trainer = Trainer(recipe, folder, data="digits")
    gradients = trainer._step_gradients
    assert gradients._replays
    gradients._replays = replays
    found, graphs = [], set[object]()
    for number in range(8):
        batch = trainer.train_indices[number * trainer.batch_size : (number + 1) * trainer.batch_size]
        if number == 5:
            trainer.step += skipped
        found.append(float(trainer._train_step(batch)))
        trainer.step += 1
        graph = gradients._graph
        graphs.add(graph)
    assert graphs == ({None, graph} if replays else {None})  # recorded once
    return found


@pytest.mark.parametrize(
    "overrides",
    [[], ADVERSARIAL, ["noise.learn=channel"], ["resize_pad.smallest=8", "resize_pad.largest=10"]],
)
def test_replayed_steps_have_the_losses_of_eager_ones(tmp_path: Path, overrides: list[str]) -> None:
    eager = losses(tmp_path / "eager", overrides, replays=False)
    replayed = losses(tmp_path / "replayed", overrides, replays=True)
    assert replayed == pytest.approx(eager, rel=1e-3)


def test_the_noise_of_a_replayed_step_is_that_of_its_number(tmp_path: Path) -> None:
    eager = losses(tmp_path / "eager", [], replays=False, skipped=100)
    replayed = losses(tmp_path / "replayed", [], replays=True, skipped=100)
    other = losses(tmp_path / "other", [], replays=True)
    assert replayed == pytest.approx(eager, rel=1e-3)
    assert replayed[:5] == pytest.approx(other[:5], rel=1e-3)
    assert replayed[5:] != pytest.approx(other[5:], rel=1e-2)
