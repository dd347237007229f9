"""Training objectives: their losses against closed forms, and what a step may not touch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import selfensemble as rse
from selfensemble.artefacts import storage
from selfensemble.attacks.norms import Norm, size
from selfensemble.training import defenses
from selfensemble.training.checkpoints import RESULTS, TEACHER
from selfensemble.training.defenses.adversarial import maximise
from selfensemble.training.recipe import load_recipe
from selfensemble.training.trainer import Trainer

from ..conftest import LinearClassifier


class Recorded(nn.Module):
    """A linear classifier that remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = LinearClassifier(48)
        self.conv = nn.Conv2d(3, 3, 1)  # a place for noise, which is not used
        self.seen: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append(inputs.detach().clone())
        logits: Tensor = self.linear(inputs)
        return logits


@pytest.fixture
def ensemble() -> rse.SelfEnsemble:
    return rse.SelfEnsemble(Recorded(), rse.NoiseConfig(0, 0)).train()


@pytest.fixture
def grey() -> Tensor:
    return 0.4 + 0.2 * torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(5))


def inside(ensemble: rse.SelfEnsemble) -> Recorded:
    assert isinstance(ensemble.model, Recorded)
    return ensemble.model


def networks(ensemble: rse.SelfEnsemble, teacher: rse.SelfEnsemble | None = None) -> defenses.Networks:
    return defenses.Networks(ensemble, ensemble, teacher)


