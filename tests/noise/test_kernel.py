"""Compiled noise is that of torch's operators to the last bit, and is done without where it cannot be had."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.noise import kernel
from selfensemble.noise.half_precision import Bits, fill_half_, fill_half_in_twos_


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing was looked for, and the cache folder is empty."""
    monkeypatch.setattr(kernel, "_found", [])
    monkeypatch.setenv("SELFENSEMBLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def compiled() -> None:
    reason = kernel.prepare()
    if "no C compiler" in reason:
        pytest.skip(reason)
    assert reason == ""


def without(call: Callable[[], Any]) -> Any:
    """What torch's operators give."""
    found, kernel._found[:] = list(kernel._found), [(None, "taken away")]
    try:
        return call()
    finally:
        kernel._found[:] = found


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other row": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "a slice of the batch": lambda x: torch.cat([x, x])[len(x) :],
}


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("antithetic", [False, True])
@given(
    shape=st.tuples(*(st.integers(1, 5) for _ in range(3))),
    images=st.integers(1, 3),
    count=st.integers(1, 5),
    index=st.integers(0, 3),
    step=st.integers(1, 2),
    overwrites=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_draws_are_those_of_torchs_operators(
    layout: str, antithetic: bool, shape: tuple[int, ...], images: int, count: int, index: int, step: int,
    overwrites: bool,
) -> None:  # fmt: skip
    numbers = torch.Generator().manual_seed(0)
    inputs = LAYOUTS[layout](torch.randn(count * images, *shape, generator=numbers).bfloat16())
    layer = rse.GaussianNoise(0.3, layer=2, sampling="shared").eval()
    layer.overwrites = overwrites

    def twice() -> list[Tensor]:
        options: dict[str, Any] = {"count": count, "step": step, "antithetic": antithetic, "portable": False}
        with torch.no_grad(), rse.noise_draw(7, index, **options):
            return [layer(inputs.clone()) for _ in range(2)]  # a layer that is called again draws on

    for ours, theirs in zip(twice(), without(twice), strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("images", [1, 2])
def test_large_layers_and_several_threads(images: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = torch.rand(images, 3, 301, 503).bfloat16()

        def drawn() -> Tensor:
            with torch.no_grad(), rse.noise_draw(1, portable=False):
                return rse.GaussianNoise(0.1, sampling="shared").eval()(inputs)  # type: ignore[no-any-return]

        assert same_bits(drawn(), without(drawn))
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", [fill_half_, fill_half_in_twos_])
@pytest.mark.parametrize("count", [1, 2, 7, 1000, 300_001])
def test_numbers_alone(fill: Callable[..., None], dtype: torch.dtype, count: int) -> None:
    def filled() -> Tensor:
        tensor, bits = torch.empty(count, dtype=dtype), Bits(np.random.SFC64(5))
        for _ in range(2):
            fill(tensor, 0.25, bits)
        return tensor

    assert same_bits(filled(), without(filled))


@pytest.mark.usefixtures("compiled")
def test_numbers_at_the_ends_are_rounded_as_torch_rounds() -> None:
    ends = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.38e38, -3.38e38, 0.0, -0.0, 1e-40])
    inputs = ends.bfloat16().repeat(50).view(1, -1)

    def drawn() -> Tensor:
        with torch.no_grad(), rse.noise_draw(1, portable=False):
            return rse.GaussianNoise(1e37, sampling="shared").eval()(inputs)  # type: ignore[no-any-return]

    ours, theirs = drawn(), without(drawn)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert ours.isinf().sum() > 100


@pytest.mark.usefixtures("compiled")
def test_fresh_noise_has_its_distribution() -> None:
    """Moments and tails of 3 million numbers, at five standard errors; opposite draws are opposite."""
    layer = rse.GaussianNoise(1.0, sampling="shared").eval()
    inputs = torch.zeros(6, 500_000, dtype=torch.bfloat16)
    with torch.no_grad(), rse.noise_draw(count=6):
        drawn = layer(inputs).double()
    assert drawn.mean().abs() < 5 / 3e6**0.5
    assert (drawn.var() - 1).abs() < 5 * (2 / 3e6) ** 0.5 + 2**-9  # and what bfloat16 rounds
    assert abs(float((drawn.abs() > 2).double().mean()) - 0.0455) < 0.002
    assert torch.corrcoef(drawn)[0, 1:].abs().max() < 5 / 5e5**0.5
    with torch.no_grad(), rse.noise_draw(count=6, antithetic=True):
        pairs = layer(inputs)
    assert torch.equal(pairs[0::2], -pairs[1::2])
    assert not torch.equal(pairs[0], pairs[2])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own decompositions
@pytest.mark.usefixtures("compiled")
def test_derivatives_pass_through() -> None:
    layer = rse.GaussianNoise(0.5, sampling="shared").eval()
    inputs = torch.rand(2, 3, 4, 4).bfloat16()
    leaf = inputs.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
    tangent = torch.func.jvp(layer, (inputs,), (torch.full_like(inputs, 2.0),))[1]
    assert torch.equal(tangent, torch.full_like(inputs, 2.0))
    slope = torch.func.grad(lambda x: 3 * layer(x).float().sum())(inputs)
    assert torch.equal(slope, torch.full_like(inputs, 3.0))
    with torch.device("meta"):
        assert layer(torch.empty(2, 3, dtype=torch.bfloat16)).shape == (2, 3)


@pytest.mark.usefixtures("compiled")
def test_a_batch_that_cannot_hold_its_draws_is_refused() -> None:
    layer = rse.GaussianNoise(0.5, sampling="shared").eval()
    with rse.noise_draw(1, count=2, portable=False), pytest.raises(ValueError, match="cannot hold 2 draws"):
        layer(torch.zeros(3, 4, dtype=torch.bfloat16))
    assert layer(torch.zeros(0, 4, dtype=torch.bfloat16)).shape == (0, 4)


def test_it_is_kept_for_later_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "no C compiler" in (reason := kernel.prepare()):
        pytest.skip(reason)
    (file,) = (tmp_path / "cache").glob("noise-*.so")
    assert file.stat().st_mode & 0o077 == 0
    made = file.stat().st_mtime_ns
    kernel._found.clear()
    assert kernel.prepare() == ""
    assert file.stat().st_mtime_ns == made
    other = tmp_path / "another" / file.name
    other.parent.mkdir()
    other.write_bytes(b"rubbish")
    monkeypatch.setenv("SELFENSEMBLE_CACHE", str(other.parent))
    kernel._found.clear()
    assert kernel.prepare() == ""  # made anew
    assert other.read_bytes() == file.read_bytes()


def test_what_others_could_have_written_is_not_loaded(tmp_path: Path) -> None:
    if "no C compiler" in (reason := kernel.prepare()):
        pytest.skip(reason)
    (file,) = (tmp_path / "cache").glob("noise-*.so")
    for writable in (file, file.parent):
        mode = writable.stat().st_mode
        writable.chmod(mode | 0o020)
        assert not kernel._is_our_own(file)
        writable.chmod(mode)
    assert kernel._is_our_own(file)


REASONS = {
    "it is switched off": ({"SELFENSEMBLE_KERNEL": "0"}, "SELFENSEMBLE_KERNEL is 0"),
    "there is no compiler": ({"PATH": "", "CC": ""}, "no C compiler"),
    "the compiler fails": ({"CC": "false"}, "false failed"),
}


@pytest.mark.parametrize("case", REASONS)
def test_without_it_the_same_numbers_are_drawn(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, reason = REASONS[case]
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 10, 3), nn.Flatten())
    network.append(nn.LazyLinear(10))
    images = torch.rand(3, 1, 8, 8)
    network(images)
    ensemble = rse.SelfEnsemble(network, example_inputs=images).eval()
    expected = rse.optimize(ensemble, images, "bf16").predict(images, seed=3, draws=7).probabilities
    kernel._found.clear()
    for name, value in changes.items():
        monkeypatch.setitem(os.environ, name, value)
    assert reason in kernel.prepare()
    found = rse.optimize(ensemble, images, "bf16").predict(images, seed=3, draws=7).probabilities
    assert kernel.kernel() is None
    assert torch.equal(found, expected)


def test_somebody_without_a_home_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kernel, "cache_dir", homeless)
    reason = kernel.prepare()
    assert "home directory" in reason or "no C compiler" in reason
    assert kernel.kernel() is None


def test_where_nothing_can_be_kept_it_is_made_for_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("SELFENSEMBLE_CACHE", str(tmp_path / "a file" / "cache"))
    reason = kernel.prepare()
    assert reason == "" or "no C compiler" in reason
