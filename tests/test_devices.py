"""Any device: one without float64, and a program whose default is not the CPU."""

import ast
import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._device import _device_constructors

import selfensemble as rse
from selfensemble.certainty.bounds import mean_lower, narrower
from selfensemble.certainty.decision import Gamblers
from selfensemble.certainty.statistics import Means, Votes
from selfensemble.evaluation.doctor import examination
from selfensemble.evaluation.protocol import Protocol
from selfensemble.evaluation.runner import Evaluation
from selfensemble.experiments.curvature import log_softmax_draws
from selfensemble.experiments.draws import right_groups
from selfensemble.serving.batching import Batcher
from selfensemble.training import trainer

from .emulated_device import DEVICE, OnDevice, emulated_device, there_too
from .public_calls import CALLS, PROTOCOL, TRAINING, Case, case, plain, trained, usual

ROOT = Path(__file__).parents[1]
# Examinations of whether the network computes in bfloat16 need a device that torch knows.
DEFAULT = CALLS | {
    "optimize, bf16": lambda c: rse.optimize(c.ensemble, c.inputs, "bf16").predict(c.inputs, seed=1),
    "optimize, measured": lambda c: rse.optimize(c.ensemble, c.inputs).predict(c.inputs).label.shape,
    "load": lambda c: list(rse.load("digits-rse").state_dict().values()),
    "save": lambda c: _saved(c),
    "export": lambda c: rse.export_onnx(c.ensemble, c.folder / "it.onnx", c.inputs).is_file(),
    "data": lambda c: [rse.load_data("digits", "train").sample(50, 3).labels, c.data.inputs(slice(3))],
}


def _saved(c: Case) -> list[Tensor]:
    with torch.device("cpu"):
        network = rse.create_model("small-cnn", channels=1)
    rse.save(c.ensemble, c.folder / "it")
    return list(rse.load(c.folder / "it", network).state_dict().values())


