"""Ctrl-C in the first moments of a command, wherever they find it: it ends with 130 and one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import selfensemble

INTERRUPTED = "error: interrupted; files that were complete before are intact\n"
# As pip writes it.
SCRIPT = "import re\nimport sys\nfrom selfensemble.__main__ import main\nsys.exit(main())\n"
# Read by Python as it starts: Ctrl-C when a module is looked for, or at a line of a file of ours.
STARTED = """
import os, signal, sys

where = os.environ["INTERRUPT"]

class Finder:
    def find_spec(name, path=None, target=None):
        if name == where:
            os.kill(os.getpid(), signal.SIGINT)

def trace(frame, event, argument):
    file, _, number = where.partition(":")
    if frame.f_code.co_filename.replace(os.sep, "/").endswith(f"selfensemble/{file}"):
        here = number and frame.f_code.co_name == "<module>" and frame.f_lineno >= int(number)
        if event == "line" and here:
            sys.settrace(None)
            os.kill(os.getpid(), signal.SIGINT)
        return trace

sys.meta_path.insert(0, Finder)
if ":" in where:
    sys.settrace(trace)
"""


def lines(file: str) -> list[str]:
    """Some lines of a file of the package that are run while it is imported, once Ctrl-C is taken care of."""
    text = (Path(selfensemble.__file__).parent / file).read_text().splitlines()
    first = text.index("    _end_at_once()") + 2 if file == "__init__.py" else 1
    places = [
        n for n, line in enumerate(text, 1) if n > first and line.startswith(("from", "import", "if", "_"))
    ]
    return [f"{file}:{n}" for n in places[::5] + places[-1:]]


MOMENTS = [
    "selfensemble.__main__", "selfensemble.runtime", "selfensemble.runtime.memory", "rich",
    "selfensemble.cli.base",
    *lines("__init__.py"), *lines("__main__.py"),
]  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="signals are others there")
@pytest.mark.parametrize("kind", ["module", "script"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_from_the_first_line_on(moment: str, kind: str, tmp_path: Path) -> None:
    if kind == "script" and moment == lines("__main__.py")[-1]:
        return  # which is of python -m alone
    (tmp_path / "sitecustomize.py").write_text(STARTED)
    script = tmp_path / "bin" / "selfensemble"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    places = [str(tmp_path), str(Path(selfensemble.__file__).parents[1])]
    finished = subprocess.run(
        [sys.executable, *(("-m", "selfensemble") if kind == "module" else (str(script),)), "info"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places), "INTERRUPT": moment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (finished.returncode, finished.stderr) == (130, INTERRUPTED)


def test_a_library_leaves_signals_alone(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import signal, selfensemble\nassert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    subprocess.run([sys.executable, "-m", "own"], cwd=tmp_path, check=True)
