"""The fast path: the same answers as the slow one, and attacks that decide on the slow one."""

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.attacks import cw_l2, ddn, pgd, transfer
from selfensemble.evaluation import judge
from selfensemble.fast import optimize as fast
from selfensemble.fast.optimize import Precision, faster_precision, optimize, original_of


def trained_statistics(name: str, channels: int = 3) -> rse.SelfEnsemble:
    """A network whose batch norms have seen data, so that folding them changes every weight."""
    torch.manual_seed(2)
    ensemble = rse.SelfEnsemble(rse.create_model(name, classes=5, channels=channels, width=0.25)).train()
    with torch.no_grad():
        for _ in range(3):
            ensemble(torch.rand(16, channels, 32, 32) * 2 - 0.3)
        for module in ensemble.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(0.5, 2)
                module.bias.uniform_(-0.5, 0.5)
    return ensemble.eval()


@pytest.fixture
def colour() -> Tensor:
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnext29-2x64d"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bf16", 0.02)])
def test_it_answers_as_the_original(name: str, precision: str, tolerance: float, colour: Tensor) -> None:
    ensemble = trained_statistics(name)
    before = copy.deepcopy(ensemble.state_dict())
    fast = optimize(ensemble, colour, precision)  # type: ignore[arg-type]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    ours, theirs = (each.predict_proba(colour, draws=4, seed=7) for each in (fast, ensemble))
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    assert all(torch.equal(before[key], value) for key, value in ensemble.state_dict().items())
    assert not torch.is_autocast_enabled("cpu")
    assert original_of(fast) is ensemble
    assert list(rse.noise_layers(fast.model).values()) != []
    assert fast.predict_proba(colour).ne(fast.predict_proba(colour)).any()


class Awkward(nn.Module):
    """Python that decides by values, which no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.conv(inputs)).relu()
        if hidden.sum() > 0:
            hidden = hidden * 2
        logits: Tensor = self.linear(hidden.mean(dim=(2, 3)))
        return logits


class Twice(nn.Module):
    """A convolution that is used with and without its batch norm: folding would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.conv(inputs)
        logits: Tensor = self.linear((self.norm(hidden) + hidden + self.conv(hidden)).mean(dim=(2, 3)))
        return logits


