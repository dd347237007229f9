"""Training rules of others' randomised defenses: their losses in closed form, and what a recipe may say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import selfensemble as rse
from selfensemble.noise.injection import noise_disabled
from selfensemble.noise.perturbing import LearnedPerturbation
from selfensemble.noise.placing import PlacedLayer
from selfensemble.noise.randomness import randomise_, read_randomness
from selfensemble.training import defenses
from selfensemble.training.defenses.adversarial import maximise
from selfensemble.training.defenses.perturbation import harmonic
from selfensemble.training.optimizers import make_optimizer
from selfensemble.training.recipe import load_recipe
from selfensemble.training.sections import TrainSection
from selfensemble.training.trainer import Trainer

from ..conftest import LinearClassifier

N_FGSM: dict[str, Any] = {
    "norm": "linf",
    "eps": 0.1,
    "steps": 1,
    "step_size": 0.1,
    "start": 2.0,
    "projected": False,
}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(8)


def ensemble_of(name: str, images: Tensor, **settings: Any) -> rse.SelfEnsemble:
    """A network without batch norm, so that a pass in train mode is one in eval mode."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    network.append(nn.Linear(16, 10))
    randomise_(network, read_randomness({"name": name} | settings), images)
    return rse.SelfEnsemble(network, rse.NoiseConfig(0, 0)).train()


def placed(ensemble: rse.SelfEnsemble) -> list[PlacedLayer]:
    return [module for module in ensemble.modules() if isinstance(module, PlacedLayer)]


def loss_of(defense: defenses.Defense, ensemble: rse.SelfEnsemble, images: Tensor, labels: Tensor) -> Tensor:
    networks = defenses.Networks(ensemble, ensemble, images=50)
    torch.manual_seed(7)
    return defense.loss(networks, images, labels)


def attacked(ensemble: rse.SelfEnsemble, images: Tensor, labels: Tensor) -> Tensor:
    """What the N-FGSM of `loss_of` attacks, its random start of the same seed."""
    torch.manual_seed(7)
    return maximise(
        ensemble, images, lambda over: functional.nll_loss(over, labels), norm="linf", eps=0.1, steps=1,
        step_size=0.1, start=2.0, projected=False,
    )  # fmt: skip


def test_n_fgsm_is_a_whole_step_from_a_start_beyond_the_ball_within_the_box() -> None:
    """Of a linear classifier: start plus eps times the sign, clipped to [0, 1] alone."""
    model = LinearClassifier(48)
    ensemble = rse.SelfEnsemble(nn.Sequential(nn.Conv2d(3, 3, 1), model), rse.NoiseConfig(0, 0))
    with torch.no_grad():
        convolution = ensemble.model[0]  # type: ignore[index]
        convolution.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
        convolution.bias.zero_()
    images = torch.rand(400, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    labels = torch.zeros(400, dtype=torch.long)
    change = attacked(ensemble, images, labels) - images
    moved = images + change
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    assert 0.25 < float(change.abs().max()) <= 0.3 + 1e-6
    inner = change[(moved > 0) & (moved < 1)]  # uniform within 0.2 of a step of 0.1
    steps = torch.minimum((inner - 0.1).abs(), (inner + 0.1).abs())
    assert float(steps.max()) <= 0.2 + 1e-6
    with pytest.raises(ValueError, match="several steps must be projected"):
        defenses.Adversarial(steps=2, projected=False)


def test_parametric_noise_learns_from_images_and_attacked_ones_alike(images: Tensor, labels: Tensor) -> None:
    ensemble = ensemble_of("parametric-noise", images)
    with noise_disabled(ensemble):
        found = loss_of(defenses.ParametricNoiseTraining(**N_FGSM), ensemble, images, labels)
        both = torch.cat([images, attacked(ensemble, images, labels)])
        halves = [functional.cross_entropy(ensemble(each), labels) for each in both.chunk(2)]
    torch.testing.assert_close(found, (halves[0] + halves[1]) / 2)


def test_bayesian_training_is_the_bound_of_the_evidence(images: Tensor, labels: Tensor) -> None:
    """Cross-entropy of attacked images plus KL / N, the divergence by torch's distributions."""
    ensemble = ensemble_of("bayesian", images, start=0.1, prior_std=0.2)
    prior = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(0.2))
    posterior = [
        torch.distributions.Normal(each.detach(), torch.tensor(0.1))
        for layer in placed(ensemble)
        for each in (layer.get_parameter("weight"), layer.get_parameter("bias"))
    ]
    divergence = sum(torch.distributions.kl_divergence(each, prior).sum() for each in posterior)
    with noise_disabled(ensemble):
        found = loss_of(defenses.BayesianTraining(**N_FGSM, divergence=0.5), ensemble, images, labels)
        moved = ensemble(attacked(ensemble, images, labels))
    torch.testing.assert_close(found, functional.cross_entropy(moved, labels) + 0.5 * divergence / 50)
    with pytest.raises(ValueError, match="number of training images"):
        defenses.BayesianTraining(**N_FGSM).loss(defenses.Networks(ensemble, ensemble), images, labels)


