"""Noise of ONNX files: a function of a run's seed, normal and independent; sessions do not repeat others."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.artefacts import onnx_export
from selfensemble.artefacts.onnx_noise import seed_noise
from selfensemble.artefacts.onnx_session import seed_words

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# Deprecation warnings of torch's own exporter.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
LAYERS = 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


@pytest.fixture(scope="module")
def ensemble() -> rse.SelfEnsemble:
    return rse.SelfEnsemble(network(), rse.NoiseConfig(0.5, 0.3), draws=8).eval()


@pytest.fixture(scope="module")
def exported(ensemble: rse.SelfEnsemble, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "rse.onnx"
    return rse.export_onnx(ensemble, path, torch.rand(2, 3, 8, 8), classes=("a", "b", "c", "d", "e"))


@pytest.fixture(scope="module")
def opened(exported: Path) -> rse.OnnxEnsemble:
    return rse.OnnxEnsemble(exported, threads=1)


@pytest.fixture(scope="module")
def bare() -> Any:
    """A session whose outputs are the noise of 4 layers, of the shape of its input."""
    from onnx import TensorProto, helper

    names = [f"noise{number}" for number in range(LAYERS)]
    nodes = [helper.make_node("RandomNormalLike", ["images"], [name], mean=0.0, scale=1.0) for name in names]
    shape = ["batch", "features"]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("images", *names)]
    graph = helper.make_graph(nodes, "bare", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    model = seed_noise(model)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def noise(bare: Any, seed: Any, *shape: int) -> np.ndarray:
    """(layers, ...) float64."""
    feed = {"images": np.zeros(shape, np.float32), "seed": np.array(seed, np.uint32)}
    return np.stack(bare.run(None, feed)).astype(np.float64)


def mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0_AAAD)
    return folded(x)


def folded(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0xD35A_2D97)
    found: np.ndarray = x ^ (x >> np.uint32(15))
    return found


@pytest.mark.parametrize("size", [1, 2, 7, 4096])
def test_noise_is_the_function_of_the_seed_that_is_described(bare: Any, size: int) -> None:
    """Against the same generator written in NumPy: files of all versions must repeat by a seed."""
    seed = [3, 0xFFFF_FFFF, 5, 0]
    keys = np.arange(1, 2 * LAYERS + 1, dtype=np.uint32).reshape(2, -1)
    for key in seed:
        keys = mixed(keys ^ np.uint32(key))
    keys = mixed(keys)
    index = np.arange((size + 1) // 2, dtype=np.uint32)
    for layer, found in enumerate(noise(bare, seed, 1, size)):
        word = index * np.uint32(0x9E37_79B9) + keys[0, layer]
        word = folded(((word ^ (word >> np.uint32(16))) + keys[1, layer]) * np.uint32(0x21F0_AAAD))
        radius = np.sqrt(-2 * np.log((word + 0.5) / 2.0**32))
        angle = (word & np.uint32(0xFFFF)) * (2 * math.pi / 2**16)
        expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
        # Where a word is nearly 2^32, its logarithm has no more digits in float32.
        assert found[0] == pytest.approx(expected, abs=2e-3)
        assert np.median(np.abs(found[0] - expected)) < 1e-6


def correlations(one: np.ndarray, other: np.ndarray) -> Iterator[float]:
    """Of numbers of two sets, of their squares and of their sizes, in standard errors."""
    for change in (lambda z: z, np.square, np.abs):
        yield float(np.corrcoef(change(one), change(other))[0, 1]) * math.sqrt(len(one))


def test_noise_is_normal_and_independent(bare: Any) -> None:
    """Of 2^18 numbers a layer: moments, distribution, and correlations of many kinds.

    With elements after them, with the other layers, and with the noise of seeds that differ in one bit; all
    within 4.5 standard errors, and above a p-value of 1e-5 (of about 370 figures one is beyond with
    probability .003).
    """
    found: list[float] = []
    for seed in ([0, 0, 0, 0], [1, 2, 3, 4]):
        layers = noise(bare, seed, 64, 4096).reshape(LAYERS, -1)
        for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            found += list((np.power(layers, power).mean(axis=1) - mean) * math.sqrt(2**18 / variance))
        for layer in layers:
            assert stats.kstest(layer, "norm").pvalue > 1e-5
            whole = np.floor(stats.norm.cdf(layer[: 2**17]) * 64).astype(int)
            pairs = 64 * whole[:-1] + whole[1:]
            counts = np.bincount(pairs, minlength=64 * 64)
            assert 1e-5 < stats.chisquare(counts).pvalue < 1 - 1e-5
        for lag in (1, 2, 3, 8, 64, 1000, 4096, 2**17):
            found += correlations(layers[0, lag:], layers[0, :-lag])
        for number in range(1, LAYERS):
            for lag in (0, 1, 5):
                found += correlations(layers[0, : 2**17], layers[number, lag : lag + 2**17])
        for word in range(4):
            for bit in (0, 1, 9, 16, 31):
                other = list(seed)
                other[word] ^= 1 << bit
                near = noise(bare, other, 64, 512).reshape(LAYERS, -1)
                found += correlations(layers[0, : 2**15], near[0])
    assert len(found) > 200
    assert max(map(abs, found)) < 4.5
    # And not too good: as spread as 200 and more normal figures are.
    assert 0.8 < np.std(found) < 1.2


def test_over_runs_an_element_is_normal_and_independent_of_the_others(bare: Any) -> None:
    """Seeds in a row, 8 elements of 2 layers: 120 correlations and 16 means within 4.5 standard errors."""
    runs = 4000
    each = np.stack([noise(bare, seed_words(number), 2, 4)[:2].reshape(-1) for number in range(runs)])
    assert (np.abs(each.mean(axis=0)) < 4.5 / math.sqrt(runs)).all()
    between = np.corrcoef(each.T) - np.eye(16)
    assert (np.abs(between) < 4.5 / math.sqrt(runs)).all()
    following = (each[1:] * each[:-1]).mean(axis=0)
    assert (np.abs(following) < 4.5 / math.sqrt(runs)).all()
    assert min(stats.kstest(column, "norm").pvalue for column in each.T) > 1e-5


def test_a_hundred_sessions_give_a_hundred_answers(exported: Path, images: Tensor) -> None:
    """First answers of new sessions in one process, which onnxruntime starts alike."""
    first = [rse.OnnxEnsemble(exported, threads=1).predict(images[:1]) for _ in range(100)]
    assert len({tuple(answer.probabilities[0].tolist()) for answer in first}) == 100
    seeded = [rse.OnnxEnsemble(exported, threads=1).predict(images, seed=5) for _ in range(2)]
    assert torch.equal(seeded[0].probabilities, seeded[1].probabilities)


def test_a_file_cannot_be_run_without_a_seed(exported: Path, images: Tensor) -> None:
    session = onnxruntime.InferenceSession(str(exported))
    assert [(each.name, each.type, each.shape) for each in session.get_inputs()] == [
        ("images", "tensor(float)", ["batch", 3, 8, 8]),
        ("seed", "tensor(uint32)", [4]),
    ]
    with pytest.raises(ValueError, match="seed"):
        session.run(None, {"images": images.numpy()})
    nodes = onnx.load(exported).graph.node
    assert not [node.op_type for node in nodes if node.op_type.startswith("Random")]
    assert {node.domain for node in nodes} == {""}  # operators that every runtime has


_FORK = """
import multiprocessing, os, sys, torch
import selfensemble as rse

