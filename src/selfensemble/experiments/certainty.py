"""What a self-ensemble knows of its own certainty: calibration, decisions, abstention, other images, sets."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional

from ..certainty.conformal import conformal_sets
from ..certainty.decision import decide
from ..data.sources import load_data
from ..noise.streams import stream_seed
from ..report.figures import Line, Panel, draw
from ..report.intervals import Share, mean, share
from ..report.page import Page, Picture, Table
from .base import Experiment, Measured, Setting, inputs_of
from .draws import softmax_draws
from .records import Record, column
from .scales import CertaintyScale

_BINS = 10
_WITHIN = (10, 13, 20, 50, 100, 200)
_LEFT_OUT = (0.0, 0.1, 0.2, 0.3, 0.5)
OTHERS = {"noise": "uniform noise", "shuffled": "shuffled patches", "digits": "handwritten digits"}
_SCORES = {
    "confidence": "low confidence",
    "entropy": "entropy of the mean",
    "information": "mutual information",
}
_ABOUT = """\
The first {images} test images, mean probabilities of {draws} draws, noise of each image's own, no attack.
*Calibration*: the expected calibration error with 10 bins of equally many images. *Decision*: `decide` at
risk {alpha:g}, at most {max_draws} draws. *Other images*: the probability that one of them gets a larger
score than a test image (AUROC; .5 is chance); mutual information is what the spread over draws says, the
entropy of the mean less the mean entropy. *Sets*: conformal sets at risk {risk:g}, calibrated on the last
{images} test images; robust ones hold for images moved by up to L2 {radius:g}."""


class Certainty(Experiment):
    """No defense, RSE and ours."""

    name = "certainty"
    names = ("plain", "rse", "ours")

    def measure(self, setting: Setting) -> Measured:
        settings = setting.scale.certainty
        # Sets are calibrated on other images than those that they are tried on.
        inputs, labels = inputs_of(setting, max(1, min(settings.images, len(setting.test) // 2)))
        units, size = setting.units(settings.model_dump()), min(100, setting.scale.shard)
        named = {"": inputs} | {f"{kind}.": images for kind, images in other_images(setting, inputs).items()}
        columns = {"label": column(labels.numpy())}
        steps = len(named) + 2
        for place, (prefix, images) in enumerate(named.items()):
            parts = []
            for number, few in enumerate(images.split(size)):
                done = (place + number * size / len(images)) / steps
                setting.progress(f"{prefix or 'test '}images {number * size} on", done)
                work = partial(
                    _answers, setting, settings, few, stream_seed(setting.seed, number, 40 + place)
                )
                parts.append(units.compute(f"{prefix}{number:05d}", work))
            columns |= _joined(parts, prefix)
        setting.progress("decisions", (steps - 2) / steps)
        decided = []
        for number, few in enumerate(inputs.split(size)):
            work = partial(_decisions, setting, settings, few, stream_seed(setting.seed, number, 50))
            decided.append(units.compute(f"decide-{number:05d}", work))
        columns |= _joined(decided, "decide.")
        setting.progress("sets", (steps - 1) / steps)
        kinds = ("set", "robust") if setting.trained.ensemble.is_random else ("set",)
        for kind in kinds:
            found = units.compute(kind, partial(_sets, setting, settings, inputs, labels, kind == "robust"))
            columns |= _joined([found], f"{kind}.")
        return Measured(settings.model_dump(), {}, columns)

    def page(self, records: Sequence[Record]) -> Page:
        settings = records[0].facts.settings
        random = [record for record in records if "robust.size" in record.columns]
        within = [count for count in _WITHIN if count <= settings["max_draws"]]
        others = [(kind, title) for kind, title in OTHERS.items() if f"{kind}.entropy" in records[0].columns]
        parts: list[Table | Picture] = [
            Table(
                "Calibration",
                "Errors in points; accuracy and confidence in %.",
                ["network", "accuracy", "mean confidence", "calibration error", "of one draw"],
                [_calibration(record) for record in records],
            ),
            Picture("reliability", "Accuracy against confidence.", draw([[_reliability(records)]])),
        ]
        if random:
            parts += [
                Table(
                    "Decision of the infinite ensemble",
                    "Images that are decided within that many draws, and accuracy among the decided, in %.",
                    [
                        "network",
                        *(str(count) for count in within),
                        "median draws",
                        "undecided",
                        "accuracy",
                    ],
                    [_decided(record, within) for record in random],
                ),
                Picture("decision", "Images that are decided.", draw([[_decisions_by_draws(random)]])),
            ]
        parts += [
            Table(
                "Abstention",
                "Accuracy in % among the images that are left when the least confident ones are left out.",
                ["network", *(f"{100 * part:g} % left out" for part in _LEFT_OUT)],
                [[record.facts.title, *_abstaining(record)] for record in records],
            ),
            Table(
                "Other images",
                "AUROC of scores that tell them from test images, with 95 % intervals.",
                ["network, score", *(title for _, title in others)],
                [
                    [
                        f"{record.facts.title}, {title}",
                        *(_auroc_text(record, kind, score) for kind, _ in others),
                    ]
                    for record in records
                    for score, title in _SCORES.items()
                    if score != "information" or record in random
                ],
            ),
            Table(
                "Conformal sets",
                "Share of the sets that hold the right label, in %, and their mean size.",
                ["network", "coverage", "size", "coverage, robust", "size, robust"],
                [_set_row(record) for record in records],
            ),
        ]
        images = len(records[0].columns["label"])
        return Page("Certainty", _ABOUT.format(**settings | {"images": images}), parts)


def other_images(setting: Setting, inputs: Tensor) -> dict[str, Tensor]:
    """As many images that are none of the classes, by kind, of the shape of the test images."""
    count, channels, height, width = inputs.shape
    generator = torch.Generator("cpu").manual_seed(stream_seed(setting.seed, 0, 41))
    patch = max(1, height // 4)
    cut = inputs.unfold(2, patch, patch).unfold(3, patch, patch).flatten(2, 3)  # (B, C, N, p, p)
    order = torch.rand(count, cut.shape[2], generator=generator, dtype=torch.float32, device="cpu").argsort(
        dim=1
    )
    mixed = cut.gather(2, order[:, None, :, None, None].expand_as(cut))
    side = height // patch
    mixed = mixed.unflatten(2, (side, side)).permute(0, 1, 2, 4, 3, 5).reshape(count, channels, height, width)
    found = {
        "noise": torch.rand(inputs.shape, generator=generator, dtype=torch.float32, device="cpu"),
        "shuffled": mixed,
    }
    if channels == 3:
        digits = load_data("digits", "train")
        chosen = torch.arange(count, device="cpu") % len(digits)
        grown = functional.interpolate(digits.inputs(chosen), (height, width), mode="bilinear")
        found["digits"] = grown.expand(-1, channels, -1, -1).clamp(0, 1).contiguous()
    return found


def _joined(parts: Sequence[dict[str, Tensor]], prefix: str) -> dict[str, list[str]]:
    return {
        f"{prefix}{name}": column(torch.cat([part[name] for part in parts]).numpy())
        for name in sorted(parts[0])
    }


def _answers(setting: Setting, settings: CertaintyScale, images: Tensor, seed: int) -> dict[str, Tensor]:
    """Confidence and spread of a few images."""
    ensemble = setting.attacked
    draws = settings.draws if setting.trained.ensemble.is_random else 1
    each = softmax_draws(ensemble, images.to(setting.device), draws, seed).cpu().double()
    middle = each.mean(dim=0)
    entropy = _entropy(middle)
    confidence, answer = middle.max(dim=1)
    one_confidence, one_answer = each[0].max(dim=1)
    return {
        "answer": answer, "confidence": confidence, "entropy": entropy,
        "information": (entropy - _entropy(each).mean(dim=0)).clamp_min(0),
        "one.answer": one_answer, "one.confidence": one_confidence,
    }  # fmt: skip


def _entropy(probabilities: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(probabilities).sum(dim=-1)
    return entropy


def _decisions(setting: Setting, settings: CertaintyScale, images: Tensor, seed: int) -> dict[str, Tensor]:
    x = images.to(setting.device)
    found = decide(setting.attacked, x, alpha=settings.alpha, max_draws=settings.max_draws, seed=seed)
    return {"answer": found.label, "draws": found.draws}


def _sets(
    setting: Setting, settings: CertaintyScale, inputs: Tensor, labels: Tensor, robust: bool
) -> dict[str, Tensor]:
    """Sets of the test images, calibrated on as many at the end of the test set."""
    test, ensemble = setting.test, setting.attacked
    held = slice(max(len(labels), len(test) - len(labels)), len(test))
    radius, draws = (settings.radius, settings.robust_draws) if robust else (0.0, settings.draws)
    if not setting.trained.ensemble.is_random:
        draws = 1
    seed = stream_seed(setting.seed, int(robust), 51)
    sets = conformal_sets(
        ensemble, test.inputs(held), test.labels[held], alpha=settings.risk, radius=radius, draws=draws,
        seed=seed,
    )  # fmt: skip
    found = sets.predict(inputs, seed=stream_seed(seed, 0, 1))
    return {"size": found.sum(dim=1), "right": found.gather(1, labels[:, None])[:, 0].long()}


def _right(record: Record, prefix: str = "") -> NDArray[np.bool_]:
    """(N,) whether the answer is right."""
    right: NDArray[np.bool_] = record.numbers(f"{prefix}answer") == record.numbers("label")
    return right


def calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Mean absolute difference of accuracy and confidence over bins of equally many images."""
    parts = np.array_split(np.argsort(confidence, kind="stable"), _BINS)
    gaps = [abs(confidence[part].mean() - right[part].mean()) * len(part) for part in parts if len(part)]
    return float(sum(gaps) / len(right))