@functools.cache
def _usual_of_others(name: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return plain(DEFAULT[name](case(Path(folder))))


@pytest.fixture
def _elsewhere() -> Iterator[None]:
    """A program that has another default: what follows it cannot be computed with."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("fewer_checks")
@pytest.mark.parametrize("name", DEFAULT)
def test_the_default_device_is_nobody_s_business(name: str, tmp_path: Path) -> None:
    there = case(tmp_path / "there")
    expected = usual(name) if name in CALLS else _usual_of_others(name)
    torch.set_default_device("meta")
    try:
        found = DEFAULT[name](there)
    finally:
        torch.set_default_device(None)
    assert plain(found) == expected


@pytest.fixture
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# In these the test itself makes tensors of the default dtype.
OF_THE_PROGRAM = {"save", "of a library"}


@pytest.mark.usefixtures("fewer_checks")
@pytest.mark.parametrize("name", [name for name in DEFAULT if name not in OF_THE_PROGRAM])
def test_nor_is_the_default_dtype(name: str, tmp_path: Path) -> None:
    there = case(tmp_path / "there")
    expected = usual(name) if name in CALLS else _usual_of_others(name)
    torch.set_default_dtype(torch.float64)
    try:
        found = DEFAULT[name](there)
    finally:
        torch.set_default_dtype(torch.float32)
    assert plain(found) == expected


@pytest.mark.usefixtures("_double")
def test_saved_networks_have_the_dtype_they_were_made_in(tmp_path: Path) -> None:
    ensemble = rse.load("digits-rse")
    assert {parameter.dtype for parameter in ensemble.parameters()} == {torch.float32}
    inputs = rse.load_data("digits", "test").inputs(slice(4))
    assert inputs.dtype == torch.float32
    assert rse.export_onnx(ensemble, tmp_path / "it.onnx", inputs).is_file()
    wide = rse.SelfEnsemble(rse.create_model("small-cnn", channels=1).eval())
    assert wide.input_dtype == torch.float64
    with pytest.raises(ValueError, match="float64, which bfloat16"):
        rse.optimize(wide, inputs, "bf16")
    assert rse.optimize(wide, inputs).precision == "float32"


@pytest.mark.parametrize("name", TRAINING)
def test_training_whatever_the_default_device(name: str, tmp_path: Path) -> None:
    expected = usual(name)
    torch.set_default_device("meta")
    try:
        found = trained(name, tmp_path / "there")
    finally:
        torch.set_default_device(None)
    assert plain(found) == expected


@pytest.mark.usefixtures("_elsewhere")
def test_new_networks_lie_where_the_program_says(tmp_path: Path) -> None:
    network = rse.create_model("small-cnn", channels=1)
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    rse.save(rse.load("digits-rse"), tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        rse.load(tmp_path, network)


@pytest.mark.parametrize("folder", ["src", "benchmarks"])
def test_whoever_makes_a_tensor_says_where(folder: str) -> None:
    factories = {function.__name__ for function in _device_constructors()} | {"Generator"}
    silent, named = [], 0
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            function = node.func if isinstance(node, ast.Call) else None
            if not (isinstance(function, ast.Attribute) and function.attr in factories):
                continue
            if not (isinstance(function.value, ast.Name) and function.value.id == "torch"):
                continue
            assert isinstance(node, ast.Call)
            says = any(each.arg == "device" for each in node.keywords)
            says |= function.attr == "Generator" and len(node.args) == 1
            named += says
            if not says:
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert silent == []
    assert named > 8


@pytest.fixture
def expected(name: str) -> Any:
    """What the call gives on the CPU, found before there is the device, which slows all operators down."""
    return usual(name)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(Batcher, "_run", there_too(Batcher._run))
    with emulated_device(monkeypatch) as device:
        yield device


def test_the_emulated_device_is_strict(there: torch.device) -> None:
    tensor = torch.rand(3).to(there)
    assert isinstance(tensor, OnDevice)
    assert tensor.device == there
    assert torch.zeros(2, device=there).sum().device.type == there.type
    refused: list[Callable[[], object]] = [
        lambda: tensor.double(),
        lambda: tensor.to("cpu", torch.float64),
        lambda: torch.zeros(3, dtype=torch.float64).copy_(tensor),
        lambda: torch.rand(3, dtype=torch.float64).to(there),
        lambda: torch.zeros(1, dtype=torch.float64, device=there),
    ]
    for wrong in refused:
        with pytest.raises(TypeError, match=r"has no torch\.float64"):
            wrong()
    mixing: list[Callable[[], object]] = [lambda: tensor + torch.rand(3), lambda: torch.rand(3)[tensor > 2]]
    for mixed in mixing:
        with pytest.raises(RuntimeError, match="on one device"):
            mixed()
    assert torch.equal((2 * tensor).cpu(), 2 * tensor.cpu())
    assert tensor.cpu().double().dtype == torch.float64


@pytest.mark.usefixtures("fewer_checks")
@pytest.mark.parametrize("images", ["on the CPU", "with the network"])
@pytest.mark.parametrize("name", CALLS)
def test_a_device_without_float64(
    name: str, images: str, expected: Any, there: torch.device, tmp_path: Path
) -> None:
    moved = case(tmp_path)
    moved.ensemble.to(there)
    if images == "with the network":
        moved.inputs, moved.many = moved.inputs.to(there), moved.many.to(there)
    assert plain(CALLS[name](moved)) == expected


class There(Accelerator):  # type: ignore[misc]
    """Accelerate on the emulated device."""

    @property
    def device(self) -> torch.device:
        return DEVICE


@pytest.mark.parametrize("name", TRAINING)
def test_training_without_float64(
    name: str, expected: Any, there: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "accelerator_of", lambda precision: There(cpu=True))
    found = trained(name, tmp_path / "there")
    assert {tensor.device for tensor in found.weights.values()} >= {there}
    assert plain(found) == expected


def test_an_evaluation_with_checks_without_float64(
    there: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("logits", "where noise enters", "gradients")
    monkeypatch.setattr(examination, "CHECKS", {name: examination.CHECKS[name] for name in names})
    monkeypatch.setattr(examination, "doctor", partial(examination.doctor, steps=2, images=5))
    judge = {"seeds": 1, "queries": 2}
    protocol = Protocol.model_validate(PROTOCOL | {"images": 8, "checks": True, "judge": judge})
    found = []
    for place in ("here", "there"):
        c = case(tmp_path / place)
        ensemble = c.ensemble.to(there) if place == "there" else c.ensemble
        found.append(Evaluation(ensemble, c.data, protocol, tmp_path / place).run())
    assert [check.passed for check in found[1].checks or ()] == [True] * len(names)
    assert plain(found[0].checks) == plain(found[1].checks)
    assert plain(found[0].worst_case) == plain(found[1].worst_case)


def test_statistics_take_tensors_of_any_device(there: torch.device) -> None:
    """Those below the public functions, which tests and experiments call."""
    samples = torch.rand(20, 3, 4, generator=torch.Generator("cpu").manual_seed(0)).softmax(dim=2)
    moved, coins = samples.to(there), [torch.Generator("cpu").manual_seed(1) for _ in range(2)]
    for bound in ("betting", "bernstein"):
        assert torch.equal(mean_lower(moved, 0.01, bound), mean_lower(samples, 0.01, bound))
    ours, theirs = (
        mean_lower(each, 0.01, "binomial", generator=own)
        for each, own in zip((moved, samples), coins, strict=True)
    )
    assert torch.equal(ours, theirs)
    mean, variance = samples.mean(dim=0), samples.var(dim=0)
    ours, theirs = (
        narrower(mean.to(there), variance.to(there), 0.01, 500),
        narrower(mean, variance, 0.01, 500),
    )
    assert torch.equal(ours, theirs)
    bounds = []
    for each in (samples, moved):
        seen: list[Any] = [
            Votes(each, "runner_up", 0.01, 20), Means(each, "runner_up", 0.01, 20, None, seed=0)
        ]  # fmt: skip
        gamblers = Gamblers(each.mean(dim=0).argmax(dim=1), 4, 0.01)
        for measure in seen:
            measure.add(each)
            bounds.append([side.tolist() for side in measure.bounds(0.01)])
        gamblers.draw(each[0])
        bounds.append(gamblers.labels().tolist())
    assert bounds[:3] == bounds[3:]
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(right_groups(moved, labels.to(there), 5), right_groups(samples, labels, 5))


def test_experiments_take_logarithms_on_the_cpu(there: torch.device, tmp_path: Path) -> None:
    c = case(tmp_path)
    expected = log_softmax_draws(c.ensemble, c.inputs, 2, 0)
    found = log_softmax_draws(copy.deepcopy(c.ensemble).to(there), c.inputs.to(there), 2, 0)
    assert found.dtype == torch.float64
    assert torch.equal(found, expected)
