"""The ensemble against its definition."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.networks.models import create_model


@pytest.fixture
def ensemble(tiny: nn.Module) -> rse.SelfEnsemble:
    return rse.SelfEnsemble(tiny, rse.NoiseConfig(0.3, 0.2), draws=4).eval()


def single_draws(ensemble: rse.SelfEnsemble, images: Tensor, draws: int, seed: int) -> Tensor:
    """(draws, B, K) softmax of single shared draws, the slow and obvious way."""
    out = []
    with torch.no_grad():
        for index in range(draws):
            with rse.noise_draw(seed, index, "shared"):
                out.append(ensemble.model(images).softmax(dim=1))
    return torch.stack(out)


def test_training_mode_returns_the_logits_of_one_draw(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    ensemble.train()
    with rse.noise_draw(seed=1):
        logits = ensemble(images)
    with rse.noise_draw(seed=1):
        assert torch.equal(logits, ensemble.model(images))
    assert not torch.equal(ensemble(images), ensemble(images))


def test_eval_mode_returns_the_log_of_the_mean_softmax(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    with rse.noise_draw(seed=1):
        log_mean = ensemble(images)
    with rse.noise_draw(seed=1):
        draws = torch.stack([ensemble.model(images).softmax(dim=1) for _ in range(4)])
    torch.testing.assert_close(log_mean.exp(), draws.mean(dim=0))
    torch.testing.assert_close(log_mean.exp().sum(dim=1), torch.ones(6))


def test_log_of_the_mean_softmax_keeps_tiny_probabilities() -> None:
    """Probabilities below float32's smallest number still have finite logits."""

    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            zero = 0 * self.conv(inputs).mean(dim=(1, 2, 3))
            return torch.stack([zero, zero - 300], dim=1)

    logits = rse.SelfEnsemble(Sure()).eval()(torch.rand(2, 1, 2, 2))
    torch.testing.assert_close(logits, torch.tensor([[0.0, -300.0]]).expand(2, 2))


def test_gradients_flow_through_the_ensemble(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    leaf = images.clone().requires_grad_()
    with rse.noise_draw(seed=3):
        (gradient,) = torch.autograd.grad(ensemble(leaf)[:, 0].sum(), leaf)
    leaf = images.clone().requires_grad_()
    with rse.noise_draw(seed=3):
        draws = torch.stack([ensemble.model(leaf).softmax(dim=1) for _ in range(4)])
    (expected,) = torch.autograd.grad(draws.mean(dim=0)[:, 0].log().sum(), leaf)
    torch.testing.assert_close(gradient, expected)


def test_prediction_is_mean_and_spread_of_the_draws(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    answer = ensemble.predict(images, draws=7, seed=5)
    draws = single_draws(ensemble, images, 7, seed=5)
    torch.testing.assert_close(answer.probabilities, draws.mean(dim=0))
    torch.testing.assert_close(answer.spread, draws.std(dim=0))
    assert torch.equal(answer.label, draws.mean(dim=0).argmax(dim=1))
    assert torch.isnan(ensemble.predict(images, draws=1).spread).all()


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 7), max_batch=st.integers(1, 7), seed=st.integers())
def test_seeded_shared_predictions_do_not_depend_on_the_batch(size: int, max_batch: int, seed: int) -> None:
    torch.manual_seed(0)
    ensemble = rse.SelfEnsemble(create_model("small-cnn", channels=1, width=0.25))
    images = torch.rand(7, 1, 8, 8)
    whole = ensemble.predict_proba(images, seed=seed)
    part = ensemble.predict_proba(images[:size], seed=seed, max_batch=max_batch)
    torch.testing.assert_close(part, whole[:size], rtol=1e-5, atol=1e-6)


def test_per_image_noise_differs_between_images_and_chunks(ensemble: rse.SelfEnsemble) -> None:
    same = torch.rand(1, 3, 8, 8).expand(6, -1, -1, -1)
    for max_batch in (6, 2, 1):
        answers = ensemble.predict_proba(same, seed=2, sampling="per_image", max_batch=max_batch)
        assert answers.unique(dim=0).shape[0] == 6
    shared = ensemble.predict_proba(same, seed=2, max_batch=2)
    torch.testing.assert_close(shared, shared[:1].expand_as(shared))


