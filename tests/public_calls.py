"""Every public function that takes a network, called with little work and fixed seeds.

For tests of what has to hold of all of them.
"""

import copy
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor

import selfensemble as rse
from selfensemble import attacks
from selfensemble.ensemble.stopping import Exact, Fixed
from selfensemble.evaluation import judge
from selfensemble.evaluation.adapters import LibraryAttack
from selfensemble.evaluation.certified import Certification, Settings
from selfensemble.evaluation.doctor import examination
from selfensemble.evaluation.protocol import Protocol
from selfensemble.evaluation.runner import Evaluation
from selfensemble.noise.learned import distance_from_start, learn_noise_
from selfensemble.serving.batching import Batcher

PROTOCOL = {
    "name": "short", "images": 12, "shard": 7, "judge": {"seeds": 2, "queries": 3},
    "attacks": [
        {"attack": "cw-paper", "c": 1, "steps": 3},
        {"attack": "pgd", "eps": [0.1, 0.2], "steps": 2, "eot": 2},
        {"attack": "apgd", "norm": "linf", "eps": 0.1, "steps": 2},
    ],
}  # fmt: skip
# Noise of each image's own follows the layout, which devices choose differently.
TRAIN = {"epochs": 1, "batch_size": 40, "channels_last": False}
RECIPE = {
    "name": "short", "seed": 1,
    "data": {"source": "digits", "images": 80, "crop_padding": 1, "flip": True},
    "model": {"name": "small-cnn", "width": 0.25},
    "train": TRAIN,
}  # fmt: skip


@dataclasses.dataclass
class Case:
    """A network that knows digits, and digits.

    Attributes:
        ensemble: the network, of 4 draws.
        inputs, labels: 12 images and their classes.
        many: 200 images.
        folder: an empty one.
    """

    ensemble: rse.SelfEnsemble
    inputs: Tensor
    labels: Tensor
    many: Tensor
    folder: Path

    @property
    def data(self) -> rse.ImageData:
        images = (255 * self.inputs.cpu()).round().to(torch.uint8)
        return rse.ImageData("digits", images, self.labels, tuple("0123456789"))


_digits = functools.cache(lambda: rse.load_data("digits", "test"))
_network = functools.cache(lambda: rse.load("digits-rse"))


def case(folder: Path) -> Case:
    data = _digits()
    inputs, labels = data.inputs(slice(12)), data.labels[:12].clone()
    ensemble = copy.deepcopy(_network())
    ensemble.draws = 4
    return Case(ensemble, inputs, labels, data.inputs(slice(200)), folder)


def _of_library(
    classifier: Any, x: Tensor, y: Tensor, targeted: bool, classes: int, seed: int
) -> Tensor:  # of a library that names no devices
    del y, targeted, classes, seed
    change = 0.1 * torch.rand(x.shape) * (classifier(x).argmax(dim=1) >= 0).view(-1, 1, 1, 1)
    changed: Tensor = (x + change).clamp(0, 1)
    return changed


def _learned(c: Case) -> Any:
    ensemble = copy.deepcopy(c.ensemble)
    learn_noise_(ensemble.model, "channel")
    with rse.noise_draw(3):
        logits = ensemble.train()(c.inputs.to(next(ensemble.parameters()).device))
    (logits.logsumexp(dim=1).sum() + distance_from_start(ensemble.model)).backward()
    return [parameter.grad for parameter in ensemble.parameters()]


def _by_channel(c: Case) -> Any:
    model = copy.deepcopy(c.ensemble.model)
    rse.remove_noise_(model)
    rse.inject_noise_(model, example_inputs=c.inputs[:2].to(next(model.parameters()).device))
    for name, layer in rse.noise_layers(model).items():
        layer.std = (0.1,) * model.get_submodule(name).in_channels  # type: ignore[operator]
    return rse.SelfEnsemble(model).eval().predict(c.inputs, seed=1)


def _batched(c: Case) -> Any:
    with Batcher(c.ensemble, c.inputs[:1]) as batcher:
        answers = [*batcher.submit(c.inputs, Fixed(3)), *batcher.submit(c.inputs[:2], Exact(4))]
        return [[len(each.result().probabilities), float(each.result().probabilities.sum()) > 0.999]
                for each in answers]  # fmt: skip


def _evaluated(c: Case) -> Any:
    found = Evaluation(c.ensemble, c.data, Protocol.model_validate(PROTOCOL), c.folder / "run").run()
    return found.clean, found.attacks, found.worst_case, found.checks


