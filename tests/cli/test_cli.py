"""The command: outputs, exit status, one-line errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import selfensemble as rse
from selfensemble.artefacts import zoo

from ..command import call, error, run

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "model"
    sets = ["train.epochs=4", "model.width=0.5"]
    run("train", "digits-rse", "--out", out, *(part for item in sets for part in ("--set", item)))
    return out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    digits = rse.load_data("digits", "test")
    for i in range(3):
        Image.fromarray(digits.images[i, 0].numpy()).resize((40, 30)).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_help_does_not_wait_for_torch() -> None:
    script = (
        "import sys, runpy; sys.argv = ['selfensemble', '--help']\n"
        "try: runpy.run_module('selfensemble', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for command in (
        "demo",
        "train",
        "evaluate",
        "doctor",
        "report",
        "predict",
        "certify",
        "calibrate",
        "info",
    ):
        assert command in finished.stdout


def test_info(model: Path) -> None:
    here = json.loads(run("info", "--json").stdout)
    assert "digits-rse" in here["recipes"]
    assert "vgg16" in here["models"]
    saved = json.loads(run("info", model, "--json").stdout)
    assert saved["format_version"] == 1
    assert saved["input_shape"] == [1, 8, 8]
    assert list(saved["noise"].values()) == [0.47, 0.1, 0.1, 0.1]
    assert "noise" in run("info", model).stdout
    for said in (("--draws", 3), ("--sampling", "per_image"), ("--network", "own:net")):
        assert f"leave {said[0]} out" in error("info", model, *said)


def test_a_certificate_has_no_draws_per_prediction(model: Path, tmp_path: Path) -> None:
    few = ("--n", 2, "--max-draws", 20, "--n0", 5, "--out", tmp_path / "run")
    assert "--draws is of predictions" in run("certify", model, "--draws", 50, *few).stderr


@pytest.mark.parametrize(
    ("said", "protocol"), [((), "demo-honest"), (("--c", 1), "paper"), (("--protocol", "honest"), "honest")]
)
def test_the_protocol_is_an_honest_one_unless_another_is_asked_for(
    model: Path, tmp_path: Path, said: tuple[str | float, ...], protocol: str
) -> None:
    with mock.patch("selfensemble.evaluation.runner.Evaluation") as evaluation:
        evaluation.side_effect = ValueError("stopped")
        error("evaluate", model, "--out", tmp_path / "run", *said)
        assert evaluation.call_args.args[2].name == protocol
        npz = tmp_path / "mine.npz"
        digits = rse.load_data("digits", "test")
        np.savez(npz, images=digits.images[:, 0].numpy(), labels=digits.labels.numpy())
        error("evaluate", model, "--data", npz, "--out", tmp_path / "run", *said)
        assert evaluation.call_args.args[2].name == ("honest" if protocol == "demo-honest" else protocol)


def test_the_strong_protocol_is_not_called_weak(model: Path, tmp_path: Path) -> None:
    quick = tmp_path / "quick.yaml"
    attack = "{attack: random-noise, eps: 0.1, tries: 2}"
    quick.write_text(f"attacks: [{attack}, {attack}]\nimages: 5\njudge: {{queries: 3}}\n")
    assert "weak" not in run("evaluate", model, "--protocol", quick, "--out", tmp_path / "run").stderr


@pytest.mark.parametrize(
    ("command", "says"), [(("card",), "--out card.md"), (("calibrate", "--data", "digits"), "in a copy")]
)
def test_nothing_is_written_into_an_included_network(
    command: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by its name nor by its folder in an installed package."""
    installed = tmp_path / "site-packages" / "zoo"
    shutil.copytree(zoo.zoo()["digits-rse"], installed / "digits-rse")
    before = {file: file.read_bytes() for file in (installed / "digits-rse").iterdir()}
    monkeypatch.setattr(zoo, "_FOLDERS", (installed,))
    for named in ("digits-rse", installed / "digits-rse"):
        said = error(command[0], named, *command[1:])
        assert says in said
        assert "selfensemble pack" in said
        assert {file: file.read_bytes() for file in (installed / "digits-rse").iterdir()} == before
    run("card", "digits-rse", "--out", tmp_path / "card.md")
    assert 'rse.load("digits-rse")' in (tmp_path / "card.md").read_text()
    assert {file: file.read_bytes() for file in (installed / "digits-rse").iterdir()} == before