class Backwards(nn.Module):
    """The layer that is used first comes last, and a table shares its weights with a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.linear = nn.Linear(3, 5, bias=False)
        self.linear.weight = self.words.weight
        self.second, self.first = nn.Conv2d(4, 3, 3), nn.Conv2d(3, 4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        pooled = self.second(self.first(inputs).relu()).mean(dim=(2, 3))
        logits: Tensor = self.linear(pooled) + self.words(torch.arange(5)).sum(dim=1)
        return logits


def test_half_precision_begins_behind_the_first_layer_used(colour: Tensor) -> None:
    torch.manual_seed(0)
    ensemble = rse.SelfEnsemble(Backwards(), rse.NoiseConfig(0.1, 0.1)).eval()
    fast = optimize(ensemble, colour, "bf16")
    halved = {name.split(".")[-2] for name, value in fast.named_parameters() if value.dtype == torch.bfloat16}
    assert halved == {"second"}
    ours, theirs = (each.predict_proba(colour, draws=3, seed=1) for each in (fast, ensemble))
    torch.testing.assert_close(ours, theirs, atol=0.01, rtol=0)
    # Changes of pixels that bfloat16 cannot hold arrive.
    pixels = 0.9 + 1e-3 * colour
    seen: list[Tensor] = []
    fast.model.get_submodule("network.first").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    fast.predict(pixels, seed=1)
    assert seen[0].dtype == torch.float32


@pytest.mark.parametrize("network", [Awkward, Twice])
def test_what_cannot_be_folded_stays(network: type[nn.Module], colour: Tensor) -> None:
    torch.manual_seed(0)
    model = network()
    model.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr,operator]
    ensemble = rse.SelfEnsemble(model, rse.NoiseConfig(0.1, 0.1)).eval()
    fast = optimize(ensemble, colour, "float32")
    assert any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    ours, theirs = (each.predict_proba(colour, draws=3, seed=1) for each in (fast, ensemble))
    torch.testing.assert_close(ours, theirs)


def test_an_error_inside_leaves_autocast_as_it_was(colour: Tensor) -> None:
    fast = optimize(trained_statistics("vgg11"), colour, "bf16")
    with pytest.raises(ValueError, match="cannot take inputs"):
        fast.predict(torch.rand(2, 1, 32, 32))
    assert not torch.is_autocast_enabled("cpu")
    fast.predict(colour)


@pytest.fixture(scope="module")
def digits() -> tuple[rse.SelfEnsemble, Tensor, Tensor]:
    """A self-ensemble that knows handwritten digits, and some of them."""
    torch.manual_seed(0)
    data = rse.load_data("digits", "train")
    ensemble = rse.SelfEnsemble(
        rse.create_model("small-cnn", channels=1, width=0.5), rse.NoiseConfig(0.1, 0.05)
    )
    optimizer = torch.optim.Adam(ensemble.train().parameters(), lr=5e-3)
    for step in range(60):
        chosen = torch.randint(len(data), (128,))
        optimizer.zero_grad()
        with rse.noise_draw(step):
            nn.functional.cross_entropy(ensemble(data.inputs(chosen)), data.labels[chosen]).backward()
        optimizer.step()
    test = rse.load_data("digits", "test")
    inputs, labels = test.inputs(slice(20)), test.labels[:20]
    assert (ensemble.eval().predict(inputs).label == labels).float().mean() > 0.8
    return ensemble, inputs, labels


def test_attacks_on_a_copy_succeed_on_the_original(digits: tuple[rse.SelfEnsemble, Tensor, Tensor]) -> None:
    """Where bfloat16 and float32 disagree, the nearest images would else be no success at all."""
    ensemble, inputs, labels = digits
    plain = copy.deepcopy(ensemble)
    rse.remove_noise_(plain.model)
    fast = optimize(plain, inputs, "bf16")
    for attack in (partial(cw_l2, lr=0.05, initial_c=1.0), ddn):
        found = [attack(model, inputs, labels, steps=60, seed=0) for model in (fast, plain)]
        ours, theirs = (judge(plain, inputs, images, labels, seed=1) for images in found)
        assert theirs.accuracy == 0
        assert ours.accuracy == 0
        assert float(ours.l2.mean()) <= 1.03 * float(theirs.l2.mean())


def test_noise_counts_on_copies_as_on_originals(digits: tuple[rse.SelfEnsemble, Tensor, Tensor]) -> None:
    """Steps on a copy draw other noise than steps on the original: eight draws a step make up for it."""
    ensemble, inputs, labels = digits
    fast = optimize(ensemble, inputs, "bf16")
    found = [
        pgd(model, inputs, labels, norm="l2", eps=0.7, steps=20, eot=8, seed=0) for model in (ensemble, fast)
    ]
    original, copied, clean = (
        judge(ensemble, inputs, images, labels, queries=50, seed=1).lead for images in (*found, inputs)
    )
    assert original.mean() > clean.mean() + 0.2
    # The mean would be that of the one or two images of twenty that end in another place.
    difference = copied - original
    assert difference.median().abs() < 0.01
    assert (difference.abs() > 0.02).sum() <= 2
    base = [
        transfer(model, inputs, labels, attack=pgd, eps=0.1, steps=20, seed=0) for model in (ensemble, fast)
    ]
    assert (base[0] - base[1]).abs().mean() < 0.01
    assert all(layer.enabled for layer in rse.noise_layers(ensemble.model).values())


def test_without_a_precision_the_faster_one_is_measured(
    digits: tuple[rse.SelfEnsemble, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble, inputs, _ = digits
    assert faster_precision(torch.device("cpu")) in ("float32", "bf16")
    for precision in ("float32", "bf16"):
        monkeypatch.setattr(fast, "faster_precision", lambda device, chosen=precision: chosen)
        assert optimize(ensemble, inputs).precision == precision


class Dropping(nn.Module):
    """Dropout within a part of the network, as torchvision's VGG, AlexNet and SqueezeNet have it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(inputs)).flatten(1)
        return logits


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_dropout_stays_off_in_copies(precision: Any, images: Tensor) -> None:
    """And on where it was switched on."""
    ensemble = rse.SelfEnsemble(Dropping(), rse.NoiseConfig(0, 0)).eval()
    fast = rse.optimize(ensemble, images, precision)
    assert not [fqn for fqn, module in fast.named_modules() if module.training]
    with torch.no_grad():
        assert torch.equal(fast.draw_logits(images), fast.draw_logits(images))
        assert torch.allclose(fast.draw_logits(images).float(), ensemble.draw_logits(images), atol=0.02)
    ensemble.model.classifier[0].train()  # type: ignore[index, union-attr]
    fast = rse.optimize(ensemble, images, precision)
    with torch.no_grad():
        assert not torch.equal(fast.draw_logits(images), fast.draw_logits(images))


