"""What `benchmarks/soak.py` calls a fault, in the figures that are published and in others."""

import importlib
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "docs" / "performance"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("httpx")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("soak")


def figures(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((PUBLISHED / name).read_text(encoding="utf-8"))
    return found


def test_the_published_runs_have_no_faults(soak: Any) -> None:
    alone, disturbed = figures("soak.json"), figures("soak-disturbed.json")
    for found, other in ((alone, None), (disturbed, None), (disturbed, alone)):
        faults = soak.faults_of(found, found["settings"]["requests"], other)
        assert not any(faults.values()), faults


def test_waiting_more_than_twice_as_long_is_a_fault(soak: Any) -> None:
    alone = figures("soak.json")
    requests = alone["settings"]["requests"]
    for factor, fault in ((1.99, 0), (2.01, 1)):
        slow = alone | {"p99 ms": factor * alone["p99 ms"]}
        faults = soak.faults_of(slow, requests, alone)
        assert faults["a 99th percentile more than twice that of the run alone"] == fault
        assert sum(faults.values()) == fault
        assert not any(soak.faults_of(slow, requests, None).values())


def test_paths_of_a_machine_are_no_settings(soak: Any) -> None:
    assert soak.settings(Namespace(alone=Path("soak.json"), out=None, requests=1)) == {"requests": 1}
