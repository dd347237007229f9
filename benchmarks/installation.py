"""The built wheel in a fresh environment: what it takes to install, and whether it works there.

    python -m build && python benchmarks/installation.py dist/*.whl [--whole] [--out FOLDER]

torch is installed first, and not counted. Then come the wheel alone, timed, and the first code of the README.
`--whole` goes on with every extra: the demo, and the tests in `TESTS`, away from the repository.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("artefacts/test_storage.py", "certainty/test_bounds.py", "ensemble/test_ensemble.py", "noise")


class Fresh:
    """A new virtual environment within `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", folder / "environment"], check=True)
        self.python = folder / "environment" / "bin" / "python"
        self.own = self.packages()

    def run(self, *arguments: str) -> float:
        """Seconds that Python takes with these arguments; no path leads to the repository."""
        hidden = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        began = time.monotonic()
        subprocess.run([str(self.python), *arguments], check=True, cwd=self.folder, env=hidden)
        return time.monotonic() - began

    def install(self, *wanted: str) -> float:
        """Seconds that pip takes, within the versions that the tests run with."""
        pins = str(ROOT / "constraints.txt")
        return self.run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", pins, *wanted)

    def packages(self) -> set[str]:
        """Names of what is installed."""
        command = [str(self.python), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return {each["name"].lower() for each in found}

    def megabytes(self) -> float:
        """Of everything in the environment."""
        files = (self.folder / "environment").rglob("*")
        return sum(file.lstat().st_size for file in files if file.is_file()) / 1e6


def first_code(page: Path) -> str:
    """The first Python block of a page."""
    found = re.search(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"no Python code in {page}")
    return found[1]


def measure(fresh: Fresh, wheel: Path) -> dict[str, object]:
    """What the wheel alone takes beside torch, and the first code of the README."""
    with_torch = {"seconds": fresh.install("torch"), "packages": sorted(fresh.packages() - fresh.own)}
    before, size = fresh.packages(), fresh.megabytes()
    seconds = fresh.install(str(wheel))
    return {
        "torch": with_torch,
        "seconds": seconds,
        "megabytes": fresh.megabytes() - size,
        "packages": sorted(fresh.packages() - before),
        "first code, seconds": fresh.run("-c", first_code(ROOT / "README.md")),
    }


def check_whole(fresh: Fresh, wheel: Path) -> None:
    """The demo and some tests of what is installed, with every extra."""
    fresh.install(f"{wheel}[all]", "pytest", "hypothesis", "transformers")
    fresh.run("-m", "selfensemble", "demo", "--out", "demo")
    shutil.copytree(ROOT / "tests", fresh.folder / "tests")
    fresh.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in TESTS))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        fresh = Fresh(Path(place))
        found = measure(fresh, options.wheel.resolve())
        print(json.dumps(found, indent=2), flush=True)
        if options.whole:
            check_whole(fresh, options.wheel.resolve())
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "installation.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
