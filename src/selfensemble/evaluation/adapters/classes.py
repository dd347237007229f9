"""Attacks of classes that take a model: torchattacks, foolbox, ART and the published AutoAttack."""

import inspect
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...attacks.norms import per_image
from .library import LibraryAttack, LibraryClassifier, check_settings, choose, import_library

# torchattacks: they attack several models, or train one.
_WRAPPERS = {"MultiAttack", "LGV"}
_NEEDS_IMAGES = {"DatasetAttack"}  # foolbox: its images come from elsewhere
# ART: attacks whose answer is a patch, a texture, sound or a table, that need one layer of a network, or
# that run on other frameworks.
_NO_IMAGES = (
    "ASR", "DPatch", "DecisionTree", "FeatureAdversaries", "FrameSaliency", "GRAPHITE", "HighConfidence",
    "Laser", "LowProFool", "Malware", "OverTheAir", "Overload", "Patch", "SNAL", "TargetedUniversal",
    "TensorFlow", "Texture",
)  # fmt: skip
_ASKS_PROBABILITIES = {"SimBA", "VirtualAdversarialMethod"}  # ART: they refuse logits


def torchattacks_attack(name: str, **settings: Any) -> LibraryAttack:
    """An attack of torchattacks.

    Args:
        name: of its class, e.g. "PGD", "APGD", "CW".
        settings: arguments of the class. The number of classes and the seed are filled in.

    Raises:
        ImportError: torchattacks is not installed.
        ValueError: no such attack, or settings it does not know.
    """
    library = import_library("torchattacks", "torchattacks")
    found = {each: getattr(library, each) for each in library.__all__ if each not in _WRAPPERS}
    build = choose("torchattacks", found, name)
    known = check_settings("torchattacks", name, build, settings, skip={"model"})

    def run(
        classifier: LibraryClassifier, x: Tensor, y: Tensor, targeted: bool, classes: int, seed: int
    ) -> Tensor:
        filled = {"n_classes": classes, "seed": seed}
        attack = build(classifier, **{key: filled[key] for key in filled if key in known} | settings)
        if targeted:
            if "targeted" not in attack.supported_mode:
                raise ValueError(f"torchattacks' {name} has no targeted mode")
            attack.set_mode_targeted_by_label(quiet=True)
        adversarial: Tensor = attack(x, y)
        return adversarial

    return LibraryAttack("torchattacks", name, settings, run)


def foolbox_attack(name: str, *, eps: float | None = None, **settings: Any) -> LibraryAttack:
    """An attack of foolbox.

    Args:
        name: of its class, e.g. "LinfPGD", "L2CarliniWagnerAttack".
        eps: radius of the ball. Attacks of a fixed budget need it; those that minimise the distance do so
            without it, and with it stop there.
        settings: arguments of the class.

    Returns:
        An attack whose images are the originals where a search for the nearest found nothing; those of a
        fixed budget are what the last step reached.

    Raises:
        ImportError: foolbox is not installed.
        ValueError: no such attack, settings it does not know, or a missing or impossible `eps`.
    """
    library = import_library("foolbox", "foolbox")
    base = import_library("foolbox", "foolbox.attacks.base")
    found = {
        each: kind
        for each, kind in vars(library.attacks).items()
        if inspect.isclass(kind) and issubclass(kind, base.Attack) and not inspect.isabstract(kind)
        if each not in _NEEDS_IMAGES
    }
    build = choose("foolbox", found, name)
    check_settings("foolbox", name, build, settings)
    fixed = issubclass(build, base.FixedEpsilonAttack)
    if fixed and eps is None:
        raise ValueError(f"foolbox's {name} has a fixed budget: give eps")
    if eps is not None and not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be finite and > 0, got {eps}")

    def run(
        classifier: LibraryClassifier, x: Tensor, y: Tensor, targeted: bool, classes: int, seed: int
    ) -> Tensor:
        model = library.PyTorchModel(classifier, bounds=(0, 1), device=x.device)
        goal = library.criteria.TargetedMisclassification if targeted else library.criteria.Misclassification
        _, images, success = build(**settings)(model, x, goal(y), epsilons=eps)
        adversarial: Tensor = images if fixed else torch.where(per_image(success, x), images, x)
        return adversarial

    return LibraryAttack("foolbox", name, settings if eps is None else settings | {"eps": eps}, run)


