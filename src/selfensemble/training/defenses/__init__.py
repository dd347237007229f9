"""Defenses as training objectives, one file each; a recipe names one in its section `defense`."""

from typing import Annotated

from pydantic import Field

from .adversarial import Adversarial, Trades
from .alignment import AlignmentTraining
from .base import Defense, Networks
from .bayesian import BayesianTraining
from .cross_entropy import CrossEntropy
from .distillation import Distillation
from .fgsm_retraining import FgsmRetraining
from .parametric_noise import ParametricNoiseTraining
from .perturbation import PerturbationTraining

AnyDefense = Annotated[
    CrossEntropy
    | Adversarial
    | Trades
    | FgsmRetraining
    | Distillation
    | ParametricNoiseTraining
    | BayesianTraining
    | PerturbationTraining
    | AlignmentTraining,
    Field(discriminator="name"),
]

__all__ = [
    "Adversarial",
    "AlignmentTraining",
    "AnyDefense",
    "BayesianTraining",
    "CrossEntropy",
    "Defense",
    "Distillation",
    "FgsmRetraining",
    "Networks",
    "ParametricNoiseTraining",
    "PerturbationTraining",
    "Trades",
]
