"""Freed memory is kept by the command's process, in a process of its own each."""

import json
import os
import subprocess
import sys

import pytest

_PROBE = """
import json, resource, torch
from selfensemble.runtime.memory import keep_freed_memory
done = keep_freed_memory()
def use():
    parts = [torch.ones(2**20 * (1 + size)) for size in range(12)]
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(json.dumps([done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def probe(**tuning: str) -> tuple[bool, int]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", _PROBE], env=kept | tuning, capture_output=True, text=True, check=True
    )
    done, faults = json.loads(run.stdout)
    return done, faults


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_tensors_that_come_and_go_cause_few_page_faults() -> None:
    done, faults = probe()
    left, untouched = probe(MALLOC_ARENA_MAX="1")
    assert not left
    if done:  # not with another C library
        assert faults < 0.2 * untouched  # measured: 0.08, of what fragments the heap


_GARBAGE = """
import gc, json
from selfensemble.runtime.memory import collect_garbage_later
usual, searches, found = gc.get_threshold(), [0], []
gc.callbacks.append(lambda phase, info: searches.__setitem__(0, searches[0] + (phase == "start")))
collect_garbage_later(50_000)
for _ in range(2):
    searches[0] = 0
    kept = [[] for _ in range(45_000)]
    found.append(searches[0])
print(json.dumps([found, gc.get_threshold() == usual, len(gc.callbacks)]))
"""


def test_garbage_is_searched_for_late_and_then_as_usual() -> None:
    run = subprocess.run([sys.executable, "-c", _GARBAGE], capture_output=True, text=True, check=True)
    (first, second), as_before, callbacks = json.loads(run.stdout)
    assert first == 0
    assert second > 10
    assert as_before
    assert callbacks == 1
