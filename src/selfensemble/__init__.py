"""Random Self-Ensemble for any PyTorch classifier: `import selfensemble as rse`."""

from .ensemble import Prediction, SelfEnsemble
from .inject import inject_noise_, noise_disabled, noise_layers, remove_noise_
from .noise import GaussianNoise, NoiseConfig, noise_draw

__all__ = [
    "GaussianNoise",
    "NoiseConfig",
    "Prediction",
    "SelfEnsemble",
    "inject_noise_",
    "noise_disabled",
    "noise_draw",
    "noise_layers",
    "remove_noise_",
]
