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
