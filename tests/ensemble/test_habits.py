"""Networks as people write them: they change their inputs, freeze parts, use names that others use."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.ensemble.fingerprint import fingerprint
from selfensemble.training.recipe import load_recipe
from selfensemble.training.trainer import Trainer


class InPlace(nn.Module):
    """Standardises its inputs in place, or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_place = in_place
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.sub_(0.4).div_(0.2) if self.in_place else (inputs - 0.4) / 0.2
        found: Tensor = self.layers(inputs).flatten(1)
        return found


@pytest.mark.parametrize("count", [1, 8, 64])
def test_networks_that_write_into_their_inputs(count: int) -> None:
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    one, other = (rse.SelfEnsemble(InPlace(kind)).eval() for kind in (True, False))
    torch.testing.assert_close(one.predict_proba(images, seed=0), other.predict_proba(images, seed=0))
    with torch.no_grad(), rse.noise_draw(0), rse.noise_disabled(one), rse.noise_disabled(other):
        torch.testing.assert_close(one(images), other(images))
    if count > 1:
        rules = [{issue.rule for issue in rse.validate(each.model, images)} for each in (one, other)]
        assert "input-range" not in rules[0] | rules[1]
    assert torch.equal(images, before)


@pytest.mark.parametrize("switch", ["decide", "static"])
def test_images_stay_as_they_were_where_noise_is_switched_off(switch: str) -> None:
    """Noise on the whole input makes another tensor of it, which the network may write into."""
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    ensemble = rse.SelfEnsemble(
        InPlace(in_place=True), filter_fn=lambda module, fqn: fqn == "" or isinstance(module, nn.Conv2d)
    ).eval()
    ensemble.predict(images)
    if switch == "decide":
        rse.decide(ensemble, images, seed=0)
    else:
        rse.remove_noise_(ensemble.model)
        ensemble.predict(images)
    assert torch.equal(images, before)


class Frozen(nn.Module):
    """A part that stays in eval mode."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.part.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.part(inputs)
        return found.mean(dim=(2, 3))


@pytest.mark.parametrize("later", [True, False])
def test_training_noise_is_each_images_own_in_parts_that_are_frozen(later: bool) -> None:
    part = nn.Conv2d(3, 4, 3)
    network = nn.Sequential(part, nn.AdaptiveAvgPool2d(1), nn.Flatten()) if later else Frozen(part)
    ensemble = rse.SelfEnsemble(network).train()
    if later:
        part.eval()
    same = torch.rand(1, 3, 8, 8).repeat(4, 1, 1, 1)
    assert len(ensemble(same).unique(dim=0)) == 4
    assert not part.training
    ensemble.eval()
    with rse.noise_draw(0, sampling="shared"):
        assert len(ensemble.draw_logits(same).unique(dim=0)) == 1


class Deep(nn.Module):
    """The names of DLA: `base_layer` is the beginning of a network, and no adapter's."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.level0, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.fc(self.level0(self.base_layer(inputs))).mean(dim=(2, 3))
        return found


def test_a_base_layer_is_not_always_an_adapters(images: Tensor) -> None:
    network = Deep()
    rse.inject_noise_(network, example_inputs=images)
    assert list(rse.noise_layers(network)) == ["base_layer.0", "level0", "fc"]


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gaussian_noise = rse.GaussianNoise(0.1)
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.conv(self.gaussian_noise(inputs)).mean(dim=(2, 3))
        return found


def test_a_layer_placed_by_hand_stays_whatever_its_name(images: Tensor) -> None:
    network = ByHand()
    assert rse.noise_layers(network) == {}
    rse.inject_noise_(network)
    assert list(rse.noise_layers(network)) == ["conv"]
    rse.remove_noise_(network)
    assert isinstance(network.gaussian_noise, rse.GaussianNoise)
    assert not torch.equal(network(images), network(images))


class Clip(nn.BatchNorm2d):
    """A batch norm that does more, as those of libraries with their activation."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input).clamp(-0.1, 0.1)


class Branches(nn.Module):
    """No tracer follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3), Clip(5)

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.sum() < -1e9:
            return inputs.new_zeros(len(inputs), 5)
        found: Tensor = self.norm(self.conv(inputs))
        return found.mean(dim=(2, 3))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_batch_norms_of_others_are_not_folded_away(precision: Any) -> None:
    ensemble = rse.SelfEnsemble(Branches(), rse.NoiseConfig(0, 0)).eval()
    fast = rse.optimize(ensemble, torch.full((2, 3, 8, 8), 0.01), precision)
    bright = torch.rand(16, 3, 8, 8)
    difference = (fast.predict_proba(bright) - ensemble.predict_proba(bright)).abs().max()
    assert difference < (1e-5 if precision == "float32" else 2e-3)


