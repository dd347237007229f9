"""Predictions that stop drawing: how many draws they take, what they cost, and what attacks do to them.

    python benchmarks/adaptive.py --data DATA [--model cifar10-vgg16-rse] [--rounds 5] [--out FOLDER]

The last 4,000 test images calibrate, the first 6,000 confirm. `exact` must give every label of the fixed
number of draws; `calibrated` is compared with 200 draws. Attacks: PGD and C&W on the ensemble, and PGD on the
margin of one draw at a time, which is what an early stop looks at. Times are of 1,000 images, in turn with
the authors' way.
"""

import copy
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import authors
import torch
from timing import arguments, in_turn, medians, parsed, ratio, report, settings
from torch import Tensor

import selfensemble as rse
from selfensemble.artefacts.storage import read_config
from selfensemble.artefacts.zoo import locate
from selfensemble.attacks import cw_l2, pgd
from selfensemble.ensemble.draws import Draws
from selfensemble.ensemble.stopping import Stop
from selfensemble.fast.optimize import precision_of
from selfensemble.noise.injection import make_static_
from selfensemble.noise.layer import GaussianNoise

REFERENCE = 200
RULES = ("fixed", "fixed, antithetic", "exact", "calibrated")
EPS = 0.5


def _stop(rule: str) -> Stop | None:
    return None if rule.startswith("fixed") else rule  # type: ignore[return-value]


def _pairs(rule: str) -> bool | None:
    return True if rule == "fixed, antithetic" else None


def share(answers: Tensor, truth: Tensor) -> float:
    return float((answers != truth).double().mean())


def compare(fast: rse.SelfEnsemble, inputs: Tensor, labels: Tensor) -> dict[str, Any]:
    """Draws, disagreement with 200 draws and accuracy, of a fixed number of draws and of both rules."""
    reference = fast.predict(inputs, draws=REFERENCE, sampling="per_image").label
    values: dict[str, Any] = {"images": len(inputs), "reference accuracy": 1 - share(reference, labels)}
    for name in RULES:
        answer = fast.predict(inputs, stop=_stop(name), antithetic=_pairs(name), sampling="per_image")
        values[name] = {
            "draws": float(answer.draws.double().mean()),
            "disagreement": share(answer.label, reference),
            "accuracy": 1 - share(answer.label, labels),
            "by draws": dict(sorted(Counter(answer.draws.tolist()).items())),
        }
    return values


