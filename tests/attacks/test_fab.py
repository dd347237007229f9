"""FAB against closed forms and linear programs, and its contract on any model."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.attacks.budget import count_evaluations
from selfensemble.attacks.fab import _Near, fab, to_hyperplane
from selfensemble.attacks.norms import Norm, dual_size, size

from ..conftest import LinearClassifier

SHAPE = (1, 4, 4)


@pytest.fixture
def linear() -> LinearClassifier:
    return LinearClassifier(16)


@pytest.fixture
def grey() -> Tensor:
    """Images near mid-grey, so that the box [0, 1] is not in the way."""
    return 0.45 + 0.1 * torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    labels: Tensor = model(images).argmax(dim=1)
    return labels


def smallest(points: Tensor, gradient: Tensor, value: Tensor, norm: Norm) -> float:
    """Smallest L-inf or L1 norm of a change to `value + gradient . change = 0` within [0, 1]; by LP."""
    x, g, n = points.flatten().double().numpy(), gradient.flatten().double().numpy(), points.numel()
    if norm == "l1":
        room = [(0.0, up) for up in 1 - x] + [(0.0, down) for down in x]
        answer = linprog(np.ones(2 * n), A_eq=np.r_[g, -g][None], b_eq=[-value.item()], bounds=room)
        assert answer.fun is not None
        return float(answer.fun)
    below = np.vstack([np.c_[np.eye(n), -np.ones(n)], np.c_[-np.eye(n), -np.ones(n)]])
    room = [*zip(-x, 1 - x, strict=True), (0.0, 1.0)]
    goal = np.r_[np.zeros(n), 1.0]
    answer = linprog(goal, below, np.zeros(2 * n), np.r_[g, 0.0][None], [-value.item()], bounds=room)
    assert answer.fun is not None
    return float(answer.fun)


@pytest.mark.parametrize("targets", [None, 9])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_reaches_the_closed_form_distance(
    linear: LinearClassifier, grey: Tensor, norm: Norm, targets: int | None
) -> None:
    labels = answers(linear, grey)
    adversarial = fab(linear, grey, labels, norm=norm, steps=20, targets=targets)
    assert (answers(linear, adversarial) != labels).all()
    with torch.no_grad():
        optimum = linear.value(grey).abs() / dual_size(linear.a[None], norm)
    ratio = size(adversarial - grey, norm) / optimum
    assert (ratio > 1 - 1e-4).all()
    assert (ratio < 1.01).all()


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_reaches_the_optimum_against_the_box(linear: LinearClassifier, norm: Norm) -> None:
    """Near-black and near-white pixels that want to leave the box: closed forms fail, a program does not."""
    generator = torch.Generator().manual_seed(5)
    images = (linear.a.detach() < 0).float().view(1, *SHAPE).expand(6, *SHAPE).clone()
    images = (images + 0.3 * (torch.rand(images.shape, generator=generator) - 0.5)).clamp(0, 1)
    images[:, :, :2] = 1 - images[:, :, :2]
    labels = answers(linear, images)
    adversarial = fab(linear, images, labels, norm=norm, steps=30)
    assert (answers(linear, adversarial) != labels).all()
    value = linear.value(images).detach()
    for image, found, now in zip(images, adversarial, value, strict=True):
        optimum = smallest(image, linear.a.detach(), now, norm)
        distance = size((found - image)[None], norm).item()
        assert optimum - 1e-4 < distance < 1.01 * optimum


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_projection_is_the_smallest_change(norm: Norm) -> None:
    points, gradient = torch.rand(20, 1, 5, 5), torch.randn(20, 1, 5, 5)
    points[:, :, 0], gradient[:, :, 1] = points[:, :, 0].round(), 0.0
    value = torch.randn(20)
    change = to_hyperplane(points, gradient, value, norm)
    torch.testing.assert_close((gradient * change).flatten(1).sum(dim=1), -value, atol=1e-5, rtol=1e-5)
    for row in range(20):
        optimum = smallest(points[row], gradient[row], value[row], norm)
        assert size(change[row : row + 1], norm).item() == pytest.approx(optimum, rel=1e-5)


def test_projection_in_l2_meets_the_optimality_conditions() -> None:
    """Pixels that are free move in proportion to the gradient; those at the box would have moved farther."""
    points, gradient, value = torch.rand(20, 25), torch.randn(20, 25), 4 * torch.randn(20)
    change = to_hyperplane(points, gradient, value, "l2")
    reached = ((gradient * change).sum(dim=1) + value).abs() < 1e-4
    assert reached.sum() > 10
    moved = points + change
    pace = change / gradient * -value.sign()[:, None]
    free = (moved > 1e-6) & (moved < 1 - 1e-6)
    for row in reached.nonzero().squeeze(1):
        common = pace[row][free[row]]
        assert common.max() - common.min() < 1e-4
        assert (pace[row][~free[row]] <= common.max() + 1e-4).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_projection_out_of_reach(norm: Norm) -> None:
    """As near as the box allows; pixels of no influence stay; no gradient, no change."""
    points, gradient = torch.rand(3, 6), torch.randn(3, 6)
    gradient[:, 0], gradient[2] = 0.0, 0.0
    change = to_hyperplane(points, gradient, torch.tensor([100.0, -100.0, -1.0]), norm)
    ends = torch.stack([(gradient[0] < 0).float(), (gradient[1] > 0).float()])
    torch.testing.assert_close((points + change)[:2, 1:], ends[:, 1:])
    assert (change[:, 0] == 0).all()
    assert (change[2] == 0).all()
    assert (to_hyperplane(points, gradient, torch.zeros(3), norm) == 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_targeted_reaches_the_target(tiny: nn.Module, images: Tensor, norm: Norm) -> None:
    target = tiny(images).topk(2, dim=1).indices[:, 1]
    adversarial = fab(tiny, images, target, targeted=True, norm=norm, steps=30)
    assert torch.equal(answers(tiny, adversarial), target)
    already = fab(tiny, images, answers(tiny, images), targeted=True, norm=norm, steps=2)
    assert torch.equal(already, images)


@pytest.mark.parametrize("targets", [None, 4])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fools_a_network(tiny: nn.Module, images: Tensor, norm: Norm, targets: int | None) -> None:
    labels = answers(tiny, images)
    adversarial = fab(tiny, images, labels, norm=norm, steps=20, targets=targets)
    assert (answers(tiny, adversarial) != labels).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    # A little nearer on the same line no image is adversarial: the final search ended at the boundary.
    assert torch.equal(answers(tiny, images + 0.98 * (adversarial - images)), labels)


def test_restarts_only_help(tiny: nn.Module, images: Tensor) -> None:
    labels = answers(tiny, images)
    once = size(fab(tiny, images, labels, steps=5, seed=1) - images, "linf")
    thrice = size(fab(tiny, images, labels, steps=5, restarts=3, seed=1) - images, "linf")
    assert (thrice <= once + 1e-6).all()


def test_near_enough_images_leave(linear: LinearClassifier, grey: Tensor) -> None:
    labels = answers(linear, grey)
    with count_evaluations() as budget:
        adversarial = fab(linear, grey, labels, eps=0.3, steps=50, restarts=2, seed=0)
    assert (answers(linear, adversarial) != labels).all()
    assert budget.gradients < 8 * 20
    with count_evaluations() as budget:
        fab(linear, grey, labels, eps=1e-6, steps=5, restarts=3)
    assert budget.gradients == 8 * 15


@pytest.mark.parametrize(("targets", "classes"), [(None, 4), (2, 2), (9, 4)])
def test_evaluations_are_counted(tiny: nn.Module, images: Tensor, targets: int | None, classes: int) -> None:
    """A gradient for each boundary; a forward for each iterate, clean image, halving, and beyond."""
    labels = answers(tiny, images)
    with count_evaluations() as budget:
        fab(tiny, images, labels, steps=3, targets=targets)
    assert budget.gradients == 6 * 3 * classes
    runs = 1 if targets is None else classes
    assert 6 * (3 * runs + 1) < budget.forwards <= 6 * (3 * runs + 2 + 10 + 1)
    linear, noisy = LinearClassifier(192), rse.SelfEnsemble(tiny).eval()
    with count_evaluations() as budget:
        fab(noisy, images, labels, steps=3, eot=2, targets=targets, seed=0)
    steps, ascent = 6 * 3 * 2 * classes, 6 * 30 * 2
    assert 0 < budget.gradients <= steps + ascent
    with count_evaluations() as budget:
        fab(linear, images, 1 - answers(linear, images))
    assert (budget.gradients, budget.forwards) == (0, 6)


@pytest.mark.parametrize(
    ("eot", "frozen", "iterates", "draws"),
    [(1, False, 4, 4), (9, False, 12, 12), (20, False, 16, 20), (1, True, 13, 1)],
)
def test_draws_of_a_random_network_make_fewer_steps(
    tiny: nn.Module,
    images: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    eot: int,
    frozen: bool,
    iterates: int,
    draws: int,
) -> None:
    """16 steps become as many as each then has draws, unless more are asked for; frozen noise is no noise.

    Three of its steps, of three gradients, are spent before.
    """
    seen: list[int] = []
    turns = set[int]()
    adversarial = _Near.adversarial

    def counted(self: _Near, active: Tensor, found: Tensor) -> Tensor:
        seen.append(self.oracle.eot)
        turns.add(self.turns)
        return adversarial(self, active, found)

    monkeypatch.setattr(_Near, "adversarial", counted)
    labels = answers(tiny, images)
    noisy = rse.SelfEnsemble(tiny, rse.NoiseConfig(0.02, 0.01)).eval()
    fab(noisy, images, labels, steps=16, eot=eot, frozen=frozen, seed=0)
    assert seen == [draws] * iterates
    assert turns == {0 if frozen else max(2, 20 // draws)}  # of as many draws as the other steps


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_contract(tiny: nn.Sequential, images: Tensor, norm: Norm) -> None:
    """Seeds repeat, the caller's random state and the model stay as they were."""
    ensemble = rse.SelfEnsemble(tiny, draws=2).train()
    state, labels, kept = torch.get_rng_state(), torch.arange(6) % 5, images.clone()

    def run(seed: int) -> Tensor:
        return fab(ensemble, images, labels, norm=norm, steps=5, restarts=2, eot=2, max_batch=4, seed=seed)

    assert torch.equal(run(1), run(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, kept)
    assert ensemble.training
    assert all(parameter.grad is None for parameter in ensemble.parameters())
    assert fab(ensemble, images[:0], labels[:0]).shape == (0, 3, 8, 8)
    with torch.no_grad():
        assert run(3).min() >= 0


def test_one_lucky_draw_is_no_success(grey: Tensor) -> None:
    """A coin that answers wrong in one draw of ten fools nobody: the original comes back."""

    class Coin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            value = (-4.0 if self.calls % 10 == 0 else 4.0) + 0.01 * inputs.mean(dim=(1, 2, 3))
            return torch.stack([value + 1e-3 * torch.rand(()), -value], dim=1)

    labels = torch.zeros(8, dtype=torch.int64)
    assert torch.equal(fab(Coin(), grey, labels, steps=40, seed=0), grey)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(8)}, "labels must be int64"),
        ({"labels": torch.full((8,), 2)}, "below 2"),
        ({"inputs": torch.full((8, *SHAPE), 2.0)}, r"\[0, 1\]"),
        ({"steps": 0}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"targets": 0}, "targets"),
        ({"targets": 2, "targeted": True}, "targeted=True"),
        ({"norm": "l0"}, "norm must be"),
        ({"eps": 0.0}, "eps must be"),
        ({"eps": 1.5}, "eps must be"),
        ({"alpha_max": 1.5}, "alpha_max"),
        ({"eta": 0.9}, "eta"),
        ({"beta": float("nan")}, "beta"),
        ({"max_batch": 0}, "max_batch"),
        ({"confirm_draws": 0}, "confirm_draws"),
    ],
)
def test_bad_input(linear: LinearClassifier, grey: Tensor, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"inputs": grey, "labels": torch.zeros(8, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        fab(linear, **arguments)
