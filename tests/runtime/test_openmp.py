"""The command has threads sleep while they wait, unless the environment says otherwise."""

import os
import subprocess
import sys

import pytest

STARTED = """
import os, sys
sys.argv = ["selfensemble"]
import selfensemble.__main__
print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_commands_set_it_before_torch_is_loaded(chosen: dict[str, str], spins: str) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
    usual = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", STARTED]
    done = subprocess.run(command, env=usual | chosen, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [spins, "False"]


def test_a_library_leaves_the_environment_alone() -> None:
    code = "import os, selfensemble, torch; print('GOMP_SPINCOUNT' in os.environ)"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