images = torch.full((1, 3, 8, 8), 0.5)
ensemble = rse.OnnxEnsemble(sys.argv[1], threads=2)

def answer(seed):
    return ensemble.predict(images, seed=seed).probabilities[0].tolist()

print(answer(None))
print(answer(7))
pool = multiprocessing.get_context("fork").Pool(3)
for each in pool.map(answer, [None] * 6 + [7], chunksize=1):
    print(each)
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, str(answer(None)).encode())
    os._exit(0)
print(os.read(reader, 10_000).decode())
print(answer(None))
pool.terminate()
"""


def test_forked_workers_differ_from_their_parent_and_each_other(exported: Path) -> None:
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-W", "ignore", "-c", _FORK, str(exported)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answers = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(answers) == 11
    seeded = [answers[1], answers[8]]
    assert seeded[0] == seeded[1]
    assert len({*answers} - {*seeded}) == 9


def test_threads_and_pickles_have_noise_of_their_own(opened: rse.OnnxEnsemble, images: Tensor) -> None:
    found: list[tuple[float, ...]] = []

    def ask(each: rse.OnnxEnsemble) -> None:
        found.extend(tuple(each.predict(images[:1]).probabilities[0].tolist()) for _ in range(5))

    other = pickle.loads(pickle.dumps(opened))
    threads = [threading.Thread(target=ask, args=(each,)) for each in (opened, opened, other, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({*found}) == 20
    assert torch.equal(opened.predict(images, seed=-3).spread, other.predict(images, seed=-3).spread)


def test_it_answers_as_the_ensemble_does(
    ensemble: rse.SelfEnsemble, opened: rse.OnnxEnsemble, images: Tensor
) -> None:
    """The same kind of answer. Over 500 of them, means of 30 probabilities within 4 standard errors.

    All are, with probability .998; single spreads average to that of the ensemble's draws within 5 %.
    """
    answers = [opened.predict(images, seed=number) for number in range(500)]
    expected = ensemble.predict(images, draws=4000, seed=1)
    assert all(answer.draws.tolist() == [8] * 6 for answer in answers)
    assert all(torch.equal(each.label, each.probabilities.argmax(dim=1)) for each in answers)
    mean = torch.stack([answer.probabilities for answer in answers]).double().mean(dim=0)
    error = expected.spread * math.sqrt(1 / 4000 + 1 / 4000)
    assert ((mean - expected.probabilities).abs() < 4 * error).all()
    variance = torch.stack([answer.spread.square() for answer in answers]).mean(dim=0)
    assert float(variance.sum()) == pytest.approx(float(expected.spread.square().sum()), rel=0.05)
    assert (opened.draws, opened.bounds, opened.classes) == (8, (0.0, 1.0), ("a", "b", "c", "d", "e"))
    assert opened.noise == {"0": 0.5, "2": 0.3}


def test_arrays_and_other_dtypes_are_taken(opened: rse.OnnxEnsemble, images: Tensor) -> None:
    expected = opened.predict(images, seed=1).probabilities
    for same in (images.numpy(), images.double(), images.double().numpy(), images.clone().requires_grad_()):
        assert torch.equal(opened.predict(same, seed=1).probabilities, expected)
    assert opened.predict(images[:0]).probabilities.shape == (0, 5)


def test_single_draws_and_no_noise_have_the_spread_of_predictions(images: Tensor, tmp_path: Path) -> None:
    for config, spread in ((rse.NoiseConfig(0.5, 0.3), math.nan), (rse.NoiseConfig(0, 0), 0.0)):
        quiet = rse.SelfEnsemble(network(), config)
        path = rse.export_onnx(quiet, tmp_path / "x.onnx", images, draws=1)
        answer = rse.OnnxEnsemble(path).predict(images)
        np.testing.assert_array_equal(answer.spread.numpy(), np.full((6, 5), spread, np.float32))
        ours = quiet.eval().predict(images, draws=1)
        np.testing.assert_array_equal(ours.spread.numpy(), answer.spread.numpy())


def test_bad_inputs_are_named(opened: rse.OnnxEnsemble, images: Tensor) -> None:
    for bad, kind, problem in (
        (images.to(torch.uint8), TypeError, "float"),
        (images * 255, ValueError, r"must lie in \[0, 1\]"),
        (images * math.nan, ValueError, "NaN"),
        (images[:, :2], ValueError, r"\('batch', 3, 8, 8\), got \(6, 2, 8, 8\)"),
        (images[0], ValueError, r"got \(3, 8, 8\)"),
        ([[0.5]], TypeError, "Tensor"),
    ):
        with pytest.raises(kind, match=problem):
            opened.predict(bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="integer"):
        opened.predict(images, seed=0.5)  # type: ignore[arg-type]


def test_files_that_are_none_of_ours_are_named(
    exported: Path, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        rse.OnnxEnsemble(tmp_path / "nothing.onnx")
    (tmp_path / "damaged.onnx").write_bytes(exported.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"onnxruntime cannot read .*damaged\.onnx"):
        rse.OnnxEnsemble(tmp_path / "damaged.onnx")
    foreign = onnx.load(exported)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="not written by export_onnx"):
        rse.OnnxEnsemble(tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="threads must be an integer >= 1"):
        rse.OnnxEnsemble(exported, threads=0)
    # As files were before: the runtime draws.
    monkeypatch.setattr(onnx_export, "seed_noise", lambda model: model)
    old = rse.export_onnx(rse.SelfEnsemble(network()), tmp_path / "old.onnx", images)
    with pytest.raises(ValueError, match=r"repeats in every new session.*export the ensemble again"):
        rse.OnnxEnsemble(old)


def test_another_process_takes_no_other_file(exported: Path, images: Tensor, tmp_path: Path) -> None:
    """A file that was replaced is another network than the one that was opened."""
    path = tmp_path / "rse.onnx"
    shutil.copy(exported, path)
    sent = pickle.dumps(rse.OnnxEnsemble(path))
    assert pickle.loads(sent).predict(images).label.shape == (6,)
    changed = onnx.load(path)
    changed.producer_name = "somebody else"
    onnx.save(changed, path)
    with pytest.raises(ValueError, match="has changed since"):
        pickle.loads(sent).predict(images)