@torch.no_grad()
def variance_of_pairs(fast: rse.SelfEnsemble, inputs: Tensor, pairs: int = 40) -> float:
    """Of the mean probabilities of two opposite draws, over that of two independent ones."""
    draws = Draws(fast, inputs, None, 7, "per_image", antithetic=True)
    images = draws.prepared(inputs)
    outputs = torch.cat([draws.take(images, index, 1) for index in range(2 * pairs)]).double()
    first, second = outputs[::2], outputs[1::2]
    return float(((first + second) / 2).var(dim=0).mean() / (first.var(dim=0).mean() / 2))


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--model", default="cifar10-vgg16-rse", help="of the zoo, or a folder")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=6000, help="to confirm on")
    parser.add_argument("--calibrate", type=int, default=4000, help="to calibrate on")
    parser.add_argument("--attacked", type=int, default=200)
    parser.add_argument("--timed", type=int, default=1000)
    options = parsed(parser)
    ensemble = rse.load(options.model)
    data = rse.load_data(options.data, "test")
    if options.images + options.calibrate > len(data):
        raise SystemExit(
            f"{len(data)} images are too few to calibrate on {options.calibrate} and to confirm on "
            f"{options.images} others: pass fewer"
        )
    fast = rse.optimize(ensemble, data.inputs(slice(2)))
    last = data.inputs(slice(len(data) - options.calibrate, len(data)))
    fast.stopping = rse.calibrate(fast, last, seed=0)
    inputs, labels = data.inputs(slice(options.images)), data.labels[: options.images]

    seeded = [fast.predict(inputs, seed=1, stop=stop) for stop in (None, "exact")]
    other_labels = int((seeded[0].label != seeded[1].label).sum())
    some = inputs[:2000]
    changed = share(fast.predict(some, seed=1).label, ensemble.predict(some, seed=1).label)
    clean = compare(fast, inputs, labels)
    pairs = variance_of_pairs(fast, inputs[:400])
    x, y = inputs[: options.attacked], labels[: options.attacked]
    found = {
        "PGD, EOT 8": pgd(fast, x, y, norm="l2", eps=EPS, steps=20, eot=8, average="probabilities", seed=1),
        "PGD on the margin of one draw": pgd(
            fast, x, y, norm="l2", eps=EPS, steps=100, loss="margin", seed=2
        ),
        "C&W, EOT 4": cw_l2(fast, x, y, steps=50, binary_search_steps=4, eot=4, seed=3),
    }
    attacked = {name: compare(fast, images, y) for name, images in found.items()}

    config = read_config(locate(options.model))
    assert config.architecture is not None
    network = rse.create_model(**config.architecture.model_dump()).eval()
    network.load_state_dict(
        {key: value for key, value in ensemble.model.state_dict().items() if "gaussian_noise" not in key}
    )
    levels = [layer.std for layer in ensemble.modules() if isinstance(layer, GaussianNoise)]
    theirs = authors.with_noise(network, *map(float, levels[:2]))  # type: ignore[arg-type]
    few, draws = inputs[: options.timed], ensemble.draws
    static = copy.deepcopy(ensemble)
    make_static_(static)
    plain = rse.optimize(static, inputs[:2])
    single = inputs[:100].split(1)
    seconds = in_turn(
        {
            "one at a time: a pass without noise": lambda: [plain.predict(image) for image in single],
            "one at a time: calibrated": lambda: [fast.predict(image, stop="calibrated") for image in single],
            "one at a time: fixed": lambda: [fast.predict(image) for image in single],
            "authors' way": lambda: [authors.predict(theirs, part, draws) for part in few.split(128)],
            "fixed": partial(fast.predict, few),
            "exact": partial(fast.predict, few, stop="exact"),
            "calibrated": partial(fast.predict, few, stop="calibrated"),
        },
        options.rounds,
        warm_up=1,
    )
    faster = {name: ratio(seconds, "authors' way", name) for name in ("fixed", "exact", "calibrated")}
    alone = {
        name: ratio(seconds, f"one at a time: {name}", "one at a time: a pass without noise")
        for name in ("calibrated", "fixed")
    }
    rows = []
    for where, values in ({"no attack": clean} | attacked).items():
        for name in RULES:
            each = values[name]
            cells = (each["draws"], 100 * each["disagreement"], 100 * each["accuracy"])
            rows.append([f"{where}: {name}", *(f"{cell:.2f}" for cell in cells)])
    rows += [[f"authors' time / {name}", f"{value:.2f}", "", ""] for name, value in faster.items()]
    rows += [
        [f"one image: {name} / a pass without noise", f"{value:.2f}", "", ""] for name, value in alone.items()
    ]
    rows += [["variance of a pair / of two draws", f"{pairs:.2f}", "", ""]]
    rows += [["labels of exact that differ", str(other_labels), "", ""]]
    rows += [[f"labels that {precision_of(fast)} changes, same noise, %", f"{100 * changed:.2f}", "", ""]]
    rule = fast.stopping
    report(
        "adaptive",
        f"{Path(options.model).name}: {options.images} images; epsilon {rule.epsilon:.4f}, "
        f"delta {rule.delta:g}; {options.threads} threads",
        ["", "draws", "other answer than 200 draws, %", "accuracy, %"],
        rows,
        {
            "settings": settings(options),
            "rule": rule.model_dump(mode="json"), "other labels": other_labels,
            "pairs": pairs, "clean": clean,
            "attacked": attacked, "seconds": seconds, "medians": medians(seconds), "faster": faster,
            "one image": alone, "changed by precision": changed,
        },
        options.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