class Coin(nn.Module):
    """A network that decides in Python which of two answers it gives: by numbers, or by counting."""

    counted: Tensor

    def __init__(self, toss: Callable[["Coin"], bool]) -> None:
        super().__init__()
        self.conv, self.toss, self.passes = nn.Conv2d(1, 2, 1), toss, 0
        self.heads, self.tails = nn.Linear(2, 2), nn.Linear(2, 2)
        self.register_buffer("counted", torch.zeros(()))
        self.numbers = np.random.default_rng(0)
        with torch.no_grad():
            self.heads.bias.copy_(torch.tensor([90.0, -90.0]))
            self.tails.bias.copy_(torch.tensor([-90.0, 90.0]))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = (self.heads if self.toss(self) else self.tails)(self.conv(inputs).mean((2, 3)))
        return logits


def _count(coin: Coin) -> bool:
    coin.passes += 1
    return coin.passes % 2 == 0


def _count_in_a_buffer(coin: Coin) -> bool:
    coin.counted += 1
    return float(coin.counted) % 2 == 0


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(
    "toss",
    [
        lambda coin: random.random() < 0.5,
        lambda coin: np.random.rand() < 0.5,  # noqa: NPY002
        lambda coin: float(torch.rand(())) < 0.5,
        lambda coin: coin.numbers.random() < 0.5,
        _count,
        _count_in_a_buffer,
    ],
    ids=["python", "numpy", "torch", "generator", "counter", "buffer"],
)
def test_what_python_decides_in_each_pass_is_not_frozen(
    toss: Callable[[Coin], bool], precision: Precision
) -> None:
    images = torch.rand(2, 1, 8, 8)
    for _ in range(8):  # a frozen copy may look right once
        fast = optimize(rse.SelfEnsemble(Coin(toss), draws=40), images, precision)
        # Of a fair coin outside of this range twice in ten million times.
        assert 0.1 < float(fast.predict_proba(images)[0, 0]) < 0.9


class Storing(nn.Module):
    """Keeps what it computes in attributes, and squeezes all sides of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.features: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        self.features = self.norm(self.conv(inputs)).relu()
        self.shape = self.features.shape
        logits: Tensor = self.linear(self.features.mean((2, 3), keepdim=True).squeeze())
        return logits


def test_networks_that_store_what_they_compute_are_folded(colour: Tensor) -> None:
    torch.manual_seed(0)
    ensemble = rse.SelfEnsemble(Storing().eval(), draws=3)
    for precision in ("float32", "bf16"):
        fast = optimize(ensemble, colour, precision)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    ours, theirs = (each.predict_proba(colour, seed=7) for each in (fast, ensemble))
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)


@pytest.mark.parametrize("in_front", [False, True], ids=["noise inside", "noise before mean and std"])
def test_networks_that_standardise_their_images_are_folded_like_others(
    tiny: nn.Module, images: Tensor, in_front: bool
) -> None:
    """Their forward takes more than the image, and noise before the whole network is a hook of its root."""
    network = rse.Normalized(copy.deepcopy(tiny), 0.5, 0.25)
    wanted = ("", "model.3") if in_front else ("model.0", "model.3")
    ensemble = rse.SelfEnsemble(
        network, rse.NoiseConfig(0.1, 0.05), filter_fn=lambda module, fqn: fqn in wanted
    )
    fast = optimize(ensemble.eval(), images, "float32")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    ours, theirs = (each.predict_proba(images, seed=3) for each in (fast, ensemble))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, fast.predict_proba(images, seed=4), atol=1e-5)
    with rse.noise_disabled(fast):
        quiet = fast.predict_proba(images, seed=3)
    assert torch.allclose(quiet, tiny((images - 0.5) / 0.25).softmax(dim=1), atol=1e-5)


@pytest.mark.parametrize(("known", "expected"), [(True, "bf16"), (False, "float32")])
def test_attacks_follow_float32_where_bfloat16_is_imitated(
    known: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "has_bfloat16", lambda device: known)
    ensemble = rse.load("digits-rse")
    images = torch.rand(2, 1, 8, 8)
    assert fast.for_attacks(ensemble, images, "float32") is ensemble
    assert fast.precision_of(fast.for_attacks(ensemble, images, "bf16")) == expected
