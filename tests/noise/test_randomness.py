"""Random layers of others: moments in closed form, and what every tool of the package needs of them.

Statistical tests use fixed seeds and 5 standard errors, in the worst of at most 400 numbers each: a right
layer fails one of them with a probability below 400 * 6e-7 = 2.4e-4.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import selfensemble as rse
from selfensemble.artefacts.config import Architecture
from selfensemble.artefacts.storage import read_config
from selfensemble.attacks import pgd
from selfensemble.evaluation.doctor.examination import doctor
from selfensemble.evaluation.identity import model_record
from selfensemble.noise.aligned import AlignedNoise, alignments
from selfensemble.noise.bayesian import BayesianWeights, divergence
from selfensemble.noise.dropping import ActivationPruning, LastingDropout
from selfensemble.noise.injection import make_static_, random_layers
from selfensemble.noise.learned import parameter_groups
from selfensemble.noise.parametric import ParametricNoise
from selfensemble.noise.perturbing import LearnedPerturbation
from selfensemble.noise.random_filters import RandomFilterConv2d
from selfensemble.noise.random_weights import RandomWeights
from selfensemble.noise.randomness import randomise_, randomness_of, read_randomness
from selfensemble.noise.streams import Sampling, random_source

KINDS = (
    "parametric-noise", "bayesian", "random-filters", "learned-perturbation", "aligned-noise", "dropout",
    "activation-pruning",
)  # fmt: skip
WEIGHTS = KINDS[:3]
# Noise that a network which was trained without any still answers under.
MILD: dict[str, dict[str, Any]] = {
    "parametric-noise": {"start": 0.05},
    "bayesian": {"start": 0.002},
    "learned-perturbation": {"start": 0.05},
    "aligned-noise": {"scale": 0.01},
    "dropout": {"p": 0.02},
}
DRAWS = 20_000


def small(name: str, images: Tensor, **settings: Any) -> rse.SelfEnsemble:
    """A small network with one kind of random layers, its batch norm not at its start."""
    torch.manual_seed(4)
    network = rse.create_model("small-cnn", channels=1, width=0.25)
    network.train()(torch.rand(64, 1, 8, 8) * 3)
    randomise_(network, read_randomness({"name": name} | settings), images)
    return rse.SelfEnsemble(network, rse.NoiseConfig(0, 0), draws=4, example_inputs=images).eval()


@pytest.fixture
def digits() -> Tensor:
    return rse.load_data("digits", "test").inputs(slice(6))


def check_moments(outputs: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Of (N, ...) independent Gaussian-like outputs, the mean and variance (...)."""
    count = len(outputs)
    outputs, mean, variance = outputs.double(), mean.double(), variance.double()
    off = (outputs.mean(dim=0) - mean).abs()
    assert bool((off <= 5 * (variance / count).sqrt() + 1e-6).all())
    squares = (outputs - mean).square()
    error = (squares.var(dim=0) / count).sqrt()
    assert bool(((squares.mean(dim=0) - variance).abs() <= 5 * error + 1e-6).all())


def layer_of(name: str, module: nn.Module, inputs: Tensor, **settings: Any) -> nn.Sequential:
    """`module` alone, random."""
    network = nn.Sequential(module)
    randomise_(network, read_randomness({"name": name} | settings), inputs)
    return network.eval()


def patches(image: Tensor) -> Tensor:
    """(9 * C, H * W): what each place of a 3x3 convolution with padding 1 sees."""
    return functional.unfold(image[None], 3, padding=1)[0]


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_parametric_noise_has_the_moments_of_its_formula(granularity: str) -> None:
    """Of w + alpha * std(w) * N(0, 1): mean w * x, variance alpha^2 std(w)^2 |x|^2."""
    torch.manual_seed(0)
    image, convolution = torch.rand(2, 3, 3), nn.Conv2d(2, 3, 3, padding=1)
    network = layer_of("parametric-noise", convolution, image[None], start=0.4, granularity=granularity)
    layer = network[0]
    assert isinstance(layer, ParametricNoise)
    with torch.no_grad():
        layer.alpha.copy_(torch.linspace(0.2, 0.6, layer.alpha.numel()).view_as(layer.alpha))
        alpha = layer.alpha.flatten().expand(3)
        with rse.noise_draw(1, sampling="per_image"):
            outputs = network(image.expand(DRAWS, -1, -1, -1))
        spread = (layer.weight - layer.weight.mean()).square().mean()
        level = alpha.square()[:, None] * spread * patches(image).square().sum(dim=0)
        plain = functional.conv2d(image[None], layer.weight, layer.bias, padding=1)[0]
    check_moments(outputs, plain, level.view(3, 3, 3))


