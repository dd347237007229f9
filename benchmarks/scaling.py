"""Evaluation on several processes: seconds against work, and whether a simple model foretells them.

    python benchmarks/scaling.py --data DATA [--model cifar10-vgg16-rse] [--images 256] [--out FOLDER]

The same PGD attack by torchrun on 1, 2 and 4 processes of one thread each, with a small and a large amount
of work. The model is `seconds = a + b * images * steps * EOT / workers`; a and b come from one process, and
workers are no more than there are cores. Results must be equal whatever the number of processes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import arguments, parsed, report, settings

PROTOCOL = """\
description: PGD for timing
images: {images}
shard: 16
judge: {{seeds: 1, queries: 1}}
attacks:
  - {{attack: pgd, title: PGD, norm: l2, eps: [0.5], steps: {steps}, eot: {eot}, average: probabilities}}
"""


def timed(options: Any, images: int, processes: int, place: Path) -> tuple[float, Any]:
    """Seconds of a whole run, and what it found."""
    protocol = place / f"timing-{images}.yaml"
    protocol.write_text(PROTOCOL.format(images=images, steps=options.steps, eot=options.eot))
    out = place / f"{images}-{processes}"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "-m", "selfensemble", "evaluate", options.model, "--data", options.data, "--protocol", str(protocol),
        "--precision", "bf16", "--out", str(out),
    ]  # fmt: skip
    began = time.perf_counter()
    finished = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - began
    if finished.returncode:
        raise SystemExit(finished.stderr[-2000:])
    results = json.loads((out / "results.json").read_text())
    return seconds, [results["clean"]["seeds"], [each["seeds"] for each in results["attacks"]]]


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="cifar10-vgg16-rse")
    parser.add_argument(
        "--images", type=int, default=256, help="of the large amount; the small one is a quarter"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eot", type=int, default=4)
    options = parsed(parser)
    cores = len(os.sched_getaffinity(0))
    small, large = options.images // 4, options.images
    found: dict[str, tuple[float, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        timed(options, 16, 1, Path(place))  # decodes the data, once
        for images, processes in ((small, 1), (large, 1), (large, 2), (large, 4)):
            found[f"{images} images, {processes} processes"] = timed(options, images, processes, Path(place))
    seconds = {name: each[0] for name, each in found.items()}
    work = options.steps * options.eot
    one_small, one_large, two, _ = seconds.values()
    b = (one_large - one_small) / ((large - small) * work)
    a = one_small - b * small * work
    rows = []
    for (name, measured), (images, processes) in zip(
        seconds.items(), ((small, 1), (large, 1), (large, 2), (large, 4)), strict=True
    ):
        foretold = a + b * images * work / min(processes, cores)
        rows.append([name, f"{measured:.1f}", f"{foretold:.1f}", f"{measured / foretold:.2f}"])
    equal = len({json.dumps(each[1]) for name, each in found.items() if name.startswith(f"{large} ")}) == 1
    values = {
        "a, seconds": a, "b, seconds": b, "throughput of two over one": one_large / two,
        "without what a run costs anyhow": (one_large - a) / (two - a), "results equal": equal,
    }  # fmt: skip
    rows += [
        [name, f"{value:.4g}" if not isinstance(value, bool) else str(value), "", ""]
        for name, value in values.items()
    ]
    report(
        "scaling", f"PGD, {options.steps} steps, EOT {options.eot}, {options.model}, {cores} cores",
        ["", "seconds", "the model's", "ratio"], rows,
        {"settings": settings(options), "seconds": seconds, "model": values}, options.out,
    )  # fmt: skip
    if not equal:
        raise SystemExit("results differ between numbers of processes")


if __name__ == "__main__":
    main()
