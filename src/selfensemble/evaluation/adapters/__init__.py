"""Attacks of other libraries, with the signature of this project's own.

They are torchattacks, foolbox, ART, adv-lib and the published AutoAttack.

    attack = foolbox_attack("L2CarliniWagnerAttack", steps=100)
    adversarial = attack(model, inputs, labels, eot=10, seed=0)

The library sees a plain classifier: the logits of one noise draw or, with `eot` > 1, the logarithm of the
mean softmax over `eot` fresh draws a pass. What it calls a success counts for little: `judge` decides.
"""

from .classes import art_attack, autoattack_attack, foolbox_attack, torchattacks_attack
from .functions import adv_lib_attack
from .library import LibraryAttack, LibraryClassifier

__all__ = [
    "LibraryAttack",
    "LibraryClassifier",
    "adv_lib_attack",
    "art_attack",
    "autoattack_attack",
    "foolbox_attack",
    "torchattacks_attack",
]
