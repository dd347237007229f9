"""Attacks of functions that take a model: adv-lib."""

import inspect
from typing import Any

from torch import Tensor

from .library import LibraryAttack, LibraryClassifier, check_settings, choose, import_library

# Their distances are of other kinds than these images have, or they return no images.
_OTHERS = {"perc_al"}
_FILLED = {"model", "inputs", "labels", "targeted", "callback"}


def adv_lib_attack(name: str, **settings: Any) -> LibraryAttack:
    """An attack of adv-lib.

    Args:
        name: of its function in `adv_lib.attacks`, e.g. "ddn", "fmn", "alma", "apgd", "pgd_linf".
        settings: arguments of the function.

    Raises:
        ImportError: adv-lib is not installed, or torchvision, which some of its distances need.
        ValueError: no such attack, or settings it does not know.
    """
    library = import_library("adv_lib", "adv_lib.attacks")
    found = {
        each: function
        for each, function in vars(library).items()
        if inspect.isfunction(function) and "labels" in inspect.signature(function).parameters
        if each not in _OTHERS
    }
    attack = choose("adv_lib", found, name)
    check_settings("adv_lib", name, attack, settings, skip=_FILLED)
    has_targets = "targeted" in inspect.signature(attack).parameters

    def run(
        classifier: LibraryClassifier, x: Tensor, y: Tensor, targeted: bool, classes: int, seed: int
    ) -> Tensor:
        if targeted and not has_targets:
            raise ValueError(f"adv_lib's {name} has no targeted mode")
        filled = {"targeted": targeted} if has_targets else {}
        adversarial: Tensor = attack(classifier, x, y, **filled | settings)
        return adversarial

    return LibraryAttack("adv_lib", name, settings, run)
