"""Statistics, independence and seed semantics of the noise.

Statistical tests use 4 standard errors (two-sided error rate 6e-5 each) or a stated level, at fixed seeds
where the noise is seeded; unseeded ones can fail by chance at that rate.
"""

import itertools
import math
import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest, norm
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.noise.half_precision import Bits
from selfensemble.noise.layer import Std
from selfensemble.noise.resize_pad import ResizePad, ResizePadConfig
from selfensemble.noise.streams import Generators, Sampling, seed_streams_, stream_seed

N = 1_000_000


def sample(layer: nn.Module, shape: tuple[int, ...] = (100, 10, 1000)) -> Tensor:
    noise: Tensor = layer(torch.zeros(shape))
    return noise


def correlation(left: Tensor, right: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1])


@pytest.mark.parametrize("std", [0.01, 0.1, 0.2, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mean_and_std_within_four_standard_errors(std: float, dtype: torch.dtype) -> None:
    with rse.noise_draw(seed=7):
        noise = rse.GaussianNoise(std)(torch.zeros(1000, 1000, dtype=dtype)).double()
    assert abs(noise.mean()) < 4 * std / math.sqrt(N)
    assert abs(noise.std() - std) < 4 * std / math.sqrt(2 * N)


@pytest.mark.parametrize("sampling", ["per_image", "shared"])
def test_shape_of_the_distribution(sampling: Sampling) -> None:
    """Kolmogorov-Smirnov against the normal distribution, level 1e-4."""
    with rse.noise_draw(seed=3, sampling=sampling):
        noise = rse.GaussianNoise(0.3)(torch.zeros(1, 3, 200, 200))
    assert kstest(noise.flatten().numpy() / 0.3, "norm").pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_normal_noise_rounded(dtype: torch.dtype) -> None:
    """Chi-squared test at level 1e-4 in cells, rounded as the normal distribution would be."""
    with rse.noise_draw(seed=5):
        noise = rse.GaussianNoise(1.0)(torch.zeros(16, 3, 200, 200, dtype=dtype)).float().flatten().numpy()
    edges = np.linspace(-3.03, 3.03, 40)
    counts, _ = np.histogram(noise, np.concatenate([[-np.inf], edges, [np.inf]]))
    rounded = torch.tensor(norm.ppf((np.arange(10**6) + 0.5) / 10**6)).to(dtype).float().numpy()
    expected, _ = np.histogram(rounded, np.concatenate([[-np.inf], edges, [np.inf]]))
    assert chisquare(counts, expected * (counts.sum() / expected.sum())).pvalue > 1e-4
    fourth = float(np.mean(noise.astype(np.float64) ** 4))
    assert abs(fourth - 3) < 4 * math.sqrt(96 / len(noise))


def test_half_precision_calls_layers_and_neighbours_are_independent() -> None:
    """Of every pair |r| < 4 / sqrt(n), at every distance that a word of four numbers could correlate."""
    inputs = torch.zeros(N, dtype=torch.bfloat16)
    with rse.noise_draw(seed=9):
        first, other = rse.GaussianNoise(1.0, layer=0), rse.GaussianNoise(1.0, layer=1)
        noises = [first(inputs).float(), first(inputs).float(), other(inputs).float()]
    with rse.noise_draw(seed=9, index=1):
        noises.append(rse.GaussianNoise(1.0, layer=0)(inputs).float())
    for left, right in itertools.combinations(noises, 2):
        assert abs(correlation(left, right)) < 4 / math.sqrt(N)
    for distance in (1, 2, 3, 4, 8):
        one, two = noises[0][distance:], noises[0][:-distance]
        assert abs(correlation(one, two)) < 4 / math.sqrt(N)
        assert abs(correlation(one.square(), two.square())) < 4 / math.sqrt(N)


@pytest.mark.parametrize("size", [1, 3, 4, 2**18, 2**18 + 5])
def test_half_precision_repeats_by_seed_at_every_size(size: int) -> None:
    layer, inputs = rse.GaussianNoise(0.5), torch.zeros(2, size, dtype=torch.bfloat16)
    with rse.noise_draw(seed=1):
        once = layer(inputs)
    with rse.noise_draw(seed=1):
        again = layer(inputs)
    assert torch.equal(once, again)
    assert not torch.equal(once[0], once[1])
    assert not torch.equal(layer(inputs), layer(inputs))


def test_every_layer_of_a_network_has_its_level() -> None:
    model = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(5)))
    rse.inject_noise_(model, rse.NoiseConfig(0.2, 0.1))
    layers = list(rse.noise_layers(model).values())
    assert [layer.std for layer in layers] == [0.2, 0.1, 0.1, 0.1, 0.1]
    with rse.noise_draw(seed=11):
        for layer in layers:
            noise, std = sample(layer), layer.std
            assert isinstance(std, float)
            assert abs(noise.mean()) < 4 * std / math.sqrt(N)
            assert abs(noise.std() - std) < 4 * std / math.sqrt(2 * N)