@pytest.mark.parametrize("width", [6, 8, 12])
def test_depthwise_convolutions_with_several_filters_a_channel(width: int) -> None:
    """torch's bfloat16 kernels read outside of narrow maps there."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.AvgPool2d((1, 2)), nn.Conv2d(8, 16, 3, stride=(1, 2), groups=8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    ensemble = rse.SelfEnsemble(network).eval()
    images = torch.rand(6, 1, 8, width)
    fast = rse.optimize(ensemble, images, "bf16")
    for _ in range(3):
        torch.testing.assert_close(
            fast.predict_proba(images, seed=1), ensemble.predict_proba(images, seed=1), atol=0.02, rtol=0
        )


class Named(nn.Module):
    """Calls its first layer by the name of its argument, and is interrupted in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Interrupted(1, 5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.conv(input=inputs).mean(dim=2)
        return found


class Interrupted(nn.Conv1d):
    stops = False

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if self.stops:
            raise KeyboardInterrupt
        return super().forward(input)


def test_an_interrupt_in_the_first_layer_leaves_no_autocast() -> None:
    ensemble = rse.SelfEnsemble(Named(), rse.NoiseConfig(0, 0.0)).eval()
    waves = torch.rand(3, 1, 20)
    fast = rse.optimize(ensemble, waves, "bf16")
    torch.testing.assert_close(fast.predict_proba(waves), ensemble.predict_proba(waves), atol=0.01, rtol=0)
    for module in fast.modules():
        if isinstance(module, Interrupted):
            module.stops = True
    with pytest.raises(KeyboardInterrupt):
        fast.predict_proba(waves)
    with torch.autocast("cpu", torch.bfloat16):  # which keeps casts of weights, until it ends
        layer = nn.Linear(4, 4)
        first = layer(torch.ones(1, 4))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1, 4)).abs().max() == 0 < first.abs().max()


class InParts(nn.Module):
    """Cuts its batch into parts of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([self.conv(part).mean(dim=(2, 3)) for part in inputs.split(8)])


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_networks_that_cut_their_batch(count: int) -> None:
    ensemble = rse.SelfEnsemble(InParts()).eval()
    images = torch.rand(count, 3, 6, 6)
    alone = [ensemble.predict_proba(images[:8], seed=0, max_batch=8) for _ in range(2)]
    assert torch.equal(*alone)
    answers = ensemble.predict_proba(images, draws=30)
    torch.testing.assert_close(answers.sum(dim=1), torch.ones(count))
    assert ensemble.predict(images, draws=30).spread.max() > 0
    labels = torch.arange(count) % 5
    for eot in (3, 4):
        for average in ("losses", "probabilities"):
            found = rse.attacks.pgd(
                ensemble, images, labels, eps=0.03, steps=2, eot=eot, average=average, seed=0
            )
            assert 0 < (found - images).abs().max() <= 0.03 + 1e-6


def test_shared_noise_is_the_same_in_any_precision() -> None:
    noise = rse.GaussianNoise(1.0).eval()
    found = []
    for dtype in (torch.float32, torch.float64):
        with rse.noise_draw(0, sampling="shared"):
            found.append(noise(torch.zeros(2, 3, 4, 4, dtype=dtype)).float())
    assert torch.equal(*found)


def test_the_range_is_that_of_the_ensemble(images: Tensor, tiny: nn.Module) -> None:
    ensemble = rse.SelfEnsemble(tiny, bounds=(-1.0, 1.0)).eval()
    assert "input-range" not in {issue.rule for issue in rse.validate(ensemble, 2 * images - 1)}
    assert "input-range" in {issue.rule for issue in rse.validate(ensemble, 9 * images - 1)}


def test_what_training_puts_on_a_network_is_taken_off(tmp_path: Path) -> None:
    settings = ["model.width=0.25", "train.epochs=1", "data.images=60"]
    trainer = Trainer(load_recipe("digits-rse", settings), tmp_path / "run")
    for _ in range(2):
        again = pickle.loads(pickle.dumps(trainer.network))
        assert fingerprint(again).weights == fingerprint(trainer.network).weights
        rse.save(trainer.ensemble, tmp_path / "saved")
        assert fingerprint(rse.load(tmp_path / "saved")).weights == fingerprint(trainer.ensemble).weights
        trainer.run()
