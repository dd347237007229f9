"""Random Self-Ensemble for any PyTorch classifier: `import selfensemble as rse`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import attacks, evaluation
    from .attacks import cw_l2, cw_l2_paper
    from .calibration import calibrate
    from .certification import Certificate, certify
    from .conformal import ConformalSets, conformal_sets
    from .data import ImageData, load_data
    from .decision import Decision, decide
    from .ensemble import Prediction, SelfEnsemble
    from .evaluation.judge import judge
    from .hub import load, save
    from .inference import optimize
    from .inject import inject_noise_, noise_disabled, noise_layers, remove_noise_
    from .models import create_model
    from .noise import GaussianNoise, NoiseConfig
    from .onnx_export import export_onnx
    from .recipe import Recipe, load_recipe
    from .streams import noise_draw
    from .training import Trainer
    from .tuning import Sweep, tune
    from .validators import Issue, validate

__all__ = [
    # noise
    "GaussianNoise",
    "NoiseConfig",
    "noise_draw",
    # into a network, and out of it
    "inject_noise_",
    "remove_noise_",
    "noise_disabled",
    "noise_layers",
    "validate",
    "Issue",
    # the ensemble
    "SelfEnsemble",
    "Prediction",
    "optimize",
    "calibrate",
    "save",
    "load",
    "export_onnx",
    # what is certain
    "decide",
    "Decision",
    "certify",
    "Certificate",
    "conformal_sets",
    "ConformalSets",
    # attacks, and what they are worth
    "attacks",
    "cw_l2",
    "cw_l2_paper",
    "evaluation",
    "judge",
    # training
    "tune",
    "Sweep",
    "Trainer",
    "Recipe",
    "load_recipe",
    "create_model",
    "ImageData",
    "load_data",
]

_MODULES = {
    "attacks": ("cw_l2", "cw_l2_paper"),
    "calibration": ("calibrate",),
    "certification": ("Certificate", "certify"),
    "conformal": ("ConformalSets", "conformal_sets"),
    "data": ("ImageData", "load_data"),
    "decision": ("Decision", "decide"),
    "ensemble": ("Prediction", "SelfEnsemble"),
    "evaluation": ("judge",),
    "hub": ("load", "save"),
    "inference": ("optimize",),
    "inject": ("inject_noise_", "noise_disabled", "noise_layers", "remove_noise_"),
    "models": ("create_model",),
    "noise": ("GaussianNoise", "NoiseConfig"),
    "onnx_export": ("export_onnx",),
    "recipe": ("Recipe", "load_recipe"),
    "streams": ("noise_draw",),
    "training": ("Trainer",),
    "tuning": ("Sweep", "tune"),
    "validators": ("Issue", "validate"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Lazy, so that `selfensemble --help` does not wait for torch.
    if name in ("attacks", "evaluation"):
        return import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