def auroc(ours: NDArray[np.float64], others: NDArray[np.float64]) -> Share:
    """Probability that one of `others` is larger, ties half; interval of Hanley and McNeil (1982)."""
    ranks = rankdata(np.concatenate([ours, others]))
    n, m = len(ours), len(others)
    area = float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (m - 1) * (first - area**2) + (n - 1) * (second - area**2)
    half = 1.96 * float(np.sqrt(max(variance, 0.0) / (n * m)))
    return Share(area, max(0.0, area - half), min(1.0, area + half))


def _calibration(record: Record) -> list[str]:
    confidence = record.numbers("confidence")
    one = calibration_error(record.numbers("one.confidence"), _right(record, "one."))
    return [
        record.facts.title, share(_right(record)).text, f"{100 * confidence.mean():.1f}",
        f"{100 * calibration_error(confidence, _right(record)):.1f}", f"{100 * one:.1f}",
    ]  # fmt: skip


def _reliability(records: Sequence[Record]) -> Panel:
    lines = []
    for look, record in enumerate(records):
        confidence, right = record.numbers("confidence"), _right(record)
        parts = [part for part in np.array_split(np.argsort(confidence, kind="stable"), _BINS) if len(part)]
        x = [100 * float(confidence[part].mean()) for part in parts]
        lines.append(Line(record.facts.title, look, x, [share(right[part]) for part in parts]))
    lines.append(Line("calibrated", 7, [0.0, 100.0], [0.0, 1.0]))
    return Panel("Reliability", "confidence, %", "accuracy, %", lines)


