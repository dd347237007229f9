"""Defenses as training objectives, one file each; a recipe names one in its section `defense`."""

from typing import Annotated

from pydantic import Field

from .adversarial import Adversarial, Trades
from .base import Defense, Networks
from .cross_entropy import CrossEntropy
from .distillation import Distillation, Temperature
from .fgsm_retraining import FgsmRetraining

AnyDefense = Annotated[
    CrossEntropy | Adversarial | Trades | FgsmRetraining | Distillation | Temperature,
    Field(discriminator="name"),
]

__all__ = [
    "Adversarial",
    "AnyDefense",
    "CrossEntropy",
    "Defense",
    "Distillation",
    "FgsmRetraining",
    "Networks",
    "Temperature",
    "Trades",
]
