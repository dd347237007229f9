"""Peak memory of `predict_proba` with 100 draws against one plain forward pass.

Each measurement is a fresh process; its peak resident memory is compared at the same network and batch.

    python benchmarks/memory.py [--batch 128] [--draws 100] [--rounds 3] [--out FOLDER]
"""

import resource
import subprocess
import sys

from timing import arguments, medians, ratio, report, settings


def measure(what: str, batch: int, draws: int) -> float:
    """Peak resident memory in MiB of this very process, after the work."""
    import torch

    import selfensemble as rse

    torch.manual_seed(0)
    model = rse.create_model("vgg16").eval()
    inputs = torch.rand(batch, 3, 32, 32, device="cpu")
    if what == "ensemble":
        rse.SelfEnsemble(model).eval().predict_proba(inputs, draws=draws)
    else:
        with torch.no_grad():
            model(inputs).softmax(dim=1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--measure", choices=["plain", "ensemble"])
    options = parser.parse_args()
    if options.measure:
        print(measure(options.measure, options.batch, options.draws))
        return
    peaks: dict[str, list[float]] = {"plain": [], "ensemble": []}
    for _ in range(options.rounds):
        for what, values in peaks.items():
            command = [sys.executable, __file__, "--measure", what]
            command += ["--batch", str(options.batch), "--draws", str(options.draws)]
            values.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    middle = medians(peaks)
    share = ratio(peaks, "ensemble", "plain")
    rows = [[name, f"{value:.1f}"] for name, value in middle.items()] + [["ensemble / plain", f"{share:.2f}"]]
    report(
        "memory",
        f"Peak resident memory, VGG16, batch {options.batch}, {options.draws} draws; medians of "
        f"{options.rounds} processes",
        ["", "MiB, or ratio"],
        rows,
        {"settings": settings(options), "peak_mib": peaks, "ratio": share},
        options.out,
    )


if __name__ == "__main__":
    main()
