"""Networks run by onnxruntime are those of torch, with the noise of a seed."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.artefacts.onnx_session import seed_words
from selfensemble.noise.learned import learn_noise_
from selfensemble.noise.resize_pad import ResizePadConfig, ResizePadNetwork

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# Deprecation warnings of torch's own exporter.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
RUNS = 2000


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options)


def test_draws_have_the_distribution_of_torch(tiny: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """Mean, spread and independence over 2,000 runs of one draw, with seeds in a row.

    30 means within 4 standard errors (all are with probability .998), variances within 4 standard errors of
    their logarithm at the kurtosis seen, correlations of a run with the next within 4 / sqrt(2000).
    """
    ensemble = rse.SelfEnsemble(tiny, rse.NoiseConfig(0.5, 0.3))
    path = rse.export_onnx(ensemble, tmp_path / "one.onnx", images, draws=1)
    run = session(path)
    feeds = [{"images": images.numpy(), "seed": seed_words(number)} for number in range(RUNS)]
    theirs = np.stack([run.run(None, feed)[0] for feed in feeds])
    with torch.no_grad(), rse.noise_draw(7, 0, "per_image"):
        ours = ensemble.eval().draw_logits(images.repeat(RUNS, 1, 1, 1)).softmax(dim=1)
    ours_np = ours.view(RUNS, 6, 5).double().numpy()
    error = np.sqrt((theirs.var(axis=0) + ours_np.var(axis=0)) / RUNS)
    assert (np.abs(theirs.mean(axis=0) - ours_np.mean(axis=0)) < 4 * error).all()
    centred = theirs - theirs.mean(axis=0)
    kurtosis = (centred**4).mean(axis=0) / theirs.var(axis=0) ** 2
    ratio = np.log(theirs.var(axis=0) / ours_np.var(axis=0))
    assert (np.abs(ratio) < 4 * np.sqrt(2 * (kurtosis - 1) / RUNS)).all()
    following = (centred[1:] * centred[:-1]).mean(axis=0) / theirs.var(axis=0)
    assert (np.abs(following) < 4 / math.sqrt(RUNS)).all()


def test_ensembles_average_independent_draws(tiny: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """Any batch size; the spread of the mean over runs is that of single draws over sqrt(draws).

    Over 400 runs of 16 draws the ratio of variances is 1 within a quarter (over 3 standard errors); draws
    that shared their noise would make it 16.
    """
    ensemble = rse.SelfEnsemble(tiny, rse.NoiseConfig(0.5, 0.3), draws=16)
    path = rse.export_onnx(ensemble, tmp_path / "many.onnx", images, classes=("a", "b", "c", "d", "e"))
    run = session(path)
    assert [each.name for each in run.get_outputs()] == ["probabilities", "spread"]
    seeds = [seed_words(number) for number in range(400)]
    answers = [run.run(None, {"images": images.numpy(), "seed": seed}) for seed in seeds]
    means, spreads = (np.stack(each) for each in zip(*answers, strict=True))
    assert not np.array_equal(means[0], means[1])
    assert means.sum(axis=2) == pytest.approx(1, abs=1e-5)
    ratio = 16 * means.var(axis=0).mean() / np.square(spreads).mean()
    assert 0.75 < ratio < 1.25
    expected = ensemble.eval().predict(images, draws=4000, seed=1)
    error = expected.spread.numpy() * math.sqrt(1 / 6400 + 1 / 4000)
    assert (np.abs(means.mean(axis=0) - expected.probabilities.numpy()) < 4 * error).all()
    assert run.run(None, {"images": images[:1].numpy(), "seed": seeds[0]})[0].shape == (1, 5)
    about = run.get_modelmeta().custom_metadata_map
    assert json.loads(about["selfensemble.draws"]) == 16
    assert json.loads(about["selfensemble.noise"]) == {"0": 0.5, "3": 0.3, "5": 0.3}
    assert json.loads(about["selfensemble.classes"]) == ["a", "b", "c", "d", "e"]


def test_levels_of_zero_give_the_logits_of_torch(tiny: nn.Module, images: Tensor, tmp_path: Path) -> None:
    ensemble = rse.SelfEnsemble(tiny, rse.NoiseConfig(0, 0), draws=1)
    path = rse.export_onnx(ensemble, tmp_path / "static.onnx", images)
    with torch.no_grad():
        expected = tiny(images).softmax(dim=1).numpy()
    assert session(path).run(None, {"images": images.numpy()})[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["channel", "layer", "optimised"])
def test_other_kinds_of_noise(images: Tensor, tmp_path: Path, kind: str) -> None:
    """Learned levels by channel or layer, and of an optimised copy the original."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    rse.inject_noise_(net, rse.NoiseConfig(2.0, 0.5))
    if kind != "optimised":
        learn_noise_(net, "channel" if kind == "channel" else "layer")
    ensemble = rse.SelfEnsemble(net, draws=300).eval()
    given = rse.optimize(ensemble, images, "bf16") if kind == "optimised" else ensemble
    path = rse.export_onnx(given, tmp_path / "x.onnx", images)
    mean, spread = session(path).run(None, {"images": images.numpy(), "seed": seed_words(5)})
    expected = ensemble.predict(images, draws=1200, seed=2)
    error = expected.spread.numpy() * math.sqrt(1 / 300 + 1 / 1200)
    assert (np.abs(mean - expected.probabilities.numpy()) < 4.5 * error).all()
    assert spread == pytest.approx(expected.spread.numpy(), rel=0.35)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("part", ["all", "convolution"])
