"""Records of experiments: facts and their table, which belong together."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from selfensemble.experiments.records import Facts, Record, read_record, write_record
from selfensemble.experiments.units import Units


def record(value: str) -> Record:
    nothing: dict[str, Any] = {}
    facts = Facts(
        experiment="draws", network="rse", title=f"RSE {value}", scale="quick", seed=0, draws=2,
        source="digits", recipe=nothing, training=nothing, settings=nothing, entries=nothing,
        provenance=nothing, model="sha256:a", data="sha256:b",
    )  # fmt: skip
    return Record(facts, {"correct": [value, value]})


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_record(tmp_path, record("1"))
    found = read_record(tmp_path, "rse")
    assert found is not None
    assert (found.facts, found.columns) == (record("1").facts, record("1").columns)
    # As earlier versions wrote it.
    values = json.loads((tmp_path / "rse.json").read_text())
    del values["table"]
    (tmp_path / "rse.json").write_text(json.dumps(values))
    assert read_record(tmp_path, "rse") is not None


def test_units_without_what_they_are_of_are_refused(tmp_path: Path) -> None:
    units = Units(tmp_path, {"device": "cpu"})
    units.compute("one", lambda: {"a": torch.ones(2)})
    assert Units(tmp_path, {"device": "cpu"}).compute("one", dict)["a"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="differs in device"):
        Units(tmp_path, {"device": "cuda"})
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"run\.json is missing"):
        Units(tmp_path, {"device": "cuda"})
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("name", ["rse.csv", "rse.json"])
def test_facts_and_table_of_two_records_are_refused(tmp_path: Path, name: str) -> None:
    for folder, value in (("one", "1"), ("other", "0")):
        write_record(tmp_path / folder, record(value))
    shutil.copy(tmp_path / "other" / name, tmp_path / "one" / name)
    with pytest.raises(
        ValueError, match=r"rse\.csv is not the one that rse\.json was written with: remove both"
    ):
        read_record(tmp_path / "one", "rse")


def test_a_table_that_cannot_be_replaced_leaves_the_earlier_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record(tmp_path, record("1"))
    replace = Path.replace

    def refused(self: Path, target: Path) -> Path:
        if target.suffix == ".csv":
            raise PermissionError(13, "in use")
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refused)
        with pytest.raises(PermissionError):
            write_record(tmp_path, record("0"))
    found = read_record(tmp_path, "rse")
    assert found is not None
    assert (found.facts, found.columns) == (record("1").facts, record("1").columns)
