"""Damaged and hostile files against everything that reads one.

    python -m tests.fuzzing [--cases 60000] [--seed 0] [--only NAME]

A case is a valid file with a few changes (bits, slices, numbers, values of JSON of another kind). A loader
may take it or refuse it by an error that the command prints as one line; anything else is a fault, and is
printed with the seed that repeats it. `test_fuzzing.py` runs a few hundred.
"""

import argparse
import base64
import io
import json
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import selfensemble as rse
from selfensemble.cli.arguments import read_image
from selfensemble.evaluation import Evaluation, load_protocol, read_results
from selfensemble.evaluation.certified import Certification, Settings, read_certified
from selfensemble.experiments.records import read_record
from selfensemble.experiments.tuning import levels_named
from selfensemble.runtime.errors import InputError
from selfensemble.serving.images import decode_base64, open_image
from selfensemble.training.checkpoints import CHECKPOINT
from selfensemble.training.recipe import load_recipe
from selfensemble.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "selfensemble"
REFUSALS = (InputError, ValueError, OSError)  # what `selfensemble` turns into a line and exit status 2
_TOKENS = (
    b"", b"\0", b"-1", b"0", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'"', b"'", b"\n", b"\xff\xfe",
    b"9" * 30, b": ", b"&a [*a]", b"!!python/object:os.system", b"../../../etc/passwd", b"\x80\x05",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**70, 0.5, -0.5, 1e308, "", "x", "\0", "../../x", "x" * 5000, [], [[]], {},
    {"a": 1}, [1, "a", None], "NaN",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Files to begin with, and what reads one: a path, or the bytes themselves."""

    name: str
    seeds: list[bytes]
    read: Callable[[bytes], object]
    share: float = 1.0  # of the cases


def changed(data: bytes, chance: random.Random) -> bytes:
    """The bytes after one to four changes."""
    if chance.random() < 0.5:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            pass
        else:
            for _ in range(chance.randint(1, 3)):
                value = _other_value(value, chance)
            return json.dumps(value).encode()
    changing = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(changing) + 1)
        # Headers are short and matter most.
        start = min(start, chance.choice((64, 1024, 2**40)))
        end = min(len(changing), start + chance.choice((0, 1, 2, 8, 100)))
        kind = chance.randrange(5)
        if kind == 0 and start < len(changing):
            changing[start] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del changing[start:end]
        elif kind == 2:
            changing[start:start] = changing[start:end]
        elif kind == 3:
            changing[start:end] = chance.choice(_TOKENS)
        elif kind == 4 and chance.random() < 0.2:
            del changing[start:]
    return bytes(changing)


def _other_value(value: Any, chance: random.Random) -> Any:
    """JSON with something in it of another kind."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        kind = chance.random()
        if kind < 0.1:
            return {each: value[each] for each in value if each != key}
        if kind < 0.15:
            return value | {chance.choice(("x", "", "__class__", key + " ")): chance.choice(_VALUES)}
        return value | {key: _other_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        return [*value[:place], _other_value(value[place], chance), *value[place + 1 :]]
    return chance.choice(_VALUES)


def targets(place: Path) -> list[Target]:
    """Every loader, with valid files that are made in `place`."""
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (12, 10, 3), dtype=np.uint8))
    pictures = []
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        pictures.append(buffer.getvalue())
    golden = ROOT / "tests" / "golden" / "v1"
    test = rse.load_data("digits", "test")
    ensemble = rse.load("digits-rse")
    protocol = load_protocol("demo-honest")
    small = {"images": 2, "attacks": protocol.attacks[-1:], "checks": False}
    Evaluation(ensemble, test, protocol.model_copy(update=small), place / "evaluation").run()
    certifying = Settings.model_validate({"images": 2, "n": 20, "n0": 5})
    Certification(ensemble, test, certifying, place / "certified").run()
    recipe = load_recipe("digits-rse", ["train.epochs=1", "model.width=0.05", "train.precision='no'"])
    Trainer(recipe, place / "trained").run()
    records = ROOT / "docs" / "results" / "draws"

    def in_folder(
        name: str, others: Path | None, read: Callable[[Path], object]
    ) -> Callable[[bytes], object]:
        folder = place / f"fuzz-{name}"
        folder.mkdir(exist_ok=True)
        for other in others.iterdir() if others is not None else ():
            if other.is_file():
                (folder / other.name).write_bytes(other.read_bytes())

        def write_and_read(data: bytes) -> object:
            (folder / name).write_bytes(data)
            return read(folder)

        return write_and_read

    def artefact(name: str) -> Target:
        return Target(f"artefact {name}", [(golden / name).read_bytes()], in_folder(name, golden, rse.load))

    split = place / "pictures" / "test" / "class"
    split.mkdir(parents=True)

    def folder_of_images(data: bytes) -> object:
        (split / "a.png").write_bytes(data)
        return rse.load_data(str(place / "pictures"), "test", size=8)

    def parquet(folder: Path) -> object:
        return rse.load_data(str(folder), "test")

    return [
        Target("image", pictures, lambda data: open_image(data, (3, 8, 8), 10_000), 4),
        Target("image file", pictures,
               in_folder("a.png", None, lambda folder: read_image(folder / "a.png", (3, 8, 8))), 4),
        Target("base64", [base64.b64encode(pictures[0]), b"data:image/png;base64,AAAA"],
               lambda data: decode_base64(data.decode("latin-1")), 4),
        Target("folder of images", pictures, folder_of_images, 0.3),
        Target("parquet", [_parquet(pictures[:1] * 3)], in_folder("test-0.parquet", None, parquet), 0.3),
        artefact("config.json"),
        artefact("model.safetensors"),
        Target("recipe", [path.read_bytes() for path in (PACKAGE / "training/recipes").glob("*.yaml")],
               in_folder("r.yaml", None, lambda folder: load_recipe(str(folder / "r.yaml")))),
        Target("protocol",
               [path.read_bytes() for path in (PACKAGE / "evaluation/protocols").glob("*.yaml")],
               in_folder("p.yaml", None, lambda folder: load_protocol(str(folder / "p.yaml")))),
        Target("results", [(place / "evaluation" / "results.json").read_bytes()],
               in_folder("results.json", None, read_results)),
        Target("certificates", [(place / "certified" / "certified.json").read_bytes()],
               in_folder("certified.json", None, read_certified)),
        Target("record", [(records / "rse.json").read_bytes()],
               in_folder("rse.json", records, lambda folder: read_record(folder, "rse")), 0.3),
        Target("checkpoint", [(place / "trained" / CHECKPOINT).read_bytes()],
               in_folder(CHECKPOINT, place / "trained",
                         lambda folder: Trainer(recipe, folder, resume=True)), 0.2),
        Target("levels", [b"0.1:0.05,0.2:0.1"], lambda data: levels_named(data.decode("latin-1")), 2),
    ]  # fmt: skip


