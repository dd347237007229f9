"""What an experiment stores of one network: a JSON file of facts and a CSV line an image.

Tables and plots are made from these files alone.
"""

import csv
import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ..runtime.files import atomic_pair, digest_of, read_versioned, to_json

FORMAT, FORMAT_VERSION = "selfensemble-experiment", 1


class Facts(BaseModel):
    """What stands in NETWORK.json.

    Attributes:
        experiment, network, title, published: which network of which experiment.
        scale: name of the scale.
        seed: of attacks and judge.
        source: where the images come from.
        recipe, draws: the network's; noise draws an answer.
        training: what its training said of itself: accuracy, seconds, provenance.
        changed: what was changed of the network after its training, for people; empty for nothing.
        model, data: digests of the evaluated network and the first images.
        test: digest of the whole test set; None in files of versions that did not write it.
        settings: of the measurement.
        table: "sha256:..." of the table that it was written with; None where a record was read, and in files
            of versions that did not write it.
        entries: what the columns of the table stand for.
        provenance: versions, hardware and commit of the measurement.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["selfensemble-experiment"] = "selfensemble-experiment"
    format_version: int = FORMAT_VERSION
    experiment: str
    network: str
    title: str
    published: str | None = None
    scale: str
    seed: int
    source: str
    recipe: dict[str, Any]
    draws: int
    training: dict[str, Any]
    changed: str = ""
    model: str
    data: str
    test: str | None = None
    settings: dict[str, Any]
    table: str | None = None
    entries: dict[str, dict[str, Any]]
    provenance: dict[str, Any]


class Record:
    """Facts and the table of all images, by column."""

    def __init__(self, facts: Facts, columns: dict[str, list[str]]) -> None:
        self.facts, self.columns = facts, columns

    def numbers(self, name: str) -> NDArray[np.float64]:
        """(N,) a column of numbers."""
        return np.array([float(value) for value in self.columns[name]])

    def bits(self, name: str) -> NDArray[np.bool_]:
        """(N, S) a column of words of S zeros and ones."""
        return np.array([[digit == "1" for digit in word] for word in self.columns[name]])


def column(values: Any) -> list[str]:
    """Numbers as they are stored."""
    array = np.asarray(values)
    if array.dtype.kind in "biu":
        return [str(int(value)) for value in array]
    return [f"{float(value):.6g}" for value in array]


def words(bits: Any) -> list[str]:
    """(N, S) booleans as words of zeros and ones."""
    return ["".join("1" if bit else "0" for bit in row) for row in np.asarray(bits)]


def write_record(folder: Path, record: Record) -> None:
    """Write both files; they are replaced as a whole or not at all, but by a kill just between the two."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *record.columns])
    rows = zip(*record.columns.values(), strict=True)
    writer.writerows([number, *row] for number, row in enumerate(rows))
    path = folder / f"{record.facts.network}.json"
    content = text.getvalue().encode()
    written = record.facts.model_copy(update={"table": digest_of(content)})
    with atomic_pair(path, path.with_suffix(".csv")) as (facts, table):
        facts.write(to_json(written.model_dump(mode="json")))
        table.write(content)


def read_record(folder: Path, network: str) -> Record | None:
    """What is stored of a network, or None.

    Raises:
        ValueError: a file is missing, damaged, foreign, written by a newer version, or of another record.
    """
    path = folder / f"{network}.json"
    if not path.is_file():
        return None
    facts = read_versioned(path, Facts, FORMAT, FORMAT_VERSION, "restore it, or run the experiment again")
    table = path.with_suffix(".csv")
    try:
        content = table.read_bytes()
        head, *rows = csv.reader(io.StringIO(content.decode(), newline=""))
        columns = dict(zip(head, map(list, zip(*rows, strict=True)), strict=True))
        del columns["image"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{table} is missing or damaged ({error}): restore it, or run the experiment again"
        ) from error
    if facts.table not in (None, digest_of(content)):
        raise ValueError(
            f"{table} is not the one that {path.name} was written with: remove both, and run the experiment "
            "again"
        )
    return Record(facts.model_copy(update={"table": None}), columns)
