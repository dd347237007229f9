"""C&W against closed forms on a linear classifier, and its contract on any model."""

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.attacks import cw_l2, cw_l2_paper

from ..conftest import LinearClassifier

SHAPE = (1, 4, 4)


@pytest.fixture
def linear() -> LinearClassifier:
    return LinearClassifier(16)


@pytest.fixture
def grey() -> Tensor:
    """Images near mid-grey, so that the box [0, 1] is not in the way."""
    return 0.5 + 0.1 * torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(3)) - 0.05


def labels_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        labels: Tensor = model(images).argmax(dim=1)
    return labels


def test_tuned_attack_reaches_the_closed_form_distance(linear: LinearClassifier, grey: Tensor) -> None:
    labels = labels_of(linear, grey)
    adversarial = cw_l2(linear, grey, labels, confirm_draws=1, binary_search_steps=9, steps=250)
    assert (labels_of(linear, adversarial) != labels).all()
    optimum = (linear.value(grey).abs() / linear.a.norm()).detach()
    distance = (adversarial - grey).flatten(1).norm(dim=1)
    assert (distance >= optimum - 1e-6).all()
    assert (distance <= 1.02 * optimum).all()


def test_targeted_reaches_the_target(linear: LinearClassifier, grey: Tensor) -> None:
    target = 1 - labels_of(linear, grey)
    adversarial = cw_l2(linear, grey, target, targeted=True, confirm_draws=1)
    assert torch.equal(labels_of(linear, adversarial), target)
    already = cw_l2(linear, grey, labels_of(linear, grey), targeted=True, confirm_draws=1)
    torch.testing.assert_close(already, grey, atol=1e-4, rtol=0)


@pytest.mark.parametrize("targeted", [False, True])
def test_fixed_c_reaches_the_closed_form_optimum(linear: LinearClassifier, targeted: bool) -> None:
    """min ||d||^2 + c max(m - ||a|| t, 0) over steps t along a: t = c ||a|| / 2 while that is below the
    margin, else m / ||a||, where it stays on the boundary."""
    grey = torch.full((1, *SHAPE), 0.5)
    with torch.no_grad():
        linear.b.add_(0.4 - linear.value(grey).item())
    label = torch.tensor([1 if targeted else 0])
    norm, margin = linear.a.norm().item(), 0.4
    for c in (0.25 * 2 * margin / norm**2, 20 * margin / norm**2):
        adversarial = cw_l2_paper(linear, grey, label, c=c, targeted=targeted, lr=2e-3, steps=600)
        expected = min(c * norm / 2, margin / norm)
        assert abs((adversarial - grey).norm().item() - expected) < 0.03 * expected
        step = (adversarial - grey).flatten()
        cosine = torch.nn.functional.cosine_similarity(step, -linear.a.detach(), dim=0)
        assert cosine > 0.995


@pytest.mark.parametrize("attack", [cw_l2, cw_l2_paper])
def test_black_and_white_pixels_do_not_freeze(linear: LinearClassifier, attack: object) -> None:
    """All pixels at 0 or 1: in the authors' parametrisation w is infinite and nothing ever moves."""
    images = (linear.a > 0).float().view(1, *SHAPE)
    label = torch.tensor([0])
    linear.b.data = 0.3 - (images.flatten(1) @ linear.a).detach()
    if attack is cw_l2:
        adversarial = cw_l2(linear, images, label, confirm_draws=1)
        assert labels_of(linear, adversarial).item() == 1
    else:
        adversarial = cw_l2_paper(linear, images, label, c=10.0)
    moved = (adversarial - images).abs().flatten()
    assert (moved[linear.a.abs() > 0.1] > 1e-3).all()


