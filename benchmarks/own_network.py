"""A network of one's own on a folder of photos at 224, by commands alone; killed twice and resumed.

    python benchmarks/own_network.py [--images 200] [--epochs 3]

Makes that many JPEG files of about 300x260 in two classes, and trains `mynets.py:make` on them by a recipe:
RSE with adversarial training, learned levels and averaged weights. One training is left alone, another is
killed (SIGKILL) twice within an epoch and resumed; their weights are compared bit by bit. Then every
command works on the folder. Prints what each said, and fails where something differs or does not work.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

_NETWORK = """
from torch import nn


def make(width=8, classes=2):
    def block(before, after):
        return [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]

    layers = [*block(3, width), *block(width, 2 * width), *block(2 * width, 4 * width)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))
"""
_RECIPE = """
data: {source: photos, size: 224, flip: true, photos: {scale: [0.25, 1.0], jitter: 0.2}, centre: 0.875}
model:
  network: mynets.py:make
  arguments: {width: 8}
  normalize: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
noise: {init_std: 0.1, inner_std: 0.1, learn: layer, draws: 4}
defense: {name: adversarial, norm: linf, eps: 0.0157, steps: 2}
train:
  epochs: 3
  batch_size: 16
  accumulate: 2
  optimizer: adamw
  lr: 0.01
  weight_decay: 0.05
  decay_of: matrices
  warmup_epochs: 0.5
  clip: 1.0
  average: 0.9
  checkpoint_steps: 1
"""
_NAMED = ("--network", "mynets.py:make", "--network-args", '{"width": 8}')
# What is asked of the folder `trained`.
_COMMANDS = (
    "evaluate trained NAMED --protocol paper --c 0.1 --n 20",
    "doctor trained NAMED --n 10 --steps 3 --eot 2",
    "certify trained NAMED --n 20 --max-draws 500",
    "tune trained NAMED --n 20 --levels 0:0,0.1:0.1",
    "tune trained NAMED --n 20 --levels 0.1:0.1 --epochs 1 --out tuned",
    "calibrate trained NAMED --data more --n 200 --epsilon 0.3 --most 4 --precision float32",
    "calibrate trained NAMED --data more --n 200 --sets --precision float32",
    "predict photos/dark --model trained NAMED --stop calibrated --sets",
    "export trained NAMED --out trained.onnx",
    "card trained NAMED --evaluation runs/trained-paper --certificate runs/trained-certified-mean",
    "report runs/trained-paper runs/trained-certified-mean --out report.html",
    "pack trained packed NAMED",
)


def make_photos(root: Path, count: int, seed: int) -> None:
    """Dark and bright ones, of a size each."""
    chance = np.random.default_rng(seed)
    for number in range(count):
        kind = number % 2
        place = root / ("dark", "bright")[kind] / f"{number:04}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        small = (chance.integers(0, 160, (26, 30, 3)) + 60 * kind).astype(np.uint8)
        sides = (int(chance.integers(280, 320)), int(chance.integers(240, 280)))
        Image.fromarray(small).resize(sides).save(place, quality=85)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "selfensemble", *arguments]


def done(root: Path, *arguments: str) -> None:
    """Print what a command says; an error where it did not do its work."""
    began = time.monotonic()
    finished = subprocess.run(command(*arguments), cwd=root, capture_output=True, text=True, check=False)
    print(f"$ selfensemble {' '.join(arguments)}\n[{time.monotonic() - began:.0f} s, {finished.returncode}]")
    print("\n".join(finished.stdout.rstrip().splitlines()[-12:]), flush=True)
    if finished.returncode not in ((0, 3) if arguments[0] == "doctor" else (0,)):  # 3: a check fails
        raise SystemExit(finished.stderr)


def kill_in_epoch(root: Path, steps: int, *arguments: str) -> None:
    """Run a training, and kill it so many steps after its first checkpoint."""
    running = subprocess.Popen(
        command(*arguments), cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoint, seen, last = root / arguments[arguments.index("--out") + 1] / "checkpoint.pt", 0, 0
    while seen < steps:
        if running.poll() is not None:
            raise SystemExit(f"the training ended by itself, status {running.returncode}")
        now = checkpoint.stat().st_mtime_ns if checkpoint.exists() else last
        seen, last = seen + (now != last), now
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    print(f"killed after {seen} more checkpoints, status {running.wait()}", flush=True)


def train_both(root: Path, epochs: int) -> None:
    """One training that is left alone, and one that is killed twice."""
    long = ("--set", f"train.epochs={epochs}")
    done(root, "train", "my.yaml", "--out", "alone", *long)
    kill_in_epoch(root, 2, "train", "my.yaml", "--out", "trained", *long)
    kill_in_epoch(root, 3, "train", "my.yaml", "--out", "trained", "--resume", *long)
    done(root, "train", "my.yaml", "--out", "trained", "--resume", *long, "--set", "data.workers=1")
    weights = [(root / folder / "model.safetensors").read_bytes() for folder in ("alone", "trained")]
    print(
        f"killed twice and resumed: {'bit-equal' if weights[0] == weights[1] else 'OTHER WEIGHTS'}",
        flush=True,
    )
    if weights[0] != weights[1]:
        raise SystemExit(1)


def ask_the_server(root: Path) -> None:
    """Start it on the folder, send a photo, stop it."""
    import httpx

    port = "8765"
    serving = subprocess.Popen(
        command("serve", "trained", *_NAMED, "--port", port, "--precision", "float32"), cwd=root,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    photo = next((root / "photos" / "bright").iterdir()).read_bytes()
    try:
        for _ in range(120):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        sent = {"images": ("photo.jpg", photo, "image/jpeg")}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/predict/files", files=sent, timeout=60)
        print(f"serve: {answer.status_code} {json.dumps(answer.json())[:300]}", flush=True)
        if answer.status_code != 200:
            raise SystemExit(1)
    finally:
        serving.terminate()
        print(f"server stopped, status {serving.wait(30)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "mynets.py").write_text(_NETWORK)
        (root / "my.yaml").write_text(_RECIPE)
        make_photos(root / "photos", options.images, seed=0)
        make_photos(root / "more" / "test", 220, seed=1)
        train_both(root, options.epochs)
        for each in _COMMANDS:
            before, _, after = each.partition(" NAMED")
            done(root, *before.split(), *(_NAMED if "NAMED" in each else ()), *after.split())
        ask_the_server(root)


if __name__ == "__main__":
    main()
