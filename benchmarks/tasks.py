"""Two tasks of newcomers, timed as they run in a terminal: "I have a model", "I have a defense to judge".

    python benchmarks/tasks.py [--page docs/tasks.md]

What a newcomer brings is made first, and not counted: a trained network, and a defense of somebody else.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch.nn import functional

import selfensemble as rse
from selfensemble.runtime.provenance import provenance

_NETWORK = """\
from torch import nn


def make(width=16):
    def block(before, after):
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]

    layers = [*block(1, width), *block(width, 2 * width), nn.MaxPool2d(2), *block(2 * width, 4 * width)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))
"""
_DEFENSE = """\
from torch import nn

from mynets import make


class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = make()

    def forward(self, images):
        return self.network((images * 7).round() / 7)  # eight levels
"""
_PAGE = """\
# Two tasks in a terminal

Timed and written by `python benchmarks/tasks.py --page docs/tasks.md`: {machine}. Commands are shown with
their complete standard output. To be quick, they use few images; intervals are 95 %.

{tasks}"""


@dataclass
class Task:
    """Commands, and what they say.

    Attributes:
        heading, about: for the page.
        files: what the newcomer brings, for the page.
        commands: lines of a shell.
    """

    heading: str
    about: str
    files: dict[str, str]
    commands: tuple[str, ...]
    shown: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def run(self, folder: Path) -> None:
        """Run the commands in `folder`; a doctor that finds a fault ends with status 3, as it should."""
        surroundings = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}
        for command in self.commands:
            began = time.monotonic()
            arguments = [sys.executable, "-m", *shlex.split(command)]
            done = subprocess.run(
                arguments, cwd=folder, env=surroundings, capture_output=True, text=True, check=False
            )
            took = time.monotonic() - began
            self.seconds += took
            if done.returncode not in (0, 3):
                raise RuntimeError(f"{command}: {done.stderr}")
            said = re.sub(r"[ \t]+$", "", done.stdout, flags=re.MULTILINE).strip("\n")
            self.shown.append(f"$ {command}\n{said}\n({took:.0f} s)")
            print(self.shown[-1], flush=True)

    def page(self) -> str:
        """Markdown."""
        brought = "".join(f'```py title="{name}"\n{text}```\n\n' for name, text in self.files.items())
        shown = "\n\n".join(self.shown)
        total = f"{self.seconds:.0f} seconds in all."
        return f"## {self.heading}\n\n{self.about}\n\n{brought}```text\n{shown}\n```\n\n{total}\n"


TASKS = (
    Task(
        "I have a model",
        "You have a trained network with its weights in `my.safetensors`. These commands check it, train it "
        "further with noise, attack it and certify it.",
        {"mynets.py": _NETWORK},
        (
            "selfensemble validate mynets.py:make --weights my.safetensors --shape 1x8x8",
            "selfensemble train digits-rse --set model.network=mynets.py:make --set "
            "model.weights=my.safetensors --set train.epochs=15 --set noise.init_std=0.3 --out hardened",
            "selfensemble evaluate hardened --network mynets.py:make --protocol demo-honest --n 40 "
            "--out evaluated",
            "selfensemble certify hardened --network mynets.py:make --n 50 --max-draws 1000 --out certified",
        ),
    ),
    Task(
        "I have a defense to judge",
        "Someone claims that rounding makes the network robust. The [doctor](glossary.md#doctor) looks for "
        "misleading results, the [protocol](glossary.md#protocol) attacks, and the report shows both.",
        {"defense.py": _DEFENSE},
        (
            "selfensemble doctor defense.py:Rounded --weights rounded.safetensors --noise 0:0 --data digits "
            "--norm l2 --eps 1 --n 30",
            "selfensemble evaluate defense.py:Rounded --weights rounded.safetensors --noise 0:0 "
            "--data digits --protocol demo-honest --n 40 --out judged",
            "selfensemble report judged -o report.html",
        ),
    ),
)  # fmt: skip


def bring(folder: Path) -> None:
    """The files that the tasks begin with."""
    (folder / "mynets.py").write_text(_NETWORK, encoding="utf-8")
    (folder / "defense.py").write_text(_DEFENSE, encoding="utf-8")
    torch.manual_seed(0)
    network = rse.network_from(f"{folder / 'mynets.py'}:make")
    data = rse.load_data("digits", "train")
    sgd = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    network.train()
    for _ in range(10):
        for batch in torch.randperm(len(data), device="cpu").split(64):
            sgd.zero_grad()
            functional.cross_entropy(network(data.inputs(batch)), data.labels[batch]).backward()
            sgd.step()
    state = network.state_dict()
    safetensors.torch.save_file(state, folder / "my.safetensors")
    rounded = {f"network.{name}": value for name, value in state.items()}
    safetensors.torch.save_file(rounded, folder / "rounded.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--page", type=Path, help="file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        bring(Path(place))
        for task in TASKS:
            task.run(Path(place))
    found = provenance()
    threads, cpu = torch.get_num_threads(), found["hardware"]["cpu"]
    machine = f"{threads} thread(s) of an {cpu}, torch {torch.__version__}"
    if options.page is not None:
        tasks = "\n".join(task.page() for task in TASKS)
        options.page.write_text(_PAGE.format(machine=machine, tasks=tasks), encoding="utf-8")


if __name__ == "__main__":
    main()