def test_precisions_that_no_runtime_convolves_in_are_refused(
    tiny: nn.Module, images: Tensor, tmp_path: Path, dtype: torch.dtype, part: str
) -> None:
    ensemble = rse.SelfEnsemble(tiny, draws=2)
    inputs = images.to(dtype) if part == "all" else images
    if part == "all":
        ensemble.to(dtype)
    else:
        tiny.get_submodule("3").to(dtype)
        tiny.get_submodule("3").register_forward_pre_hook(lambda module, args: args[0].to(dtype))
        tiny.get_submodule("3").register_forward_hook(lambda module, args, output: output.float())
    with pytest.raises(ValueError, match=r"computes in torch\.(float64|bfloat16).*ensemble\.float\(\)"):
        rse.export_onnx(ensemble, tmp_path / "file.onnx", inputs)
    assert list(tmp_path.iterdir()) == []
    if part == "all":
        rse.export_onnx(ensemble.float(), tmp_path / "file.onnx", images)


def test_what_onnx_cannot_say_is_refused(tiny: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """And a file that is there stays as it was."""
    path = tmp_path / "x.onnx"
    path.write_text("precious")
    resizing = ResizePadNetwork(tiny, ResizePadConfig(smallest=6, largest=8))
    with pytest.raises(ValueError, match="no operator for ResizePad"):
        rse.export_onnx(rse.SelfEnsemble(resizing), path, images)

    class Branching(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            out = super().forward(input).flatten(1)
            return out[:, :5] if input.sum() > 0 else out[:, 5:10]

    class OneSize(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input).reshape(2, -1)

    class Dropping(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return nn.functional.dropout(super().forward(input).mean(dim=(2, 3)), training=True)

    class Placing(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input * torch.rand_like(input)).mean(dim=(2, 3))

    class Tossing(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input).mean(dim=(2, 3)) * random.random()

    class Counting(nn.Conv2d):
        passes = 0

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            self.passes += 1
            return super().forward(input).mean(dim=(2, 3)) * (1 + self.passes % 2)

    for network, problem in (
        (Tossing(3, 5, 1), "change from pass to pass"),
        (Counting(3, 5, 1), "change from pass to pass"),
        (Branching(3, 5, 1), "^torch cannot export"),
        (OneSize(3, 5, 1), "^this network computes with its batch size"),
        (Dropping(3, 5, 1), "draws random numbers of its own .Dropout"),
        (Placing(3, 5, 1), "draws random numbers of its own .RandomUniformLike"),
    ):
        with pytest.raises(ValueError, match=problem):
            rse.export_onnx(rse.SelfEnsemble(network), path, images[:2], draws=1)
    assert path.read_text() == "precious"
    assert [each.name for each in tmp_path.iterdir()] == ["x.onnx"]


class Branching(nn.Module):
    """Goes one way or another by the values of its features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.conv(inputs)
        if features.sum() > 0:
            features = features + 1
        logits: Tensor = features.mean(dim=(2, 3))
        return logits


class Bessel(Branching):
    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = torch.special.i1(self.conv(inputs)).mean(dim=(2, 3))
        return logits


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (Branching, r"data-dependent expression.*\(test_onnx_export.py:\d+: if features.sum\(\) > 0:\)"),
        (Bessel, "No ONNX function found for .*bessel_i1"),
    ],
)
def test_networks_that_torch_cannot_export_are_refused_with_the_reason(
    network: type[nn.Module], says: str, tmp_path: Path, images: Tensor, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one line without colours, and nothing else is printed."""
    with pytest.raises(ValueError, match=says) as raised:
        rse.export_onnx(rse.SelfEnsemble(network()), tmp_path / "network.onnx", images)
    assert "\x1b" not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "network.onnx").exists()


@pytest.mark.filterwarnings("ignore")  # the tracer's own
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("std", [0.1, (0.1, 0.2, 0.3)])
def test_torchs_exporters_name_ours_and_write_no_network_without_noise(
    tmp_path: Path, tiny: nn.Sequential, images: Tensor, dynamo: bool, std: Any
) -> None:
    ensemble = rse.SelfEnsemble(tiny).eval()
    next(iter(rse.noise_layers(tiny).values())).std = std
    for network in (ensemble, ensemble.model):
        with pytest.raises(RuntimeError, match=r"use rse\.export_onnx") as raised:
            torch.onnx.export(network, (images,), tmp_path / "network.onnx", dynamo=dynamo, verbose=False)
        assert "\x1b" not in str(raised.value.__cause__ or raised.value)
    assert not (tmp_path / "network.onnx").exists()
    rse.export_onnx(ensemble, tmp_path / "network.onnx", images)
    torch.onnx.export(rse.remove_noise_(tiny), (images,), tmp_path / "static.onnx", dynamo=False)


class TwoHeads(nn.Module):
    """Logits, and boxes beside them that nobody asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.boxes, self.logits = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images).relu()
        self.boxes(features)
        logits: Tensor = self.logits(features).mean(dim=(2, 3))
        return logits


def test_noise_that_the_logits_do_not_depend_on_is_no_part_of_the_graph(
    images: Tensor, tmp_path: Path
) -> None:
    ensemble = rse.SelfEnsemble(TwoHeads(), rse.NoiseConfig(0.2, 0.1), draws=2)
    path = rse.export_onnx(ensemble, tmp_path / "one.onnx", images)
    (written,) = [each for each in onnx.load(path).metadata_props if each.key == "selfensemble.noise"]
    assert json.loads(written.value) == {"conv": 0.2, "logits": 0.1}
    assert (rse.OnnxEnsemble(path).predict(images).spread > 0).all()
