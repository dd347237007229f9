"""The judge and the curve on models with known answers."""

import json

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.evaluation import judge
from selfensemble.runtime.provenance import accuracy_record, binomial_interval, provenance

from ..conftest import LinearClassifier


def test_distances_and_answers() -> None:
    model = LinearClassifier(4)
    inputs = torch.rand(5, 1, 2, 2)
    labels = model(inputs).argmax(dim=1)
    adversarial = inputs.clone()
    adversarial[:, 0, 0, 0] = 0.5
    verdict = judge(model, inputs, adversarial, labels)
    change = (inputs[:, 0, 0, 0] - 0.5).abs()
    torch.testing.assert_close(verdict.l2, change)
    torch.testing.assert_close(verdict.linf, change)
    assert torch.equal(verdict.correct, model(adversarial).argmax(dim=1) == labels)
    assert verdict.rms_l2 == pytest.approx(float(change.square().mean().sqrt()))
    assert judge(model, inputs, inputs, labels).accuracy == 1.0


def test_the_judge_ignores_frozen_noise_around_it(tiny: nn.Module, images: Tensor) -> None:
    """A seed in the surroundings must not reach the judge's noise, a seed of its own must."""
    ensemble = rse.SelfEnsemble(tiny, rse.NoiseConfig(1.0, 1.0), draws=1)
    many = images.repeat(50, 1, 1, 1)
    labels = torch.arange(300) % 5

    def correct(seed: int | None) -> Tensor:
        with rse.noise_draw(seed=0):
            return judge(ensemble, many, many, labels, seed=seed).correct

    assert torch.equal(correct(1), correct(1))
    assert not torch.equal(correct(1), correct(2))
    assert not torch.equal(correct(None), correct(None))


def test_other_stochastic_modules_are_averaged(images: Tensor) -> None:
    model = rse.inject_noise_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    labels = torch.zeros(6, dtype=torch.int64)
    verdict = judge(model, images, images, labels, draws=3, max_batch=4)
    assert verdict.correct.shape == (6,)


def test_the_judge_refuses_what_is_no_valid_image(images: Tensor) -> None:
    model, labels = LinearClassifier(192), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        judge(model, images, images + 1, labels)
    with pytest.raises(ValueError, match="NaN"):
        judge(model, images, images * torch.nan, labels)
    with pytest.raises(ValueError, match="no images"):
        judge(model, images[:0], images[:0], labels[:0])
    with pytest.raises(ValueError, match="adversarial is"):
        judge(model, images, images[:5], labels)


class Guesses(nn.Module):
    """Answers class 1 with probability p, else the true class 0; noise of torch's global generator."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, inputs: Tensor) -> Tensor:
        wrong = (torch.rand(len(inputs)) < self.p).float()
        return torch.stack([1 - wrong, wrong], dim=1) + 0 * inputs.flatten(1).sum(dim=1, keepdim=True)


def test_persistent_attacker_is_the_binomial_law() -> None:
    """`1 - (1 - p)^k` within 4.4 standard errors (level 1e-5), also where w/Q plugged in is biased."""
    images, queries = torch.rand(400, 1, 2, 2), 20
    labels = torch.zeros(400, dtype=torch.int64)
    verdict = judge(Guesses(0.05), images, images, labels, queries=queries, seed=3)
    assert verdict.answers.shape == (400, queries)
    for k in (1, 5, 20):
        expected = 1 - (1 - 0.05) ** k
        # The unbiased estimate of one image has at most the variance of one trial.
        error = (expected * (1 - expected) / 400) ** 0.5
        assert abs(verdict.persistent(k) - expected) < 4.4 * error
    assert verdict.persistent(1) == pytest.approx(float(verdict.wrong_per_query.mean()))
    assert verdict.persistent(20) == pytest.approx(float(verdict.wrong.any(dim=1).double().mean()))
    with pytest.raises(ValueError, match="k must be 1 to 20"):
        verdict.persistent(21)


def test_queries_are_fresh_repeat_by_seed_and_leave_the_callers_generator() -> None:
    images, labels = torch.rand(300, 1, 2, 2), torch.zeros(300, dtype=torch.int64)
    state = torch.get_rng_state()
    one, same, other, free = (
        judge(Guesses(0.5), images, images, labels, queries=2, seed=seed).answers for seed in (1, 1, 2, None)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, free)
    assert not torch.equal(one[:, 0], one[:, 1])
    assert torch.equal(torch.get_rng_state(), state)


def test_lead_budget_and_broken_outputs(images: Tensor) -> None:
    model, labels = LinearClassifier(192), torch.zeros(6, dtype=torch.int64)
    verdict = judge(model, images, images, labels, queries=2)
    probabilities = model(images).softmax(dim=1)
    torch.testing.assert_close(verdict.lead, (probabilities[:, 1] - probabilities[:, 0]).detach())
    with pytest.raises(ValueError, match="broke its budget"):
        judge(model, images, (images + 0.2).clamp(max=1), labels, norm="linf", eps=0.1)
    judge(model, images, (images + 0.2).clamp(max=1), labels, norm="linf", eps=0.2)

    class Broken(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.full((len(inputs), 2), torch.nan)

    with pytest.raises(ValueError, match="NaN"):
        judge(Broken(), images, images, labels)


def test_intervals() -> None:
    """Clopper-Pearson's closed forms at the ends: 1 - (alpha / 2)^(1 / n)."""
    low, high = binomial_interval(0, 100)
    assert low == 0.0
    assert high == pytest.approx(1 - 0.025 ** (1 / 100))
    assert binomial_interval(100, 100)[0] == pytest.approx(0.025 ** (1 / 100))
    for successes, trials in ((1, 2), (7, 10), (399, 450), (1, 10_000)):
        expected = stats.binomtest(successes, trials).proportion_ci(0.99, method="exact")
        assert binomial_interval(successes, trials, 0.99) == pytest.approx((expected.low, expected.high))
    record = accuracy_record(9, 10)
    assert record["low"] < record["accuracy"] == 0.9 < record["high"]


def test_provenance_is_complete_json() -> None:
    record = json.loads(json.dumps(provenance()))
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["cores"] >= 1
