"""Executes the notebooks in this folder, and writes what they print and draw into them and the overview.

python docs/tutorials/execute.py [NAME ...]     # needs the extra `docs`; minutes
"""

import argparse
import base64
import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
PICTURES = FOLDER.parent / "assets" / "tutorials"
NAMES = ("harden", "judge", "certify", "report")


def executed(name: str) -> Any:
    """The notebook as it comes out of a fresh kernel, in a folder of its own.

    Raises:
        CellExecutionError: a cell failed; the message shows where.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    with tempfile.TemporaryDirectory() as place:
        client = NotebookClient(
            notebook, timeout=300, record_timing=False, resources={"metadata": {"path": place}},
            extra_arguments=["--InlineBackend.rc={'figure.dpi': 80, 'savefig.dpi': 80}"],
        )  # fmt: skip
        client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main() -> None:
    """Execute those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    for name in parser.parse_args().names:
        notebook = executed(name)
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        PICTURES.joinpath(f"{name}.png").write_bytes(base64.b64decode(last_picture(notebook)))


def last_picture(notebook: Any) -> str:
    """The one that the overview shows, as base64."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    found: str = [each["data"]["image/png"] for each in outputs if "image/png" in each.get("data", {})][-1]
    return found


if __name__ == "__main__":
    main()
