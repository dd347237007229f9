"""What the method's theory says, measured on trained networks: Jensen's bound, curvature, smoothness."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..noise.injection import noise_layers
from ..noise.layer import NoiseConfig, Std
from ..noise.streams import stream_seed
from ..report.figures import Line, Panel, draw
from ..report.intervals import Share, mean
from ..report.page import Page, Picture, Table
from .base import Experiment, Measured, Setting, inputs_of
from .curvature import gradient_norm, levels, local_lipschitz, log_softmax_draws, second_order_term
from .records import Record, column

FACTORS = (0.125, 0.25, 0.5, 1.0)
_ROUNDING = 1e-12
_SMOOTHNESS = ("gradient", "lipschitz", "term", "noisy")
_ABOUT = """\
*Jensen*: the loss of the ensemble, `-log(mean softmax)`, is at most the mean loss of its {draws} single
draws, for every image. *Second order*: noise raises the loss by the sum over all layers of
`std^2 / 2 * Tr(H)`, H being the Hessian with respect to the noised activations, estimated at the network
without noise ({probes} probes an image); beside it is the increase that was measured with all levels
multiplied by a factor. The two agree for a smooth network and small levels; a network of ReLUs is not smooth,
and only the measured increase contains what its kinks near an image's activations add, of either sign. For
the network without defense the levels are those of RSE. *Smoothness*: the
norm of the gradient of the ensemble's loss with respect to the image, and the largest quotient
`|p(x') - p(x)|_1 / |x' - x|_2` that {steps} steps of gradient ascent find within L2 {radius:g}, which is a
lower bound of the local Lipschitz constant. Means over the images with normal 95 % intervals."""


class Theory(Experiment):
    """No defense against RSE and ours."""

    name = "theory"
    names = ("plain", "rse", "ours")

    def measure(self, setting: Setting) -> Measured:
        settings = setting.scale.theory
        inputs, labels = inputs_of(setting, settings.images)
        stds = _levels(setting)
        shown = settings.model_dump() | {"levels": stds}
        units = setting.units(shown)
        size = min(50, setting.scale.shard)
        starts = range(0, len(labels), size)
        parts = []
        for number, start in enumerate(starts):
            setting.progress(f"images {start} on", number / len(starts))
            part = slice(start, start + size)
            work = partial(_figures, setting, inputs[part], labels[part], stds, number)
            parts.append(units.compute(f"{number:05d}", work))
        names = sorted(parts[0])
        columns = {"label": column(labels.numpy())}
        columns |= {name: column(torch.cat([part[name] for part in parts]).numpy()) for name in names}
        return Measured(shown, {}, columns)

    def page(self, records: Sequence[Record]) -> Page:
        about = _ABOUT.format(**records[0].facts.settings)
        parts: list[Table | Picture] = [
            Table(
                "Jensen's bound",
                f"Violations are gaps below {-_ROUNDING:g}, the rounding of the sums.",
                [
                    "network",
                    "mean loss of single draws",
                    "loss of the ensemble",
                    "gap",
                    "smallest gap",
                    "violations",
                ],
                [_jensen(record) for record in records],
            ),
            Table(
                "Second-order term",
                "Increase of the mean loss: measured, and to second order.",
                ["network", "loss without noise", *(f"levels times {factor:g}" for factor in FACTORS)],
                [row for record in records for row in _increases(record)],
            ),
            Table(
                "Smoothness",
                "Means; the curvature is the second-order term at the full levels, with the Hessian at the "
                "activations without noise and at those of a noise draw.",
                ["network", "gradient norm", "local Lipschitz estimate", "curvature", "with noise"],
                [
                    [
                        record.facts.title,
                        *(_text(mean(record.numbers(key))) for key in _SMOOTHNESS),
                    ]
                    for record in records
                ],
            ),
            Picture(
                "second-order",
                "Increase of the loss against the level of the noise.",
                draw([_panels(records)]),
            ),
        ]
        return Page("The theory, measured", about, parts)


def _levels(setting: Setting) -> list[Std]:
    """The network's own levels by layer, or those of RSE where it has none."""
    stds = [layer.std for layer in noise_layers(setting.trained.ensemble.model).values()]
    if setting.trained.ensemble.is_random:
        return stds
    published = NoiseConfig()
    return [published.inner_std if number else published.init_std for number in range(len(stds))]


