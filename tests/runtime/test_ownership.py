"""A run owns its folder: of two at once the second is refused, and a crash leaves no lock behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import selfensemble as rse
from selfensemble.evaluation.certified import Certification
from selfensemble.evaluation.certified import Settings as Certifying
from selfensemble.evaluation.protocol import load_protocol
from selfensemble.evaluation.runner import Evaluation
from selfensemble.runtime.ownership import LOCK, FolderInUseError, owned
from selfensemble.training.recipe import load_recipe
from selfensemble.training.trainer import Trainer

from ..command import error

HOLD = """
import sys, time
from pathlib import Path
from selfensemble.runtime.ownership import owned
with owned(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with owned(folder):
        with pytest.raises(FolderInUseError, match=f"in use by process {os.getpid()}"), owned(folder):
            pass
        with owned(folder, wanted=False):  # another process of the same run
            pass
        with owned(tmp_path / "other"):
            pass
        assert (folder / LOCK).exists()
    assert list(folder.iterdir()) == []
    with owned(folder):
        pass


FORK = """
import os, sys, time
from pathlib import Path
from selfensemble.runtime.ownership import owned
with owned(Path(sys.argv[1])):
    child = os.fork()  # as the workers that decode images
    if child == 0:
        time.sleep(60)
    print(child, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_that_outlives_its_run_holds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORK, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        with pytest.raises(FolderInUseError), owned(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(child, 0)  # it lives
        until = time.monotonic() + 30  # it lets go as soon as it runs
        while True:
            try:
                with owned(tmp_path):
                    break
            except FolderInUseError:
                assert time.monotonic() < until
                time.sleep(0.05)
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_a_crash_lets_go(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(FolderInUseError, match=f"process {process.pid}"), owned(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / LOCK).exists()  # but nobody holds it
    with owned(tmp_path):
        pass


def test_of_many_at_once_one_is_in(tmp_path: Path) -> None:
    """Forty threads, twenty times each: never two within, whoever removes the file of the lock meanwhile."""
    within, most, entered = 0, 0, 0
    counting = threading.Lock()

    def work() -> None:
        nonlocal within, most, entered
        for _ in range(20):
            try:
                with owned(tmp_path):
                    with counting:
                        within += 1
                        most, entered = max(most, within), entered + 1
                    with counting:
                        within -= 1
            except FolderInUseError:
                pass

    threads = [threading.Thread(target=work) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert entered >= 20


def test_runs_hold_their_folders(tmp_path: Path) -> None:
    """Training, evaluation, certification and commands: refused while another works there."""
    ensemble, data = rse.load("digits-rse"), rse.load_data("digits", "test")
    recipe = load_recipe("digits-rse", ["train.epochs=1", "model.width=0.1"])
    evaluation = Evaluation(ensemble, data, load_protocol("paper"), tmp_path / "evaluated")
    certification = Certification(ensemble, data, Certifying(images=2, n=10, n0=2), tmp_path / "certified")
    trained = tmp_path / "trained"
    trainer = Trainer(recipe, trained)
    for folder, run in (
        (evaluation.out, evaluation.run), (certification.out, certification.run), (trained, trainer.run),
    ):  # fmt: skip
        with owned(folder), pytest.raises(FolderInUseError):
            run()
    with owned(trained):
        assert "in use by process" in error("train", "digits-rse", "--out", trained)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        Trainer(recipe, tmp_path / "file").run()
    with owned(tmp_path / "demo"):
        assert "in use by process" in error("demo", "--out", tmp_path / "demo")
    with owned(tmp_path / "tuned"):
        assert "in use by process" in error("tune", "digits-rse", "--out", tmp_path / "tuned")
    certification.run()
    assert not (certification.out / LOCK).exists()


def test_a_run_that_ended_meanwhile_is_not_lost(tmp_path: Path) -> None:
    """Two looked at an empty folder; the second begins when the first has saved its network."""
    recipe = load_recipe("digits-rse", ["train.epochs=1", "model.width=0.1"])
    first, second = Trainer(recipe, tmp_path), Trainer(recipe, tmp_path)
    first.run()
    saved = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds a run already"):
        second.run()
    assert (tmp_path / "model.safetensors").read_bytes() == saved
