"""Images that stop drawing: exactly, and calibrated with a guarantee."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.artefacts import storage
from selfensemble.certainty.calibration import Paths, cheapest, choose
from selfensemble.data.images import ImageData, Inputs
from selfensemble.ensemble.draws import Draws, moments
from selfensemble.ensemble.stopping import Calibrated, Exact, Fixed, Rule, margin


def replayed(outputs: Tensor, rule: Rule, *, fold: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """`moments` of recorded (n, B, K) draws; an image is its number."""

    class Recorded(Draws):
        def take(self, images: Tensor, index: int, count: int, group: int = 0) -> Tensor:  # noqa: ARG002
            assert count == 1 or count * len(images) <= fold
            return outputs[index : index + count, images[:, 0].long()]

    nobody = rse.SelfEnsemble(nn.Conv2d(1, 1, 1))
    numbers = torch.arange(outputs.shape[1], dtype=torch.float32).unsqueeze(1)
    return moments(Recorded(nobody, numbers, fold), numbers, rule)


def random_outputs(draws: int, images: int, classes: int, seed: int) -> Tensor:
    """(draws, images, classes) softmax outputs, of sure and of unsure images."""
    generator = torch.Generator().manual_seed(seed)
    centre = (
        3
        * torch.rand(1, images, 1, generator=generator)
        * torch.randn(1, images, classes, generator=generator)
    )
    return (centre + torch.randn(draws, images, classes, generator=generator)).softmax(dim=2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 14), st.integers(1, 12), st.integers(1, 5), st.integers(1, 30), st.integers(0, 2**31))
def test_exact_gives_the_label_of_all_draws(
    draws: int, images: int, classes: int, fold: int, seed: int
) -> None:
    outputs = random_outputs(draws, images, classes, seed)
    mean, _, used = replayed(outputs, Exact(draws), fold=fold)
    assert torch.equal(mean.argmax(dim=1), outputs.double().mean(dim=0).argmax(dim=1))
    assert (used >= (1 if classes == 1 else draws // 2 + 1)).all()
    assert (used <= draws).all()


def test_exact_stops_at_the_first_moment_it_may() -> None:
    """By brute force: no continuation of zeros and ones changes the label, one draw earlier some do."""
    outputs = random_outputs(8, 40, 3, seed=5)
    _, _, used = replayed(outputs, Exact(8))
    assert len(set(used.tolist())) > 2
    for image, stop in enumerate(used.tolist()):
        stands = []
        for taken in (stop - 1, stop):
            total = outputs[:taken, image].double().sum(dim=0)
            left = [
                votes for votes in itertools.product(range(9 - taken), repeat=3) if sum(votes) == 8 - taken
            ]
            ends = {int((total + torch.tensor(votes)).argmax()) for votes in left}
            stands.append(ends == {int(total.argmax())})
        assert stands == [False, True]


@pytest.mark.parametrize("fold", [1, 3, 64])
def test_means_and_spreads_are_of_the_draws_taken(fold: int) -> None:
    outputs = random_outputs(12, 9, 4, seed=2)
    for rule in (Fixed(12), Exact(12), halving(12)):
        mean, spread, used = replayed(outputs, rule, fold=fold)
        for image, count in enumerate(used.tolist()):
            taken = outputs[:count, image]
            torch.testing.assert_close(mean[image], taken.mean(dim=0))
            expected = taken.std(dim=0) if count > 1 else torch.full((4,), torch.nan)
            torch.testing.assert_close(spread[image], expected, equal_nan=True)


def halving(most: int) -> Calibrated:
    """Thresholds .8, .4, .2, ... and 0."""
    thresholds = (*(0.8 / 2**k for k in range(most - 1)), 0.0)
    return Calibrated(
        thresholds=thresholds,
        epsilon=0.1,
        delta=0.05,
        mean_draws=2,
        disagreement=0.08,
        images=500,
        reference_draws=200,
    )


def test_calibrated_stops_at_its_thresholds() -> None:
    outputs = random_outputs(10, 50, 3, seed=3)
    rule = halving(10)
    _, _, used = replayed(outputs, rule)
    means = outputs.cumsum(dim=0) / torch.arange(1, 11)[:, None, None]
    for image, count in enumerate(used.tolist()):
        gaps = [float(margin(means[k : k + 1, image])) for k in range(10)]
        first = next(k + 1 for k in range(10) if gaps[k] >= rule.thresholds[k])
        assert count == first


def test_answers_that_are_not_numbers_never_stop_early() -> None:
    outputs = torch.full((6, 2, 3), torch.nan)
    for rule in (Exact(6), halving(6)):
        assert replayed(outputs, rule)[2].tolist() == [6, 6]


# several draws in one batch


def test_draws_in_one_batch_are_those_of_their_own() -> None:
    layer = rse.GaussianNoise(0.5, layer=3, sampling="shared").eval()
    by_channel = rse.GaussianNoise([0.5, 0.0, 2.0], layer=4, sampling="shared").eval()
    images = torch.rand(2, 3, 5, 5)
    for noise, inputs in itertools.product(
        (layer, by_channel), (images, images.to(memory_format=torch.channels_last), images.bfloat16())
    ):
        each = []
        for index in range(4, 7):
            with rse.noise_draw(9, index):
                each.append(noise(inputs))
        with rse.noise_draw(9, 4, count=3):
            together = noise(inputs.repeat(3, 1, 1, 1))
        assert torch.equal(together, torch.cat(each))


def test_draws_in_one_batch_of_a_compiled_network(images: Tensor) -> None:
    layer = rse.GaussianNoise(0.5, layer=3, sampling="shared").eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    repeated = images.repeat(3, 1, 1, 1)
    with rse.noise_draw(9, 4, count=3):
        expected = layer(repeated)
    with rse.noise_draw(9, 4, count=3):
        assert torch.equal(compiled(repeated), expected)


def test_a_batch_that_cannot_hold_its_draws(images: Tensor) -> None:
    layer = rse.GaussianNoise(0.5, sampling="shared").eval()
    with rse.noise_draw(count=4), pytest.raises(ValueError, match="a batch of 6 cannot hold 4 draws"):
        layer(images)
    with pytest.raises(ValueError, match="count and step >= 1"), rse.noise_draw(count=0):
        pass


@pytest.fixture
def ensemble(tiny: nn.Module) -> rse.SelfEnsemble:
    return rse.SelfEnsemble(tiny, rse.NoiseConfig(0.3, 0.2), draws=10).eval()


@pytest.mark.parametrize("size", [1, 2, 7])
def test_folded_predictions_are_those_of_single_draws(ensemble: rse.SelfEnsemble, size: int) -> None:
    inputs = torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(size))
    folded = ensemble.predict(inputs, seed=3, sampling="shared")
    one_by_one = ensemble.predict(inputs, seed=3, sampling="shared", max_batch=1)
    torch.testing.assert_close(folded.probabilities, one_by_one.probabilities)
    torch.testing.assert_close(folded.spread, one_by_one.spread)
    assert folded.draws.tolist() == [10] * size
    # Fresh noise of a single image has its spread too.
    assert (ensemble.predict(inputs, sampling="per_image").spread > 0).all()


class Coin(nn.Module):
    """Noise on one pixel x decides, softly, between two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = rse.GaussianNoise(0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        value = 4 * self.noise(inputs)
        return torch.cat([value, -value], dim=1)


class Flipped(nn.Module):
    """Test-time augmentation: both views in one batch, the views of all images one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        both = self.conv(torch.cat([inputs, inputs.flip(3)])).mean(dim=(2, 3))
        logits: Tensor = 30 * both.unflatten(0, (2, -1)).mean(dim=0)
        return logits


class OneByOne(nn.Module):
    """Images in a loop, without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([30 * self.conv(image).mean(dim=(1, 2)) for image in inputs])


@pytest.mark.parametrize("network", [Flipped, OneByOne])
def test_networks_that_rearrange_their_batch_get_one_draw_at_a_time(
    network: type[nn.Module], images: Tensor
) -> None:
    torch.manual_seed(0)
    ensemble = rse.SelfEnsemble(network(), rse.NoiseConfig(0.5, 0.1), draws=10).eval()
    answer = ensemble.predict(images[:1], seed=0)
    alone = ensemble.predict(images[:1], seed=0, max_batch=1)
    assert list(ensemble.folds.values()) == [False]
    torch.testing.assert_close(answer.probabilities, alone.probabilities)
    torch.testing.assert_close(answer.spread, alone.spread)


def test_other_networks_get_several(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    ensemble.predict(images[:1])
    assert list(ensemble.folds.values()) == [True]


class Recorder(nn.Module):
    """Keeps what the noise in front of it made of pixel 1, by pixel 0, the number of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 1)
        self.passes: list[dict[float, float]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        noisy = self.conv(inputs[:, None, 1:])[:, 0]
        self.passes.append(dict(zip(inputs[:, 0].tolist(), noisy[:, 0].tolist(), strict=True)))
        return torch.cat([4 * noisy, -4 * noisy], dim=1)


@pytest.mark.parametrize("max_batch", [None, 7])
def test_images_that_leave_leave_the_others_their_own_opposite_noise(max_batch: int | None) -> None:
    """Noise of each image's own is negated by place, so that nobody may move within a pair."""
    network = Recorder()
    with torch.no_grad():
        network.conv.weight.fill_(1.0)
        assert network.conv.bias is not None
        network.conv.bias.zero_()
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0.5, 0), sampling="per_image", bounds=None).eval()
    ensemble.stopping = halving(6).model_copy(update={"antithetic": True})
    numbers = torch.arange(40.0)
    inputs = torch.stack([numbers, torch.linspace(-1, 1, 40)], dim=1)
    answer = ensemble.predict(inputs, seed=0, stop="calibrated", max_batch=max_batch)
    assert 20 < (answer.draws == 1).sum() < 39  # some leave within the first pair
    noise: list[dict[float, float]] = []
    clean = dict(inputs.tolist())
    for each in network.passes:
        if not each.keys() <= clean.keys():
            continue  # it looks whether the network answers images by themselves
        own = {number: noisy - clean[number] for number, noisy in each.items()}
        if not noise or own.keys() & noise[-1].keys() or max_batch is None:
            noise.append(own)
        else:
            noise[-1] |= own  # the next part of a draw
    draws = {number: [own[number] for own in noise if number in own] for number in numbers.tolist()}
    for number, used in zip(numbers.tolist(), answer.draws.tolist(), strict=True):
        for first, second in zip(draws[number][0:used:2], draws[number][1:used:2], strict=False):
            assert first == pytest.approx(-second, abs=1e-5)


