"""Attacks against closed forms on linear classifiers, the expectation over noise, and their contract."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.attacks import (
    ATTACKS,
    Noise,
    apgd,
    apgd_targeted,
    count_evaluations,
    cw_l2,
    ddn,
    fgsm,
    fmn,
    pgd,
    random_noise,
    transfer,
)
from selfensemble.attacks.averaging import Average
from selfensemble.attacks.driver import attacked, looks_like_probabilities
from selfensemble.attacks.expectation import Estimate, Oracle
from selfensemble.attacks.losses import LOSSES, dlr
from selfensemble.attacks.nearest import Nearest
from selfensemble.attacks.norms import project, random_start, size
from selfensemble.ensemble.randomness import OTHER_NOISE
from selfensemble.noise.streams import stream_seed

from ..conftest import LinearClassifier

SHAPE = (1, 4, 4)
EPS = {"linf": 0.02, "l2": 0.1, "l1": 0.3}


@pytest.fixture
def linear() -> LinearClassifier:
    return LinearClassifier(16).requires_grad_(False)


@pytest.fixture
def grey() -> Tensor:
    """Images near mid-grey, so that the box [0, 1] is not in the way."""
    return 0.5 + 0.1 * torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(3)) - 0.05


def dual(weights: Tensor, norm: str) -> float:
    order = {"linf": 1.0, "l2": 2.0, "l1": math.inf}[norm]
    return float(torch.linalg.vector_norm(weights, order))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("attack", "settings"),
    [
        (fgsm, {}),
        *[(pgd, {"loss": loss, "restarts": 2}) for loss in LOSSES],
        *[(apgd, {"loss": loss}) for loss in LOSSES],
        (apgd_targeted, {}),
    ],
)
def test_fixed_budget_reaches_the_closed_form_loss(
    linear: LinearClassifier,
    grey: Tensor,
    norm: str,
    targeted: bool,
    attack: Callable[..., Tensor],
    settings: dict[str, Any],
) -> None:
    """The value a.x + b moves by eps times the dual norm of a, and no further."""
    if attack is apgd_targeted and targeted:
        pytest.skip("takes true labels")
    labels = linear(grey).argmax(dim=1)
    down = torch.where((labels == 0) != targeted, 1.0, -1.0)
    adversarial = attack(
        linear, grey, labels, targeted=targeted, norm=norm, eps=EPS[norm], seed=0, **settings
    )
    moved = down * (linear.value(grey) - linear.value(adversarial))
    best = EPS[norm] * dual(linear.a, norm)
    assert (moved <= best * (1 + 1e-4)).all()
    assert (moved >= best * 0.999).all()
    assert (size(adversarial - grey, norm) <= EPS[norm] * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("attack", "norm"), [(cw_l2, "l2"), (ddn, "l2"), (fmn, "l2"), (fmn, "linf"), (fmn, "l1")]
)
def test_minimum_norm_comes_near_the_closed_form_distance(
    linear: LinearClassifier, grey: Tensor, attack: Callable[..., Tensor], norm: str
) -> None:
    labels = linear(grey).argmax(dim=1)
    adversarial = attack(linear, grey, labels, **({"norm": norm} if attack is fmn else {}))
    assert (linear(adversarial).argmax(dim=1) != labels).all()
    ratio = size(adversarial - grey, norm) / (linear.value(grey).abs() / dual(linear.a, norm))
    assert (ratio > 1 - 1e-4).all()
    assert (ratio < 1.05).all()


def test_box_and_ball_at_once() -> None:
    """The L1 projection is the nearest point of ball and box: checked against a search by scipy."""
    from scipy.optimize import minimize

    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x, u = (torch.rand(1, 6, generator=generator).double() for _ in range(2))
        u = 3 * (u - 0.5)
        found = project(u, "l1", 0.4, x)
        assert size(found, "l1") <= 0.4 + 1e-9
        assert ((x + found >= -1e-12) & (x + found <= 1 + 1e-12)).all()
        # With d = p - q, p, q >= 0, a smooth problem.
        goal, here = u.numpy()[0], x.numpy()[0]
        bounds = [(0, 1 - value) for value in here] + [(0, value) for value in here]
        best = minimize(  # type: ignore[call-overload]
            lambda pq, goal=goal: np.square(pq[:6] - pq[6:] - goal).sum(),
            np.zeros(12),
            bounds=bounds,
            constraints={"type": "ineq", "fun": lambda pq: 0.4 - pq.sum()},
            options={"ftol": 1e-14, "maxiter": 1000},
        )
        assert float((found - u).square().sum()) <= best.fun + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_starts_fill_the_ball(norm: str) -> None:
    """Radii of uniform points in n dimensions: r / eps <= t with probability t^n; KS at level 1e-4."""
    from scipy.stats import kstest

    inputs = torch.full((4000, 3), 0.5)
    change = random_start(inputs, norm, 0.1, torch.Generator().manual_seed(0))
    assert (size(change, norm) <= 0.1 + 1e-6).all()
    assert kstest((size(change, norm) / 0.1).pow(3).numpy(), "uniform").pvalue > 1e-4
    assert abs(float(change.mean())) < 4 * float(change.std()) / math.sqrt(change.numel())


class NoisyWeights(nn.Module):
    """A Bayesian linear layer: weights N(mean, std^2), drawn by torch's global generator at each call."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std
        self.register_buffer("mean", torch.randn(16, generator=torch.Generator().manual_seed(5)))

    def forward(self, inputs: Tensor) -> Tensor:
        value = inputs.flatten(1) @ (self.get_buffer("mean") + self.std * torch.randn(16))
        return torch.stack([value, -value], dim=1)


