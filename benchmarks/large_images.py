"""Photos of 224 pixels: an ensemble of four architectures, the plain network, and the authors' way.

    python benchmarks/large_images.py [--only resnet-50] [--batches 1 4 32] [--rounds 5] [--out FOLDER]

Networks of transformers with random weights, ten classes, noise .2 and .1 in front of every convolution. All
cases of a network and batch take turns. *Calibrated* stops after three draws, as trained networks do on
average.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import authors
import torch
from inference import one_draw, plain, without_noise
from timing import Case, arguments, in_turn, medians, parsed, ratio, report, settings
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import selfensemble as rse
from selfensemble.ensemble.stopping import Calibrated
from selfensemble.fast.optimize import Precision

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet-50": lambda: ResNetForImageClassification(ResNetConfig(num_labels=10)),
    "convnext-t": lambda: ConvNextForImageClassification(ConvNextConfig(num_labels=10)),
    "vit-b/16": lambda: ViTForImageClassification(ViTConfig(num_labels=10)),
    "swin-t": lambda: SwinForImageClassification(SwinConfig(num_labels=10)),
}


class Logits(nn.Module):
    """Of a network of transformers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(inputs).logits
        return logits


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


@torch.no_grad()
def half(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits: Tensor = model(inputs.contiguous(memory_format=torch.channels_last))
    return logits


def cases_of(
    name: str, inputs: Tensor, draws: int, precision: Precision | None
) -> tuple[dict[str, Case], float]:
    """What takes turns, and the seconds that `optimize` takes."""
    float32, theirs = Logits(network(name)), authors.with_noise(Logits(network(name)))
    laid_out = Logits(network(name)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ensemble = rse.SelfEnsemble(network(name), draws=draws, example_inputs=inputs[:2]).eval()
    began = time.perf_counter()
    fast = rse.optimize(ensemble, inputs, precision)
    took = time.perf_counter() - began
    # An untrained network is never sure: three draws stand for what a trained one takes.
    fast.stopping = Calibrated(
        thresholds=(2.0, 2.0, 0.0), epsilon=0.05, delta=0.05, mean_draws=3, disagreement=0.04,
        images=1, reference_draws=200, precision=fast.precision,
    )  # fmt: skip
    return {
        "plain, float32": partial(plain, float32, inputs),
        "plain, bfloat16 autocast, channels last": partial(half, laid_out, inputs),
        "fast path without noise": partial(without_noise, fast, inputs),
        "fast path, one draw": partial(one_draw, fast, inputs),
        "fast path, ensemble": partial(fast.predict, inputs),
        "fast path, calibrated": partial(fast.predict, inputs, stop="calibrated"),
        "authors' ensemble": partial(authors.predict, theirs, inputs, draws),
    }, took


PAIRS = {
    "one draw / without noise": ("fast path, one draw", "fast path without noise"),
    "without noise / autocast": ("fast path without noise", "plain, bfloat16 autocast, channels last"),
    "authors' ensemble / ours": ("authors' ensemble", "fast path, ensemble"),
    "ensemble / without noise": ("fast path, ensemble", "fast path without noise"),
}


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 32])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--precision", choices=get_args(Precision), help="default: the faster one here")
    options = parsed(parser)
    found: dict[str, Any] = {}
    for name in options.only:
        rows: dict[str, list[str]] = {}
        for batch in options.batches:
            inputs = torch.rand(
                batch, 3, 224, 224, generator=torch.Generator("cpu").manual_seed(0), device="cpu"
            )
            cases, took = cases_of(name, inputs, options.draws, options.precision)
            seconds = in_turn(cases, options.rounds, warm_up=1)
            ratios = {title: ratio(seconds, *pair) for title, pair in PAIRS.items()}
            found[f"{name}, {batch}"] = {"seconds": seconds, "ratios": ratios, "optimize": took}
            for title, value in medians(seconds).items():
                rows.setdefault(f"{title}, ms", []).append(f"{1e3 * value:.0f}")
            for title, value in ratios.items():
                rows.setdefault(title, []).append(f"{value:.2f}")
            rows.setdefault("optimize, s", []).append(f"{took:.1f}")
        report(
            f"large_images_{name.replace('/', '_')}",
            f"{name} at 224x224, {options.draws} draws, {options.threads} threads, torch {torch.__version__}",
            ["batch", *map(str, options.batches)],
            [[title, *cells] for title, cells in rows.items()],
            {"settings": settings(options), "measured": found},
            options.out,
        )


if __name__ == "__main__":
    main()
