"""Steps that are replayed on a GPU are the steps that would have been taken one by one."""

from pathlib import Path

import pytest
import torch

from selfensemble.training.recipe import load_recipe
from selfensemble.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ADVERSARIAL = [
    "defense.name=adversarial",
    "defense.norm=l2",
    "defense.eps=0.5",
    "defense.steps=2",
    "defense.eot=2",
]


Step = tuple[float, torch.Tensor]


def steps(folder: Path, overrides: list[str], *, replays: bool, skipped: int = 0) -> list[Step]:
    """Loss and gradients of each step; `skipped`: how far the number of the sixth is ahead."""
    recipe = load_recipe("digits-rse", ["data.crop_padding=1", "train.lr=0.001", *overrides])
    trainer = Trainer(recipe, folder, data="digits")
    gradients = trainer.training_step.gradients
    assert gradients._replays
    gradients._replays = replays
    found, graphs = list[Step](), set[object]()
    for number in range(8):
        batch = trainer.batches.numbers(trainer.batches.train_indices, number)
        if number == 5:
            trainer.step += skipped
        loss = float(trainer.training_step(batch, trainer.step))
        grads = [parameter.grad for parameter in trainer.network.parameters()]
        found.append((loss, torch.cat([grad.flatten() for grad in grads if grad is not None])))
        trainer.step += 1
        graph = gradients._graph
        graphs.add(graph)
    assert graphs == ({None, graph} if replays else {None})  # recorded once
    return found


@pytest.mark.parametrize(
    "overrides",
    [[], ADVERSARIAL, ["noise.learn=channel"], ["resize_pad.smallest=8", "resize_pad.largest=10"]],
)
def test_replayed_steps_have_the_losses_and_gradients_of_eager_ones(
    tmp_path: Path, overrides: list[str]
) -> None:
    eager = steps(tmp_path / "eager", overrides, replays=False)
    replayed = steps(tmp_path / "replayed", overrides, replays=True)
    for one, other in zip(eager, replayed, strict=True):
        assert other[0] == pytest.approx(one[0], rel=1e-3)
        assert (other[1] - one[1]).norm() < 0.02 * one[1].norm()


def test_the_noise_of_a_replayed_step_is_that_of_its_number(tmp_path: Path) -> None:
    eager = steps(tmp_path / "eager", [], replays=False, skipped=100)
    replayed = steps(tmp_path / "replayed", [], replays=True, skipped=100)
    other = steps(tmp_path / "other", [], replays=True)
    for number, (mine, its, another) in enumerate(zip(replayed, eager, other, strict=True)):
        assert (mine[1] - its[1]).norm() < 0.02 * its[1].norm()
        assert ((mine[1] - another[1]).norm() > 0.1 * another[1].norm()) == (number >= 5)