def test_exact_predictions_of_a_network() -> None:
    ensemble = rse.SelfEnsemble(Coin(), bounds=None).eval()
    inputs = torch.linspace(-2, 2, 81).unsqueeze(1)
    full = ensemble.predict(inputs, seed=1)
    early = ensemble.predict(inputs, seed=1, stop="exact")
    assert torch.equal(full.label, early.label)
    assert early.draws.min() == 6
    # Images that went on to the end have the same mean.
    last = early.draws == 10
    assert 0 < last.sum() < 40
    torch.testing.assert_close(early.probabilities[last], full.probabilities[last])
    probabilities = ensemble.predict_proba(inputs, seed=1, stop="exact")
    torch.testing.assert_close(probabilities, early.probabilities)


def test_without_noise_nothing_is_drawn_twice(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    with rse.noise_disabled(ensemble.model):
        for stop in (None, "exact"):
            assert ensemble.predict(images, stop=stop).draws.tolist() == [1] * 6


def test_a_rule_that_is_not_there(ensemble: rse.SelfEnsemble, images: Tensor) -> None:
    with pytest.raises(ValueError, match="no calibrated thresholds: set"):
        ensemble.predict(images, stop="calibrated")
    with pytest.raises(ValueError, match="stop must be one of"):
        ensemble.predict(images, stop="soon")  # type: ignore[arg-type]
    ensemble.stopping = halving(10)
    with pytest.raises(ValueError, match="leave draws out"):
        ensemble.predict(images, stop="calibrated", draws=5)
    assert ensemble.predict(images, stop="calibrated").draws.max() <= 10


# calibration


def simulated(images: int, most: int, generator: np.random.Generator) -> Paths:
    """Two classes; a draw's lead is normal around the image's own mean, whose sign is the right answer."""
    lead = generator.normal(size=images)
    draws = lead + generator.normal(size=(most, images))
    mean = np.tanh(draws).cumsum(axis=0) / np.arange(1, most + 1)[:, None]
    return Paths(np.abs(mean), (mean > 0) != (lead > 0))


def test_the_guarantee_holds() -> None:
    """Of 150 calibrations at most delta, plus 3 standard errors, have a risk above epsilon."""
    generator = np.random.default_rng(0)
    fresh = simulated(100_000, 12, generator)
    epsilon, delta, repetitions = 0.17, 0.2, 150
    failures = 0
    for _ in range(repetitions):
        rule = choose(simulated(400, 12, generator), simulated(400, 12, generator), epsilon, delta, 200)
        _, wrong = fresh.follow(np.array(rule.thresholds))
        failures += wrong.mean() > epsilon
        assert rule.disagreement < epsilon
    assert failures / repetitions <= delta + 3 * np.sqrt(delta * (1 - delta) / repetitions)


def test_it_takes_fewer_draws_than_a_fixed_number_as_good() -> None:
    generator = np.random.default_rng(0)
    fresh = simulated(100_000, 24, generator)
    epsilon = fresh.wrong[5].mean()  # of six draws
    rule = choose(simulated(20_000, 24, generator), simulated(20_000, 24, generator), epsilon, 0.05, 200)
    draws, wrong = fresh.follow(np.array(rule.thresholds))
    assert wrong.mean() <= epsilon
    assert draws.mean() < 0.75 * 6


@pytest.mark.parametrize("price", [2.0, 10.0, 50.0])
def test_each_threshold_is_the_best_given_the_later_ones(price: float) -> None:
    paths = simulated(40, 4, np.random.default_rng(1))
    found = cheapest(paths, price)
    assert found[-1] == 0

    def cost(thresholds: np.ndarray, start: int) -> float:
        """Of images that have come to draw `start`."""
        draws, wrong = Paths(paths.margins[start:], paths.wrong[start:]).follow(thresholds[start:])
        return float((draws + price * wrong).mean())

    for start in range(3):
        others = []
        for threshold in [*paths.margins[start], 2.0]:
            other = found.copy()
            other[start] = threshold
            others.append(cost(other, start))
        assert cost(found, start) == pytest.approx(min(others))


@pytest.fixture(scope="module")
def digits() -> tuple[rse.SelfEnsemble, Tensor]:
    """A noisy ensemble that knows handwritten digits, and images it has not seen."""
    torch.manual_seed(0)
    data = rse.load_data("digits", "train")
    ensemble = rse.SelfEnsemble(
        rse.create_model("small-cnn", channels=1, width=0.25), rse.NoiseConfig(0.4, 0.2)
    )
    optimizer = torch.optim.Adam(ensemble.train().parameters(), lr=5e-3)
    for _ in range(60):
        chosen = torch.randint(len(data), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(ensemble(data.inputs(chosen)), data.labels[chosen]).backward()
        optimizer.step()
    test = rse.load_data("digits", "test")
    return ensemble.eval(), test.inputs(slice(None))


def test_a_calibrated_network(digits: tuple[rse.SelfEnsemble, Tensor], tmp_path: Path) -> None:
    ensemble, images = digits
    calls: list[tuple[int, int]] = []
    rule = rse.calibrate(
        ensemble,
        images[:300],
        epsilon=0.2,
        most=16,
        reference_draws=100,
        seed=0,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1] == (300 * 126, 300 * 126)
    again = rse.calibrate(ensemble, images[:300], epsilon=0.2, most=16, reference_draws=100, seed=0)
    assert again == rule
    ensemble.stopping = rule
    held_out = images[300:]
    answer = ensemble.predict(held_out, seed=1, stop="calibrated")
    reference = ensemble.predict(held_out, draws=300, seed=2)
    wrong = int((answer.label != reference.label).sum())
    # At level 1e-3, were the risk epsilon.
    assert wrong <= stats.binom.ppf(0.999, len(held_out), 0.2)
    assert 1 < answer.draws.float().mean() < 10
    # It travels with the model, and with optimised copies.
    rse.save(ensemble, tmp_path / "model", architecture=None)
    assert storage.read_config(tmp_path / "model").stopping == rule
    assert rse.optimize(ensemble, images).stopping == rule
    storage.save_stopping(tmp_path / "model", halving(4))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["stopping"]["thresholds"] == [0.8, 0.4, 0.2, 0.0]
    fresh = rse.create_model("small-cnn", channels=1, width=0.25)
    ensemble.stopping = halving(4)  # which is bound to it, as to what is loaded
    assert rse.load(tmp_path / "model", model=fresh).stopping == ensemble.stopping


def test_images_that_are_made_some_at_a_time_give_the_same_rules(
    digits: tuple[rse.SelfEnsemble, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble, images = digits
    labels = rse.load_data("digits", "test").labels
    data = ImageData("floats", torch.cat([torch.rand(7, 1, 8, 8), images]), labels.new_zeros(457), ("a", "b"))
    monkeypatch.setattr("selfensemble.data.images.BATCH_NUMBERS", 64 * 30)
    later = Inputs(data, len(images), start=7)
    parts = list(later.split(64))
    assert [len(part) for part in parts] == [64] * 7 + [2]
    assert torch.equal(torch.cat(parts), images)
    settings: dict[str, Any] = {"epsilon": 0.3, "most": 4, "reference_draws": 8, "max_batch": 30, "seed": 0}
    assert rse.calibrate(ensemble, later, **settings) == rse.calibrate(ensemble, images, **settings)
    rules = [rse.conformal_sets(ensemble, each, labels, draws=3, seed=0).rule for each in (later, images)]
    assert rules[0] == rules[1]
    data.images[300] = 2.0
    for refused in (lambda: rse.calibrate(ensemble, later, **settings),
                    lambda: rse.conformal_sets(ensemble, later, labels, draws=3)):  # fmt: skip
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            refused()


def test_what_cannot_be_calibrated(digits: tuple[rse.SelfEnsemble, Tensor]) -> None:
    ensemble, images = digits
    with pytest.raises(ValueError, match="needs 200 images or more, got 5"):
        rse.calibrate(ensemble, images[:5])
    with pytest.raises(ValueError, match="epsilon must lie between 0 and 1"):
        rse.calibrate(ensemble, images, epsilon=1.5)
    with pytest.raises(ValueError, match=r"no rule of up to 2 draws .* give more"):
        rse.calibrate(ensemble, images[:200], epsilon=1e-4, most=2, reference_draws=10, seed=0)
    with rse.noise_disabled(ensemble.model), pytest.raises(ValueError, match="no noise"):
        rse.calibrate(ensemble, images)
