"""One version everywhere, and types that others' checkers accept."""

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import selfensemble as rse

ROOT = Path(__file__).parents[1]
# What a user writes; wrong in the last line, which a checker has to say.
USER = """\
import torch

import selfensemble as rse

ensemble: rse.SelfEnsemble = rse.load("digits-rse")
images: torch.Tensor = rse.load_data("digits", "test").inputs(slice(3))
answer: rse.Prediction = ensemble.predict(images, stop="exact")
labels: torch.Tensor = answer.label
certificate: rse.Certificate = rse.certify(ensemble, images, n=100)
noise = rse.NoiseConfig(init_std=0.2, inner_std=0.1)
adversarial: torch.Tensor = rse.attacks.pgd(ensemble, images, labels, norm="l2", eps=0.5)
wrong: int = answer.label
"""


def test_the_version_is_that_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version  # type: ignore[index]
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", version)
    assert version in headings
    assert rse.__version__ == metadata.version("selfensemble")


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What writes the metadata, without the build backend that calls it."""
    backend = ModuleType("hatchling.metadata.plugin.interface")
    backend.MetadataHookInterface = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("hatch_build")


@pytest.mark.parametrize("address", ["https://example.org/owner/name", ""])
def test_the_index_shows_no_relative_address(hook: ModuleType, address: str) -> None:
    readme = (ROOT / "README.md").read_text()
    shown = hook.absolute(readme, address, "1.2.3")
    targets = re.findall(r"\]\(([^)\s]+)\)", shown)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    assert ("![" in shown) is bool(address)
    within = [target for target in re.findall(r"\]\(([^)\s]+)\)", readme) if "://" not in target]
    assert within
    if address:
        assert f"{address}/raw/v1.2.3/docs/results/honest/accuracy.svg" in targets
        assert all(f"/v1.2.3/{target}" in shown for target in within)
        assert hook.links(address, "1.2.3")["Changelog"] == f"{address}/blob/v1.2.3/CHANGELOG.md"
    else:
        assert "glossary" not in shown.replace("Glossary", "")
        assert hook.links(address, "1.2.3") == {}


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_file_of_a_user_is_checked(checker: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What mypy knows of PyTorch, by far the most of its work, is kept for the next run of the tests."""
    if find_spec(checker) is None:
        pytest.skip(f"needs {checker}")
    cache: pytest.Cache | None = getattr(request.config, "cache", None)
    known = tmp_path / "known" if cache is None else cache.mkdir("mypy")
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT / "src")]}))
    options = {"mypy": ["--strict", "--cache-dir", str(known)], "pyright": ["--pythonpath", sys.executable]}[
        checker
    ]
    done = subprocess.run(
        [sys.executable, "-m", checker, *options, "user.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"MYPYPATH": str(ROOT / "src")},
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if " error: " in line]
    assert len(errors) == 1, done.stdout + done.stderr
    assert re.search(rf"user\.py:{USER.count(chr(10))}:", errors[0]), errors