def _parquet(pictures: list[bytes]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"img": {"bytes": each, "path": None}, "label": number % 2} for number, each in enumerate(pictures)
    ]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def fuzz(target: Target, cases: int, seed: int) -> tuple[int, list[str]]:
    """How many cases were refused, and the faults."""
    refused, faults = 0, []
    for case in range(cases):
        chance = random.Random(f"{target.name} {seed} {case}")
        data = changed(chance.choice(target.seeds), chance)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.read(data)
        except REFUSALS as error:
            refused += 1
            if not str(error).strip():
                faults.append(f"{target.name}, case {case}: {type(error).__name__} without a word")
        except Exception:
            faults.append(f"{target.name}, case {case}:\n{traceback.format_exc(limit=-4)}")
    return refused, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=60_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["SELFENSEMBLE_CACHE"] = f"{place}/cache"
        every = targets(Path(place))
        chosen = [target for target in every if options.only in (None, target.name)]
        total = sum(target.share for target in chosen)
        count, faults = 0, []
        for target in chosen:
            began, cases = time.perf_counter(), round(options.cases * target.share / total)
            refused, found = fuzz(target, cases, options.seed)
            count += cases
            faults += found
            seconds = time.perf_counter() - began
            print(
                f"{target.name}: {cases} cases, {refused} refused, {len(found)} faults, {seconds:.0f} s",
                flush=True,
            )
    for fault in faults[:20]:
        print(fault)
    print(f"{count} cases, {len(faults)} faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