def test_expected_gradient_of_noisy_weights_is_the_analytic_one(grey: Tensor) -> None:
    """The margin's gradient is 2 (w + std n): its mean over n draws is N(2w, 4 std^2 / n).

    Chi-squared over 16 coordinates at level 1e-4 (two-sided).
    """
    from scipy.stats import chi2

    model, draws = NoisyWeights(0.7), 2000
    labels = torch.ones(8, dtype=torch.int64)
    with attacked(model) as (forward, _):
        oracle = Oracle(forward, Noise(eot=draws), seed=1, reseed=True)
        gradient = oracle.gradient(grey, lambda z: LOSSES["margin"](z, labels, False)).gradient
    error = 2 * 0.7 / math.sqrt(draws)
    statistic = float(((gradient[0].flatten() - 2 * model.get_buffer("mean")) / error).square().sum())
    assert chi2.ppf(5e-5, 16) < statistic < chi2.ppf(1 - 5e-5, 16)


@pytest.mark.parametrize("average", ["losses", "probabilities"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_expectations_match_quadrature(average: str, loss: str) -> None:
    """Input noise on a linear classifier makes v = a.x + b normal; its expectations are integrals.

    Cross-entropy of the mean softmax has the gradient of -log E[s(v)], the mean of losses that of
    -E[log s(v)]; the margin is -v, or -log(E[s(v)] / E[s(-v)]). Tolerance: five standard errors.
    """
    std, draws = 0.5, 4000
    linear = LinearClassifier(16).requires_grad_(False)
    model = nn.Sequential(rse.GaussianNoise(std), linear).eval()
    x = torch.full((1, *SHAPE), 0.5)
    linear.b.data = 0.3 - linear.value(x)[0] + linear.b
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    v = 0.3 + std * float(linear.a.norm()) * nodes
    weights = weights / weights.sum()
    s, slope = 1 / (1 + np.exp(-v)), np.exp(-np.abs(v)) / np.square(1 + np.exp(-np.abs(v)))
    mean, mean_slope = float(weights @ s), float(weights @ slope)
    factor = {
        ("losses", "ce"): -float(weights @ (1 - s)),
        ("probabilities", "ce"): -mean_slope / mean,
        ("losses", "margin"): -1.0,
        ("probabilities", "margin"): -mean_slope / mean - mean_slope / (1 - mean),
    }[average, loss]
    labels = torch.zeros(1, dtype=torch.int64)
    with attacked(model) as (forward, _), count_evaluations() as budget:
        oracle = Oracle(forward, Noise(eot=draws, average=average), seed=2)  # type: ignore[arg-type]
        estimate = oracle.gradient(x, lambda z: LOSSES[loss](z, labels, False))
    found = estimate.gradient.flatten() @ linear.a / linear.a.square().sum()
    assert abs(float(found) - factor) < 5 * 0.5 / math.sqrt(draws) * max(1.0, 1 / mean)
    assert abs(float(estimate.probabilities[0, 0]) - mean) < 5 * 0.5 / math.sqrt(draws)
    assert budget.gradients == draws
    assert budget.forwards == (draws if average == "probabilities" else 0)


def test_average_of_probabilities_is_the_gradient_of_the_ensemble(tiny: nn.Module, images: Tensor) -> None:
    """Against autograd through all draws at once, which the oracle never holds in memory."""
    model, labels = rse.inject_noise_(tiny).eval(), torch.arange(6) % 5
    for loss in (*LOSSES.values(), dlr):
        with attacked(model) as (forward, _):
            oracle = Oracle(forward, Noise(eot=4, average="probabilities", frozen=True), seed=3)
            found = oracle.gradient(images, lambda z, loss=loss: loss(z, labels, False))  # type: ignore[misc]
            leaf = images.clone().requires_grad_()
            each = []
            for index in range(4):
                with rse.noise_draw(3, index, "shared"):
                    each.append(forward(leaf).log_softmax(dim=1))
            mean = torch.stack(each).logsumexp(dim=0) - math.log(4)
            values = loss(mean, labels, False)
            (expected,) = torch.autograd.grad(values.sum(), leaf)
        torch.testing.assert_close(found.gradient, expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found.loss, values.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.probabilities.float(), mean.detach().exp(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("average", ["losses", "probabilities"])
@pytest.mark.parametrize("eot", [4, 5])
def test_draws_of_one_pass_are_those_of_several(
    tiny: nn.Module, images: Tensor, average: Average, eot: int
) -> None:
    """Of an even number they are antithetic pairs; those that confirm are independent."""
    model, labels = rse.inject_noise_(tiny).eval(), torch.arange(6) % 5
    found, confirmed = [], []
    for room in (0, 1, 6, 24, 1000):
        with attacked(model) as (forward, _):
            oracle = Oracle(forward, Noise(eot=eot, average=average), seed=3, room=(room, room))
            found += [oracle.gradient(images, lambda z: LOSSES["ce"](z, labels, False)) for _ in range(2)]
            confirmed.append(oracle.lead(images, labels, targeted=False)[0])
    for later in range(2, len(found)):
        for name in ("gradient", "loss", "probabilities"):
            torch.testing.assert_close(getattr(found[later], name), getattr(found[later % 2], name))
    assert all(torch.allclose(each, confirmed[0], rtol=1e-4, atol=1e-6) for each in confirmed)
    drawn = []
    for index in range(eot):
        with torch.no_grad(), rse.noise_draw(oracle._seed, index, "shared", antithetic=eot == 4):
            drawn.append(model(images).softmax(dim=1))
    torch.testing.assert_close(found[0].probabilities.float(), torch.stack(drawn).mean(dim=0))


def test_what_only_the_copy_takes_for_a_success_is_moved_on() -> None:
    """The model's border lies at a mean pixel of .5, the copy's at .45."""
    noise = rse.GaussianNoise(0.01).eval()

    def border(at: float) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            z = 40 * (noise(x).flatten(1).mean(dim=1) - at)
            return torch.stack([-z, z], dim=1)

        return forward

    oracle = Oracle(border(0.5), Noise(eot=4), seed=1, follow=border(0.45))
    x, labels = torch.full((4, 1, 8, 8), 0.3), torch.zeros(4, dtype=torch.int64)
    nearest = Nearest(oracle, x, labels, False, "l2")
    visited = torch.tensor([0.6, 0.47, 0.46, 0.4]).view(4, 1, 1, 1).expand_as(x).clone()
    with torch.no_grad():
        logits = torch.stack([border(0.45)(visited) for _ in range(4)])
    estimate = Estimate(torch.zeros(4), logits.softmax(dim=2), torch.empty(0))
    found = nearest.visit(torch.arange(4), visited, estimate)
    assert found.tolist() == [True, True, True, False]
    means = nearest.refined().flatten(1).mean(dim=1)
    assert (means > 0.5).all()  # the third and fourth beyond what was visited
    assert (means < 0.51).all()
    torch.testing.assert_close(nearest.distance, 8 * (means - 0.3))


def test_frozen_noise_is_that_of_a_seeded_prediction(tiny: nn.Module, images: Tensor) -> None:
    """What fools the frozen draws in the attack fools `predict` with the same seed, image for image."""
    ensemble = rse.SelfEnsemble(tiny, rse.NoiseConfig(0.3, 0.3), draws=3)
    labels = ensemble.predict(images, seed=4).label
    adversarial = pgd(ensemble, images, labels, eps=0.5, steps=40, loss="margin", eot=3, frozen=True, seed=4)
    assert (ensemble.predict(adversarial, seed=4).label != labels).all()


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_contract(tiny: nn.Sequential, images: Tensor, name: str) -> None:
    """Bounds, ball, no weight gradients, modes, statistics and every caller's state as they were."""
    attack = ATTACKS[name]
    budget = {"steps": 3} if "steps" in attack.__annotations__ else {}
    budget |= {"queries": 10} if "queries" in attack.__annotations__ else {}
    ensemble = rse.SelfEnsemble(tiny, draws=2).train()
    statistics = tiny.get_buffer("1.running_mean").clone()
    tiny[0].weight.requires_grad_(False)
    state, labels, kept = torch.get_rng_state(), torch.arange(6) % 5, images.clone()
    results = [
        attack(ensemble, images, labels, max_batch=4, eot=3, seed=seed, **budget) for seed in (1, 1, 2)
    ]
    adversarial = results[0]
    assert torch.equal(results[0], results[1])
    if name != "fgsm":
        assert not torch.equal(results[0], results[2])
    assert adversarial.shape == images.shape
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    if "eps" in attack.__annotations__ and name != "fab":
        assert float((adversarial - images).abs().max()) <= 8 / 255 + 1e-6
    assert torch.equal(images, kept)
    assert not adversarial.requires_grad
    assert all(parameter.grad is None for parameter in ensemble.parameters())
    assert [p.requires_grad for p in tiny[0].parameters()] == [False, True]
    assert ensemble.training
    assert tiny.training
    assert torch.equal(tiny.get_buffer("1.running_mean"), statistics)
    assert torch.equal(torch.get_rng_state(), state)
    assert attack(ensemble, images[:0], labels[:0]).shape == (0, 3, 8, 8)


def test_budget_is_counted_and_finished_images_leave(linear: LinearClassifier, grey: Tensor) -> None:
    labels = linear(grey).argmax(dim=1)
    with count_evaluations() as full:
        pgd(linear, grey, labels, eps=0.3, steps=10)
    assert full.gradients == 80
    with count_evaluations() as outer, count_evaluations() as short:
        adversarial = pgd(linear, grey, labels, eps=0.3, steps=10, early_stop=True)
    assert (linear(adversarial).argmax(dim=1) != labels).all()
    assert short.gradients < 60
    assert outer == short
    wrong = 1 - labels
    with count_evaluations() as none:
        untouched = pgd(linear, grey, wrong, eps=0.3, steps=10, early_stop=True)
        cw_l2(linear, grey, wrong)
    assert torch.equal(untouched, grey)
    assert none.gradients == 0


def test_memory_does_not_depend_on_draws_nor_batch(tiny: nn.Module, images: Tensor) -> None:
    """No forward pass sees more than `max_batch` images, whatever the number of draws."""
    seen = []
    tiny.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    ensemble = rse.SelfEnsemble(tiny)
    for most in (2, 5):
        seen.clear()
        apgd(ensemble, images, torch.arange(6) % 5, steps=2, eot=20, max_batch=most)
        assert max(seen) == most


def test_random_noise_is_weaker_than_gradients(linear: LinearClassifier, grey: Tensor) -> None:
    labels = linear(grey).argmax(dim=1)
    down = torch.where(labels == 0, 1.0, -1.0)
    attacks: tuple[Callable[..., Tensor], ...] = (random_noise, pgd)
    for norm, eps in EPS.items():
        random, best = (
            down
            * (linear.value(grey) - linear.value(attack(linear, grey, labels, norm=norm, eps=eps, seed=0)))
            for attack in attacks
        )
        assert (random > 0).all()
        assert (random < 0.95 * best).all()


def test_transfer_attacks_the_base_or_the_surrogate(linear: LinearClassifier, grey: Tensor) -> None:
    noisy = nn.Sequential(rse.GaussianNoise(5.0), linear).eval()
    labels = linear(grey).argmax(dim=1)
    direct = pgd(linear, grey, labels, eps=0.1, seed=0)
    settings: dict[str, Any] = {"attack": pgd, "eps": 0.1, "seed": 0}
    assert torch.equal(transfer(noisy, grey, labels, **settings), direct)
    assert torch.equal(transfer(noisy, grey, labels, surrogate=linear, **settings), direct)
    assert noisy[0].enabled


def test_dropout_at_test_time_is_averaged_and_can_be_frozen(images: Tensor) -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(192, 5)

        def forward(self, inputs: Tensor) -> Tensor:
            out: Tensor = self.head(nn.functional.dropout(inputs.flatten(1), 0.5, training=True))
            return out

    model, labels = Dropped(), torch.arange(6) % 5
    state = torch.get_rng_state()
    one, same, other = (pgd(model, images, labels, eps=0.1, steps=3, seed=seed, eot=2) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    seen = []
    model.head.register_forward_pre_hook(lambda module, args: seen.append((args[0] != 0).detach()))
    inside = 0.3 + 0.4 * images  # no pixel is 0 but for the dropout
    pgd(model, inside, labels, eps=0.1, steps=3, frozen=True, random_starts=False)
    assert len(seen) > 4
    assert all(torch.equal(seen[1], mask) for mask in seen[2:])


@pytest.mark.parametrize("name", ["pgd", "apgd", "cw", "ddn", "fmn", "fab", "square", "autoattack-rand"])
def test_frozen_dropout_falls_to_every_attack(images: Tensor, name: str) -> None:
    """The batch stays whole, so that its frozen masks do; the seed need not be given."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(192, 5)

        def forward(self, inputs: Tensor) -> Tensor:
            out: Tensor = self.head(nn.functional.dropout(inputs.flatten(1), 0.3, training=True))
            return out

    model = Dropped()

    def frozen(batch: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(7, 0, OTHER_NOISE))
            answers: Tensor = model(batch).argmax(dim=1)
            return answers

    labels = frozen(images)
    ball = {"eps": 0.5} if name in ("pgd", "apgd", "square", "autoattack-rand") else {}
    adversarial = ATTACKS[name](model, images, labels, frozen=True, seed=7, **ball)
    assert (frozen(adversarial) != labels).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 2.0}, "eps must be above 0 and at most 1"),
        ({"eps": 0.0}, "eps"),
        ({"eps": math.nan}, "eps"),
        ({"norm": "l3"}, "norm must be one of"),
        ({"steps": 0}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"loss": "mse"}, "loss must be one of ce, margin, dlr, probability-margin"),
        ({"step_size": -1.0}, "step_size"),
        ({"eot": 0}, "eot"),
        ({"average": "logits"}, "average"),
        ({"confirm_draws": 0}, "confirm_draws"),
    ],
)
def test_bad_settings(linear: LinearClassifier, grey: Tensor, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pgd(linear, grey, torch.zeros(8, dtype=torch.int64), **settings)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [(lambda z: z * torch.nan, "NaN"), (lambda z: z.softmax(dim=1), "probabilities")],
)
def test_models_that_cannot_be_attacked(
    linear: LinearClassifier, grey: Tensor, outputs: Callable[[Tensor], Tensor], message: str
) -> None:
    class Broken(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return outputs(linear(inputs))

    with pytest.raises(ValueError, match=message):
        apgd(Broken(), grey, torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="true labels"):
        apgd_targeted(linear, grey, torch.zeros(8, dtype=torch.int64), targeted=True)


def test_probabilities_are_told_from_logits_that_add_up_to_one() -> None:
    torch.manual_seed(0)
    logits = torch.randn(16, 10)
    for answers in (logits.softmax(dim=1), logits.bfloat16().softmax(dim=1), logits.half().softmax(dim=1)):
        assert looks_like_probabilities(answers)
        assert looks_like_probabilities(answers.float())
        assert looks_like_probabilities(answers[:1])
    assert looks_like_probabilities(torch.randn(16, 1000).softmax(dim=1))
    # Of a network whose answers hardly depend on the image: seen in a training of one epoch.
    alike = torch.tensor([0.46, 0.54]) + 3e-4 * torch.randn(16, 2)
    assert ((alike.sum(dim=1) - 1).abs() < 1.5e-3).all()
    assert not looks_like_probabilities(alike)
    assert not looks_like_probabilities(logits.softmax(dim=1) * 1.01)


def test_a_model_without_gradients_is_refused(linear: LinearClassifier, grey: Tensor) -> None:
    class Detached(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            out: Tensor = linear(inputs.detach())
            return out

    with pytest.raises(ValueError, match="no gradient"):
        pgd(Detached(), grey, torch.zeros(8, dtype=torch.int64))


def test_inference_mode_and_inputs_with_gradients(linear: LinearClassifier, grey: Tensor) -> None:
    labels = linear(grey).argmax(dim=1)
    expected = pgd(linear, grey, labels, eps=0.1, seed=0)
    with torch.inference_mode():
        assert torch.equal(pgd(linear, grey, labels, eps=0.1, seed=0), expected)
    leaf = grey.clone().requires_grad_()
    assert torch.equal(pgd(linear, leaf, labels, eps=0.1, seed=0), expected)
    assert leaf.grad is None
    assert not torch.equal(cw_l2(linear, leaf, labels), grey)


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_inputs_need_not_be_images(grey: Tensor, name: str) -> None:
    linear = LinearClassifier(16).requires_grad_(False)
    rows = grey.flatten(1)
    labels = linear(rows).argmax(dim=1)
    assert ATTACKS[name](linear, rows, labels).shape == (8, 16)
    with pytest.raises(ValueError, match="Square changes squares of images"):
        ATTACKS["square"](linear, rows.view(8, 1, 1, 2, 2, 4), labels)
