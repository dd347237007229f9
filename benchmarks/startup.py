"""How long `selfensemble --help`, `info` and `predict` of an image take, and what is added to `import torch`.

    python benchmarks/startup.py [--rounds 15] [--out FOLDER]

Fresh processes in turn; files are in the system's cache after the first rounds, which are not counted.
Modules have bytecode, as installed ones have: what a clone compiles once, or at every start where the
environment sets PYTHONDONTWRITEBYTECODE, is not counted either.
"""

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from PIL import Image
from timing import arguments, in_turn, medians, parsed, ratio, report

_BYTECODE = tempfile.mkdtemp()


def process(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = _BYTECODE
    subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    options = parsed(parser)
    command = ("-m", "selfensemble")
    picture = Path(tempfile.mkdtemp()) / "picture.png"
    Image.new("L", (8, 8), 128).save(picture)
    everything = "import torch, selfensemble as rse; [getattr(rse, name) for name in rse.__all__]"
    seconds = in_turn(
        {
            "python": partial(process, "-c", ""),
            "selfensemble --help": partial(process, *command, "--help"),
            "selfensemble info": partial(process, *command, "info"),
            "selfensemble info digits-rse": partial(process, *command, "info", "digits-rse"),
            "selfensemble predict": partial(
                process, *command, "predict", str(picture), "--model", "digits-rse"
            ),
            "import torch": partial(process, "-c", "import torch"),
            "import torch, selfensemble": partial(process, "-c", "import torch, selfensemble"),
            "all public names": partial(process, "-c", everything),
        },
        options.rounds,
    )
    middle = medians(seconds)
    added = {
        "import selfensemble adds": middle["import torch, selfensemble"] - middle["import torch"],
        "all public names add": middle["all public names"] - middle["import torch"],
        "predict adds": middle["selfensemble predict"] - middle["import torch"],
    }
    rows = [[name, f"{value:.2f}"] for name, value in (middle | added).items()]
    times = ratio(seconds, "selfensemble predict", "import torch")
    rows.append(["predict, times the import of torch in its round", f"{times:.3f}"])
    report(
        "startup", f"Seconds, medians of {options.rounds} rounds", ["", "s"], rows,
        {"seconds": seconds, "added": added, "predict_times_import": times}, options.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
