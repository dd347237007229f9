"""The doctor passes honest models and finds every planted fault."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.evaluation.doctor.examination import CHECKS, doctor
from selfensemble.evaluation.results import CheckRecord
from selfensemble.training.recipe import load_recipe
from selfensemble.training.trainer import Trainer

Images = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, rse.SelfEnsemble]:
    folder, models = tmp_path_factory.mktemp("trained"), {}
    for kind in ("plain", "rse"):
        recipe = load_recipe(f"digits-{kind}", ["train.epochs=8", "model.width=0.5"])
        trainer = Trainer(recipe, folder / kind)
        trainer.run()
        models[kind] = trainer.ensemble.cpu().eval()
    return models


@pytest.fixture(scope="module")
def digits() -> Images:
    test = rse.load_data("digits", "test")
    return test.inputs(slice(120)), test.labels[:120]


def examine(model: nn.Module, digits: Images, **settings: Any) -> dict[str, CheckRecord]:
    budget: dict[str, Any] = {"eps": 0.1, "steps": 12, "eot": 6, "images": 25} | settings
    return {record.name: record for record in doctor(model, *digits, **budget)}


def failures(records: dict[str, CheckRecord]) -> list[str]:
    return [name for name, record in records.items() if record.passed is False]


@pytest.mark.parametrize("kind", ["plain", "rse"])
def test_honest_models_pass(trained: dict[str, rse.SelfEnsemble], digits: Images, kind: str) -> None:
    model = trained[kind]
    state, before = torch.get_rng_state(), {key: x.clone() for key, x in model.state_dict().items()}
    records = examine(model, digits, expect_random=kind == "rse")
    few: dict[str, Any] = {"steps": 3, "eot": 2, "images": 10, "expect_random": kind == "rse"}
    assert examine(model, digits, **few) == examine(model, digits, **few)  # whatever they find
    assert list(records) == list(CHECKS)
    assert failures(records) == [], records
    inapplicable = [name for name, record in records.items() if record.passed is None]
    assert len(inapplicable) == (4 if kind == "plain" else 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_pass_of_somebody_else_can_still_run_backward(digits: Images) -> None:
    """Batch statistics that did not change are not written again: a graph holds them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(10)).eval()
    images = digits[0][:4].clone().requires_grad_()
    total = model(images).sum()
    examine(model, digits, steps=1, eot=1, images=5)
    total.backward()
    assert images.grad is not None
    assert float(images.grad.abs().max()) > 0


def test_an_honest_model_of_another_kind_passes(trained: dict[str, rse.SelfEnsemble], digits: Images) -> None:
    """Dropout at test time, in a module that is none of this library's."""

    class Dropped(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, inputs: Tensor) -> Tensor:
            out: Tensor = self.net(nn.functional.dropout(inputs, 0.1, training=True))
            return out

    assert failures(examine(Dropped(trained["plain"].model).eval(), digits, images=15)) == []


class FunctionalDropout(nn.Module):
    """Dropout as a function, in training mode only, as many networks have it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = nn.functional.dropout(self.net(inputs), 0.3, self.training)
        return out


class Attention(nn.Module):
    """Attention's operator is tagged as random; without dropout it is not."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.flatten(2)
        mixed = nn.functional.scaled_dot_product_attention(rows, rows, rows)
        out: Tensor = self.net(inputs + 0 * mixed.view_as(inputs))
        return out


class Strict(nn.Module):
    """Refuses images that leave [0, 1]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor) -> Tensor:
        assert inputs.min() >= 0
        assert inputs.max() <= 1
        out: Tensor = self.net(inputs)
        return out


class Halved(nn.Module):
    """bfloat16 throughout, and confident: softmax is 1 to float32 on many images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.to(torch.bfloat16)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = 2 * self.net(inputs)
        return out


