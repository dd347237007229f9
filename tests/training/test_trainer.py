"""Training as real processes: killed, interrupted, resumed, out of room."""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

import selfensemble as rse
from selfensemble.cli import training as commands  # noqa: F401  (adds its commands to the app)
from selfensemble.cli.base import app
from selfensemble.training import accelerator as accelerator_module
from selfensemble.training import trainer as trainer_module
from selfensemble.training.accuracy import count_correct
from selfensemble.training.checkpoints import CHECKPOINT, RESULTS
from selfensemble.training.optimizers import make_scheduler
from selfensemble.training.recipe import load_recipe, public_recipe
from selfensemble.training.sections import TrainSection
from selfensemble.training.trainer import Trainer

from ..command import error, run
from ..forked import Forked, run_forked, run_ranks

SMALL = [
    "data.flip=true", "data.crop_padding=1", "model.width=0.25", "train.epochs=8", "train.batch_size=128",
    "train.checkpoint_steps=3", "noise.draws=2",
]  # fmt: skip


def arguments(out: Path, *more: str, sets: list[str] | None = None) -> list[str]:
    overrides = [part for item in sets or SMALL for part in ("--set", item)]
    return ["train", "digits-rse", "--out", str(out), *overrides, *more]


def train(out: Path, *more: str, sets: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose weights are compared with those of others to the last bit."""
    return run_forked(*arguments(out, *more, sets=sets))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "model.safetensors")


@pytest.mark.parametrize("known", [True, False])
def test_bfloat16_is_for_processors_that_have_it(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others imitate it, six times slower than they compute in float32."""
    monkeypatch.setattr(accelerator_module, "has_bfloat16", lambda device: known)
    sets = ["train.precision=bf16", "train.epochs=1", "train.batch_size=1024", "noise.draws=1"]
    assert not app(arguments(tmp_path, "--json", sets=sets), standalone_mode=False)
    said = capsys.readouterr()
    results = json.loads(said.out)
    assert results["recipe"]["train"]["precision"] == "bf16"
    assert results["precision"] == ("bf16" if known else "no")
    assert ("this processor has no bfloat16 arithmetic" in said.err) is not known


def test_it_begins_with_the_weights_of_a_trained_network(tmp_path: Path) -> None:
    """Of the zoo, or of a folder; the noise is that of the recipe."""
    sets = ["model.weights=digits-rse", "noise.init_std=0.1", "train.epochs=1", "train.batch_size=1024"]
    recipe = load_recipe("digits-rse", [*sets, "train.lr=1e-9", "data.validation=0"])
    trainer = Trainer(recipe, tmp_path / "run")
    theirs, mine = rse.load("digits-rse").state_dict(), trainer.network.state_dict()
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[key], mine[key]) for key in mine)
    assert [layer.std for layer in rse.noise_layers(trainer.network).values()][:2] == [0.1, 0.1]
    found = trainer.run()
    assert found["metrics"]["test"]["accuracy"] > 0.9
    again = load_recipe("digits-rse", [f"model.weights={tmp_path / 'run'}", "train.epochs=1"])
    own = Trainer(again, tmp_path / "again").network
    assert torch.equal(next(own.parameters()), next(rse.load(tmp_path / "run").parameters()))
    assert public_recipe(again.model_dump(mode="json"))["model"]["weights"] == "run"


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    for sets, reason in (
        (["model.weights=digits-rse", "model.width=0.5"], "another one than the recipe's"),
        (["model.weights=nowhere"], "no folder nowhere"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=reason):
            Trainer(load_recipe("digits-rse", sets), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def start_and_wait_for_checkpoint(out: Path, after: float) -> Forked:
    """Start (or resume) the run and return `after` seconds behind its next checkpoint."""
    before = (out / CHECKPOINT).stat().st_mtime_ns if (out / CHECKPOINT).exists() else 0
    process = Forked(*arguments(out, "--resume"))
    for _ in range(6000):
        if (out / CHECKPOINT).exists() and (out / CHECKPOINT).stat().st_mtime_ns > before:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(after)
    return process


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finished = train(out)
    assert finished.returncode == 0, finished.stderr
    return out


def test_killed_twice_and_resumed_ends_in_the_same_weights(undisturbed: Path, tmp_path: Path) -> None:
    out, chance = tmp_path / "run", random.Random(0)
    for _ in range(2):
        process = start_and_wait_for_checkpoint(out, after=chance.uniform(0, 0.2))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (out / "model.safetensors").exists()
    finished = train(out, "--resume")
    assert finished.returncode == 0, finished.stderr
    assert same(weights(out), weights(undisturbed))


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start_and_wait_for_checkpoint(out, after=0.0)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert train(out, "--resume").returncode == 0
    assert same(weights(out), weights(undisturbed))


def test_another_seed_gives_other_weights(undisturbed: Path, tmp_path: Path) -> None:
    run(*arguments(tmp_path / "run", sets=[*SMALL, "seed=1"]))
    assert not same(weights(tmp_path / "run"), weights(undisturbed))


def test_a_finished_run_is_complete_and_protected(undisturbed: Path) -> None:
    kept = {path.name: path.read_bytes() for path in undisturbed.iterdir() if path.is_file()}
    assert {"model.safetensors", "config.json", RESULTS, CHECKPOINT} <= kept.keys()
    assert list((undisturbed / "tensorboard").glob("events*"))
    assert "--resume" in error(*arguments(undisturbed))
    assert "train.lr" in error(*arguments(undisturbed, "--resume", sets=[*SMALL, "train.lr=0.5"]))
    assert {path.name: path.read_bytes() for path in undisturbed.iterdir() if path.is_file()} == kept


def test_resuming_a_finished_run_repeats_nothing(undisturbed: Path) -> None:
    before = weights(undisturbed)
    finished = run(*arguments(undisturbed, "--resume"))
    assert "epoch" not in finished.stderr
    assert same(weights(undisturbed), before)


def test_resuming_without_a_checkpoint_does_not_replace_an_ensemble(
    undisturbed: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(undisturbed / name, tmp_path / name)
    assert "no checkpoint" in error(*arguments(tmp_path, "--resume"))
    assert same(weights(tmp_path), weights(undisturbed))


def test_keys_that_recipes_gained_since_do_not_stop_a_resumed_run(undisturbed: Path, tmp_path: Path) -> None:
    state = torch.load(undisturbed / CHECKPOINT, weights_only=True)
    recipe = state["recipe"]
    del recipe["resize_pad"], recipe["model"]["activation"], recipe["noise"]["learn"]
    torch.save(state, tmp_path / CHECKPOINT)
    run(*arguments(tmp_path, "--resume"))
    assert same(weights(tmp_path), weights(undisturbed))


def test_a_damaged_checkpoint_is_named(undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes((undisturbed / CHECKPOINT).read_bytes()[:1000])
    errors = run(*arguments(tmp_path, "--resume"), expect=2).stderr
    assert "--overwrite" in errors
    assert errors.count("\n") <= 2


@pytest.mark.parametrize("when", [1, 2, 3, 4])
def test_an_evaluation_that_fails_loses_no_training(
    when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After either of two epochs, or at the end, of validation or test images."""
    recipe = load_recipe(
        "digits-rse",
        ["data.images=200", "model.width=0.25", "train.epochs=2", "train.batch_size=60", "noise.draws=2"],
    )
    whole = Trainer(recipe, tmp_path / "whole").run()
    asked = 0

    def fails(*arguments: Any, **settings: Any) -> int:
        nonlocal asked
        asked += 1
        if asked == when:
            raise TypeError("the device has no float64")
        return count_correct(*arguments, **settings)

    monkeypatch.setattr(trainer_module, "count_correct", fails)
    with pytest.raises(TypeError, match="no float64"):
        Trainer(recipe, tmp_path / "run").run()
    if when > 2:  # the network is there, without figures
        assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
        assert rse.load(tmp_path / "run").draws == 2
    resumed = Trainer(recipe, tmp_path / "run", resume=True)
    assert resumed.step == min(when, 2) * resumed.batches.in_epoch
    results = resumed.run()
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert results["history"] == whole["history"]
    assert results["metrics"] == whole["metrics"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["metrics"] == whole["metrics"]


def test_no_room_to_save_keeps_earlier_files(undisturbed: Path, tmp_path: Path) -> None:
    """A limit on file sizes fails the write as a full disk does, in the middle of a file."""
    out = tmp_path / "run"
    out.mkdir()
    (out / CHECKPOINT).write_bytes(b"an earlier checkpoint")

    limited = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "from tests.forked import run_here\n"
        "run_here(*sys.argv[1:])"
    )
    finished = run_forked("-c", limited, *arguments(out, "--overwrite"))
    assert finished.returncode == 2, finished.stderr
    assert "no room" in finished.stderr
    assert (out / CHECKPOINT).read_bytes() == b"an earlier checkpoint"
    assert not list(out.glob(".*partial"))


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    """Gloo on this machine: both ranks end with the same weights, which one process would not have."""
    finished, other = run_ranks(*arguments(tmp_path / "run", "--json"))
    assert finished.returncode == other.returncode == 0, finished.stderr + other.stderr
    assert json.loads(finished.stdout)["metrics"]["test"]["images"] == 450
    ensemble = rse.load(tmp_path / "run")
    assert ensemble.predict_proba(rse.load_data("digits", "test").inputs(slice(5))).shape == (5, 10)


@pytest.mark.parametrize("schedule", ["stages", "cosine", "one_cycle"])
def test_schedules(schedule: str) -> None:
    config = TrainSection(schedule=schedule, lr=0.1)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    scheduler = make_scheduler(optimizer, config, steps=200)
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    if schedule == "stages":
        expected = [0.1] * 80 + [0.01] * 60 + [0.001] * 40 + [0.0001] * 20
        assert rates == pytest.approx(expected)
    else:
        assert max(rates) == pytest.approx(0.1)
        assert rates[-1] < 1e-3


def test_data_given_on_the_command_line_are_remembered(tmp_path: Path) -> None:
    """Resuming and evaluating without --data read the same images."""
    digits = rse.load_data("digits", "test")
    for split in ("train", "test"):
        for i in range(300):
            folder = tmp_path / "data" / split / digits.classes[int(digits.labels[i])]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.images[i, 0].numpy()).save(folder / f"{i}.png")
    sets = ["train.epochs=1", "model.width=0.25"]
    run(*arguments(tmp_path / "run", "--data", str(tmp_path / "data"), sets=sets))
    assert "data.source" in error(*arguments(tmp_path / "run", "--resume", sets=sets))
    (tmp_path / "quick.yaml").write_text("attacks: [{attack: fgsm}]\njudge: {queries: 1}")
    evaluated = run(
        "evaluate", tmp_path / "run", "--n", 400, "--protocol", tmp_path / "quick.yaml",
        "--out", tmp_path / "evaluation", "--json",
    )  # fmt: skip
    data = json.loads(evaluated.stdout)["data"]
    assert data["images"] == 300
    assert data["source"] == str(tmp_path / "data")


def test_a_part_of_the_images_to_try_things_out(tmp_path: Path) -> None:
    sets = ["data.images=200", "train.epochs=1", "model.width=0.25"]
    results = Trainer(load_recipe("digits-rse", sets), tmp_path / "run").run()
    assert results["data"]["train"] == 180
    assert [results["metrics"][part]["images"] for part in ("validation", "test")] == [20, 200]


def test_images_that_a_network_cannot_take(tmp_path: Path) -> None:
    assert "choose another model.name" in error(*arguments(tmp_path / "run", sets=["model.name=vgg16"]))


def test_overwriting_removes_what_no_longer_belongs(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    process = Forked(*arguments(tmp_path / "run", "--overwrite", sets=[*SMALL, "train.epochs=200"]))
    before = (undisturbed / CHECKPOINT).stat().st_size, time.time_ns()
    while process.poll() is None and (tmp_path / "run" / CHECKPOINT).stat().st_mtime_ns < before[1]:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_batches_too_small_for_batch_norm_are_refused(tmp_path: Path) -> None:
    assert "train.batch_size" in error(*arguments(tmp_path / "run", sets=["train.batch_size=1"]))


def test_a_loss_that_explodes_is_an_error(tmp_path: Path) -> None:
    assert "lower train.lr" in error(*arguments(tmp_path / "run", sets=[*SMALL, "train.lr=1e30"]))
    assert not (tmp_path / "run" / "model.safetensors").exists()
