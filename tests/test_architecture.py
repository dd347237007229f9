"""The structure: imports in one direction, files and functions of a size to read, a picture that is true."""

import ast
import os
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "selfensemble"
FILES = sorted(PACKAGE.rglob("*.py"))
# Methods of SelfEnsemble that save and load.
EXCEPTION = ("selfensemble.ensemble.ensemble", ("selfensemble.artefacts.", "selfensemble.report.packing"))


def test_no_file_needs_itself_through_others() -> None:
    """All imports: in functions and under TYPE_CHECKING, too."""
    graph = grimp.build_graph("selfensemble")
    needs = {name: set(graph.find_modules_directly_imported_by(name)) for name in graph.modules}
    assert needs["selfensemble.cli.evaluation"] > {"selfensemble.evaluation.runner"}  # inside a function
    with pytest.raises(CycleError):  # by the one exception
        TopologicalSorter(needs).prepare()
    name, above = EXCEPTION
    needs[name] = {each for each in needs[name] if not each.startswith(above)}
    TopologicalSorter(needs).prepare()


def checked(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on the package in `folder`, by the contract of pyproject.toml."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    command += ["--no-cache", str(ROOT / "pyproject.toml")]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("where", "added", "contract"),
    [
        ("noise/streams.py", "\n\ndef later():\n    from ..ensemble import stopping\n", "layers"),
        ("ensemble/draws.py", "\nif TYPE_CHECKING:\n    from ..cli.terminal import progress\n", "layers"),
        ("serving/settings.py", "\nfrom ..experiments import scales\n", "layers"),
        ("ensemble/checks.py", "\n\ndef later():\n    from . import draws\n", "circle"),
    ],
)
def test_an_import_upwards_is_found(tmp_path: Path, where: str, added: str, contract: str) -> None:
    copy = tmp_path / "selfensemble"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = checked(tmp_path)
    assert before.returncode == 0, before.stdout
    with (copy / where).open("a") as file:
        file.write(added)
    after = checked(tmp_path)
    assert after.returncode == 1
    named = {"layers": "each package imports only from those below it", "circle": "no two files"}
    assert any(line.startswith(named[contract]) and "BROKEN" in line for line in after.stdout.splitlines())
    assert f".{Path(where).stem} -> " in after.stdout  # the import is named


def test_files_and_functions_are_of_a_size_to_read() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 4
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, (path, node.name)


def test_the_picture_is_that_of_the_code() -> None:
    command = [sys.executable, str(ROOT / "docs" / "architecture.py"), "--check"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