def art_attack(name: str, **settings: Any) -> LibraryAttack:
    """An evasion attack of the Adversarial Robustness Toolbox.

    Args:
        name: of its class in `art.attacks.evasion`, e.g. "ProjectedGradientDescent", "CarliniL2Method".
        settings: arguments of the class. Note the small default `batch_size` of some, and its default of
            eps 0.3. Progress bars are off where the attack lets us.

    Raises:
        ImportError: ART is not installed.
        ValueError: no such attack, or settings it does not know.
    """
    library = import_library("art", "art.attacks.evasion")
    base = import_library("art", "art.attacks.attack").EvasionAttack
    estimator = import_library("art", "art.estimators.classification").PyTorchClassifier
    found = {
        each: kind
        for each, kind in vars(library).items()
        if inspect.isclass(kind) and issubclass(kind, base) and not inspect.isabstract(kind)
        if not any(part in each for part in _NO_IMAGES)
    }
    build = choose("art", found, name)
    known = check_settings("art", name, build, settings, skip={"estimator", "classifier", "targeted"})

    def run(
        classifier: LibraryClassifier, x: Tensor, y: Tensor, targeted: bool, classes: int, seed: int
    ) -> Tensor:
        classifier.answers_probabilities = name in _ASKS_PROBABILITIES
        victim = estimator(
            model=classifier, loss=nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=classes,
            clip_values=(0.0, 1.0), device_type="cpu",
        )  # fmt: skip
        filled: dict[str, Any] = {"verbose": False} if "verbose" in known else {}
        if "targeted" in inspect.signature(build).parameters:
            filled["targeted"] = targeted
        elif targeted:
            raise ValueError(f"art's {name} has no targeted mode")
        attack = build(victim, **filled | settings)
        goals = nn.functional.one_hot(y, classes).float().cpu().numpy()
        return torch.from_numpy(np.asarray(attack.generate(x=x.cpu().numpy(), y=goals)))

    return LibraryAttack("art", name, settings, run)


def autoattack_attack(
    *, norm: str = "linf", eps: float, version: str = "rand", steps: int | None = None, eot: int | None = None
) -> LibraryAttack:
    """AutoAttack as its authors publish it.

    Args:
        norm: "linf", "l2" or "l1".
        eps: radius of the ball.
        version: "rand", "standard" or "plus".
        steps: of each run of APGD; None for the published 100.
        eot: passes averaged by APGD; None for the published numbers, 20 of "rand", 1 of the others.

    Returns:
        An attack whose images are the originals where no single pass was fooled.

    Raises:
        ImportError: it is not installed.
        ValueError: a norm, radius or version that it does not have.
    """
    library = import_library("autoattack", "autoattack").AutoAttack
    norms, versions = {"linf": "Linf", "l2": "L2", "l1": "L1"}, ("rand", "standard", "plus")
    if norm not in norms or version not in versions:
        known = f"a norm of {', '.join(norms)} and a version of {', '.join(versions)}"
        raise ValueError(f"autoattack has {known}, not {norm!r} and {version!r}")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be finite and > 0, got {eps}")

    def run(
        classifier: LibraryClassifier, x: Tensor, y: Tensor, targeted: bool, classes: int, seed: int
    ) -> Tensor:
        if targeted:
            raise ValueError("autoattack has no targeted mode")
        attack = library(
            classifier, norm=norms[norm], eps=eps, version=version, seed=seed, device=x.device, verbose=False
        )
        for part in (attack.apgd, attack.apgd_targeted):
            part.n_iter = steps or part.n_iter
            part.eot_iter = eot or part.eot_iter
        adversarial: Tensor = attack.run_standard_evaluation(x, y, bs=len(x))
        return adversarial

    settings = {"norm": norm, "eps": eps, "version": version, "steps": steps, "eot": eot}
    return LibraryAttack("autoattack", version, settings, run)
