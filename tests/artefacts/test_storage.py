"""Artefacts: round trips, golden files of every format version, and files that must be refused."""

import copy
import hashlib
import itertools
import json
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.artefacts.config import Architecture
from selfensemble.artefacts.storage import read_config, read_weights, save_stopping
from selfensemble.artefacts.upload import push
from selfensemble.artefacts.zoo import zoo
from selfensemble.ensemble.stopping import Calibrated
from selfensemble.evaluation.identity import model_record
from selfensemble.evaluation.results import ModelRecord
from selfensemble.report.packing import pack, write_card

from ..conftest import Aliased, OutOfOrder
from ..forked import run_forked


@pytest.mark.parametrize("version", [1])
def test_golden_artefacts_load_and_answer_as_they_did(golden: Path, version: int) -> None:
    folder = golden / f"v{version}"
    ensemble = rse.load(folder)
    expected = safetensors.torch.load_file(folder / "outputs.safetensors")
    with rse.noise_disabled(ensemble), torch.no_grad():
        torch.testing.assert_close(ensemble.draw_logits(expected["images"]), expected["logits"])
    answer = ensemble.predict_proba(expected["images"], seed=1)
    torch.testing.assert_close(answer, expected["proba"], rtol=1e-4, atol=1e-5)
    assert ensemble.draws == 3
    assert [layer.std for layer in rse.noise_layers(ensemble.model).values()] == [0.4, 0.2, 0.2, 0.2]


def test_round_trip_keeps_answers_levels_and_order(tmp_path: Path, images: Tensor) -> None:
    """The layer that sees the image is registered last: its number must survive."""
    ensemble = rse.SelfEnsemble(OutOfOrder(), rse.NoiseConfig(0.3, 0.7), draws=4, example_inputs=images)
    rse.save(ensemble, tmp_path)
    loaded = rse.load(tmp_path, model=OutOfOrder())
    assert not loaded.training
    torch.testing.assert_close(loaded.predict_proba(images, seed=2), ensemble.predict_proba(images, seed=2))
    assert {k: v.layer for k, v in rse.noise_layers(loaded.model).items()} == {"stem": 0, "inner": 1}
    with pytest.raises(ValueError, match="model="):
        rse.load(tmp_path)


def _whole(network: nn.Module) -> Any:
    return torch.compile(network, backend="eager")


def _in_place(network: nn.Module) -> Any:
    network.compile(backend="eager")
    return network


def _part(network: nn.Module) -> Any:
    network.add_module("stem", _whole(network.get_submodule("stem")))
    return network


def _both(network: nn.Module) -> Any:
    return _whole(_part(network))


COMPILED: dict[str, Callable[[nn.Module], Any]] = {
    "not": lambda network: network, "whole": _whole, "in place": _in_place, "part": _part, "both": _both,
}  # fmt: skip


@pytest.mark.parametrize("into", COMPILED)
@pytest.mark.parametrize("how", COMPILED)
def test_compiled_networks_are_saved_as_what_they_compile(
    tmp_path: Path, images: Tensor, how: str, into: str
) -> None:
    network = COMPILED[how](OutOfOrder())
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0.3, 0.7), draws=2, example_inputs=images).eval()
    plain = set(OutOfOrder().state_dict())
    ensemble.stopping = Calibrated(
        thresholds=(0.5, 0.0), epsilon=0.1, delta=0.05, mean_draws=1.5, disagreement=0.05, images=500,
        reference_draws=200,
    )  # fmt: skip
    rse.save(ensemble, tmp_path)
    assert set(safetensors.torch.load_file(tmp_path / "model.safetensors")) == plain
    assert read_config(tmp_path).noise == {"stem": 0.3, "inner": 0.7}
    loaded = rse.load(tmp_path, COMPILED[into](OutOfOrder()))
    assert loaded.stopping is not None
    assert loaded.stopping.differences(loaded) == []  # nor has the ensemble other weights, then
    assert [layer.std for layer in rse.noise_layers(loaded.model).values()] == [0.3, 0.7]