@pytest.mark.parametrize("sampling", ["per_image", "shared"])
def test_every_channel_has_its_level(sampling: Sampling) -> None:
    levels = (0.0, 0.05, 0.3, 1.5)
    with rse.noise_draw(seed=13, sampling=sampling):
        noise = rse.GaussianNoise(levels)(torch.zeros(1, 4, 1000, 1000))[0]
    assert (noise[0] == 0).all()
    for channel, std in zip(noise[1:], levels[1:], strict=True):
        assert abs(channel.mean()) < 4 * std / math.sqrt(N)
        assert abs(channel.std() - std) < 4 * std / math.sqrt(2 * N)
    assert abs(correlation(noise[2], noise[3])) < 4 / math.sqrt(N)


def test_equal_levels_are_the_noise_of_one_level() -> None:
    inputs = torch.rand(5, 3, 7, 7)
    samplings: tuple[Sampling, ...] = ("per_image", "shared")
    for sampling in samplings:
        found = []
        for std in (0.3, (0.3, 0.3, 0.3)):
            with rse.noise_draw(seed=2, sampling=sampling):
                found.append(rse.GaussianNoise(std)(inputs))
        torch.testing.assert_close(*found)


def test_levels_by_channel_that_do_not_fit() -> None:
    layer = rse.GaussianNoise([0.1, 0.2])
    assert (layer.std, layer.varies, layer.state_dict()) == ((0.1, 0.2), True, {})
    for shape in ((2, 3, 4, 4), (2,)):
        with pytest.raises(ValueError, match="levels for 2 channels"):
            layer(torch.zeros(shape))
    for wrong in ((), (0.1, -0.1), (0.1, math.nan), ("0.1",)):
        with pytest.raises(ValueError, match="std must"):
            rse.GaussianNoise(wrong)  # type: ignore[arg-type]
    layer.std = (0.0, 0.0)
    assert not layer.varies
    inputs = torch.rand(1, 2)
    assert layer(inputs) is inputs


def test_calls_layers_and_images_are_independent() -> None:
    first, second = rse.GaussianNoise(0.1, layer=0), rse.GaussianNoise(0.1, layer=1)
    bound = 4 / math.sqrt(N)
    assert abs(correlation(sample(first), sample(first))) < bound
    assert abs(correlation(sample(first), sample(second))) < bound
    with rse.noise_draw(seed=5):
        one, again, other = sample(first), sample(first), sample(second)
    with rse.noise_draw(seed=5, index=1):
        next_draw = sample(first)
    with rse.noise_draw(seed=6):
        next_seed = sample(first)
    for noise in (again, other, next_draw, next_seed):
        assert abs(correlation(one, noise)) < bound
    images = sample(first.eval(), (2, N)).unbind()
    assert abs(correlation(*images)) < bound


