"""One draw, an ensemble and a single image: ours, the authors' way, the plain network, and the limit.

    python benchmarks/inference.py [--width 1] [--batch 128] [--rounds 15] [--threads N] [--out FOLDER]

The limit is the time of the network's multiplications at the speed of a large matrix product in the fast
path's precision here.
"""

import time
from functools import partial

import authors
import torch
from timing import arguments, in_turn, medians, parsed, ratio, report, settings
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.ensemble.stopping import Calibrated


def operations(model: nn.Module, inputs: Tensor) -> int:
    """Multiplications and additions of one pass, of convolutions and linear layers."""
    total = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        inner = module.weight[0].numel()
        total += 2 * inner * output.numel()

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return total


def product_speed(dtype: torch.dtype, size: int = 2048) -> float:
    """Operations a second of a large matrix product, the best of several."""
    left, right = (
        torch.rand(size, size, device="cpu").to(dtype),
        torch.rand(size, size, device="cpu").to(dtype),
    )
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


@torch.no_grad()
def one_draw(model: rse.SelfEnsemble, inputs: Tensor) -> Tensor:
    return model.draw_logits(inputs)


def without_noise(model: rse.SelfEnsemble, inputs: Tensor) -> Tensor:
    with rse.noise_disabled(model):
        return one_draw(model, inputs)


@torch.no_grad()
def plain(model: nn.Module, inputs: Tensor) -> Tensor:
    output: Tensor = model(inputs)
    return output


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--draws", type=int, default=10)
    options = parsed(parser)
    torch.manual_seed(0)
    inputs = torch.rand(options.batch, 3, 32, 32, device="cpu")
    network = rse.create_model("vgg16", width=options.width).eval()
    theirs = authors.with_noise(rse.create_model("vgg16", width=options.width).eval())
    ensemble = rse.SelfEnsemble(rse.create_model("vgg16", width=options.width), draws=options.draws).eval()
    fast = rse.optimize(ensemble, inputs)
    image = inputs[:1]
    # An untrained network is never sure: three draws stand for what a trained one takes.
    fast.stopping = Calibrated(
        thresholds=(2.0, 2.0, 0.0), epsilon=0.05, delta=0.05, mean_draws=3, disagreement=0.04,
        images=1, reference_draws=200, precision=fast.precision,
    )  # fmt: skip
    seconds = in_turn(
        {
            "plain network, float32": partial(plain, network, inputs),
            "authors, one draw": partial(authors.predict, theirs, inputs, 1),
            "ours, float32, one draw": partial(one_draw, ensemble, inputs),
            "fast path without noise": partial(without_noise, fast, inputs),
            "fast path, one draw": partial(one_draw, fast, inputs),
            "authors, ensemble": partial(authors.predict, theirs, inputs, options.draws),
            "ours, ensemble": partial(fast.predict, inputs),
            "one image, fast path without noise": partial(without_noise, fast, image),
            "one image, ensemble": partial(fast.predict, image),
            "one image, three draws": partial(fast.predict, image, stop="calibrated"),
            "one image, authors' ensemble": partial(authors.predict, theirs, image, options.draws),
        },
        options.rounds,
    )
    middle = medians(seconds)
    limit = operations(network, inputs) / product_speed(
        torch.bfloat16 if fast.precision == "bf16" else torch.float32
    )
    pairs = {
        "one draw / without noise": ("fast path, one draw", "fast path without noise"),
        "authors' draw / ours": ("authors, one draw", "fast path, one draw"),
        "authors' ensemble / ours": ("authors, ensemble", "ours, ensemble"),
        "one image: ensemble / one pass": ("one image, ensemble", "one image, fast path without noise"),
        "one image: three draws / one pass": ("one image, three draws", "one image, fast path without noise"),
    }
    ratios = {name: ratio(seconds, *pair) for name, pair in pairs.items()}
    rows = [[name, f"{1e3 * value:.1f}"] for name, value in middle.items()]
    rows.append(["limit of a pass (products alone)", f"{1e3 * limit:.1f}"])
    rows += [[name, f"{value:.2f}"] for name, value in ratios.items()]
    report(
        "inference",
        f"VGG16, width {options.width:g}, batch {options.batch}, {options.draws} draws, {options.threads} "
        f"threads, torch {torch.__version__}: medians of {options.rounds} rounds",
        ["", "ms, or ratio"],
        rows,
        {"settings": settings(options), "seconds": seconds, "ratios": ratios,
         "limit": limit},
        options.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