def test_no_strength_no_change(linear: LinearClassifier) -> None:
    images = torch.tensor([0.0, 1.0, 0.5, 0.25]).repeat(4).view(1, *SHAPE)
    adversarial = cw_l2_paper(linear, images, torch.tensor([0]), c=0.0)
    torch.testing.assert_close(adversarial, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attack", [cw_l2, cw_l2_paper])
def test_contract(tiny: nn.Sequential, images: Tensor, attack: object) -> None:
    """Bounds, shapes, no weight gradients, modes, statistics and caller's random state as they were."""
    run = cw_l2 if attack is cw_l2 else cw_l2_paper
    ensemble = rse.SelfEnsemble(tiny, draws=2).train()
    statistics = tiny.get_buffer("1.running_mean").clone()
    tiny[0].weight.requires_grad_(False)
    state, labels = torch.get_rng_state(), torch.arange(6) % 5
    kept = images.clone()
    adversarial = run(ensemble, images, labels, steps=5, max_batch=4)
    assert adversarial.shape == images.shape
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert torch.equal(images, kept)
    assert not adversarial.requires_grad
    assert all(parameter.grad is None for parameter in ensemble.parameters())
    assert [p.requires_grad for p in tiny[0].parameters()] == [False, True]
    assert all(p.requires_grad for p in tiny[3].parameters())
    assert ensemble.training
    assert tiny.training
    assert torch.equal(tiny.get_buffer("1.running_mean"), statistics)
    assert torch.equal(torch.get_rng_state(), state)


def test_works_inside_no_grad_and_on_empty_batches(linear: LinearClassifier, grey: Tensor) -> None:
    with torch.no_grad():
        adversarial = cw_l2_paper(linear, grey, labels_of(linear, grey), c=1.0, steps=20)
    assert not torch.equal(adversarial, grey)
    assert cw_l2(linear, grey[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, *SHAPE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("attack", [cw_l2, cw_l2_paper])
def test_other_precisions(linear: LinearClassifier, grey: Tensor, attack: object, dtype: torch.dtype) -> None:
    run = cw_l2 if attack is cw_l2 else cw_l2_paper
    labels = labels_of(linear, grey)
    adversarial = run(linear.double(), grey.to(dtype), labels, steps=100)
    assert adversarial.dtype == dtype
    assert not torch.equal(adversarial, grey.to(dtype))


def test_seeded_noise_makes_an_attack_repeat(tiny: nn.Module, images: Tensor) -> None:
    ensemble, labels = rse.SelfEnsemble(tiny).eval(), torch.arange(6) % 5
    results = []
    for _ in range(2):
        with rse.noise_draw(seed=1):
            results.append(cw_l2_paper(ensemble, images, labels, c=1.0, steps=10))
    assert torch.equal(*results)
    assert not torch.equal(cw_l2_paper(ensemble, images, labels, c=1.0, steps=10), results[0])


def test_one_lucky_draw_is_no_success(grey: Tensor) -> None:
    """A coin that answers wrong in one draw of ten fools nobody: the original comes back."""

    class Coin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)
            self.calls = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            sign = -1.0 if self.calls % 10 == 0 else 1.0
            value = sign * 4 + 0 * self.conv(inputs).mean(dim=(1, 2, 3))
            return torch.stack([value, -value], dim=1)

    labels = torch.zeros(8, dtype=torch.int64)
    assert torch.equal(cw_l2(Coin(), grey, labels, steps=50, binary_search_steps=2, confirm_draws=10), grey)
    lucky = cw_l2(Coin(), grey, labels, steps=50, binary_search_steps=2, confirm_draws=1, lr=0.1)
    assert lucky.shape == grey.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels must be int64"),
        ({"labels": torch.zeros(8)}, "labels must be int64"),
        ({"labels": torch.full((8,), -1)}, ">= 0"),
        ({"inputs": torch.full((8, *SHAPE), 2.0)}, r"\[0, 1\]"),
        ({"inputs": torch.full((8, *SHAPE), float("nan"))}, "NaN"),
        ({"labels": torch.full((8,), 2)}, "below 2"),
        ({"inputs": torch.rand(8, 3, 4, 4)}, "cannot take inputs"),
        ({"max_batch": 0}, "max_batch"),
        ({"lr": float("inf")}, "lr"),
        ({"steps": 0}, "steps"),
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
    ],
)
@pytest.mark.parametrize("attack", [cw_l2, cw_l2_paper])
def test_bad_input(
    linear: LinearClassifier, grey: Tensor, attack: object, change: dict[str, Tensor], message: str
) -> None:
    arguments = {"inputs": grey, "labels": torch.zeros(8, dtype=torch.int64)} | change
    run = cw_l2 if attack is cw_l2 else cw_l2_paper
    with pytest.raises(ValueError, match=message):
        run(linear, **arguments)  # type: ignore[arg-type]


def test_bad_strengths(linear: LinearClassifier, grey: Tensor) -> None:
    labels = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match="c must be"):
        cw_l2_paper(linear, grey, labels, c=-1.0)
    with pytest.raises(ValueError, match="confirm_draws"):
        cw_l2(linear, grey, labels, confirm_draws=0)
