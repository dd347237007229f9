"""What compiled noise gains: the same predictions with it and with torch's operators, in turn.

    python benchmarks/kernel.py [--rounds 9] [--out FOLDER]

Optimised copies in bfloat16: VGG16 at half width, one image and 128; ResNet-50 of transformers at 224 pixels,
one image and four. Random weights. *No noise*: the same pass with the noise switched off.
"""

from functools import partial
from typing import Any

import torch
from inference import one_draw, without_noise
from large_images import Logits, network
from timing import Case, arguments, in_turn, medians, parsed, ratio, report, settings
from torch import Tensor

import selfensemble as rse
from selfensemble.noise import kernel


def by_torch(call: Case) -> None:
    """The call without the kernel."""
    found = kernel._found[:]
    kernel._found[:] = [(None, "switched off")]
    try:
        call()
    finally:
        kernel._found[:] = found


def copies() -> dict[str, tuple[rse.SelfEnsemble, Tensor]]:
    torch.manual_seed(0)
    small, photos = torch.rand(128, 3, 32, 32, device="cpu"), torch.rand(4, 3, 224, 224, device="cpu")
    vgg = rse.optimize(rse.SelfEnsemble(rse.create_model("vgg16", width=0.5)).eval(), small, "bf16")
    resnet = rse.SelfEnsemble(Logits(network("resnet-50")), example_inputs=photos[:2]).eval()
    fast = rse.optimize(resnet, photos, "bf16")
    return {
        "VGG16, 1 image": (vgg, small[:1]), "VGG16, 128 images": (vgg, small),
        "ResNet-50, 1 photo": (fast, photos[:1]), "ResNet-50, 4 photos": (fast, photos),
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    options = parsed(parser)
    rows: list[list[str]] = []
    found: dict[str, Any] = {}
    for name, (model, inputs) in copies().items():
        assert kernel.prepare() == ""
        draw, ten = partial(one_draw, model, inputs), partial(model.predict, inputs)
        seconds = in_turn(
            {
                "no noise": partial(without_noise, model, inputs),
                "one draw": draw,
                "one draw by torch": partial(by_torch, draw),
                "ten draws": ten,
                "ten draws by torch": partial(by_torch, ten),
            },
            options.rounds,
        )
        ratios = [ratio(seconds, kind, "no noise") for kind in list(seconds)[1:]]
        found[name] = {"seconds": seconds, "ratios": ratios}
        rows.append([name, f"{1e3 * medians(seconds)['no noise']:.1f}", *(f"{each:.2f}" for each in ratios)])
    report(
        "kernel",
        f"Times of a pass without noise, {options.threads} threads, torch {torch.__version__}",
        ["", "no noise, ms", "one draw", "by torch", "ten draws", "by torch"],
        rows,
        {"settings": settings(options), "measured": found},
        options.out,
    )


if __name__ == "__main__":
    main()