def _decided(record: Record, within: Sequence[int]) -> list[str]:
    answer, draws = record.numbers("decide.answer"), record.numbers("decide.draws")
    decided = answer >= 0
    shares = [f"{100 * float((decided & (draws <= count)).mean()):.1f}" for count in within]
    median = float(np.median(np.where(decided, draws, np.inf)))
    right = (answer == record.numbers("label"))[decided]
    return [
        record.facts.title,
        *shares,
        f"{median:g}",
        f"{100 * float((~decided).mean()):.1f}",
        share(right).text if len(right) else "",
    ]


def _decisions_by_draws(records: Sequence[Record]) -> Panel:
    lines = []
    for look, record in enumerate(records):
        decided, draws = record.numbers("decide.answer") >= 0, record.numbers("decide.draws")
        counts = sorted({10, *np.unique(draws[decided]).tolist()})
        shares = [float((decided & (draws <= count)).mean()) for count in counts]
        lines.append(Line(record.facts.title, look, counts, shares))
    return Panel("Decision of the infinite ensemble", "draws", "images decided, %", lines, "log")


def _abstaining(record: Record) -> list[str]:
    order = np.argsort(record.numbers("confidence"), kind="stable")
    right = _right(record)[order]
    return [share(right[round(part * len(right)) :]).text for part in _LEFT_OUT]


def _auroc_text(record: Record, kind: str, score: str) -> str:
    sign = -1.0 if score == "confidence" else 1.0
    figure = auroc(sign * record.numbers(score), sign * record.numbers(f"{kind}.{score}"))
    return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"


def _set_row(record: Record) -> list[str]:
    cells = [record.facts.title]
    for kind in ("set", "robust"):
        if f"{kind}.size" not in record.columns:
            cells += ["", ""]
            continue
        cells += [
            share(record.numbers(f"{kind}.right") > 0).text,
            f"{mean(record.numbers(f'{kind}.size')).value:.2f}",
        ]
    return cells
