"""The command `selfensemble` in a process of its own that is forked where PyTorch is loaded already.

It has its own number, working folder, environment, output and memory, and signals end it as they do others.
What depends on how Python itself starts (variables that are read while modules load, the locale, Ctrl-C from
the first line on) needs `python -m selfensemble`.
"""

import atexit
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from multiprocessing import forkserver, get_context, set_forkserver_preload
from pathlib import Path
from types import ModuleType, TracebackType
from unittest import mock

import selfensemble

Argument = str | float | Path


class Forked:
    """Such a process, with what `subprocess.Popen` has.

    Args:
        arguments: of the command; or "-c", code, and arguments of that.
        cwd: its working folder.
        env: what differs in its environment.
    """

    def __init__(
        self, *arguments: Argument, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> None:
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder)
        self._files = [Path(folder) / name for name in ("output", "errors")]
        for file in self._files:
            file.touch()
        environment = os.environ | {"COLUMNS": "120"} | (env or {})
        given = ([str(each) for each in arguments], cwd or Path.cwd(), environment, self._files)
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(_PLACES)):
            forkserver.ensure_running()
        self._process = get_context("forkserver").Process(target=_command, args=given)
        with mock.patch.dict(sys.modules, __main__=ModuleType("__main__")):  # nor is pytest loaded
            self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit status; minus a signal that ended it."""
        return self._process.exitcode

    def wait(self, timeout: float = 300) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("selfensemble", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for its end: what it wrote, and its errors."""
        self.wait(timeout)
        output, errors = (file.read_text(encoding="utf-8") for file in self._files)
        return output, errors

    def __enter__(self) -> "Forked":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        self.wait()


def run_forked(
    *arguments: Argument, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What such a process wrote, and its exit status."""
    process = Forked(*arguments, cwd=cwd, env=env)
    output, errors = process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess([*map(str, arguments)], process.returncode, output, errors)


def run_ranks(*arguments: Argument, count: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """The same of the processes of one run, with the variables that torchrun gives to each of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    common["LOCAL_WORLD_SIZE"] = common["WORLD_SIZE"]
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(Forked(*arguments, env=common | {"RANK": str(k), "LOCAL_RANK": str(k)}))
            for k in range(count)
        ]
        written = [rank.communicate() for rank in ranks]
    return [
        subprocess.CompletedProcess([*map(str, arguments)], rank.wait(), *texts)
        for rank, texts in zip(ranks, written, strict=True)
    ]


_TORCHRUN = """\
import sys
import torch.distributed.run as launcher
from torch.distributed.launcher.api import elastic_launch
from tests.forked import run_here

def launch(config, entrypoint):
    config.start_method = "fork"
    return lambda unbuffered, module, name, *arguments: elastic_launch(config, run_here)(*arguments)

launcher.elastic_launch = launch
launcher.main(sys.argv[1:])
"""


def torchrun(*arguments: Argument, before: str = "", env: dict[str, str] | None = None) -> Forked:
    """What `torchrun` does, by its own code; ranks are forked as well, in their order.

    Args:
        arguments: of torchrun, "-m", "selfensemble", and arguments of that.
        before: code that the launcher runs first.
        env: what differs in the environment.
    """
    return Forked("-c", before + _TORCHRUN, *arguments, env=env)


_PLACES = [str(Path(selfensemble.__file__).parents[1]), str(Path(__file__).parents[1])]
set_forkserver_preload(["tests.preloaded"])


def _command(
    arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], files: Sequence[Path]
) -> None:
    """In the new process: what `python -m selfensemble` does."""
    assert "tests.preloaded" in sys.modules
    for number, file in enumerate(files, 1):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, str(cwd))
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.path.insert(0, str(cwd))
    run_here(*arguments)


def run_here(*arguments: str) -> None:
    """What `python -m selfensemble` does, in a process that ends with it."""
    sys.argv = ["selfensemble", *arguments]
    try:
        runpy.run_module("selfensemble", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
