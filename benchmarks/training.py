"""A training step with noise against one without, and against the authors' way.

    python benchmarks/training.py [--width 1] [--batch 128] [--rounds 15] [--threads N] [--out FOLDER]

Ours are the steps of the trainer: bfloat16 where the processor has it, channels last, its optimiser and
augmentation left out of both.
"""

from functools import partial

import authors
import torch
from timing import Case, arguments, in_turn, medians, parsed, ratio, report, settings
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.fast.small_maps import speed_up_small_maps_
from selfensemble.runtime.devices import has_bfloat16


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor, half: bool
) -> None:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=128)
    options = parsed(parser)
    torch.manual_seed(0)
    inputs, labels = (
        torch.rand(options.batch, 3, 32, 32, device="cpu"),
        torch.randint(10, (options.batch,), device="cpu"),
    )
    ordered = inputs.contiguous(memory_format=torch.channels_last)
    cases: dict[str, Case] = {}
    for name in ("plain", "noise", "authors"):
        model: nn.Module = rse.create_model("vgg16", width=options.width)
        half = name != "authors" and has_bfloat16(torch.device("cpu"))
        if name != "authors":
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            speed_up_small_maps_(model)
        if name == "noise":
            model = rse.SelfEnsemble(model)
        if name == "authors":
            authors.with_noise(model)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        cases[name] = partial(step, model, optimizer, inputs if name == "authors" else ordered, labels, half)
    seconds = in_turn(cases, options.rounds)
    ratios = {
        "noise / plain": ratio(seconds, "noise", "plain"),
        "authors / ours": ratio(seconds, "authors", "noise"),
    }
    rows = [[name, f"{1e3 * value:.1f}"] for name, value in medians(seconds).items()]
    rows += [[name, f"{value:.2f}"] for name, value in ratios.items()]
    report(
        "training",
        f"A step of VGG16, width {options.width:g}, batch {options.batch}, {options.threads} threads, torch "
        f"{torch.__version__}: medians of {options.rounds} rounds",
        ["", "ms, or ratio"],
        rows,
        {"settings": settings(options), "seconds": seconds, "ratios": ratios},
        options.out,
    )


if __name__ == "__main__":
    main()
