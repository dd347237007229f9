"""Fresh noise starts from all of the system's entropy, not from 32 bits."""

import os

import numpy as np
import pytest
import torch
from scipy import stats

import selfensemble as rse
from selfensemble.noise.entropy import WideSeed, cpu_generator, entropy, stream_of
from selfensemble.noise.streams import fresh_seed, random_source, stream_seed


def seeded_by_32_bits(generator: torch.Generator) -> bool:
    """Whether the state is one that `manual_seed` makes: each word then follows from the one before."""
    words = generator.get_state().numpy()[24 : 24 + 8 * 624].view(np.uint64)
    before = words[:-1]
    after = (
        1812433253 * (before ^ (before >> np.uint64(30))) + np.arange(1, 624, dtype=np.uint64)
    ) & 0xFFFFFFFF
    return bool((after == words[1:]).all())


def test_the_test_sees_seeds_of_32_bits() -> None:
    assert seeded_by_32_bits(torch.Generator().manual_seed(2**40 + 5))


def test_fresh_noise_has_a_state_of_its_own() -> None:
    entropy.forget()
    generator = random_source(0, True, torch.device("cpu")).generator()
    assert not seeded_by_32_bits(generator)
    first = generator.get_state()
    entropy.forget()
    again = random_source(0, True, torch.device("cpu")).generator().get_state()
    assert int((first != again).sum()) > 2000  # of 2,496 random bytes


def test_what_a_state_of_its_own_draws_is_normal_and_uniform() -> None:
    """Kolmogorov-Smirnov, 200,000 numbers each, level 1e-4; the state is fixed."""
    words = np.random.SFC64(1).random_raw(312).view(np.uint32)
    for fill, law in (("normal_", "norm"), ("uniform_", "uniform")):
        numbers = getattr(torch.empty(200_000), fill)(generator=cpu_generator(words))
        assert stats.kstest(numbers.numpy(), law).pvalue > 1e-4
        assert abs(float(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1])) < 4 / 447


def test_seeds_of_unseeded_calls_are_wide_and_others_what_they_were() -> None:
    assert isinstance(fresh_seed(), WideSeed)
    with rse.noise_draw(3):
        repeats = fresh_seed()
    assert not isinstance(repeats, WideSeed)
    device = torch.device("cpu")
    with rse.noise_draw(7, 2):
        own = random_source(5, True, device).generator()
    assert own.initial_seed() == stream_seed(7, 2, 5)
    with rse.noise_draw(WideSeed(7), 2):
        wide = random_source(5, True, device).generator()
    assert not seeded_by_32_bits(wide)
    assert torch.equal(wide.get_state(), stream_of(WideSeed(7), 2, 5, device).get_state())


def test_every_bit_of_a_wide_seed_and_every_draw_and_layer_counts() -> None:
    device = torch.device("cpu")
    keys = [(1 << bit, 0, 0) for bit in range(62)] + [(0, index, 0) for index in range(1, 40)]
    keys += [(0, 0, layer) for layer in range(1, 40)] + [(0, 4096, 1), (0, 1, 4095)]
    streams = [torch.randn(4, generator=stream_of(WideSeed(s), i, layer, device)) for s, i, layer in keys]
    assert len({tuple(each.tolist()) for each in streams}) == len(keys)


def test_a_forked_child_draws_other_noise() -> None:
    layer, zeros = rse.GaussianNoise(1.0), torch.zeros(1, 4)
    layer(zeros)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, layer(zeros).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(read, 16), dtype=np.float32)
    assert not np.array_equal(theirs, layer(zeros).numpy()[0])


def test_another_form_of_torchs_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from selfensemble.noise import entropy as module

    monkeypatch.setattr(module, "_HEAD", 16)
    module._check_layout.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="another form"):
            cpu_generator(np.zeros(624, dtype=np.uint32))
    finally:
        module._check_layout.cache_clear()