def _figures(
    setting: Setting, inputs: Tensor, labels: Tensor, stds: list[Std], number: int
) -> dict[str, Tensor]:
    """Everything of a few images, a value each."""
    settings, ensemble = setting.scale.theory, setting.trained.ensemble
    x, y = inputs.to(setting.device), labels.to(setting.device)
    seeds = [stream_seed(setting.seed, number, 20 + place) for place in range(4 + len(FACTORS))]

    def losses(draws: int, seed: int) -> Tensor:
        own = labels.cpu()[None, :, None].expand(draws, -1, 1)
        return log_softmax_draws(ensemble, x, draws, seed).gather(2, own).squeeze(2)

    found: dict[str, Tensor] = {}
    with levels(ensemble, stds, 0.0):
        found["clean"] = -losses(1, 0)[0]
    for place, factor in enumerate(FACTORS):
        with levels(ensemble, stds, factor):
            own = losses(settings.draws, seeds[4 + place])
            found[f"loss.{factor:g}"] = -own.mean(dim=0)
            if factor == 1:
                count = torch.tensor(float(len(own)), dtype=torch.float64, device="cpu")
                over = own.logsumexp(dim=0) - count.log()
                found["ensemble"], found["gap"] = -over, over - own.mean(dim=0)
                found["noisy"] = second_order_term(
                    ensemble, x, y, stds, probes=settings.probes, seed=seeds[3], noisy=True
                ).mean(dim=1)
    found["term"] = second_order_term(ensemble, x, y, stds, probes=settings.probes, seed=seeds[0]).mean(dim=1)
    draws = ensemble.draws
    found["gradient"] = gradient_norm(ensemble, x, y, draws, seeds[1])
    found["lipschitz"] = local_lipschitz(
        ensemble, x, draws=draws, radius=settings.radius, steps=settings.steps, seed=seeds[2]
    )
    return {name: values.cpu() for name, values in found.items()}


def _jensen(record: Record) -> list[str]:
    gap = record.numbers("gap")
    return [
        record.facts.title,
        _text(mean(record.numbers("loss.1"))),
        _text(mean(record.numbers("ensemble"))),
        _text(mean(gap)),
        f"{gap.min():.3g}",
        f"{int((gap < -_ROUNDING).sum())} of {len(gap)}",
    ]


def _measured(record: Record, factor: float) -> Share:
    return mean(record.numbers(f"loss.{factor:g}") - record.numbers("clean"))


def _predicted(record: Record, factor: float) -> Share:
    return mean(factor**2 * record.numbers("term"))


def _increases(record: Record) -> list[list[str]]:
    clean = _text(mean(record.numbers("clean")))
    title = record.facts.title
    return [
        [f"{title}, measured", clean, *(_text(_measured(record, factor)) for factor in FACTORS)],
        [f"{title}, second order", "", *(_text(_predicted(record, factor)) for factor in FACTORS)],
    ]


def _text(figure: Share) -> str:
    return f"{figure.value:.3g} ({figure.low:.3g} to {figure.high:.3g})"


def _panels(records: Sequence[Record]) -> list[Panel]:
    panels = []
    for record in records:
        lines = [
            Line("measured", 4, FACTORS, [_measured(record, factor) for factor in FACTORS]),
            Line("second order", 5, FACTORS, [_predicted(record, factor) for factor in FACTORS]),
        ]
        x, y = "factor on the levels of the noise", "increase of the mean loss"
        panels.append(Panel(record.facts.title, x, y, lines, percent=False))
    return panels