def test_evaluate(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("evaluate", model, "--n", 20, "--c", 0.1, "--c", 5, "--out", out)
    results = json.loads(run(*arguments, "--json").stdout)
    assert json.loads((out / "results.json").read_text()) == results
    assert [entry["c"] for entry in results["attacks"]] == [0.1, 5.0]
    assert results["data"]["images"] == 20
    assert results["protocol"]["name"] == "paper"
    again = run(*arguments)
    assert "protocol paper" in again.stdout
    assert "Protocol paper is weak" in again.stderr
    assert "--protocol honest (demo-honest for digits)" in again.stderr
    assert "untouched" in error(*arguments, "--seed", 1)
    page = tmp_path / "report.html"
    assert "report.html" in run("report", out, "-o", page).stdout
    assert page.read_text().startswith("<!doctype html>")
    static = json.loads(run(*arguments[:-1], tmp_path / "static", "--static", "--json").stdout)
    assert static["model"]["noise"] == {}
    assert static["name"].endswith("-static")
    assert len(set(static["clean"]["seeds"])) == 1


def test_doctor(model: Path) -> None:
    arguments = ("doctor", model, "--n", 5, "--eps", "1/10", "--steps", 3, "--eot", 2)
    process = call(*arguments, "--json")
    checks = json.loads(process.stdout)["checks"]
    assert {check["name"] for check in checks} >= {"eval mode", "randomness", "gradients"}
    assert process.returncode == (3 if any(check["passed"] is False for check in checks) else 0)
    assert "eps" in error("doctor", model, "--eps", "8/0")
    assert "norm must be one of" in error("doctor", model, "--norm", "l9")


def test_predict(model: Path, pictures: Path) -> None:
    results = json.loads(run("predict", "--model", model, pictures, "--json", "--seed", 1).stdout)
    assert [Path(image["file"]).name for image in results["images"]] == ["0.png", "1.png", "2.png"]
    for image in results["images"]:
        probabilities = [guess["probability"] for guess in image["predictions"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert len(probabilities) == 3
        assert image["draws"] == 20
        assert all(0 <= guess["spread"] <= 1 for guess in image["predictions"])
    table = run("predict", "--model", model, pictures / "0.png", "--draws", 1).stdout
    assert "0.png" in table
    assert "noise draws" in table


def test_train_prints_and_stores_accuracy(model: Path) -> None:
    results = json.loads((model / "results.json").read_text())
    assert results["metrics"].keys() == {"validation", "test"}
    assert results["provenance"]["versions"]["torch"]
    assert rse.load(model).predict_proba(rse.load_data("digits", "test").inputs(slice(4))).shape == (
        4,
        10,
    )


def test_wrong_calls_are_one_line(model: Path, pictures: Path, tmp_path: Path) -> None:
    assert "digits-rse" in error("train", "nothing")
    assert "known here" in error("train", "digits-rse", "--set", "train.epoch=1")
    assert "digits, cifar10" in error("train", "digits-rse", "--data", "nowhere", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert "--out" in error("evaluate", tmp_path)
    assert "no device 'abacus'" in error("evaluate", model, "--device", "abacus")
    assert "no such file" in error("predict", "--model", model, tmp_path / "missing.png")
    assert "a folder without images" in error("predict", "--model", model, tmp_path)
    assert "as an image" in error("predict", "--model", model, pictures / "notes.txt")
    assert "c must be" in error("evaluate", model, "--c", "-1", "--n", 5, "--out", tmp_path / "y")
    assert "autoattack-rand" in error("evaluate", model, "--protocol", "onest")
    assert "--protocol paper" in error("evaluate", model, "--protocol", "honest", "--c", 1)
    assert "no results.json" in error("report", tmp_path)
    assert not (tmp_path / "y").exists()


def test_usage_errors_exit_2() -> None:
    for arguments in (
        ["train"],
        ["train", "digits-rse", "--bogus"],
        ["nonsense"],
        ["evaluate", "x", "--n", "0"],
    ):
        finished = run(*arguments, expect=2)
        assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    "damage", ["truncated", "foreign", "newer", "no json", "no weights", "other network"]
)
def test_damaged_models_are_named(model: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    weights, config = copy / "model.safetensors", copy / "config.json"
    text = config.read_text()
    expected = {
        "truncated": "damaged or not a safetensors", "foreign": "not written by selfensemble",
        "newer": "upgrade", "no json": "damaged", "no weights": "incomplete", "other network": "does not fit",
    }  # fmt: skip
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:500])
    elif damage == "foreign":
        config.write_text('{"model_type": "bert"}')
    elif damage == "newer":
        config.write_text(text.replace('"format_version": 1', '"format_version": 99'))
    elif damage == "no json":
        config.write_text(text[:100])
    elif damage == "no weights":
        weights.unlink()
    else:
        config.write_text(text.replace('"width": 0.5', '"width": 0.25'))
    assert expected[damage] in error("evaluate", copy)


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in run("train", "nothing", "--debug", expect=2).stderr


def test_ctrl_c_exits_130_without_traceback(model: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "selfensemble", "evaluate", str(model), "--n", "450", "--out", str(tmp_path)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    while "PGD" not in process.stderr.readline():  # until the attack has begun
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_an_interrupt_within_exec_exits_130(tmp_path: Path) -> None:
    """CPython ends by signal, not by status, if Ctrl-C comes while a string is executed (of a dataclass)."""
    (tmp_path / "interrupted.py").write_text(
        "import selfensemble.__main__ as command\n"
        "command.app = lambda *args, **kwargs: exec('raise KeyboardInterrupt')\n"
        "command.main()\n"
    )
    run = subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, check=False)
    assert run.returncode == 130


def test_ctrl_c_when_all_is_done_changes_nothing(tmp_path: Path) -> None:
    """While Python takes its modules down, which takes a while, it would kill the process."""
    (tmp_path / "late.py").write_text(
        "import os, signal, selfensemble.__main__ as command\n"
        "class Late:\n"
        "    def __del__(self, kill=os.kill, own=os.getpid(), number=signal.SIGINT): kill(own, number)\n"
        "late, command.app = Late(), lambda *args, **kwargs: 3\n"
        "command.main()\n"
    )
    run = subprocess.run([sys.executable, "-m", "late"], cwd=tmp_path, check=False, capture_output=True)
    assert (run.returncode, run.stderr) == (3, b"")


def test_ctrl_c_while_modules_load_exits_130(model: Path) -> None:
    """In the middle of loading PyTorch, which turns it into errors of its own now and then."""
    process = subprocess.Popen(
        [sys.executable, "-m", "selfensemble", "evaluate", str(model)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch_cpu" not in maps.read_text():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (
        130,
        "error: interrupted; files that were complete before are intact\n",
    )


@pytest.mark.parametrize("within", ["except KeyboardInterrupt: raise ImportError('strange')", "finally: pass",
                                    "except BaseException: pass"])  # fmt: skip
def test_modules_that_make_something_else_of_ctrl_c(tmp_path: Path, within: str) -> None:
    """An extension that fails to load, one that lets it through, one that swallows it."""
    (tmp_path / "strange.py").write_text(
        f"import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\n{within}\n"
    )
    (tmp_path / "interrupted.py").write_text(
        "import selfensemble.__main__ as command\n"
        "command.app = lambda *args, **kwargs: __import__('strange') and 0\n"
        "command.main()\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 130
    assert "strange" not in finished.stderr
    assert finished.stderr.startswith("error: interrupted")


def test_options_that_do_not_fit_are_explained_in_our_words() -> None:
    """typer checks some by pydantic, whose text it shows."""
    finished = run("evaluate", "digits-rse", "--n", "0", expect=2)
    assert "Invalid value for '--n': it must be 1 or more, got '0'" in finished.stderr


def test_a_copy_that_averages_over_flips(model: Path, tmp_path: Path) -> None:
    """Its card says so, and what was learned of the original's answers is not taken for its own."""
    packed, one_image = tmp_path / "flipped", ("--data", "digits", "--n", "2")
    run("pack", model, packed, "--data", "digits", "--flip-average")
    assert "of its mirror image, with the same noise" in (packed / "README.md").read_text()
    run("certify", packed, *one_image, "--max-draws", "500", "--out", tmp_path / "certified")
    found = json.loads((tmp_path / "certified" / "certified.json").read_text())
    levels, original = (list(rse.noise_layers(rse.load(each)).values()) for each in (packed, model))
    assert found["model"]["noise"][""] == levels[0].std == original[0].std
    again = error("pack", packed, tmp_path / "twice", "--data", "digits", "--flip-average")
    assert "averages over flips already" in again