def test_predictions_are_fresh_whatever_the_caller_seeds(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    answers = []
    for _ in range(2):
        torch.manual_seed(0)
        with rse.noise_draw(seed=0):
            answers.append(ensemble.predict_proba(images))
    assert not torch.equal(*answers)


def test_predicting_leaves_mode_and_gradients_alone(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    ensemble.train()
    statistics = ensemble.model.get_buffer("1.running_mean").clone()
    answer = ensemble.predict_proba(images, seed=1)
    assert ensemble.training
    assert ensemble.model.get_submodule("1").training
    assert torch.equal(ensemble.model.get_buffer("1.running_mean"), statistics)
    assert not answer.requires_grad
    ensemble.eval()
    assert torch.equal(ensemble.predict_proba(images, seed=1), answer)


def test_the_ensembles_loss_is_below_the_mean_loss_of_draws(
    ensemble: rse.SelfEnsemble, images: Tensor
) -> None:
    """Jensen's inequality, the reason why noisy SGD trains the ensemble."""
    labels = torch.arange(6) % 5
    draws = single_draws(ensemble, images, 20, seed=1)
    mean_loss = -draws[:, torch.arange(6), labels].log().mean(dim=0)
    loss = -ensemble.predict_proba(images, draws=20, seed=1)[torch.arange(6), labels].log()
    assert (loss <= mean_loss + 1e-6).all()


def test_without_noise_one_pass_serves(tiny: nn.Module, images: Tensor) -> None:
    expected = tiny(images).softmax(dim=1)
    ensemble = rse.SelfEnsemble(tiny, rse.NoiseConfig(0, 0)).eval()
    calls: list[int] = []
    tiny.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    answer = ensemble.predict(images)
    assert (calls.count(len(images)), ensemble.is_random) == (1, False)  # the others ask two of the images
    assert torch.equal(answer.probabilities, expected)
    assert torch.equal(answer.spread, torch.zeros(6, 5))
    torch.testing.assert_close(ensemble(images).exp(), expected)


def test_injected_noise_is_kept(tiny: nn.Module) -> None:
    rse.inject_noise_(tiny, rse.NoiseConfig(0.7, 0.6))
    ensemble = rse.SelfEnsemble(tiny)
    assert [layer.std for layer in rse.noise_layers(ensemble.model).values()] == [0.7, 0.6, 0.6]
    with pytest.raises(ValueError, match="remove_noise_"):
        rse.SelfEnsemble(tiny, rse.NoiseConfig())


def test_state_dict_is_the_networks(tiny: nn.Module) -> None:
    keys = [f"model.{key}" for key in tiny.state_dict()]
    assert list(rse.SelfEnsemble(tiny).state_dict()) == keys


def test_outputs_with_logits_attribute(images: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(num_labels=4, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    ensemble = rse.SelfEnsemble(transformers.ResNetForImageClassification(config))
    answer = ensemble.predict_proba(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(answer.sum(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, "255"),
        (torch.full((2, 3, 8, 8), 200.0), ValueError, r"\[0, 1\]"),
        (torch.full((2, 3, 8, 8), -0.1), ValueError, r"\[0, 1\]"),
        (torch.full((2, 3, 8, 8), math.nan), ValueError, "NaN"),
        (torch.full((2, 3, 8, 8), math.inf), ValueError, "NaN or infinite"),
        (torch.zeros(8), ValueError, "batch"),
        ([[1.0]], TypeError, r"torch\.Tensor"),
    ],
)
def test_bad_inputs(ensemble: rse.SelfEnsemble, inputs: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ensemble.predict_proba(inputs)


def test_other_ranges_can_be_allowed(tiny: nn.Module) -> None:
    ensemble = rse.SelfEnsemble(tiny, bounds=None)
    assert ensemble.predict_proba(torch.full((2, 3, 8, 8), 200.0)).shape == (2, 5)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_bad_counts(ensemble: rse.SelfEnsemble, images: Tensor, count: int) -> None:
    with pytest.raises(ValueError, match="draws"):
        ensemble.predict_proba(images, draws=count)
    with pytest.raises(ValueError, match="max_batch"):
        ensemble.predict_proba(images, max_batch=count)
    with pytest.raises(ValueError, match="draws"):
        rse.SelfEnsemble(ensemble.model, draws=count)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 8, 8, 3), (2, 3, 4, 4), (3, 8, 8)])
def test_wrong_shapes_name_what_was_expected(ensemble: rse.SelfEnsemble, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"cannot take inputs .*Conv2d\(3, 8"):
        ensemble.predict_proba(torch.rand(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_inputs_of_other_precision_are_converted(
    ensemble: rse.SelfEnsemble, images: Tensor, dtype: torch.dtype
) -> None:
    exact = ensemble.predict_proba(images, seed=1)
    torch.testing.assert_close(ensemble.predict_proba(images.to(dtype), seed=1), exact, atol=0.02, rtol=0)


def test_noise_placed_by_hand_is_kept_and_follows_the_policy(images: Tensor) -> None:
    net = nn.Sequential(rse.GaussianNoise(0.3), nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    ensemble = rse.SelfEnsemble(net).eval()
    assert rse.noise_layers(net) == {}
    whole = ensemble.predict_proba(images, seed=1)
    torch.testing.assert_close(ensemble.predict_proba(images[:2], seed=1), whole[:2])


def test_outputs_that_are_no_logits(images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(nn.Conv2d(3, 2, 1))
    with pytest.raises(ValueError, match=r"\(batch, classes\)"):
        ensemble.predict_proba(images)


def test_an_empty_batch(ensemble: rse.SelfEnsemble) -> None:
    assert ensemble.predict_proba(torch.zeros(0, 3, 8, 8)).shape == (0, 5)


def test_copies_are_independent(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    twin = copy.deepcopy(ensemble)
    assert torch.equal(twin.predict_proba(images, seed=1), ensemble.predict_proba(images, seed=1))
    rse.remove_noise_(twin.model)
    assert ensemble.is_random
    assert not twin.is_random
