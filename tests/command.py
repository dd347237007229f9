"""The command `selfensemble` without a process of its own, each of which spends seconds on loading PyTorch.

What is about processes (signals, limits, ranks) starts real ones.
"""

import io
import subprocess
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

from selfensemble.__main__ import main


def call(*arguments: str | float | Path) -> subprocess.CompletedProcess[str]:
    """What the command prints, and its exit status."""
    command = ["selfensemble", *map(str, arguments)]
    output, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch("sys.argv", command),
        mock.patch.dict("os.environ", COLUMNS="120"),
        warnings.catch_warnings(),
        redirect_stdout(output),
        redirect_stderr(errors),
        pytest.raises(SystemExit) as stop,
    ):
        main()
    status = stop.value.code
    assert isinstance(status, int)
    return subprocess.CompletedProcess(command, status, output.getvalue(), errors.getvalue())


def run(*arguments: str | float | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """The same of a call that has to end with this status."""
    finished = call(*arguments)
    assert finished.returncode == expect, finished.stdout + finished.stderr
    return finished


def error(*arguments: str | float | Path) -> str:
    """The one line of error that a wrong call prints, behind what it reported of its progress."""
    finished = run(*arguments, expect=2)
    *_, line = finished.stderr.strip().splitlines()
    assert "Traceback" not in finished.stderr
    assert line.startswith("error: ")
    assert finished.stdout == ""
    return line
