"""Random Self-Ensemble for any PyTorch classifier: `import selfensemble as rse`."""

import _signal  # type: ignore[import-not-found]  # of which `signal` is made: loaded from the beginning
import os
import sys


def _end_at_once() -> None:
    """Let Ctrl-C end this process, a command whose work has not begun, with status 130 (see `interrupts`).

    Whatever comes before is Python's own beginning.
    """

    def end(number: int, frame: object) -> None:
        os.write(2, b"error: interrupted; files that were complete before are intact\n")
        os._exit(130)

    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        try:
            _signal.signal(_signal.SIGINT, end)
        except ValueError:  # in another thread than the main one
            return


_first = os.path.basename(sys.argv[0]) if sys.argv else ""  # noqa: PTH119
# The console script, and python -m, whose first argument has this name until the package is found.
_spawned = "--multiprocessing-fork" in sys.orig_argv
_module = _first == "-m" and ("-m", "selfensemble") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
if (_module or _first in ("selfensemble", "selfensemble.exe", "selfensemble-script.py")) and not _spawned:
    _end_at_once()

from importlib import import_module  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from . import attacks, evaluation
    from .artefacts.onnx_export import export_onnx
    from .artefacts.onnx_session import OnnxEnsemble
    from .artefacts.storage import load, save
    from .attacks import cw_l2, cw_l2_paper
    from .certainty.calibration import calibrate
    from .certainty.certification import Certificate, certify
    from .certainty.conformal import ConformalSets, conformal_sets
    from .certainty.decision import Decision, decide
    from .certainty.flipping import flip_averaged
    from .data.images import ImageData
    from .data.sources import load_data
    from .ensemble.ensemble import Prediction, SelfEnsemble
    from .ensemble.validators import Issue, validate
    from .evaluation.judge import judge
    from .experiments.tuning import Sweep, tune
    from .fast.optimize import optimize
    from .networks.flipping import FlipAveraged
    from .networks.models import create_model
    from .networks.naming import network_from
    from .networks.normalized import Normalized
    from .noise.injection import inject_noise_, noise_disabled, noise_layers, remove_noise_
    from .noise.layer import GaussianNoise
    from .noise.levels import NoiseConfig
    from .noise.streams import noise_draw
    from .training.recipe import Recipe, load_recipe
    from .training.trainer import Trainer

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
    "OnnxEnsemble",
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
    "network_from",
    "Normalized",
    "FlipAveraged",
    "flip_averaged",
    "ImageData",
    "load_data",
]

_MODULES = {
    "artefacts.onnx_export": ("export_onnx",),
    "artefacts.onnx_session": ("OnnxEnsemble",),
    "artefacts.storage": ("load", "save"),
    "attacks": ("cw_l2", "cw_l2_paper"),
    "certainty.calibration": ("calibrate",),
    "certainty.certification": ("Certificate", "certify"),
    "certainty.conformal": ("ConformalSets", "conformal_sets"),
    "certainty.flipping": ("flip_averaged",),
    "certainty.decision": ("Decision", "decide"),
    "data.images": ("ImageData",),
    "data.sources": ("load_data",),
    "ensemble.ensemble": ("Prediction", "SelfEnsemble"),
    "ensemble.validators": ("Issue", "validate"),
    "evaluation": ("judge",),
    "experiments.tuning": ("Sweep", "tune"),
    "fast.optimize": ("optimize",),
    "networks.flipping": ("FlipAveraged",),
    "networks.models": ("create_model",),
    "networks.naming": ("network_from",),
    "networks.normalized": ("Normalized",),
    "noise.injection": ("inject_noise_", "noise_disabled", "noise_layers", "remove_noise_"),
    "noise.layer": ("GaussianNoise",),
    "noise.levels": ("NoiseConfig",),
    "noise.streams": ("noise_draw",),
    "training.recipe": ("Recipe", "load_recipe"),
    "training.trainer": ("Trainer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Lazy, so that `selfensemble --help` does not wait for torch.
    if name in ("attacks", "evaluation"):
        return import_module(f".{name}", __name__)
    if name == "__version__":
        return import_module("importlib.metadata").version(__name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