class Answers(nn.Module):
    """Gives prepared logits, whatever it is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        self.logits = logits

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits[: len(inputs)]


def answering(logits: Tensor) -> rse.SelfEnsemble:
    return rse.SelfEnsemble(Answers(logits), rse.NoiseConfig(0, 0)).train()


def test_cross_entropy_smoothing_and_consistency_are_their_formulas() -> None:
    """Two draws p and q of one image: (KL(m, p) + KL(m, q)) / 2, m their mean."""
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0]])
    image, label = torch.rand(1, 3, 4, 4), torch.tensor([0])
    one = defenses.CrossEntropy(label_smoothing=0.1).loss(networks(answering(logits[:1])), image, label)
    wanted = torch.full((3,), 0.1 / 3) + torch.tensor([0.9, 0.0, 0.0])
    torch.testing.assert_close(one, -(wanted * logits[0].log_softmax(0)).sum())
    both = defenses.CrossEntropy(draws=2, consistency=0.7)
    p, q = logits.softmax(dim=1)
    m = (p + q) / 2
    divergence = (m * (m / p).log()).sum() + (m * (m / q).log()).sum()
    expected = -(p[0].log() + q[0].log()) / 2 + 0.7 * divergence / 2
    torch.testing.assert_close(both.loss(networks(answering(logits)), image, label), expected)
    sure = defenses.CrossEntropy(draws=2, consistency=0.7, entropy=0.3)
    expected = expected - 0.3 * (m * m.log()).sum()
    torch.testing.assert_close(sure.loss(networks(answering(logits)), image, label), expected)
    cool = sure.model_copy(update={"temperature": 8.0})
    torch.testing.assert_close(cool.loss(networks(answering(8 * logits)), image, label), 8 * expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_attack_within_a_step_reaches_the_closed_form(
    ensemble: rse.SelfEnsemble, grey: Tensor, norm: Norm
) -> None:
    linear = inside(ensemble).linear
    labels = linear(grey).argmax(dim=1)
    loss = defenses.Adversarial(norm=norm, eps=0.05, steps=10).loss(networks(ensemble), grey, labels)
    attacked = inside(ensemble).seen[-1]
    assert (size(attacked - grey, norm) <= 0.05 + 1e-6).all()
    assert len(inside(ensemble).seen) == 11
    drop = 0.05 * linear.a.detach().norm(p=1 if norm == "linf" else 2)
    value = linear.value(grey) + torch.where(labels == 0, -drop, drop)
    logits = torch.stack([value, torch.zeros(8)], dim=1)
    torch.testing.assert_close(loss, functional.cross_entropy(logits, labels), rtol=1e-2, atol=0)


def test_images_go_a_random_share_of_the_way(ensemble: rse.SelfEnsemble) -> None:
    images, labels = torch.full((400, 3, 4, 4), 0.5), torch.zeros(400, dtype=torch.long)
    defense = defenses.Adversarial(norm="l2", eps=0.2, steps=1, step_size=0.2, random_start=False, least=0.25)
    defense.loss(networks(ensemble), images, labels)
    moved = size(inside(ensemble).seen[-1] - images, "l2")
    assert moved.min() >= 0.05 - 1e-6
    assert moved.max() <= 0.2 + 1e-6
    # Uniform: mean and standard deviation within 4 standard errors.
    assert abs(float(moved.mean()) - 0.125) < 4 * 0.15 / 12**0.5 / 20
    assert abs(float(moved.std()) - 0.15 / 12**0.5) < 0.005


def test_an_attack_leaves_statistics_modes_and_gradients_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0.1, 0.1)).train()
    before = {key: value.clone() for key, value in ensemble.state_dict().items()}
    images, labels = torch.rand(6, 3, 4, 4), torch.arange(6) % 5
    found = maximise(
        ensemble, images, lambda over: functional.nll_loss(over, labels),
        norm="l2", eps=0.5, steps=3, step_size=0.2, eot=2,
    )  # fmt: skip
    assert ensemble.training
    assert network[1].training
    assert all(parameter.grad is None for parameter in ensemble.parameters())
    assert all(torch.equal(before[key], value) for key, value in ensemble.state_dict().items())
    assert found.min() >= 0
    assert found.max() <= 1
    assert not found.requires_grad


def test_trades_is_cross_entropy_plus_a_divergence(ensemble: rse.SelfEnsemble, grey: Tensor) -> None:
    labels = torch.zeros(8, dtype=torch.long)
    loss = defenses.Trades(norm="l2", eps=0.2, beta=3.0).loss(networks(ensemble), grey, labels)
    shown = inside(ensemble).seen[-1]
    assert torch.equal(shown[:8], grey)
    natural, moved = inside(ensemble).linear(shown).chunk(2)
    p, q = natural.softmax(dim=1), moved.softmax(dim=1)
    divergence = (p * (p / q).log()).sum(dim=1).mean()
    torch.testing.assert_close(loss, functional.cross_entropy(natural, labels) + 3 * divergence)
    assert divergence > 0


def test_fgsm_retraining_attacks_half_of_the_batch(ensemble: rse.SelfEnsemble, grey: Tensor) -> None:
    labels = inside(ensemble).linear(grey).argmax(dim=1)
    loss = defenses.FgsmRetraining().loss(networks(ensemble), grey, labels)
    shown = inside(ensemble).seen[-1]
    assert torch.equal(shown[4:], grey[4:])
    lengths = size(shown[:4] - grey[:4], "linf")
    assert ((lengths >= 0.1) & (lengths <= 0.3)).all()
    assert len(set(lengths.tolist())) == 4
    torch.testing.assert_close(loss, functional.cross_entropy(inside(ensemble).linear(shown), labels))


def test_distillation_follows_the_teacher_and_ends_where_both_agree() -> None:
    """The gradient with respect to the logits is (softmax(student / T) - softmax(teacher / T)) / B."""
    answers = torch.tensor([[300.0, 100.0, 0.0]])
    teacher = answering(answers).eval()
    logits = torch.tensor([[0.0, 100.0, 50.0]], requires_grad=True)
    defense = defenses.Distillation(temperature=100.0)
    image, label = torch.rand(1, 3, 4, 4), torch.tensor([2])
    loss = defense.loss(networks(answering(logits), teacher), image, label)
    (gradient,) = torch.autograd.grad(loss, logits)
    wanted = (logits / 100).softmax(dim=1) - answers.div(100).softmax(dim=1)
    torch.testing.assert_close(gradient, wanted)
    same = answers.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(defense.loss(networks(answering(same), teacher), image, label), same)
    assert gradient.abs().max() < 1e-6
    with pytest.raises(ValueError, match="teacher"):
        defense.loss(networks(answering(logits)), image, label)


@pytest.mark.parametrize(
    "defense",
    [
        defenses.CrossEntropy(),
        defenses.CrossEntropy(draws=2, consistency=1.0, entropy=0.5),
        defenses.Adversarial(norm="l2", eps=0.01, steps=2, eot=2),
        defenses.Trades(norm="l2", eps=0.01, steps=2),
        defenses.FgsmRetraining(smallest_eps=0.001, largest_eps=0.01),
        defenses.CrossEntropy(temperature=10.0),
        defenses.Distillation(),
    ],
    ids=lambda defense: f"{defense.name}-{getattr(defense, 'draws', 1)}",
)
def test_opposite_noise_is_for_batches_that_hold_an_image_once(defense: defenses.Defense) -> None:
    """Which images a pass in train mode holds, their grey value tells."""
    values = torch.linspace(0.1, 0.9, 8)
    inputs = values.view(8, 1, 1, 1).expand(8, 3, 4, 4).contiguous()
    ensemble = rse.SelfEnsemble(Recorded(), rse.NoiseConfig(0, 0)).train()
    shown: list[Tensor] = []
    ensemble.register_forward_pre_hook(
        lambda module, args: shown.append(args[0].detach()) if module.training else None
    )
    teacher = rse.SelfEnsemble(Recorded(), rse.NoiseConfig(0, 0)).eval()
    defense.loss(networks(ensemble, teacher), inputs, torch.zeros(8, dtype=torch.long))
    assert shown
    once = True
    for batch in shown:
        numbers = (batch.flatten(1).mean(dim=1)[:, None] - values).abs().argmin(dim=1)
        once &= len(numbers.unique()) == len(numbers)
    assert once == defense.shows_images_once


def test_draws_that_are_compared_are_independent(tmp_path: Path) -> None:
    """The consistency of a step is that of two passes: means of 300 each, four standard errors."""
    recipe = load_recipe(
        "digits-rse",
        ["defense={name: cross-entropy, draws: 2, consistency: 1}", "train.lr=0.000001"],
    )
    trainer = Trainer(recipe, tmp_path)
    step, index = trainer.training_step, trainer.batches.order(0)[:64]
    inputs, labels = trainer.batches.batch(index)
    found, apart = [], []
    for number in range(300):
        loss = step.gradients(index, number)
        with torch.no_grad(), rse.noise_draw(7, number):
            each = torch.stack([step.network(inputs) for _ in range(2)]).log_softmax(dim=2)
        mean = each.exp().mean(dim=0)
        divergence = (mean * (mean.log() - each)).sum(dim=2).mean()
        apart.append(functional.nll_loss(each.flatten(0, 1), labels.repeat(2)) + divergence)
        found.append(loss)
    one, other = torch.stack(found), torch.stack(apart)
    error = (one.var() / len(one) + other.var() / len(other)).sqrt()
    assert (one.mean() - other.mean()).abs() < 4 * error


def test_an_attack_on_noise_meets_the_ensemble() -> None:
    """-log(mean softmax) of a network whose draws differ in sign: single draws point anywhere."""
    convolution = nn.Conv2d(1, 2, 1, bias=False)
    network = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([[[[1.0]]], [[[-1.0]]]]))
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(init_std=3.0)).eval()
    images, labels = torch.full((16, 1, 1, 1), 0.5), torch.zeros(16, dtype=torch.long)
    with rse.noise_draw(seed=0):
        found = maximise(
            ensemble, images, lambda over: functional.nll_loss(over, labels),
            norm="linf", eps=0.3, steps=8, step_size=0.1, eot=8,
        )  # fmt: skip
    torch.testing.assert_close(found, torch.full_like(found, 0.2))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("defense={name: wizardry}", "cross-entropy"),
        ("defense={name: adversarial, epsilon: 1}", "epsilon"),
        ("defense={name: trades, beta: 0}", "must be above 0"),
        ("defense={name: cross-entropy, consistency: 1.0}", "draws to 2"),
        ("defense={name: cross-entropy, entropy: 1.0}", "draws to 2"),
        ("defense={name: distillation, temperature: .inf}", "finite"),
        ("defense.temperature=0", "0.001 or more"),
        ("defense.temperature=1e30", "1000 or less"),
        ("defense.eps=0.5", "known here: name, label_smoothing"),
    ],
)
def test_wrong_settings_are_named(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("digits-rse", [setting])


def test_settings_without_a_name_are_of_the_defense_that_a_recipe_has_by_default() -> None:
    assert load_recipe("digits-rse", ["defense.temperature=10"]).defense == defenses.CrossEntropy(
        temperature=10
    )
    assert load_recipe("digits-rse").defense == defenses.CrossEntropy()


def test_a_teacher_is_trained_first_and_once(tmp_path: Path) -> None:
    sets = ["defense={name: distillation}", "train.epochs=3", "model.width=0.25", "noise.draws=1"]
    recipe = load_recipe("digits-plain", sets)
    Trainer(recipe, tmp_path).run()
    written = (tmp_path / TEACHER / RESULTS).stat().st_mtime_ns
    Trainer(recipe, tmp_path, resume=True).run()
    assert (tmp_path / TEACHER / RESULTS).stat().st_mtime_ns == written
    saved = storage.read_config(tmp_path / TEACHER).recipe
    assert saved is not None
    assert saved["defense"]["name"] == "cross-entropy"
    assert saved["defense"]["temperature"] == 100
    Trainer(recipe, tmp_path, overwrite=True).run()
    assert (tmp_path / TEACHER / RESULTS).stat().st_mtime_ns > written


def test_the_teacher_of_another_recipe_is_refused_or_replaced(tmp_path: Path) -> None:
    """Left behind by a run that ended before the student's first checkpoint."""
    sets = ["defense={name: distillation}", "train.epochs=1", "model.width=0.25", "noise.draws=1"]
    recipe = load_recipe("digits-plain", sets)
    teacher = recipe.teacher()
    assert teacher is not None
    Trainer(teacher, tmp_path / TEACHER).run()
    other = load_recipe("digits-plain", [*sets, "train.lr=0.01", "description=words"])
    with pytest.raises(ValueError, match=r"teacher of another recipe \(different: train\.lr\)"):
        Trainer(other, tmp_path).run()
    Trainer(other, tmp_path, overwrite=True).run()
    saved = storage.read_config(tmp_path / TEACHER).recipe
    assert saved is not None
    assert saved["train"]["lr"] == 0.01