def _certified(c: Case) -> Any:
    settings = Settings(images=6, n0=5, n=40, shard=4)
    found = Certification(c.ensemble, c.data, settings, c.folder / "run").run()
    return found.curve, found.mean_radius, found.draws


def _doctor(c: Case) -> Any:
    return examination.doctor(c.ensemble, c.inputs, c.labels, steps=2, eot=2, images=6)


def _attack(name: str, **settings: Any) -> Callable[[Case], Any]:
    settings = {"confirm_draws": 3} | settings
    return lambda c: attacks.ATTACKS[name](c.ensemble, c.inputs[:6], c.labels[:6], seed=1, **settings)


# Without labels, with labels, and those that train.
ASKING: dict[str, Callable[[Case], Any]] = {
    "predict": lambda c: c.ensemble.predict(c.inputs, seed=1),
    "predict, antithetic": lambda c: c.ensemble.predict(c.inputs, seed=1, antithetic=True),
    "predict, exact": lambda c: c.ensemble.predict(c.inputs, seed=1, stop="exact"),
    "predict, per image": lambda c: c.ensemble.predict(c.inputs, seed=1, sampling="per_image"),
    "predict, fresh": lambda c: c.ensemble.predict(c.inputs).label.shape,
    "predict_proba": lambda c: c.ensemble.predict_proba(c.inputs, seed=1, max_batch=5),
    "decide": lambda c: rse.decide(c.ensemble, c.inputs, alpha=0.05, max_draws=20, seed=1),
    "decide, one draw": lambda c: rse.decide(c.ensemble, c.inputs, max_draws=1, seed=1),
    "certify": lambda c: rse.certify(c.ensemble, c.inputs, n0=10, n=60, seed=1),
    "certify, votes": lambda c: rse.certify(c.ensemble, c.inputs, n0=10, n=60, seed=1, method="vote"),
    "certify, coins": lambda c: rse.certify(c.ensemble, c.inputs, n0=10, n=60, seed=1, bound="binomial"),
    "certify, radius": lambda c: rse.certify(c.ensemble, c.inputs, n0=10, n=60, seed=1, radius=0.1),
    "certify, none": lambda c: rse.certify(c.ensemble, c.inputs[:0]),
    "calibrate": lambda c: rse.calibrate(c.ensemble, c.many, seed=1, reference_draws=10, most=4, epsilon=0.3),
    # On another device batches are cut otherwise, and kernels round.
    "optimize": lambda c: rse.optimize(c.ensemble, c.inputs, "float32").predict(c.inputs, seed=1).label,
    "validate": lambda c: rse.validate(c.ensemble.model, c.inputs.to(next(c.ensemble.parameters()).device)),
    "batcher": _batched,
    "inject": _by_channel,
    "learned": _learned,
}  # fmt: skip
ATTACKING: dict[str, Callable[[Case], Any]] = {
    "fgsm": _attack("fgsm"),
    "pgd": _attack("pgd", steps=3, eot=2, average="probabilities", early_stop=True),
    "pgd, l1": _attack("pgd", norm="l1", eps=2.0, steps=3, restarts=2),
    "apgd": _attack("apgd", norm="l2", eps=0.5, steps=4, loss="dlr"),
    "apgd, l1": _attack("apgd", norm="l1", eps=2.0, steps=4),
    "apgd-t": _attack("apgd-t", steps=2, targets=2),
    "cw": _attack("cw", steps=4, binary_search_steps=2),
    "cw-paper": _attack("cw-paper", steps=4, c=1.0),
    "ddn": _attack("ddn", steps=4),
    "fmn": _attack("fmn", steps=4),
    "fab": _attack("fab", steps=2, targets=2, restarts=2),
    "square": _attack("square", queries=12),
    "square, l2": _attack("square", norm="l2", eps=1.0, queries=12),
    "random-noise": _attack("random-noise", norm="l2", eps=0.5, tries=12, early_stop=True),
    "autoattack-rand": _attack("autoattack-rand", steps=2, eot=2),
    "autoattack-standard": _attack("autoattack-standard", steps=1, queries=4),
    "transfer": lambda c: attacks.transfer(c.ensemble, c.inputs[:6], c.labels[:6], steps=2, seed=1),
    "of a library": lambda c: LibraryAttack("some", "Attack", {}, _of_library)(
        c.ensemble, c.inputs[:6], c.labels[:6], eot=2, seed=1
    ),
}
JUDGING: dict[str, Callable[[Case], Any]] = {
    "judge": lambda c: judge(c.ensemble, c.inputs, c.inputs, c.labels, queries=3, seed=1),
    "judge, persistent": lambda c: [
        (verdict := judge(c.ensemble, c.inputs, c.inputs, c.labels, queries=3, seed=1)).persistent(2),
        verdict.wrong_per_query, verdict.accuracy, verdict.interval, verdict.rms_l2,
    ],
    "judge, a network": lambda c: judge(
        c.ensemble.model, c.inputs, c.inputs, c.labels, queries=2, draws=2, seed=1
    ),
    "doctor": _doctor,
    "evaluation": _evaluated,
    "certification": _certified,
    "tune": lambda c: rse.tune(
        c.ensemble, c.inputs, c.labels, [rse.NoiseConfig(0.2, 0.1)], steps=2, eot=2
    ).values(),
}  # fmt: skip
SETS: dict[str, Callable[[Case], Any]] = {
    "conformal sets": lambda c: rse.conformal_sets(
        c.ensemble, c.inputs, c.labels, alpha=0.3, seed=1
    ).predict(c.inputs, seed=2),
    "conformal sets, moved": lambda c: rse.conformal_sets(
        c.ensemble, c.inputs, c.labels, alpha=0.3, radius=0.05, draws=30, seed=1
    ).predict(c.inputs, seed=2),
}  # fmt: skip
TRAINING: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged": {
        "train": TRAIN | {"epochs": 2, "average": 0.9, "schedule": "one_cycle", "nesterov": True},
        "noise": {"learn": "channel"},
    },
    "several draws": {
        "defense": {"name": "cross-entropy", "draws": 2, "consistency": 1.0, "input_std": 0.1},
        "train": TRAIN | {"schedule": "stages"},
        "resize_pad": {"smallest": 8, "largest": 10},
    },
    "adversarial": {"defense": {"name": "adversarial", "steps": 2, "norm": "l2", "eot": 2, "least": 0.5}},
    "trades": {"defense": {"name": "trades", "steps": 2}},
    "fgsm-retraining": {"defense": {"name": "fgsm-retraining"}},
    "distillation": {"defense": {"name": "distillation", "temperature": 5.0}},
    "parametric noise": {
        "defense": {"name": "parametric-noise", "steps": 1, "start": 2, "projected": False},
        "randomness": {"name": "parametric-noise"},
    },
    "bayesian": {
        "defense": {"name": "bayesian", "steps": 1},
        "randomness": {"name": "bayesian"},
        "train": TRAIN | {"optimizer": "adam", "lr": 0.001},
    },
    "learned perturbation": {
        "defense": {"name": "learned-perturbation", "steps": 1, "period": 2},
        "randomness": {"name": "learned-perturbation"},
    },
    "aligned noise": {"defense": {"name": "aligned-noise"}, "randomness": {"name": "aligned-noise"}},
    "random filters": {"randomness": {"name": "random-filters"}, "noise": {"first": "features"}},
    "dropout": {"randomness": {"name": "dropout"}},
    "activation pruning": {"randomness": {"name": "activation-pruning"}},
}
CALLS = ASKING | ATTACKING | JUDGING | SETS