@pytest.mark.parametrize("bias", [True, False])
def test_bayesian_layers_have_the_moments_and_the_divergence_of_gaussians(bias: bool) -> None:
    torch.manual_seed(0)
    inputs = torch.rand(1, 7)
    network = layer_of("bayesian", nn.Linear(7, 5, bias=bias), inputs, start=0.1, prior_std=0.3)
    layer = network[0]
    assert isinstance(layer, BayesianWeights)
    with torch.no_grad():
        layer.log_std.copy_(torch.rand(5, 7) - 2)
        with rse.noise_draw(1, sampling="per_image"):
            outputs = network(inputs.expand(DRAWS, -1))
        own = torch.zeros(5) if layer.bias_log_std is None else (2 * layer.bias_log_std).exp()
        variance = (2 * layer.log_std).exp() @ inputs[0].square() + own
        check_moments(outputs, functional.linear(inputs, layer.weight, layer.bias)[0], variance)
    posterior = torch.distributions.Normal(layer.weight, layer.log_std.exp())
    prior = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(0.3))
    expected = torch.distributions.kl_divergence(posterior, prior).sum()
    if layer.bias_log_std is not None:
        biases = torch.distributions.Normal(layer.bias, layer.bias_log_std.exp())
        expected = expected + torch.distributions.kl_divergence(biases, prior).sum()
    torch.testing.assert_close(divergence(network), expected)


def test_random_filters_have_their_moments_and_learned_ones_their_spread() -> None:
    """Entries from N(0, 1/r^2): variance |x|^2 / r^2; learned filters are w / (r std(w))."""
    torch.manual_seed(0)
    image, convolution = torch.rand(2, 3, 3), nn.Conv2d(2, 8, 3, padding=1)
    network = layer_of("random-filters", convolution, image[None])
    layer = network[0]
    assert isinstance(layer, RandomFilterConv2d)
    assert layer.random_filters == 6
    with torch.no_grad(), rse.noise_draw(1, sampling="per_image"):
        outputs = network(image.expand(DRAWS, -1, -1, -1))
    assert layer.bias is not None
    variance = patches(image).square().sum(dim=0).view(3, 3) / 9
    check_moments(outputs[:, 2:], layer.bias[2:, None, None].expand(6, 3, 3), variance.expand(6, 3, 3))
    learned = layer.weight[:2].detach()
    expected = learned / (3 * learned.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 3e-5)
    plain = functional.conv2d(image[None], expected, layer.bias[:2], padding=1)
    torch.testing.assert_close(outputs[:, :2], plain.expand(DRAWS, -1, -1, -1), rtol=1e-4, atol=1e-5)


def test_dropout_and_pruning_keep_the_mean_and_have_the_variance_of_their_probabilities() -> None:
    """Kept with q and divided by q: mean h, variance h^2 (1 - q) / q."""
    torch.manual_seed(0)
    image = torch.randn(6, 5).relu()
    share = image / image.sum()
    q = 1 - (1 - share) ** 15  # half as many draws as activations
    layers = ((LastingDropout(0.3), torch.full_like(image, 0.7)), (ActivationPruning(0.5), q))
    for layer, kept in layers:
        with rse.noise_draw(2, sampling="per_image"):
            outputs = layer.eval()(image.expand(DRAWS, -1, -1))
        variance = torch.where(image > 0, image.square() * (1 - kept) / kept, 0.0)
        check_moments(outputs, image, variance)


def test_learned_perturbation_has_a_level_for_every_neuron() -> None:
    layer = LearnedPerturbation((3, 4), start=0.3, least=0.1).eval()
    with torch.no_grad():
        layer.theta.copy_(torch.linspace(0.0, 0.6, 12).view(3, 4))
    image = torch.rand(3, 4)
    with rse.noise_draw(2, sampling="per_image"), torch.no_grad():
        outputs = layer(image.expand(DRAWS, -1, -1))
    check_moments(outputs, image, layer.theta.detach().clamp(min=0.1).square())
    with pytest.raises(ValueError, match="images of the size that it was made with"):
        layer(torch.rand(2, 3, 5))


