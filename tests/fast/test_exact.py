"""Float32 in float32, and the switches of the program as they were, whichever interface it used."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from subprocess import run
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.attacks import pgd
from selfensemble.evaluation import judge
from selfensemble.fast.exact import exact_float32

backends: Any = torch.backends
cuda: Any = torch.backends.cuda.matmul
cudnn: Any = torch.backends.cudnn
mkldnn: Any = torch.backends.mkldnn
Reading = dict[str, object]

# What the public interface reads, old and new.
READ: dict[str, Callable[[], object]] = {
    "matmul": torch.get_float32_matmul_precision,
    "cublas": lambda: cuda.allow_tf32,
    "cudnn": lambda: cudnn.allow_tf32,
    "onednn": lambda: mkldnn.allow_tf32,
    "all": lambda: backends.fp32_precision,
    "cuda.all": lambda: cudnn.fp32_precision,
    "cuda.matmul": lambda: cuda.fp32_precision,
    "cuda.conv": lambda: cudnn.conv.fp32_precision,
    "cuda.rnn": lambda: torch._C._get_fp32_precision_getter("cuda", "rnn"),
    "mkldnn.all": lambda: mkldnn.fp32_precision,
    "mkldnn.matmul": lambda: mkldnn.matmul.fp32_precision,
    "mkldnn.conv": lambda: mkldnn.conv.fp32_precision,
    "mkldnn.rnn": lambda: mkldnn.rnn.fp32_precision,
}
INHERITED = ("none", "ieee")


def now() -> Reading:
    """All that can be read, errors as errors."""
    found: Reading = {}
    for name, read in READ.items():
        try:
            found[name] = read()
        except RuntimeError as error:
            found[name] = f"raises: {str(error)[:60]}"
    return found


def as_torch_begins() -> None:
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = True
    for backend, parts in (("generic", "all"), ("cuda", "all matmul"), ("mkldnn", "all matmul conv rnn")):
        for part in parts.split():
            torch._C._set_fp32_precision_setter(backend, part, "none")


@pytest.fixture(autouse=True)
def _switches() -> Iterator[None]:
    as_torch_begins()
    yield
    as_torch_begins()


def setting(backend: object, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(backend, name, value)


def one_after_another(*steps: Callable[[], None]) -> Callable[[], None]:
    def program() -> None:
        for step in steps:
            step()

    return program


def matmul(value: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(value)


def whole(backend: str, value: str) -> Callable[[], None]:
    """torch 2.13 has no public switch for all of oneDNN: what is called so is that of all backends."""

    def program() -> None:
        torch._C._set_fp32_precision_setter(backend, "all", value)

    return program


PROGRAMS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "cublas, old": setting(cuda, "allow_tf32", True),
    "cublas, old, off": setting(cuda, "allow_tf32", False),
    "cudnn, old": setting(cudnn, "allow_tf32", True),
    "cudnn, old, off": setting(cudnn, "allow_tf32", False),
    "both, old": one_after_another(setting(cuda, "allow_tf32", True), setting(cudnn, "allow_tf32", True)),
    "high": matmul("high"),
    "medium": matmul("medium"),
    "highest": matmul("highest"),
    "medium, cudnn off": one_after_another(matmul("medium"), setting(cudnn, "allow_tf32", False)),
    "all": setting(backends, "fp32_precision", "tf32"),
    "all bf16": setting(backends, "fp32_precision", "bf16"),
    "all ieee": setting(backends, "fp32_precision", "ieee"),
    "cuda": setting(cudnn, "fp32_precision", "tf32"),
    "cuda ieee": setting(cudnn, "fp32_precision", "ieee"),
    "matmul": setting(cuda, "fp32_precision", "tf32"),
    "matmul ieee": setting(cuda, "fp32_precision", "ieee"),
    "conv": setting(cudnn.conv, "fp32_precision", "tf32"),
    "conv ieee": setting(cudnn.conv, "fp32_precision", "ieee"),
    "conv none": setting(cudnn.conv, "fp32_precision", "none"),
    "mkldnn": whole("mkldnn", "bf16"),
    "mkldnn matmul": setting(mkldnn.matmul, "fp32_precision", "bf16"),
    "mkldnn conv": setting(mkldnn.conv, "fp32_precision", "tf32"),
    "mkldnn rnn": setting(mkldnn.rnn, "fp32_precision", "bf16"),
    "old, then new": one_after_another(matmul("high"), setting(cuda, "fp32_precision", "ieee")),
    "new, then old": one_after_another(setting(cudnn.conv, "fp32_precision", "ieee"), matmul("medium")),
    "cudnn old, then conv": one_after_another(
        setting(cudnn, "allow_tf32", False), setting(cudnn.conv, "fp32_precision", "tf32")
    ),
    "inherited": one_after_another(
        setting(cudnn, "allow_tf32", False), setting(backends, "fp32_precision", "tf32")
    ),
    "told, and above it another": one_after_another(
        setting(backends, "fp32_precision", "tf32"), setting(cuda, "fp32_precision", "ieee"),
        whole("cuda", "ieee"), setting(mkldnn.conv, "fp32_precision", "ieee"),
    ),
}  # fmt: skip

# What a program may say afterwards: it shows which parts have a word of their own, and which are led.
LATER: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "all none": setting(backends, "fp32_precision", "none"),
    "all ieee": setting(backends, "fp32_precision", "ieee"),
    "all tf32": setting(backends, "fp32_precision", "tf32"),
    "cuda none": whole("cuda", "none"),
    "cuda tf32": whole("cuda", "tf32"),
    "mkldnn none": whole("mkldnn", "none"),
    "mkldnn bf16": whole("mkldnn", "bf16"),
    "all none, cuda none": one_after_another(
        setting(backends, "fp32_precision", "none"), whole("cuda", "none"), whole("mkldnn", "none")
    ),
    "matmul ieee": setting(cuda, "fp32_precision", "ieee"),
    "matmul tf32": setting(cuda, "fp32_precision", "tf32"),
    "both ieee": one_after_another(
        setting(cuda, "fp32_precision", "ieee"), setting(cudnn.conv, "fp32_precision", "ieee")
    ),
}


def assert_exact() -> None:
    """No word of TF32 or bfloat16 in either interface, and neither raises."""
    found = now()
    assert {name: found[name] for name in ("matmul", "cublas", "cudnn")} == {
        "matmul": "highest", "cublas": False, "cudnn": False
    }  # fmt: skip
    assert found["onednn"] in (None, False)
    assert {found[name] for name in found if "." in name or name == "all"} <= set(INHERITED)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("later", LATER)
def test_every_switch_reads_as_before(program: str, later: str) -> None:
    PROGRAMS[program]()
    LATER[later]()
    expected = now()
    as_torch_begins()
    PROGRAMS[program]()
    before = now()
    with exact_float32():
        assert_exact()
        with exact_float32():
            assert_exact()
        assert_exact()
    assert now() == before
    LATER[later]()
    assert now() == expected


FRESH = """
import os, sys, warnings
import torch
from selfensemble.fast.exact import _PARTS, _get, exact_float32
warnings.simplefilter("ignore")
torch.empty(0)
for number, program in enumerate(sys.argv[1:]):
    if os.fork() == 0:
        exec(program)
        before = {part: _get(part) for part in _PARTS}
        with exact_float32():
            assert {_get(part) for part in _PARTS} == {"ieee"}
        after = {part: _get(part) for part in _PARTS}
        changed = {part: (value, after[part]) for part, value in before.items() if after[part] != value}
        print(program, changed, flush=True)
        os._exit(bool(changed))
    assert os.wait()[1] == 0, program
