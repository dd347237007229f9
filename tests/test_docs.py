"""Every Python example of the README and the guides runs, in order, on handwritten digits."""

import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import selfensemble as rse

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[str]:
    return BLOCK.findall((ROOT / page).read_text())


def test_there_are_examples() -> None:
    assert sum(len(blocks(page)) for page in PAGES) > 5


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page leaves to its reader is given here: a network, images, labels, a folder."""
    monkeypatch.chdir(tmp_path)
    data = rse.load_data("digits", "test")
    model = rse.create_model("small-cnn", channels=1, width=0.25)
    names: dict[str, Any] = {
        "torch": torch,
        "model": model,
        "images": data.inputs(slice(8)),
        "labels": data.labels[:8],
        "ensemble": rse.SelfEnsemble(rse.create_model("small-cnn", channels=1, width=0.25)),
    }
    # Others may warn of their own affairs.
    foreign = any(
        re.search(r"^(import|from) (lightning|transformers)", each, re.MULTILINE) for each in blocks(page)
    )
    for block in blocks(page):
        if "foolbox" in block and find_spec("foolbox") is None:
            continue  # an extra of its own
        code = "\n".join(line for line in block.splitlines() if not re.match(r"\w+ = \.\.\.", line))
        with warnings.catch_warnings():
            warnings.simplefilter("default" if foreign else "error")
            exec(compile(code, page, "exec"), names)
