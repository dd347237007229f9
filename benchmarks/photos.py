"""Memory and waiting of training and evaluation on many photos.

    python benchmarks/photos.py [--images 20000] [--side 224]

Makes that many JPEG files, trains a small network on them for an epoch and evaluates it on as many, each in a
process of its own, and prints the largest memory of all its processes together (proportional shares of what
they share), in MiB.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

_NETWORK = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 7, stride=4), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=4), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))
"""
_PROTOCOL = """
attacks: [{attack: fgsm, eps: [0.03]}]
judge: {seeds: 1, queries: 1}
checks: false
images: 1000000
shard: 100
"""
_RECIPE = """
data: {source: photos, size: 224, stream: true, flip: true, photos: {scale: [0.25, 1]}}
model: {network: "mynets.py:make"}
noise: {init_std: 0.1, inner_std: 0.05, draws: 1}
train: {epochs: 1, batch_size: 64, lr: 0.01}
"""


def make_photos(root: Path, count: int, side: int) -> None:
    """Half dark and half bright, in `train` and, the same files, in `test`."""
    chance = np.random.default_rng(0)
    for number in range(count):
        place = root / "train" / "ab"[number % 2] / f"{number:06}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        small = chance.integers(0, 128, (28, 28, 3), dtype=np.uint8) + 100 * (number % 2)
        Image.fromarray(small.astype(np.uint8)).resize((side, side)).save(place, quality=85)
    (root / "test").symlink_to(root / "train")


def memory_of(process: int) -> int:
    """KiB of a process and its children, what they share counted once."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    own = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return own + sum(map(_memory_if_there, map(int, children)))


def _memory_if_there(process: int) -> int:
    try:
        return memory_of(process)
    except (OSError, StopIteration):  # it has ended
        return 0


def measured(root: Path, *arguments: str) -> None:
    """Run a command of the program, and say what it took."""
    began, most = time.monotonic(), 0
    running = subprocess.Popen(
        [sys.executable, "-m", "selfensemble", *arguments], cwd=root, stdout=subprocess.PIPE, text=True
    )
    while running.poll() is None:
        most = max(most, _memory_if_there(running.pid))
        time.sleep(0.5)
    output = running.stdout.read() if running.stdout is not None else ""
    said = [line for line in output.splitlines() if "aiting" in line or "no attack" in line]
    took = time.monotonic() - began
    print(f"{arguments[0]}: {most / 1024:.0f} MiB, {took:.0f} s, status {running.returncode}")
    print("\n".join(said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=224)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "mynets.py").write_text(_NETWORK)
        (root / "quick.yaml").write_text(_PROTOCOL)
        (root / "my.yaml").write_text(_RECIPE)
        make_photos(root / "photos", options.images, options.side)
        measured(root, "train", "my.yaml", "--out", "run")
        named = ("--network", "mynets.py:make")
        measured(root, "evaluate", "run", *named, "--protocol", "quick.yaml", "--out", "evaluation")


if __name__ == "__main__":
    main()