"""


def test_what_nobody_set_still_gives_way() -> None:
    """Convolutions of cuDNN have TF32 until somebody speaks of them, or of all; in a process of its own."""
    everything = ["ieee", "tf32", "bf16"]
    programs = [f"torch.backends.fp32_precision = {value!r}" for value in everything]
    programs += [f"{each}; torch.backends.cudnn.rnn.fp32_precision = 'tf32'" for each in programs]
    programs += ["pass", "torch.set_float32_matmul_precision('high')"]
    run([sys.executable, "-c", FRESH, *programs], check=True, timeout=100)


def test_an_error_switches_back() -> None:
    PROGRAMS["medium"]()
    before = now()
    with pytest.raises(KeyError), exact_float32():
        raise KeyError
    assert now() == before


def test_the_last_of_many_threads_switches_back() -> None:
    PROGRAMS["medium, cudnn off"]()
    before = now()

    def work() -> None:
        for _ in range(50):
            with exact_float32(), exact_float32():
                assert_exact()

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work) for _ in range(8)]:
            done.result()
    assert now() == before


def test_contexts_that_overlap() -> None:
    PROGRAMS["all"]()
    before = now()
    first, second = exact_float32(), exact_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as two threads may overlap
    assert_exact()
    second.__exit__(None, None, None)
    assert now() == before


def test_torch_s_own_contexts_work_inside() -> None:
    """They read the old switches and set them; of a network that runs without cuDNN, say."""
    PROGRAMS["high"]()
    before = now()
    with exact_float32():
        with cudnn.flags(enabled=False, allow_tf32=False):
            assert not cudnn.enabled
        assert_exact()
    assert now() == before


class Tells(nn.Module):
    """What could be read when it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[Reading] = []
        self.convolution = nn.Conv2d(3, 2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        self.said.append(now())
        assert_exact()
        logits: Tensor = self.convolution(inputs).flatten(1)
        return logits


@pytest.mark.parametrize("program", ["both, old", "medium", "all", "old, then new"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_attacks_and_judge_decide_in_float32(wrapped: bool, program: str) -> None:
    told = Tells()
    model = rse.SelfEnsemble(told, rse.NoiseConfig(0, 0), bounds=(0, 1)) if wrapped else told
    PROGRAMS[program]()
    before = now()
    images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 0, 1])
    judge(model, images, pgd(model, images, labels, eps=0.1, steps=2), labels)
    assert len(told.said) > 3
    assert now() == before


def test_programs_differ_in_what_can_be_read() -> None:
    """The tests above would pass of a program that sets nothing."""
    readings = []
    for program in PROGRAMS.values():
        as_torch_begins()
        program()
        readings.append(now())
    assert len({str(reading) for reading in readings}) > 20
    assert any("raises" in str(value) for reading in readings for value in reading.values())