class Trained(NamedTuple):
    """What a short training came to."""

    weights: dict[str, Tensor]
    losses: list[float]
    metrics: dict[str, Any]


def trained(name: str, folder: Path) -> Trained:
    """Of `TRAINING`."""
    trainer = rse.Trainer(rse.Recipe.model_validate(RECIPE | TRAINING[name]), folder)
    results = trainer.run()
    losses = [each["train/loss"] for each in results["history"]]
    return Trained(dict(trainer.ensemble.state_dict()), losses, results["metrics"])


def usual(name: str) -> Any:
    """What a call gives a program with torch's defaults, on the CPU; see `plain`. Computed once a process."""
    return _usual(name, tuple(examination.CHECKS) if name == "doctor" else ())


@functools.cache
def _usual(name: str, checks: tuple[str, ...]) -> Any:
    """`checks`: those that the test left to the doctor."""
    del checks
    with tempfile.TemporaryDirectory() as folder:
        if name in TRAINING:
            return plain(trained(name, Path(folder) / "run"))
        return plain(CALLS[name](case(Path(folder))))


def plain(value: Any) -> Any:
    """Tensors as their numbers with their types, records as dictionaries: what can be compared by `==`."""
    if isinstance(value, Tensor):
        numbers = value.detach().cpu().contiguous()
        many = numbers.numel() > 1000  # whose bytes are compared
        seen = numbers.view(-1).view(torch.uint8).numpy().tobytes() if many else str(numbers.tolist())
        return [str(value.dtype), tuple(value.shape), seen]  # NaN is NaN
    if isinstance(value, BaseModel):
        return plain(dict(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value