def without_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the trial attacks, which take longer and have tests of their own."""
    from selfensemble.evaluation.doctor import examination

    some = {name: check for name, check in CHECKS.items() if not check.__module__.endswith("attack_checks")}
    monkeypatch.setattr(examination, "CHECKS", some)


@pytest.mark.parametrize("honest", [FunctionalDropout, Attention, Strict, Halved])
def test_no_false_alarms(
    trained: dict[str, rse.SelfEnsemble],
    digits: Images,
    honest: Callable[[nn.Module], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_attacks(monkeypatch)
    records = examine(honest(deepcopy(trained["plain"].model)).eval(), digits)
    assert failures(records) == [], records


class Wrapped(nn.Module):
    """A network and what someone put around it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def answer(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits


class Quantised(Wrapped):
    def forward(self, inputs: Tensor) -> Tensor:
        return (self.answer(inputs) * 4).round() / 4


class StraightThrough(Wrapped):
    """Rounded outputs whose backward pass pretends that nothing was rounded, and lies in the bargain."""

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self.answer(inputs)
        fake = self.answer(inputs.flip(-1))
        return logits.detach() + fake - fake.detach()


class Saturated(Wrapped):
    def forward(self, inputs: Tensor) -> Tensor:
        return 1000 * self.answer(inputs)


class Probabilities(Wrapped):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.answer(inputs).softmax(dim=1)


class Rounding(Wrapped):
    """A preprocessor without a gradient."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.answer((inputs * 8).round() / 8)


class Detaching(Wrapped):
    """A preprocessor outside autograd, as a JPEG codec is."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.answer(torch.from_numpy(inputs.detach().cpu().numpy() ** 2))


class NoiseInTrainingOnly(Wrapped):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.answer(inputs + 0.3 * torch.randn_like(inputs) if self.training else inputs)


class OneSeed(Wrapped):
    """Noise that is the same at every call."""

    def forward(self, inputs: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return self.answer(inputs + 0.3 * torch.randn(inputs.shape[1:], generator=generator))


class SeededContext(Wrapped):
    """The library's own noise, frozen by a wrapper."""

    def forward(self, inputs: Tensor) -> Tensor:
        with rse.noise_draw(seed=0):
            return self.answer(inputs)


class QuietForAttacks(Wrapped):
    """Random for the judge, deterministic as soon as someone wants a gradient."""

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.requires_grad:
            with rse.noise_disabled(self.net):
                return self.answer(inputs)
        return self.answer(inputs)


class QuietForAttacksByMode(Wrapped):
    def forward(self, inputs: Tensor) -> Tensor:
        with rse.noise_draw(0 if torch.is_grad_enabled() else None):
            return self.answer(inputs)


class OutOfTree(nn.Module):
    """The noisy network is out of reach of eval(), parameters() and the search for noise layers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.hidden = [net]

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.hidden[0](inputs)
        return out


class FrozenOutOfTree(OutOfTree):
    """The same with weights that want no gradient, and left in training mode."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net.requires_grad_(False).train())


class LouderForAttacks(Wrapped):
    """More noise where someone wants a gradient, without a shift of the mean."""

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self.answer(inputs)
        return logits + (3.0 if inputs.requires_grad else 0.3) * torch.randn_like(logits)


class TwelveSeeds(Wrapped):
    """Recycles its noise."""

    calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        TwelveSeeds.calls += 1
        with rse.noise_draw(seed=TwelveSeeds.calls % 12):
            return self.answer(inputs)


class BatchStatistics(Wrapped):
    """Ignores eval()."""

    def train(self, mode: bool = True) -> "BatchStatistics":  # noqa: ARG002
        return super().train(True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.answer(inputs)


class NoisyBatchStatistics(BatchStatistics):
    """The same under noise that no seed of ours freezes."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.answer(inputs + 0.05 * torch.randn_like(inputs))


class Standardised(Wrapped):
    """Trained on [0, 255], handed over as if on [0, 1]."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.answer(inputs / 255)


@pytest.mark.parametrize(
    ("kind", "fault", "found_by"),
    [
        ("plain", Quantised, "logits"),
        ("plain", Quantised, "gradients"),
        ("plain", StraightThrough, "gradients"),
        ("plain", Saturated, "logits"),
        ("plain", Saturated, "gradients"),
        ("plain", Probabilities, "logits"),
        ("plain", Rounding, "gradients"),
        ("plain", Detaching, "gradients"),
        ("plain", NoiseInTrainingOnly, "randomness"),
        ("plain", OneSeed, "randomness"),
        ("rse", SeededContext, "randomness"),
        ("rse", QuietForAttacks, "nothing hidden"),
        ("rse", QuietForAttacksByMode, "nothing hidden"),
        ("rse", OutOfTree, "nothing hidden"),
        ("rse", FrozenOutOfTree, "nothing hidden"),
        ("plain", LouderForAttacks, "nothing hidden"),
        ("rse", TwelveSeeds, "randomness"),
        ("plain", BatchStatistics, "batch independence"),
        ("plain", NoisyBatchStatistics, "batch independence"),
        ("plain", Standardised, "input range"),
        ("rse", Rounding, "gradients"),
        ("rse", Saturated, "gradients"),
    ],
)
def test_planted_faults_are_found(
    trained: dict[str, rse.SelfEnsemble],
    digits: Images,
    kind: str,
    fault: Callable[[nn.Module], nn.Module],
    found_by: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the check that looks for them; the trial attacks are left out, which others may fail as well."""
    without_attacks(monkeypatch)
    records = examine(fault(deepcopy(trained[kind].model)).eval(), digits)
    assert found_by in failures(records), records
    assert records[found_by].advice


def test_trial_attacks_find_masked_gradients(trained: dict[str, rse.SelfEnsemble], digits: Images) -> None:
    """Rounded inputs stop PGD, not the attacks without gradients, and not at any eps."""
    found = failures(examine(Rounding(trained["plain"].model).eval(), digits))
    assert "success grows with eps" in found
    assert "black box is weaker" in found


def test_models_in_training_mode_and_noise_switched_off(
    trained: dict[str, rse.SelfEnsemble], digits: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfensemble.evaluation.doctor import examination

    few = {name: CHECKS[name] for name in ("eval mode", "randomness")}
    monkeypatch.setattr(examination, "CHECKS", few)
    ensemble = trained["rse"]
    ensemble.train()
    try:
        assert failures(examine(ensemble, digits)) == ["eval mode"]
        assert ensemble.training
        assert ensemble.model.training
    finally:
        ensemble.eval()
    norm = next(module for module in ensemble.modules() if isinstance(module, nn.BatchNorm2d))
    norm.train()
    assert failures(examine(ensemble, digits)) == ["eval mode"]
    norm.eval()
    with rse.noise_disabled(ensemble):
        assert failures(examine(ensemble, digits)) == ["randomness"]
    assert failures(examine(trained["plain"], digits, expect_random=True)) == ["randomness"]
    assert failures(examine(ensemble, digits, expect_random=False)) == ["randomness"]


def test_where_noise_enters(trained: dict[str, rse.SelfEnsemble], digits: Images) -> None:
    from selfensemble.evaluation.doctor.noise_checks import where_noise_enters
    from selfensemble.evaluation.doctor.subject import Subject

    def check(model: nn.Module) -> CheckRecord:
        return where_noise_enters(
            Subject(
                model.eval(), *digits, norm="linf", eps=0.1, steps=1, eot=1, images=5, expect_random=None,
                max_batch=50, seed=0,
            )
        )  # fmt: skip

    class Affine(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return (inputs - 0.5) / 0.25

    class Crooked(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.square()

    net = rse.inject_noise_(nn.Sequential(Affine(), nn.Conv2d(1, 4, 3), nn.Flatten(), nn.LazyLinear(10)))
    net(digits[0][:1])
    record = check(net)
    assert record.passed
    assert "0.05" in record.figure  # 0.2 after a division by 0.25
    assert check(nn.Sequential(Crooked(), *list(net.children())[1:])).passed is False
    deep = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(10))
    deep(digits[0][:1])
    rse.inject_noise_(deep, filter_fn=lambda module, fqn: fqn == "1")
    assert check(deep).passed is False


def test_bad_input(trained: dict[str, rse.SelfEnsemble], digits: Images) -> None:
    with pytest.raises(ValueError, match="norm must be one of"):
        doctor(trained["plain"], *digits, norm="l7")
    with pytest.raises(ValueError, match="eps"):
        doctor(trained["plain"], *digits, eps=3.0)
    with pytest.raises(ValueError, match="no images"):
        doctor(trained["plain"], digits[0][:0], digits[1][:0])
    with pytest.raises(ValueError, match="below 10"):
        doctor(trained["plain"], digits[0], digits[1] + 1)
