"""Throughput of certificates: against raw noisy passes, and against the published procedure.

    python benchmarks/certification.py [--width 0.5] [--images 256] [--n 100] [--rounds 5] [--out FOLDER]

The published procedure (Cohen et al., ICML 2019) takes one image at a time: a batch of 1,000 copies, noise
for each, the argmax of each counted. It runs here in float32 as published, and on the same optimised network.
"""

from functools import partial

import numpy as np
import torch
from timing import Case, arguments, in_turn, medians, parsed, ratio, report, settings
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.certainty.certification import certificates

STD = 0.25
BATCH = 1000


@torch.no_grad()
def published(model: nn.Module, image: Tensor, n: int) -> np.ndarray:
    """`_sample_noise` of the published code: counts of the classes."""
    counts = np.zeros(10, dtype=int)
    for start in range(0, n, BATCH):
        size = min(BATCH, n - start)
        batch = image.repeat((size, 1, 1, 1))
        noise = torch.randn_like(batch) * STD
        for label in model(batch + noise).argmax(1).numpy():
            counts[label] += 1
    return counts


@torch.no_grad()
def raw(ensemble: rse.SelfEnsemble, images: Tensor, n: int) -> None:
    """As many noisy passes, without asking what they say."""
    for _ in range(n):
        for part in images.split(128):
            ensemble.draw_logits(part)


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--n", type=int, default=100)
    options = parsed(parser)
    torch.manual_seed(0)
    network = rse.create_model("vgg16", width=options.width).eval()
    images = torch.rand(options.images, 3, 32, 32, device="cpu")
    smoothed = rse.SelfEnsemble(
        rse.create_model("vgg16", width=options.width), rse.NoiseConfig(STD, 0.0)
    ).eval()
    noisy = rse.SelfEnsemble(rse.create_model("vgg16", width=options.width), rse.NoiseConfig(STD, 0.1)).eval()
    quiet = rse.optimize(rse.SelfEnsemble(network, rse.NoiseConfig(0, 0)).eval(), images)
    cases: dict[str, Case] = {}
    for name, ensemble in (("noise on the image", smoothed), ("noise inside as well", noisy)):
        fast = rse.optimize(ensemble, images)
        cases[f"raw passes, {name}"] = partial(raw, fast, images, options.n)
        for method in ("vote", "mean"):
            cases[f"{method}, {name}"] = partial(certificates, fast, images, (method,), n0=2, n=options.n - 2)
    count = options.images * options.n  # as many passes
    for name, model in (("float32", network), ("optimised", quiet.model)):
        cases[f"published, {name}"] = partial(published, model, images[0], count)
    seconds = in_turn(cases, options.rounds, warm_up=1)
    pairs = {
        f"raw / {method}, {name}": (f"raw passes, {name}", f"{method}, {name}")
        for name in ("noise on the image", "noise inside as well")
        for method in ("vote", "mean")
    }
    for name in ("float32", "optimised"):
        pairs[f"published {name} / vote"] = (f"published, {name}", "vote, noise on the image")
    ratios = {name: ratio(seconds, *pair) for name, pair in pairs.items()}
    rows = [[name, f"{1e6 * value / count:.1f}"] for name, value in medians(seconds).items()]
    rows += [[name, f"{value:.2f}"] for name, value in ratios.items()]
    report(
        "certification",
        f"VGG16, width {options.width:g}, {options.images} images, {options.n} draws, "
        f"{options.threads} threads",
        ["", "microseconds a pass of one image, or ratio"],
        rows,
        {"settings": settings(options), "seconds": seconds, "ratios": ratios},
        options.out,
    )


if __name__ == "__main__":
    main()
