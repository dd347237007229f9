"""A few hundred cases of `tests/fuzzing.py`; tens of thousands are a command, see there."""

from pathlib import Path

import pytest

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