def test_trades_at_the_image_itself_is_refused() -> None:
    """There the divergence is 0, and so is its gradient."""
    with pytest.raises(ValueError, match="trades needs random_start"):
        load_recipe("cifar10-vgg16-trades", ["defense.random_start=false"])


def test_averaged_weights_are_the_average(tmp_path: Path) -> None:
    """Polyak's average of the weights after each step, which `average = 0` runs leave behind."""
    sets = ["train.epochs=1", "model.width=0.25", "noise.draws=1", "train.schedule=cosine"]
    recipe = load_recipe("digits-plain", [*sets, "train.average=0.5"])
    trainer, seen = Trainer(recipe, tmp_path), list[Tensor]()
    weight = next(trainer.network.parameters())
    trainer.progress = lambda step, steps, text: seen.append(weight.detach().clone())
    trainer.run()
    expected = seen[0]
    for value in seen[1 : trainer.steps]:
        expected = 0.5 * expected + 0.5 * value
    found = next(rse.load(tmp_path).parameters()).detach()
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, weight)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_attacks_in_training_are_in_the_units_of_the_inputs(norm: Norm) -> None:
    """In [-1, 1] twice the radius is what the radius is in [0, 1], at the border too."""
    linear = LinearClassifier(16)
    network = nn.Sequential(rse.GaussianNoise(0.0), linear)
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0, 0), bounds=(-1, 1))
    waves = torch.tensor([-1.0, 1.0, -0.2, 0.1] * 4).repeat(8, 1)
    labels = linear(waves).argmax(dim=1)

    def loss(over: Tensor) -> Tensor:
        return functional.nll_loss(over, labels)

    found = maximise(ensemble, waves, loss, norm=norm, eps=0.5, steps=20, step_size=0.1)
    assert found.abs().max() <= 1
    assert (size(found - waves, norm) <= 0.5 + 1e-5).all()
    assert (found < -0.3).any()  # below what [0, 1] would leave
    if norm == "linf":
        uphill = -linear.a.detach().sign() * (2 * labels[:, None] - 1) * (-1)
        best = (waves + 0.5 * uphill).clamp(-1, 1), (waves - 0.5 * uphill).clamp(-1, 1)
        assert any(torch.allclose(found, each, atol=1e-5) for each in best)


def test_fgsm_retraining_stays_in_the_bounds() -> None:
    linear = LinearClassifier(16)
    ensemble = rse.SelfEnsemble(nn.Sequential(linear), rse.NoiseConfig(0, 0), bounds=(-1, 1))
    seen: list[Tensor] = []
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    waves = -0.9 + 0.01 * torch.rand(8, 1, 16)
    labels = torch.arange(8) % 2
    defenses.FgsmRetraining().loss(networks(ensemble), waves, labels)
    moved = size(seen[-1][:4] - waves[:4], "linf")
    assert ((moved >= 0.1 - 1e-6) & (moved <= 0.3 + 1e-6)).all()
    assert seen[-1].min() >= -1
    assert seen[-1].min() < -0.95