def test_perturbation_training_rewards_noise_less_with_every_period(images: Tensor, labels: Tensor) -> None:
    """-gamma / H(t) * sum sqrt(theta), H(t) = 1 + 1/2 + ... + 1/t; theta is brought back above its least."""
    ensemble = ensemble_of("learned-perturbation", images, start=0.25, least=0.04)
    (layer,) = placed(ensemble)
    assert isinstance(layer, LearnedPerturbation)
    defense = defenses.PerturbationTraining(**N_FGSM, gamma=0.01, period=2)
    with torch.no_grad():
        layer.theta.flatten()[:9].fill_(-1.0)
    neurons = layer.theta.numel()
    reward = 0.01 * (9 * 0.2 + (neurons - 9) * 0.5)
    with noise_disabled(ensemble):
        without = loss_of(defenses.ParametricNoiseTraining(**N_FGSM), ensemble, images, labels)
        found = [loss_of(defense, ensemble, images, labels) for _ in range(5)]
    assert float(layer.theta.detach().min()) == pytest.approx(0.04)
    for loss, terms in zip(found, (1, 1, 1.5, 1.5, 1 + 1 / 2 + 1 / 3), strict=True):
        torch.testing.assert_close(loss, without - reward / terms)
    numbers = torch.tensor([1.0, 2.0, 20.0])
    expected = torch.tensor([sum(1 / i for i in range(1, int(n) + 1)) for n in numbers])
    torch.testing.assert_close(harmonic(numbers), expected)


def test_alignment_training_rewards_the_variance_along_the_classes(images: Tensor, labels: Tensor) -> None:
    ensemble = ensemble_of("aligned-noise", images)
    (layer,) = placed(ensemble)
    lower = layer.get_parameter("factor").tril()
    weight = ensemble.model.get_submodule("4").get_parameter("weight")
    variance = (weight @ lower @ lower.T @ weight.T).diagonal().sum()
    with noise_disabled(ensemble):
        found = loss_of(defenses.AlignmentTraining(weight=0.3), ensemble, images, labels)
        plain = functional.cross_entropy(ensemble(images), labels)
    torch.testing.assert_close(found, plain - 0.3 * variance.log())
    found.backward()
    above = layer.get_parameter("factor").grad
    assert above is not None
    assert float(above.triu(1).abs().max()) == 0


def test_weight_decay_and_momentum_are_of_their_optimiser(images: Tensor) -> None:
    ensemble = ensemble_of("parametric-noise", images)
    adam = make_optimizer(ensemble, TrainSection(optimizer="adam", lr=0.01, weight_decay=0.1))
    sgd = make_optimizer(ensemble, TrainSection(lr=0.02, weight_decay=0.1))
    assert (type(adam), type(sgd)) == (torch.optim.Adam, torch.optim.SGD)
    for optimizer in (adam, sgd):
        decays = {
            id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]
        }
        for name, parameter in ensemble.named_parameters():
            assert decays[id(parameter)] == (0.0 if name.endswith("alpha") else 0.1)


def test_a_defense_wants_the_layers_that_it_trains() -> None:
    for name in ("parametric-noise", "bayesian", "learned-perturbation", "aligned-noise"):
        with pytest.raises(ValueError, match=f"set randomness: {{name: {name}}}"):
            load_recipe("digits-plain", [f"defense={{name: {name}}}"])
    with pytest.raises(ValueError, match=r"known here: .*granularity"):
        load_recipe("digits-plain", ["randomness={name: parametric-noise, alpha: 1}"])


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Levels, counts and Adam's moments are in the checkpoint: the same weights as without a stop."""
    overrides = [
        "randomness={name: learned-perturbation}",
        "defense={name: learned-perturbation, steps: 1, period: 3}",
        "data.images=200", "model.width=0.25", "train.optimizer=adam", "train.lr=0.001", "train.epochs=2",
    ]  # fmt: skip
    Trainer(load_recipe("digits-plain", overrides), tmp_path / "whole").run()
    halved = Trainer(load_recipe("digits-plain", overrides), tmp_path / "parts")
    order = halved.batches.order(0)
    for number in range(halved.batches.in_epoch):
        halved.training_step(halved.batches.numbers(order, number), number)
    state = halved.training_step.state()
    resumed = Trainer(load_recipe("digits-plain", overrides), tmp_path / "again")
    resumed.training_step.restore(state)
    order = resumed.batches.order(1)
    for number in range(resumed.batches.in_epoch):
        step = resumed.batches.in_epoch + number
        resumed.training_step(resumed.batches.numbers(order, number), step)
    whole = rse.load(tmp_path / "whole")
    for key, tensor in resumed.ensemble.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[key])
    (first, *_) = [module for module in whole.modules() if isinstance(module, LearnedPerturbation)]
    assert int(first.get_buffer("passes")) == 2 * resumed.batches.in_epoch
