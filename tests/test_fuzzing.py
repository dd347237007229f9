"""A few hundred cases of `tests/fuzzing.py`; tens of thousands are a command, see there; so are folders."""

import os
from pathlib import Path

import pytest

from .folder_fuzzing import fuzz_folders
from .fuzzing import fuzz, targets


def test_no_loader_fails_but_by_a_plain_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFENSEMBLE_CACHE", str(tmp_path / "cache"))
    refused, faults = 0, []
    for target in targets(tmp_path):
        few, found = fuzz(target, round(40 * min(1.0, target.share)), seed=1)
        refused += few
        faults += found
    assert faults == []
    assert refused > 100


@pytest.mark.skipif(os.name == "nt", reason="links and pipes need rights there")
def test_folders_lose_no_file_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFENSEMBLE_CACHE", str(tmp_path / "work" / "cache"))
    (tmp_path / "work").mkdir()
    refused, faults = fuzz_folders(tmp_path / "work", 40, seed=1)
    assert faults == []
    assert 0 < refused < 20