def test_aligned_noise_has_the_covariance_of_its_factor() -> None:
    """Entry ij of a sample covariance has the variance (S_ii S_jj + S_ij^2) / N."""
    torch.manual_seed(0)
    layer, features = AlignedNoise(4).eval(), torch.rand(4)
    with rse.noise_draw(2, sampling="per_image"), torch.no_grad():
        noise = (layer(features.expand(DRAWS, -1)) - features).double()
    covariance = (layer.lower() @ layer.lower().T).detach().double()
    found = noise.T @ noise / DRAWS
    error = ((covariance.diag()[:, None] * covariance.diag() + covariance.square()) / DRAWS).sqrt()
    assert bool(((found - covariance).abs() <= 5 * error).all())
    network = nn.Sequential(nn.Linear(4, 3))
    randomise_(network, read_randomness({"name": "aligned-noise"}), torch.rand(2, 4))
    inner, last = random_layers(network)[0], network[0]
    assert isinstance(inner, AlignedNoise)
    assert isinstance(last, nn.Linear)
    weight = last.weight
    sigma = inner.lower() @ inner.lower().T
    torch.testing.assert_close(next(alignments(network)), (weight @ sigma @ weight.T).diagonal().sum())


@pytest.mark.parametrize("name", KINDS)
def test_shared_draws_are_one_a_batch_and_others_an_images_own(name: str, digits: Tensor) -> None:
    ensemble = small(name, digits)
    same = digits[:1].expand(4, -1, -1, -1)
    shared, own = (_logits(ensemble, same, sampling) for sampling in ("shared", "per_image"))
    torch.testing.assert_close(shared, shared[:1].expand(4, -1))
    assert all(not torch.allclose(own[i], own[j]) for i in range(4) for j in range(i))


def _logits(ensemble: rse.SelfEnsemble, images: Tensor, sampling: Sampling, **draw: Any) -> Tensor:
    with torch.no_grad(), rse.noise_draw(7, sampling=sampling, **draw):
        return ensemble.draw_logits(images)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("sampling", ["shared", "per_image"])
def test_seeds_repeat_whatever_else_is_in_the_batch(name: str, sampling: Sampling, digits: Tensor) -> None:
    ensemble = small(name, digits)
    full = _logits(ensemble, digits, sampling)
    assert torch.equal(full, _logits(ensemble, digits, sampling))
    assert not torch.allclose(full, _logits(ensemble, digits, sampling, index=1))
    torch.testing.assert_close(_logits(ensemble, digits[:2], sampling), full[:2])
    other = torch.cat([digits[:1], torch.rand(5, 1, 8, 8)])
    torch.testing.assert_close(_logits(ensemble, other, sampling)[:1], full[:1])
    state = torch.get_rng_state()
    assert not torch.equal(ensemble(digits), ensemble(digits))  # fresh without a seed
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", KINDS)
def test_several_draws_in_a_batch_are_those_of_their_own(name: str, digits: Tensor) -> None:
    """Grouped convolutions compute what as many passes do."""
    ensemble = small(name, digits)
    together = _logits(ensemble, digits.repeat(3, 1, 1, 1), "shared", count=3)
    each = [_logits(ensemble, digits, "shared", index=index) for index in range(3)]
    torch.testing.assert_close(together, torch.cat(each))
    assert ensemble.predict(digits, seed=1, draws=7).probabilities.shape == (6, 10)


@pytest.mark.parametrize("sampling", ["shared", "per_image"])
@pytest.mark.parametrize("name", ["parametric-noise", "bayesian", "learned-perturbation"])
def test_antithetic_draws_are_opposite(name: str, sampling: Sampling) -> None:
    inputs = torch.rand(3, 5)
    where = {"modules": ["0"]} if name == "learned-perturbation" else {}
    network = layer_of(name, nn.Identity() if where else nn.Linear(5, 4), inputs, **where)
    pair = []
    for index in (0, 1):
        with torch.no_grad(), rse.noise_draw(3, index, sampling, antithetic=True):
            pair.append(network(inputs))
    with torch.no_grad(), rse.noise_disabled(network):
        torch.testing.assert_close((pair[0] + pair[1]) / 2, network(inputs))
    assert not torch.allclose(pair[0], pair[1])