@pytest.mark.parametrize("std", [0.1, (0.1, 0.1, 0.1)])
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_in_training_half_a_batch_has_the_opposite_noise_where_that_is_asked_for(
    std: Std, batch: int
) -> None:
    layer = rse.GaussianNoise(std)
    inputs = torch.zeros(batch, 3, 200, 200, requires_grad=True)
    with rse.noise_draw(opposite=True):
        noisy = layer(inputs)
    first = -(-batch // 2)
    assert torch.equal(noisy[first:], -noisy[: batch - first])
    numbers = noisy[:first].detach().flatten()
    assert abs(numbers.mean()) < 4 * 0.1 / math.sqrt(len(numbers))
    assert abs(numbers.std() - 0.1) < 4 * 0.1 / math.sqrt(2 * len(numbers))
    if first > 1:
        assert abs(correlation(*numbers.view(first, -1)[:2])) < 4 / math.sqrt(numbers.numel() / first)
    (gradient,) = torch.autograd.grad(noisy.sum(), inputs)
    assert torch.equal(gradient, torch.ones_like(inputs))
    layer.eval()
    with rse.noise_draw(opposite=True):
        answers = layer(inputs).detach().flatten(1)
    for each, other in itertools.pairwise(answers):
        assert abs(correlation(each, other)) < 4 / math.sqrt(each.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [0.1, (0.1, 0.1, 0.1)])
@pytest.mark.parametrize("seed", [None, 5])
def test_an_image_and_its_copies_in_a_batch_have_independent_noise(
    dtype: torch.dtype, std: Std, seed: int | None
) -> None:
    """Correlation of the noise of each two of eight copies: 28 of them, 4.5 standard errors, 2e-4 in all."""
    layer = rse.GaussianNoise(std)
    with rse.noise_draw(seed):
        noisy = layer(torch.zeros(8, 3, 101, 101, dtype=dtype)).float().flatten(1)
    for one, other in itertools.combinations(noisy, 2):
        assert abs(correlation(one, other)) < 4.5 / math.sqrt(one.numel())
        assert abs(correlation(one.abs(), other.abs())) < 4.5 / math.sqrt(one.numel())


def test_shared_noise_is_one_tensor_for_the_batch_in_eval_mode_only() -> None:
    layer = rse.GaussianNoise(0.1, sampling="shared")
    training = sample(layer.train(), (4, 100))
    assert not torch.equal(training[0], training[1])
    shared = sample(layer.eval(), (4, 100))
    assert torch.equal(shared, shared[:1].expand(4, 100))
    assert not torch.equal(shared, sample(layer, (4, 100)))


def test_policies_give_the_same_distribution_of_predictions(tiny: nn.Module, images: Tensor) -> None:
    """Two-sample Kolmogorov-Smirnov of one image's probability, 2,000 draws each, level 1e-4."""
    from scipy.stats import ks_2samp

    ensemble = rse.SelfEnsemble(tiny, rse.NoiseConfig(0.5, 0.5)).eval()
    batch = images[:1].expand(50, -1, -1, -1)
    # Per image: the 50 copies are 50 independent draws. Shared: each copy is of a draw of its own.
    per_image = torch.cat(
        [ensemble.predict_proba(batch, draws=1, seed=i, sampling="per_image") for i in range(40)]
    )
    draws = []
    for seed in range(40):  # of 50 draws each, which are independent
        with torch.no_grad(), rse.noise_draw(seed, sampling="shared", count=50):
            draws.append(ensemble.draw_logits(batch).softmax(dim=1))
    shared = torch.cat(draws)
    for k in range(5):
        assert ks_2samp(per_image[:, k], shared[:, k]).pvalue > 1e-4
    assert per_image.std(dim=0).min() > 1e-3


def test_the_callers_random_state_is_neither_read_nor_changed(tiny: nn.Module, images: Tensor) -> None:
    rse.inject_noise_(tiny)
    before = torch.get_rng_state()
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        outputs.append(tiny(images))
    assert not torch.equal(*outputs)
    torch.set_rng_state(before)
    tiny(images)
    with rse.noise_draw(seed=1, sampling="shared"):
        tiny(images)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seeded_draw_repeats_and_calls_within_it_differ() -> None:
    layer = rse.GaussianNoise(0.1)
    with rse.noise_draw(seed=4, index=2):
        first, second = sample(layer), sample(layer)
    with rse.noise_draw(seed=4, index=2):
        assert torch.equal(sample(layer), first)
        assert torch.equal(sample(layer), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_seeded_shared_draw_does_not_depend_on_the_batch(size: int) -> None:
    layer = rse.GaussianNoise(0.1)
    images = torch.rand(6, 4, 5, 5)

    def noise(inputs: Tensor) -> Tensor:
        with rse.noise_draw(seed=9, sampling="shared"):
            noisy: Tensor = layer(inputs)
        return noisy

    whole = noise(images)
    assert torch.equal(noise(images[:size]), whole[:size])
    assert torch.equal(noise(images.flip(0)[:size]), whole.flip(0)[:size])
    strided = noise(images.to(memory_format=torch.channels_last))
    assert torch.equal(strided, whole)
    assert strided.is_contiguous(memory_format=torch.channels_last)
    half = noise(torch.zeros(1, 4, 5, 5, dtype=torch.bfloat16))
    assert torch.equal(half, noise(torch.zeros(1, 4, 5, 5)).bfloat16())


def test_contexts_nest_and_end() -> None:
    layer = rse.GaussianNoise(0.1)
    with rse.noise_draw(seed=1):
        outer = sample(layer)
        with rse.noise_draw(seed=2):
            sample(layer)
    with rse.noise_draw(seed=1):
        assert torch.equal(sample(layer), outer)
    assert not torch.equal(sample(layer), sample(layer))


def test_threads_have_noise_of_their_own() -> None:
    layer, noises = rse.GaussianNoise(0.1), list[Tensor]()
    threads = [threading.Thread(target=lambda: noises.append(sample(layer))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(*noises)


def test_a_forked_child_does_not_repeat_its_parents_noise() -> None:
    layer = rse.GaussianNoise(0.1)
    sample(layer, (1, 4))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, sample(layer, (1, 4)).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = torch.frombuffer(bytearray(os.read(read, 16)), dtype=torch.float32)
    os.close(read)
    os.close(write)
    assert not torch.equal(theirs, sample(layer, (1, 4))[0])


@given(
    st.integers(),
    st.tuples(st.integers(0, 10**6), st.integers(0, 4095)),
    st.tuples(st.integers(0, 10**6), st.integers(0, 4095)),
)
def test_streams_of_a_seed_never_coincide(seed: int, left: tuple[int, int], right: tuple[int, int]) -> None:
    """In the low 32 bits, which are all that torch's CPU generator takes."""
    seeds = [stream_seed(seed, *key) % 2**32 for key in (left, right)]
    assert (seeds[0] == seeds[1]) == (left == right)


@pytest.mark.parametrize("std", [-0.1, math.nan, math.inf, "0.1", None, True])
def test_bad_levels_are_refused(std: float) -> None:
    with pytest.raises(ValueError, match="init_std"):
        rse.NoiseConfig(init_std=std)
    with pytest.raises(ValueError, match="inner_std"):
        rse.NoiseConfig(inner_std=std)
    with pytest.raises(ValueError, match="std"):
        rse.GaussianNoise(std)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="per_image"):
        rse.GaussianNoise(0.1, sampling="each")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="index"), rse.noise_draw(seed=0, index=-1):
        pass
    with pytest.raises(TypeError, match="255"):
        rse.GaussianNoise(0.1)(torch.zeros(2, 3, dtype=torch.uint8))


def test_no_level_and_no_noise_are_the_identity() -> None:
    inputs = torch.rand(2, 3)
    assert rse.GaussianNoise(0.0)(inputs) is inputs
    layer = rse.GaussianNoise(0.1)
    with rse.noise_disabled(layer):
        assert layer(inputs) is inputs
    assert not torch.equal(layer(inputs), inputs)
    assert list(layer.state_dict()) == []


def test_numpy_numbers_are_numbers() -> None:
    assert rse.NoiseConfig(np.float32(0.5)).init_std == 0.5  # type: ignore[arg-type]
    with rse.noise_draw(seed=np.int64(3)):  # type: ignore[arg-type]
        noise = sample(rse.GaussianNoise(0.1), (1, 8))
    with rse.noise_draw(seed=3):
        assert torch.equal(sample(rse.GaussianNoise(0.1), (1, 8)), noise)
    with pytest.raises(TypeError), rse.noise_draw(seed=1.5):  # type: ignore[arg-type]
        pass


def test_meta_tensors_pass() -> None:
    assert rse.GaussianNoise(0.1)(torch.zeros(2, 3, device="meta")).shape == (2, 3)


def test_gradient_passes_unchanged() -> None:
    inputs = torch.rand(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(rse.GaussianNoise(0.5)(inputs).sum(), inputs)
    assert torch.equal(gradient, torch.ones(2, 3))


@pytest.mark.parametrize("sampling", ["per_image", "shared"])
def test_strided_inputs(sampling: Sampling) -> None:
    """Expanded and sliced tensors: each element gets noise of its own (or its channel's)."""
    layer = rse.GaussianNoise(1.0, sampling=sampling).eval()
    expanded = layer(torch.zeros(1, 1, 1, 1).expand(2, 3, 4, 4))
    assert expanded[0].unique().numel() == 48
    sliced = layer(torch.zeros(4, 6, 8)[::2, 1:5, ::3])
    assert sliced.shape == (2, 4, 3)
    assert sliced[0].unique().numel() == 12


@pytest.mark.parametrize("sampling", ["per_image", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("std", [0.1, (0.1, 0.2, 0.3)])
def test_antithetic_draws_are_opposite_in_pairs(sampling: Sampling, dtype: torch.dtype, std: Std) -> None:
    layers = [rse.GaussianNoise(std, layer=number).eval() for number in range(2)]
    zeros = torch.zeros(2, 3, 60, 60, dtype=dtype)
    draws = []
    for index in range(4):
        with rse.noise_draw(3, index, sampling, antithetic=True):
            draws.append([layer(zeros) for layer in (*layers, layers[0])])
    for first, second in (draws[:2], draws[2:]):
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, -other)
    with rse.noise_draw(3, 2, sampling):
        assert torch.equal(layers[0](zeros), draws[2][0])  # the first of a pair is the draw that it was
    bound = 4 / math.sqrt(zeros[0].numel())
    for one, other in ((draws[0][0], draws[2][0]), (draws[0][0], draws[0][1]), (draws[0][0], draws[0][2])):
        assert abs(correlation(one[0].float().flatten(), other[0].float().flatten())) < bound
    if sampling == "shared":
        # Several draws in one batch, from an odd one on and with steps, are those of their own.
        for index, count, step in ((0, 4, 1), (1, 3, 1), (0, 2, 3)):
            with rse.noise_draw(3, index, sampling, count=count, step=step, antithetic=True):
                batch = layers[0](zeros[:1].expand(count, -1, -1, -1))
            for place in range(count):
                assert torch.equal(batch[place], draws[index + place * step][0][0])
    else:
        with (
            rse.noise_draw(3, 0, sampling, count=2, antithetic=True),
            pytest.raises(ValueError, match="one draw"),
        ):
            layers[0](zeros)


def test_antithetic_draws_need_a_seed_and_leave_other_randomness_alone() -> None:
    with pytest.raises(ValueError, match="seed"), rse.noise_draw(antithetic=True):
        pass
    pad = ResizePad(ResizePadConfig(smallest=8, largest=16)).eval()
    images = torch.rand(4, 1, 12, 12)
    found = []
    for index in range(2):
        with rse.noise_draw(1, index, "per_image", antithetic=True):
            found.append(pad(images))
    assert not torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_whole_pairs_need_no_seed(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Noise without a seed: seven figures within five standard errors, 6e-7 each."""
    layer = rse.GaussianNoise(0.5).eval()
    zeros = torch.zeros(8, 3, 40, 40, dtype=dtype).contiguous(
        memory_format=memory_format
    )  # four draws, two images
    calls = []
    for _ in range(2):
        with rse.noise_draw(None, 0, "shared", count=4, antithetic=True):
            calls.append(layer(zeros).unflatten(0, (4, 2)))
    for draws in calls:
        assert torch.equal(draws[:, 0], draws[:, 1])
        assert torch.equal(draws[::2], -draws[1::2])
    separate = [draws[number, 0].float().flatten() for draws in calls for number in (0, 2)]
    for one, other in itertools.combinations(separate, 2):
        assert abs(correlation(one, other)) < 5 / math.sqrt(one.numel())
    numbers = torch.cat(separate)
    assert abs(numbers.std().item() / 0.5 - 1) < 5 / math.sqrt(2 * len(numbers))
    with pytest.raises(ValueError, match="whole pairs"), rse.noise_draw(index=1, count=2, antithetic=True):
        pass


def test_fresh_half_noise_never_repeats() -> None:
    """What is kept of random bits between the calls of small layers is used once."""
    bits = Bits(np.random.SFC64(1), kept=64)
    found = torch.cat([bits.take(count).clone() for count in (40, 20, 30, 64, 100, 1)])
    assert len(found) == 255
    neighbours = found.long()[:-1] * 2**16 + found.long()[1:]
    assert len(neighbours.unique()) == 254  # of 2^32 values: two alike by chance are one in 1e5
    assert found.min() >= 0
    assert found.max() < 2**16


def test_antithetic_means_vary_less() -> None:
    """Of a network that is linear in its noise but for the softmax."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0.1, 0.0))
    images = torch.rand(8, 1, 8, 8)
    spread = []
    for antithetic in (False, True):
        means = [ensemble.predict_proba(images, draws=2, antithetic=antithetic) for _ in range(100)]
        spread.append(torch.stack(means).var(dim=0).mean())
    assert spread[1] < 0.1 * spread[0]
    both = [
        ensemble.predict_proba(images, draws=4, seed=5, antithetic=True, max_batch=each) for each in (2, 8)
    ]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_shared_half_noise_that_need_not_be_portable(
    seed: int | None, memory_format: torch.memory_format
) -> None:
    layer = rse.GaussianNoise(0.5, sampling="shared").eval()
    zeros = torch.zeros(6, 4, 200, 250, dtype=torch.bfloat16).contiguous(memory_format=memory_format)
    found = []
    for _ in range(2):
        with rse.noise_draw(seed, 3, count=2, portable=False):
            found.append(layer(zeros))
    assert torch.equal(*found) == (seed is not None)
    assert found[0].stride() == zeros.stride()
    first, second = found[0][:3], found[0][3:]
    for draw in (first, second):
        assert torch.equal(draw[0], draw[2])  # shared within a draw
        numbers = draw[0].float().flatten()
        assert abs(numbers.mean()) < 4 * 0.5 / math.sqrt(len(numbers))
        assert abs(numbers.std() - 0.5) < 4 * 0.5 / math.sqrt(2 * len(numbers))
    assert abs(correlation(first[0].float().flatten(), second[0].float().flatten())) < 4 / math.sqrt(200_000)
    with rse.noise_draw(5, 3, portable=False):
        single = rse.GaussianNoise(0.5).eval()(zeros.float())
    with rse.noise_draw(5, 3):
        assert torch.equal(single, rse.GaussianNoise(0.5).eval()(zeros.float()))  # float32 stays as it is


def test_generators_that_are_kept_can_be_put_to_any_draw() -> None:
    """As a graph replays them: those of one draw, seeded anew, give the noise of another."""
    layers = nn.Sequential(
        rse.GaussianNoise(0.5, layer=3), nn.Flatten(), rse.GaussianNoise([0.1] * 60, layer=8)
    )
    inputs = torch.zeros(6, 3, 5, 4)
    kept: Generators = {}
    with rse.noise_draw(7, 2, generators=kept):
        layers(inputs)
    assert {layer for _, layer, _ in kept} == {3, 8}
    for index in (9, 2):
        seed_streams_(kept, 7, index)
        with rse.noise_draw(7, 2, generators=kept):
            found = layers(inputs)
        with rse.noise_draw(7, index):
            torch.testing.assert_close(layers(inputs), found, rtol=0, atol=0)
