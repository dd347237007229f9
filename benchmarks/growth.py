"""How cost grows with draws, batch, image size, width and EOT samples, on the fast path; a plot each.

    python benchmarks/growth.py [--rounds 7] [--threads N] [--out FOLDER]

VGG16 with noise, half width unless widths are compared. Cases take turns in one process; the dashed line is
what is expected if cost were proportional, through the smallest case.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from timing import Case, arguments, in_turn, medians, parsed, report, settings
from torch import Tensor, nn

import selfensemble as rse
from selfensemble.attacks import pgd
from selfensemble.report.figures import Line, Panel, draw, svg
from selfensemble.runtime.files import atomic_write


def made(width: float, size: int = 32) -> tuple[rse.SelfEnsemble, Tensor]:
    """An ensemble on the fast path, and 128 images for it."""
    network: nn.Module = rse.create_model("vgg16", width=width)
    images = torch.rand(128, 3, size, size, device="cpu")
    return rse.optimize(rse.SelfEnsemble(network).eval(), images), images


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    options = parsed(parser)
    torch.manual_seed(0)
    fast, images = made(0.5)
    labels = torch.randint(10, (128,), device="cpu")
    few = images[:32]

    def sized(size: int) -> Case:
        ensemble, larger = made(0.5, size)
        return partial(ensemble.predict, larger[:16])

    def wide(width: float) -> Case:
        ensemble, same = made(width)
        return partial(ensemble.predict, same)

    axes: list[tuple[str, Sequence[float], Callable[[float], Case]]] = [
        ("draws, 32 images", (2, 5, 10, 20, 50, 100), lambda n: partial(fast.predict, few, draws=int(n))),
        ("images, 10 draws", (1, 4, 16, 64, 128), lambda n: partial(fast.predict, images[: int(n)])),
        ("pixels of a side, 16 images, 10 draws", (32, 64, 96, 128), lambda n: sized(int(n))),
        ("width, 128 images, 10 draws", (0.25, 0.5, 1.0), wide),
        (
            "EOT samples, PGD of 10 steps on 32 images", (1, 2, 4, 8, 16),
            lambda n: partial(
                pgd, fast, few, labels[:32], norm="l2", eps=0.5, steps=10, eot=int(n), seed=0
            ),
        ),
    ]  # fmt: skip
    panels, rows, values = [], [], {}
    for name, points, make in axes:
        seconds = in_turn({f"{point:g}": make(point) for point in points}, options.rounds)
        middle = list(medians(seconds).values())
        values[name] = dict(zip(map(str, points), middle, strict=True))
        power = {"pixels": 2, "width,": 2}.get(name.split()[0], 1)
        straight = [middle[0] * (point / points[0]) ** power for point in points]
        lines = [
            Line("measured", 4, points, [1e3 * each for each in middle]),
            Line("in proportion", 7, points, [1e3 * each for each in straight]),
        ]
        panels.append(Panel(name, name.split(",")[0], "ms", lines, percent=False))
        rows += [
            [f"{point:g} {name}", f"{1e3 * each:.1f}", f"{each / one:.2f}"]
            for point, each, one in zip(points, middle, straight, strict=True)
        ]
    report(
        "growth",
        f"VGG16, fast path, {options.threads} threads, medians of {options.rounds} rounds",
        ["", "ms", "against proportion"],
        rows,
        {"settings": settings(options), "seconds": values},
        options.out,
    )
    if options.out is not None:
        atomic_write(options.out / "growth.svg", svg(draw([panels[:3], panels[3:]])))


if __name__ == "__main__":
    main()