def test_weights_are_drawn_a_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch, digits: Tensor) -> None:
    ensemble = small("bayesian", digits)
    full = _logits(ensemble, digits, "per_image")
    monkeypatch.setattr("selfensemble.noise.random_weights._ROOM_ON_CPU", 1)
    torch.testing.assert_close(_logits(ensemble, digits, "per_image"), full)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_random_convolutions_are_those_of_torch_with_other_weights(groups: int, mode: Any) -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 4, 6, 6)
    plain = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=groups, padding_mode=mode)
    layer = layer_of("parametric-noise", copy.deepcopy(plain), images)[0]
    assert isinstance(layer, RandomWeights)
    with torch.no_grad(), rse.noise_draw(3, sampling="per_image"):
        found = layer(images)
    with torch.no_grad(), rse.noise_disabled(layer):
        torch.testing.assert_close(layer(images), plain(images))
        torch.testing.assert_close(layer(images[0]), plain(images[0]))
    with torch.no_grad(), rse.noise_draw(3, sampling="per_image"):
        weights, _ = layer.drawn(random_source(layer.layer, False, images.device), len(images))
    for image, weight, output in zip(images, weights, found, strict=True):
        with torch.no_grad():
            plain.weight.copy_(weight)
            torch.testing.assert_close(output, plain(image))


@pytest.mark.parametrize("name", KINDS)
def test_switched_off_it_is_the_mean_network_and_static_for_good(
    name: str, digits: Tensor, tmp_path: Path
) -> None:
    ensemble = small(name, digits)
    with rse.noise_disabled(ensemble):
        random = [ensemble.is_random]
        off = ensemble(digits)
        assert torch.equal(off, ensemble(digits))
    if name != "random-filters":  # whose learned filters are normalised
        torch.manual_seed(4)
        plain = rse.create_model("small-cnn", channels=1, width=0.25)
        plain.train()(torch.rand(64, 1, 8, 8) * 3)
        torch.testing.assert_close(off, plain.eval()(digits).log_softmax(dim=1))
    static = make_static_(copy.deepcopy(ensemble))
    assert isinstance(static, rse.SelfEnsemble)
    torch.testing.assert_close(static(digits), off)
    assert [*random, static.is_random, ensemble.is_random] == [False, False, True]
    rse.save(static, tmp_path)
    assert not read_config(tmp_path).is_random
    assert torch.equal(rse.load(tmp_path)(digits), static(digits))
    assert model_record(static, "", None).digest != model_record(ensemble, "", None).digest


