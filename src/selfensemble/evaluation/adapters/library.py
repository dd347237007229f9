"""What the adapters share: the model as a library sees it, and the call of an attack."""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...attacks.averaging import Noise
from ...attacks.budget import spend
from ...attacks.driver import run_attack, single_draw
from ...attacks.expectation import Forward, Oracle
from ...attacks.units import from_units, in_own_units
from ...noise.streams import noise_draw, stream_seed
from ..isolation import isolated

_TOLERANCE = 1e-4  # how far outside [0, 1] an attack may end: rounding, not a search without a box

INSTALL = {
    "torchattacks": "pip install --no-deps torchattacks (its metadata asks for packages it never imports)",
    "foolbox": "pip install foolbox",
    "art": "pip install adversarial-robustness-toolbox",
    "adv_lib": "pip install adv-lib, and torchvision, which its distances need",
    "autoattack": "pip install git+https://github.com/fra31/auto-attack",
}


class LibraryClassifier(nn.Module):
    """The model as a library sees it: images (B, C, H, W) in [0, 1] to logits (B, K).

    It holds neither the model's parameters nor its training mode, so that no library can change them.

    Attributes:
        gradients: forward and backward passes so far, in images times draws.
        forwards: forward passes alone.
    """

    def __init__(self, forward: Forward, oracle: Oracle, device: torch.device, seed: int) -> None:
        super().__init__()
        nothing = torch.empty(0, dtype=torch.float32, device=device)
        self.device = nn.Parameter(nothing, requires_grad=False)  # libraries ask it
        self.answers_probabilities = False
        self.gradients = self.forwards = 0
        self._single_draw: Forward = forward
        self._to = device
        self._eot = oracle.eot
        self._seed, self._drawn = seed, 0
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        each = [self._draw(inputs.to(self._to)) for _ in range(self._eot)]
        answer = each[0]
        if self._eot > 1:
            answer = torch.stack([logits.log_softmax(dim=1) for logits in each]).logsumexp(dim=0)
            answer = answer - math.log(self._eot)
        if self.answers_probabilities:
            answer = answer.softmax(dim=1)
        self._count(answer, len(inputs) * self._eot)
        return answer.to(inputs.device)

    def _draw(self, inputs: Tensor) -> Tensor:
        self._drawn += 1
        with noise_draw(self._seed, self._drawn, "shared"):
            return self._single_draw(inputs).float()

    def _count(self, answer: Tensor, evaluations: int) -> None:
        """A forward pass, and for every backward pass from it one with a gradient."""
        self.forwards += evaluations
        if not answer.requires_grad:
            return
        alone = evaluations

        def backward(gradient: Tensor) -> None:
            nonlocal alone
            self.forwards -= alone
            self.gradients += evaluations
            alone = 0

        answer.register_hook(backward)


# (classifier, images, labels, targeted, number of classes, seed) to adversarial images.
Run = Callable[[LibraryClassifier, Tensor, Tensor, bool, int, int], Tensor]


@dataclass(frozen=True)
class LibraryAttack:
    """An attack of another library, called like this project's own.

    Attributes:
        library: its import name.
        name: the attack's name there.
        settings: what the attack is built with, beyond the library's defaults.
    """

    library: str
    name: str
    settings: Mapping[str, Any]
    run: Run

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        targeted: bool = False,
        eot: int = 1,
        max_batch: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Attack `model` in eval mode; evaluations are counted, the caller's random states left alone.

        Args:
            model: a classifier; of a `SelfEnsemble`, single draws are attacked, or means of `eot`.
            inputs: (B, C, H, W) in [0, 1], or in the bounds of an ensemble. The library gets them in [0, 1]:
                lengths among its settings are shares of the range.
            labels: (B,) integers, true classes, or wanted ones if `targeted`.
            targeted: reach `labels` rather than leave them, where the attack can.
            eot: noise draws of a pass, in the memory of that many; 1 for a model without noise.
            max_batch: images the library gets at a time; None for all.
            seed: of the noise and of the library's random numbers; None for fresh entropy. A few attacks
                draw from the operating system besides, and do not repeat (ART's HopSkipJump).

        Returns:
            (B, C, H, W) in the range, on the device and in the dtype of `inputs`.

        Raises:
            ValueError: inputs or settings the library cannot attack, or its images are not finite, leave
                [0, 1] by more than 1e-4 or have another shape.
        """

        def run(oracle: Oracle, x: Tensor, y: Tensor) -> Tensor:
            own = int(torch.randint(2**31, (), generator=oracle.generator, device="cpu"))
            classifier = LibraryClassifier(
                from_units(single_draw(model)), oracle, x.device, stream_seed(own, 0, 0)
            )
            # Of what the library makes without saying where; ART's arrays are NumPy's.
            where = torch.device("cpu") if self.library == "art" else x.device
            try:
                with isolated(own), torch.enable_grad(), where:
                    images = self.run(classifier, x.clamp(0.0, 1.0), y, targeted, oracle.classes, own)
            finally:
                spend(gradients=classifier.gradients, forwards=classifier.forwards)
            return self._checked(images.detach().to(x.device, torch.float32), x)

        def attack(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
            return run_attack(model, inputs, labels, run, Noise(eot=eot, seed=seed), max_batch)

        return in_own_units()(attack)(model, inputs, labels)

    def _checked(self, images: Tensor, inputs: Tensor) -> Tensor:
        what = f"{self.library}'s {self.name}"
        if images.shape != inputs.shape:
            raise ValueError(f"{what} returned shape {tuple(images.shape)} for {tuple(inputs.shape)}")
        if images.isnan().any():
            raise ValueError(f"{what} returned NaN")
        low, high = (bound.item() for bound in images.aminmax())
        if low < -_TOLERANCE or high > 1 + _TOLERANCE:
            raise ValueError(f"{what} returned images in [{low:g}, {high:g}], outside [0, 1]")
        return images


def import_library(library: str, module: str) -> Any:
    """The module, imported without its warnings and without a trace in the random states."""
    try:
        with isolated(None):
            return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{library} cannot be imported ({error}): {INSTALL[library]}") from error


def choose(library: str, found: Mapping[str, Any], name: str) -> Any:
    """The attack of that name; a ValueError lists those that there are."""
    if name not in found:
        raise ValueError(f"{library} has no attack {name!r} for images; known: {', '.join(sorted(found))}")
    return found[name]


def check_settings(
    library: str, name: str, build: Any, settings: Mapping[str, Any], skip: set[str] | None = None
) -> set[str]:
    """The settings that the attack knows; a ValueError for others, and for required ones left out."""
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(build).parameters.items()
        if key not in (skip or set())
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    if unknown := sorted(set(settings) - set(parameters)):
        raise ValueError(
            f"{library}'s {name} has no setting {', '.join(unknown)}; known: {', '.join(parameters)}"
        )
    needed = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    if missing := [key for key in needed if key not in settings]:
        raise ValueError(f"{library}'s {name} needs the setting {', '.join(missing)}")
    return set(parameters)