def test_a_compiled_network_of_ours_is_known_by_its_name(tmp_path: Path) -> None:
    network = rse.create_model("small-cnn", channels=1, width=0.25)
    expected = Architecture.of(network)
    network.add_module("0", _whole(network.get_submodule("0")))
    rse.save(rse.SelfEnsemble(_whole(network)), tmp_path)
    assert read_config(tmp_path).architecture == expected is not None
    assert len(rse.noise_layers(rse.load(tmp_path).model)) == 4


def test_levels_by_channel_survive(tmp_path: Path, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(OutOfOrder(), rse.NoiseConfig(0.3, 0.7), example_inputs=images)
    rse.noise_layers(ensemble.model)["stem"].std = (0.1, 0.0, 1 / 3)
    rse.save(ensemble, tmp_path)
    assert read_config(tmp_path).noise == {"stem": (0.1, 0.0, 1 / 3), "inner": 0.7}
    loaded = rse.load(tmp_path, model=OutOfOrder())
    assert torch.equal(loaded.predict_proba(images, seed=2), ensemble.predict_proba(images, seed=2))
    assert loaded.state_dict().keys() == ensemble.state_dict().keys()
    records = [model_record(model, "x", None) for model in (ensemble, loaded)]
    assert records[0] == records[1]
    assert ModelRecord.model_validate_json(records[0].model_dump_json()) == records[0]


def test_the_activation_is_kept(tmp_path: Path, images: Tensor) -> None:
    architecture = Architecture(name="small-cnn", classes=4, channels=3, width=0.25, activation="brelu")
    bounded = rse.create_model(**architecture.model_dump()).eval()
    rse.save(rse.SelfEnsemble(bounded, rse.NoiseConfig(0, 0)), tmp_path, architecture=architecture)
    torch.testing.assert_close(rse.load(tmp_path).predict_proba(images), bounded(images).softmax(dim=1))


def test_shared_parameters_are_saved(tmp_path: Path, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(Aliased())
    rse.save(ensemble, tmp_path)
    loaded = rse.load(tmp_path, model=Aliased())
    torch.testing.assert_close(loaded.predict_proba(images, seed=2), ensemble.predict_proba(images, seed=2))


def test_a_plain_network_is_an_ensemble_without_noise(tmp_path: Path, images: Tensor) -> None:
    architecture = Architecture(name="small-cnn", classes=4, channels=3, width=0.25)
    plain = rse.create_model(**architecture.model_dump()).eval()
    expected = plain(images).softmax(dim=1)
    rse.save(rse.SelfEnsemble(plain, rse.NoiseConfig(0, 0)), tmp_path, architecture=architecture)
    torch.testing.assert_close(rse.load(tmp_path).predict_proba(images), expected)


def test_a_network_saved_without_noise_loads_without(tmp_path: Path, images: Tensor) -> None:
    ensemble = rse.SelfEnsemble(Aliased())
    rse.remove_noise_(ensemble.model)
    rse.save(ensemble, tmp_path)
    assert not rse.load(tmp_path, model=Aliased()).is_random


def test_loading_into_a_noisy_network_says_what_to_do(tmp_path: Path) -> None:
    rse.save(rse.SelfEnsemble(Aliased()), tmp_path)
    with pytest.raises(ValueError, match="remove_noise_"):
        rse.load(tmp_path, model=rse.inject_noise_(Aliased()))


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_save_keeps_the_earlier_artefact(
    tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The disk fills up at the first or at the second of the two files."""
    ensemble = rse.SelfEnsemble(Aliased())
    rse.save(ensemble, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    nn.init.zeros_(ensemble.model.get_parameter("first.weight"))
    calls = itertools.count(1)

    def full_disk(handle: int) -> None:
        if next(calls) == failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        rse.save(ensemble, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_config_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--out"):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    for text, message in (
        ('{"format": "selfensemble", "format_version": 1}', "does not fit: noise is missing"),
        ('{"format": "selfensemble", "format_version": 1, "noise": {"0": -1}, "draws": 1}', "noise.0"),
        ('{"format": "selfensemble", "format_version": 1, "noise": {"0": []}, "draws": 1}', "noise.0"),
        ('{"format": "selfensemble", "format_version": 1, "noise": {}, "draws": 0}', "draws"),
        ("[]", "not written by selfensemble"),
        ("\xff", "damaged"),
    ):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path)


def of_seed(seed: int) -> rse.SelfEnsemble:
    torch.manual_seed(seed)
    return rse.SelfEnsemble(rse.create_model("small-cnn", channels=1, width=0.25), rse.NoiseConfig(0.3, 0.1))


_KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import selfensemble as rse

torch.manual_seed(1)
ensemble = rse.SelfEnsemble(rse.create_model("small-cnn", channels=1, width=0.25), rse.NoiseConfig(0.3, 0.1))
left, replace = int(sys.argv[2]), Path.replace

def killed(self, target):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return replace(self, target)

Path.replace = killed
rse.save(ensemble, sys.argv[1])
"""


def test_the_last_of_two_who_save_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins when the first has replaced one of its two files."""
    fcntl, replace = pytest.importorskip("fcntl"), Path.replace
    between, second_is_at_it = threading.Event(), threading.Event()
    lock, second = fcntl.flock, 0

    def slowly(self: Path, target: Path) -> Path:
        if threading.get_ident() != second and target.name == "model.safetensors":
            between.set()
            assert second_is_at_it.wait(60)
        return replace(self, target)

    def seen(handle: int, operation: int) -> None:
        if threading.get_ident() == second:
            second_is_at_it.set()
        lock(handle, operation)

    def later() -> None:
        nonlocal second
        second = threading.get_ident()
        assert between.wait(60)
        try:
            rse.save(of_seed(1), tmp_path / "net")
        finally:
            second_is_at_it.set()

    rse.save(of_seed(2), tmp_path / "net")
    monkeypatch.setattr(fcntl, "flock", seen)
    monkeypatch.setattr(Path, "replace", slowly)
    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(later)
        rse.save(of_seed(0), tmp_path / "net")
        done.result()
    assert torch.equal(next(rse.load(tmp_path / "net").parameters()), next(of_seed(1).parameters()))
    assert {path.name for path in (tmp_path / "net").iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("earlier", "replaced"),
    [("digest", 0), ("digest", 1), ("digest", 2), ("no digest", 1), ("nothing", 1)],
)
def test_a_save_that_is_killed_leaves_no_pair_of_two_networks(
    tmp_path: Path, images: Tensor, earlier: str, replaced: int
) -> None:
    """By SIGKILL before the first file takes its place, between the two, or never."""
    grey, folder = images[:, :1], tmp_path / "net"

    def is_of(seed: int) -> bool:
        ours, theirs = (each.predict_proba(grey, seed=1) for each in (rse.load(folder), of_seed(seed).eval()))
        return torch.equal(ours, theirs)

    if earlier != "nothing":
        rse.save(of_seed(0), folder)
    if earlier == "no digest":  # as earlier versions wrote it
        values = json.loads((folder / "config.json").read_text())
        del values["weights"]
        (folder / "config.json").write_text(json.dumps(values))
        assert is_of(0)
    status = run_forked("-c", _KILLED, folder, replaced).returncode
    assert status == (-signal.SIGKILL if replaced < 2 else 0)
    if replaced == 1:
        missing = earlier == "nothing"
        with pytest.raises(
            FileNotFoundError if missing else ValueError,
            match="incomplete" if missing else "Save the ensemble again",
        ):
            rse.load(folder)
    else:
        assert is_of(replaced // 2)
    rse.save(of_seed(2), folder)  # as the message says
    assert is_of(2)


@pytest.mark.parametrize("failing", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_file_that_cannot_be_replaced_leaves_the_earlier_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, earlier: bool
) -> None:
    if earlier:
        rse.save(of_seed(0), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace = Path.replace

    def refused(self: Path, target: Path) -> Path:
        if target.name == failing:
            raise PermissionError(13, "in use")
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refused)
        with pytest.raises(PermissionError):
            rse.save(of_seed(1), tmp_path, metrics={"run": 1})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_files_of_two_saves_are_refused_everywhere(tmp_path: Path, name: str) -> None:
    """Copied alone, of the same shapes: nothing loads, pushes, packs or calibrates such a folder."""
    folder = tmp_path / "mixed"
    rse.save(of_seed(0), folder, input_shape=(1, 8, 8))
    rse.save(of_seed(1), tmp_path / "other", input_shape=(1, 8, 8))
    shutil.copy(tmp_path / "other" / name, folder / name)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    data = rse.load_data("digits", "test")
    attempts: tuple[Callable[[], object], ...] = (
        lambda: rse.load(folder),
        lambda: rse.SelfEnsemble.from_pretrained(folder),
        lambda: push(folder, "me/mixed"),
        lambda: pack(folder, tmp_path / "packed", data),
        lambda: save_stopping(folder, _RULE),
        lambda: write_card(folder),
    )
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"is not the file that its config\.json was written with"):
            attempt()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "packed").exists()


def test_weights_of_your_own_network_are_not_pushed_with_another_config(tmp_path: Path) -> None:
    for seed, name in enumerate(("mine", "other")):
        torch.manual_seed(seed)
        rse.save(rse.SelfEnsemble(Aliased()), tmp_path / name)
    shutil.copy(tmp_path / "other" / "config.json", tmp_path / "mine")
    with pytest.raises(ValueError, match="is not the file"):
        push(tmp_path / "mine", "me/mine")


_RULE = Calibrated(
    thresholds=(0.9, 0.5), epsilon=0.1, delta=0.05, mean_draws=1.5, disagreement=0.01, images=200,
    reference_draws=200, precision="float32", antithetic=False,
)  # fmt: skip


def test_a_rule_goes_to_the_network_it_was_calibrated_on(tmp_path: Path) -> None:
    """Not to one that was saved into the folder in the meantime; the digest stays."""
    rse.save(of_seed(0), tmp_path)
    calibrated = read_config(tmp_path)
    save_stopping(tmp_path, _RULE, of=calibrated)
    loaded = rse.load(tmp_path)
    assert loaded.stopping == _RULE.bound_to(loaded).model_copy(update={"draws": loaded.draws})
    assert read_config(tmp_path).weights == calibrated.weights
    rse.save(of_seed(1), tmp_path)
    with pytest.raises(ValueError, match="written again while it was being calibrated"):
        save_stopping(tmp_path, _RULE, of=calibrated)
    assert rse.load(tmp_path).stopping is None


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    """What sha256sum says, also of networks that come along."""
    rse.save(of_seed(0), tmp_path, dtype=torch.bfloat16)
    for folder in (tmp_path, *zoo().values()):
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert read_config(folder).weights == f"sha256:{digest}"


def test_a_file_that_is_replaced_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a folder without digests somebody saves just then."""
    folder = tmp_path / "net"
    rse.save(of_seed(0), folder)
    values = json.loads((folder / "config.json").read_text()) | {"weights": None}
    (folder / "config.json").write_text(json.dumps(values))
    read = safetensors.torch.load_file

    def slowly(path: Path) -> dict[str, Tensor]:
        monkeypatch.undo()
        rse.save(of_seed(1), folder)
        return read(path)

    monkeypatch.setattr(safetensors.torch, "load_file", slowly)
    with pytest.raises(ValueError, match="is not the file"):
        read_weights(folder, read_config(folder))
    monkeypatch.setattr(safetensors.torch, "load_file", slowly)
    assert torch.equal(next(rse.load(folder).parameters()), next(of_seed(1).parameters()))


def test_both_files_are_of_one_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a name on the Hub that moves on between two looks at it."""
    for seed in (0, 1):
        rse.save(of_seed(seed), tmp_path / str(seed))
    revisions = itertools.count()

    def fetch(name: str) -> Path:
        return tmp_path / str(min(1, next(revisions)))

    monkeypatch.setattr("selfensemble.artefacts.zoo.fetch", fetch)
    loaded = rse.load("hf-hub:me/moving")
    for ours, theirs in zip(loaded.parameters(), of_seed(0).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_a_later_version_added_is_no_damage(tmp_path: Path) -> None:
    rse.save(of_seed(0), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"colour": "blue"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"unknown key colour.*: upgrade selfensemble"):
        rse.load(tmp_path)


def test_mean_and_std_are_saved_with_the_ensemble(tmp_path: Path, images: Tensor, tiny: nn.Module) -> None:
    """A folder of a network of ours behind them loads by itself; of one's own, into the network alone."""
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    plain = rse.create_model("small-cnn", width=0.125)
    network = rse.Normalized(plain, mean, std)
    ensemble = rse.SelfEnsemble(network, rse.NoiseConfig(0.3, 0.1)).eval()
    rse.save(ensemble, tmp_path / "ours")
    loaded = rse.load(tmp_path / "ours")
    assert isinstance(loaded.model, rse.Normalized)
    assert torch.equal(loaded.predict_proba(images, seed=1), ensemble.predict_proba(images, seed=1))
    inside = rse.SelfEnsemble(plain)  # without mean and std
    assert not torch.equal(inside.predict_proba(images, seed=1), loaded.predict_proba(images))
    own = copy.deepcopy(tiny)
    ensemble = rse.SelfEnsemble(rse.Normalized(tiny, mean, std), rse.NoiseConfig(0.3, 0.1)).eval()
    rse.save(ensemble, tmp_path / "own")
    loaded = rse.load(tmp_path / "own", own)
    assert torch.equal(loaded.predict_proba(images, seed=1), ensemble.predict_proba(images, seed=1))


def test_a_network_of_a_library_is_built_again_without_its_weights(
    tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stand-in for timm; arguments by which a file could have others read need trust."""
    asked = []

    def create_model(name: str, pretrained: bool, **arguments: object) -> nn.Module:
        asked.append((name, pretrained, arguments))
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    timm = ModuleType("timm")
    timm.__dict__.update(
        create_model=create_model, is_model=lambda name: True, is_model_pretrained=lambda name: True,
        list_models=list,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "timm", timm)
    ensemble = rse.load("timm:net", arguments={"width": 4})
    rse.save(ensemble, tmp_path / "net")
    loaded = rse.load(tmp_path / "net")
    assert asked == [("net", True, {"width": 4}), ("net", False, {"width": 4})]
    assert torch.equal(loaded.predict_proba(images, seed=1), ensemble.predict_proba(images, seed=1))
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    config["network"]["arguments"] = {"checkpoint_path": "/etc/passwd"}
    (tmp_path / "net" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was not imported"):
        rse.load(tmp_path / "net")
    assert len(asked) == 2


def test_an_ensemble_in_double_precision_comes_back_so(tmp_path: Path) -> None:
    ensemble = rse.SelfEnsemble(rse.create_model("small-cnn", channels=1)).eval().double()
    rse.save(ensemble, tmp_path / "net", architecture=Architecture(name="small-cnn", channels=1, classes=10))
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    loaded = rse.load(tmp_path / "net")
    assert torch.equal(loaded.predict_proba(images, seed=1), ensemble.predict_proba(images, seed=1))