@pytest.mark.parametrize("name", KINDS)
def test_save_and_load_keep_it(name: str, digits: Tensor, tmp_path: Path) -> None:
    ensemble = small(name, digits, **MILD.get(name, {}))
    with torch.no_grad():
        for layer in random_layers(ensemble):
            for level in layer.levels_learned():
                level.mul_(1.1)
    rse.save(ensemble, tmp_path)
    config = read_config(tmp_path)
    assert config.architecture == Architecture(name="small-cnn", classes=10, channels=1, width=0.25)
    assert config.randomness == randomness_of(ensemble.model)
    assert config.is_random
    loaded = rse.load(tmp_path)
    assert torch.equal(loaded.predict_proba(digits, seed=2), ensemble.predict_proba(digits, seed=2))
    rse.save(loaded, tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    copied = copy.deepcopy(loaded)
    assert torch.equal(copied.predict_proba(digits, seed=2), loaded.predict_proba(digits, seed=2))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_fast_path_has_the_same_draws(name: str, precision: Any, digits: Tensor) -> None:
    ensemble = small(name, digits)
    fast = rse.optimize(ensemble, digits, precision)
    assert fast.is_random
    tolerance = 1e-4 if precision == "float32" else 0.05
    found, expected = (each.predict_proba(digits, seed=2) for each in (fast, ensemble))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    with rse.noise_disabled(ensemble), rse.noise_disabled(fast):
        torch.testing.assert_close(fast(digits).exp(), ensemble(digits).exp(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_reach_images_weights_and_levels(name: str, digits: Tensor) -> None:
    ensemble = small(name, digits).train()
    images = digits.clone().requires_grad_()
    functional.cross_entropy(ensemble(images), torch.arange(6)).backward()
    levels = {id(level) for layer in random_layers(ensemble) for level in layer.levels_learned()}
    for key, parameter in ensemble.named_parameters():
        assert parameter.grad is not None, key
        if id(parameter) in levels:
            assert float(parameter.grad.abs().max()) > 0, key
    assert images.grad is not None
    assert float(images.grad.abs().max()) > 0
    kept = [group for group in parameter_groups(ensemble) if group.get("weight_decay") == 0.0]
    assert {id(each) for group in kept for each in group["params"]} == levels  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [name for name in KINDS if name != "random-filters"])
def test_attacks_and_the_doctor_run_on_it(name: str) -> None:
    """On the trained network of the zoo, with noise that it was not trained with."""
    data = rse.load_data("digits", "test")
    images, labels = data.inputs(slice(24)), data.labels[:24]
    network = rse.remove_noise_(rse.load("digits-rse")).model
    randomise_(network, read_randomness({"name": name} | MILD.get(name, {})), images[:2])  # type: ignore[arg-type]
    ensemble = rse.SelfEnsemble(network, draws=3).eval()  # type: ignore[arg-type]
    assert not rse.noise_layers(ensemble)
    attacked = pgd(ensemble, images, labels, eps=0.4, steps=10, eot=2, average="probabilities", seed=0)
    right = [
        float((ensemble.predict(each, seed=1).label == labels).float().mean()) for each in (images, attacked)
    ]
    assert right[0] > 0.7
    assert right[1] < 0.4
    checks = doctor(ensemble, images, labels, eps=0.2, steps=4, eot=1, images=5, expect_random=True, seed=0)
    failed = {check.name: check.figure for check in checks if check.passed is False}
    assert not failed
    assert rse.validate(network, images[:2]) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_no_graph_holds_the_numbers_of_one_draw(name: str, digits: Tensor) -> None:
    model = small(name, digits).model
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="no recorded graph can hold"):
            torch.compile(model, backend="eager")(digits)
        with pytest.raises(RuntimeError, match="no recorded graph can hold"):
            torch.jit.trace(model, digits, check_trace=False)
        assert not torch.equal(model(digits), model(digits))


def test_wrong_settings_and_places_are_named(net: nn.Sequential, images: Tensor) -> None:
    with pytest.raises(ValueError, match="no module '9'"):
        randomise_(net, read_randomness({"name": "bayesian", "modules": ["9"]}))
    with pytest.raises(ValueError, match="goes to linear layers, and 0 is a Conv2d"):
        randomise_(net, read_randomness({"name": "aligned-noise", "modules": ["0"]}))
    with pytest.raises(ValueError, match="each once"):
        randomise_(net, read_randomness({"name": "dropout", "modules": ["1", "1"]}))
    with pytest.raises(ValueError, match="needs example_inputs"):
        randomise_(net, read_randomness({"name": "learned-perturbation"}))
    with pytest.raises(ValueError, match="has no activation modules"):
        randomise_(nn.Sequential(nn.Linear(2, 2)), read_randomness({"name": "dropout"}))
    twice = nn.Sequential(nn.Conv2d(3, 4, 3), act := nn.ReLU(), nn.Conv2d(4, 4, 3), act)
    with pytest.raises(ValueError, match="a separate activation module"):
        randomise_(twice, read_randomness({"name": "learned-perturbation"}), images)
    assert not random_layers(net)
    assert not random_layers(twice)  # nothing was changed
    with pytest.raises(ValueError, match=r"randomness: p must be below 1, got 1\.0"):
        read_randomness({"name": "dropout", "p": 1.0})
    with pytest.raises(ValueError, match="randomness: name must be one of parametric-noise"):
        read_randomness({"name": "magic"})
    randomise_(net, read_randomness({"name": "dropout"}), images)
    with pytest.raises(ValueError, match="has random layers already"):
        randomise_(net, read_randomness({"name": "bayesian"}), images)


def test_a_network_keeps_hooks_keys_and_aliases(images: Tensor) -> None:
    convolution = nn.Conv2d(3, 3, 3, padding=1)
    network = nn.Sequential(convolution, nn.ReLU(), convolution)
    keys = list(network.state_dict())
    rse.inject_noise_(network, rse.NoiseConfig(0.1, 0.1))
    randomise_(network, read_randomness({"name": "parametric-noise"}), images)
    assert network[0] is network[2] is convolution
    assert [key for key in network.state_dict() if "alpha" not in key] == keys
    kinds = {type(layer).__name__ for layer in random_layers(network)}
    assert kinds == {"GaussianNoise", "ParametricConv2d"}
    numbers = [layer.layer for layer in random_layers(network)]
    assert len(set(numbers)) == len(numbers)
    with torch.no_grad():
        assert not torch.equal(network.eval()(images), network(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_networks_in_other_precisions_draw_too(kind: str, dtype: torch.dtype) -> None:
    network, images = rse.create_model("small-cnn", channels=1, width=0.25), torch.rand(4, 1, 8, 8)
    randomise_(network, read_randomness({"name": kind}), images)
    ensemble = rse.SelfEnsemble(network, draws=2).eval().to(dtype)
    answers = ensemble.predict_proba(images.to(dtype))
    assert answers.isfinite().all()
    with rse.noise_disabled(ensemble):
        assert ensemble.predict_proba(images.to(dtype)).isfinite().all()
