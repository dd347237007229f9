"""Where the time goes: shares of the kinds of work in a prediction, an attack and a training step.

    python benchmarks/where.py [--width 0.5] [--rounds 5] [--threads N] [--out FOLDER]

By torch's profiler, self time on the CPU; what is left to the wall clock is Python and launching. An
untrained VGG16, images of 32x32.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import arguments, parsed, report, settings
from torch.profiler import ProfilerActivity, profile, record_function
from training import step

import selfensemble as rse
from selfensemble.attacks import cw_l2
from selfensemble.fast.small_maps import speed_up_small_maps_
from selfensemble.noise.half_precision import Bits

_BITS = "random bits"
# The first that a name contains decides.
KINDS = {
    "multiplications": ("conv", "linear", "addmm", "aten::mm", "bmm", "matmul"),
    "random numbers": (_BITS, "normal_", "index_select", "random"),
    "batch norm": ("batch_norm",),
    "pooling": ("pool",),
    "copies and layouts": (
        "copy_",
        "clone",
        "contiguous",
        "reorder",
        "aten::cat",
        "zero_",
        "fill_",
        "to_mkldnn",
    ),
    "other arithmetic": ("aten::",),
}


def kind_of(name: str) -> str | None:
    """The kind of work an operation is."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), None)


def shares(case: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Milliseconds of a call by kind of work; "rest" is what the operations leave of the wall clock."""
    case()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        began = time.perf_counter()
        for _ in range(rounds):
            case()
        wall = time.perf_counter() - began
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if kind := kind_of(event.key):
            found[kind] += event.self_cpu_time_total / 1e3 / rounds
    # Gradients are taken in another thread, while this one waits: the sum is the time of the work.
    found["rest"] = max(0.0, 1e3 * wall / rounds - sum(found.values()))
    return dict(found)


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--width", type=float, default=0.5)
    options = parsed(parser)
    torch.manual_seed(0)
    inputs, labels = torch.rand(128, 3, 32, 32, device="cpu"), torch.randint(10, (128,), device="cpu")
    drawn = Bits._draw

    def recorded(bits: Bits, count: int) -> torch.Tensor:
        with record_function(_BITS):
            return drawn(bits, count)

    Bits._draw = recorded  # type: ignore[method-assign, assignment]
    ensemble = rse.SelfEnsemble(rse.create_model("vgg16", width=options.width), draws=10).eval()
    fast = rse.optimize(ensemble, inputs[:2], "bf16")
    trained: Any = rse.create_model("vgg16", width=options.width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    speed_up_small_maps_(trained)
    model = rse.SelfEnsemble(trained).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    ordered = inputs.contiguous(memory_format=torch.channels_last)
    attack = partial(cw_l2, fast, inputs[:64], labels[:64], steps=5, binary_search_steps=1, eot=8, seed=0)
    cases: dict[str, Callable[[], Any]] = {
        "128 images, 10 draws": partial(fast.predict, inputs),
        "1 image, 10 draws": partial(fast.predict, inputs[:1]),
        "C&W, EOT 8, 5 steps": attack,
        "training step": partial(step, model, optimizer, ordered, labels, True),
    }
    found = {name: shares(case, options.rounds) for name, case in cases.items()}
    kinds = [*KINDS, "rest"]
    rows = [
        [kind, *(f"{100 * each.get(kind, 0) / sum(each.values()):.0f} %" for each in found.values())]
        for kind in kinds
    ]
    rows.append(["milliseconds", *(f"{sum(each.values()):.1f}" for each in found.values())])
    report(
        "where",
        f"VGG16, width {options.width:g}, {options.threads} threads, torch {torch.__version__}",
        ["", *cases],
        rows,
        {"settings": settings(options), "milliseconds": found},
        options.out,
    )


if __name__ == "__main__":
    main()
