"""A classifier whose passes may differ, one noise draw at a time."""

from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..noise.calls import keep_hooks_apart, modules_of, restore_copy_, set_modes, state_of_copy, switch_mode
from ..noise.graphs import is_recording
from ..noise.injection import noise_disabled, random_layers
from ..noise.streams import Sampling, check_sampling, noise_draw
from ..runtime.remarks import Remark
from .checks import floating_dtype, logits_of
from .order import order_watched
from .randomness import (
    PASSES,
    answers_differ,
    draws_for_python,
    draws_numbers,
    images_share_numbers,
    with_random_images,
)

Precision = Literal["float32", "bf16"]
_PLAIN = frozenset({type(None), bool, int, float, str, type})


def _state(tensor: Tensor | None) -> tuple[int, int]:
    """What changes where a tensor is replaced, or changed in place."""
    return id(tensor), 0 if tensor is None or tensor.is_inference() else tensor._version


class Digests(NamedTuple):
    """Of what an ensemble consists of, see `Fingerprint`."""

    weights: str
    noise: str


class Copied(NamedTuple):
    """Digests of an optimised copy when it was made: its original's, and its own."""

    original: Digests
    own: Digests


class RandomClassifier(nn.Module):
    """What there is to know of a network to draw from it.

    Args:
        model: a classifier that returns logits (B, K).
        sampling: how draws are sampled in eval mode, see `GaussianNoise`.

    Attributes:
        folds: by shape of an image and `settings`, whether one pass can hold several draws; found out when it
            is wanted.
        precision: that it computes in, as `optimize` names it.
        copied: what an optimised copy was made of; None of another.
    """

    # Input elements of a forward pass on a CPU: 32 images of 32x32.
    chunk = 32 * 3 * 32 * 32
    # Whether noisy copies of activations fit where a plain pass has its activations in float32.
    has_half_activations = False
    precision: Precision = "float32"
    copied: Copied | None = None
    watches_order = False  # whether its next pass tells if the first layer is the one that noise took for it
    asks_calls = True  # its own mode stays what it is, whatever calls of other threads want

    def __init__(self, model: nn.Module, sampling: Sampling) -> None:
        super().__init__()
        self.model = model
        self.folds: dict[tuple[tuple[int, ...], int], bool] = {}
        self._others: dict[tuple[int, ...], bool] = {}
        self._quiet: dict[tuple[int, ...], int] = {}  # settings with which no other noise was found
        self.sampling = sampling

    @property
    def sampling(self) -> Sampling:
        """How draws are sampled in eval mode; of all its random layers."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._sampling: Sampling = check_sampling(sampling)
        for layer in random_layers(self.model):
            layer.sampling = self._sampling

    @property
    def is_random(self) -> bool:
        """Whether two passes can differ, as far as is known without asking the network.

        Any random layer is on, with a level above 0, or `varies` found other randomness.
        """
        return self._has_noise or any(self._others.values())

    @property
    def _has_noise(self) -> bool:
        return any(layer.is_active for layer in random_layers(self.model))

    @property
    def input_dtype(self) -> torch.dtype | None:
        """What inputs are converted to."""
        return floating_dtype(self)

    def draw_logits(self, inputs: Tensor) -> Tensor:
        """Logits (B, K) of one noise draw.

        Raises:
            OutputError: the model returns something else, see `logits_of`.
        """
        # Compilers see neither the attribute nor the pass that changes it.
        if torch.compiler.is_compiling() or is_recording() or torch._C._get_tracing_state() is not None:
            return logits_of(self.model(inputs), inputs.shape[0])
        # In eval mode its own images, for the network may write into them.
        return self._watched_logits(inputs if self.training else inputs.clone())

    def _watched_logits(self, inputs: Tensor) -> Tensor:
        if vars(self).pop("watches_order", False):  # by one thread
            try:
                with order_watched(self.model):
                    return logits_of(self.model(inputs), inputs.shape[0])
            except Exception as error:
                self.watches_order = not isinstance(error, Remark)  # where warnings are errors
                raise
        return logits_of(self.model(inputs), inputs.shape[0])

    def _forget(self) -> None:
        """What was found out of the network, which may be another one now."""
        self._others, self._quiet, self.folds = {}, {}, {}

    def _load_from_state_dict(self, *args: Any) -> None:
        self._forget()  # levels may be tensors
        super()._load_from_state_dict(*args)

    def train(self, mode: bool = True) -> Self:
        """What `nn.Module.train` does; beside calls that want eval mode, as soon as none does any more."""
        self._forget()
        switch_mode(self, mode)
        self._lead_layers(mode)
        return self

    def _lead_layers(self, mode: bool) -> None:
        """Random layers draw as the ensemble is, whatever the mode of the part that they are in."""
        if other := [layer for layer in random_layers(self.model) if layer.training != mode]:
            set_modes((layer, mode) for layer in other)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_copied": state_of_copy(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {"_quiet": {}} | state
        own = state.pop("_copied", None)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        keep_hooks_apart(*self.modules())
        if own is not None:
            restore_copy_(self, own)

    def settings(self) -> int:
        """A number that changes with the modules, their modes and tensors, and plain values set on them."""
        values = list[Any]()
        for module in modules_of(self.model):
            values.append(type(module))
            # Types are compared, for isinstance takes several times as long, and every prediction asks.
            values += [item for item in vars(module).items() if type(item[1]) in _PLAIN]
            values += map(_state, module._parameters.values())
            values += map(_state, module._buffers.values())
        return hash(tuple(values))

    def varies(self, inputs: Tensor) -> bool:
        """Whether two passes over images like these differ, by noise of any kind, whatever draws it.

        Args:
            inputs: (B, ...), prepared, in the mode that is asked about.
        """
        return self._has_noise or self.has_other_noise(inputs)

    def has_other_noise(self, inputs: Tensor, *, trusting: bool = False) -> bool:
        """Whether they differ by anything but the random layers of this package.

        Dropout at test time, Bayesian layers, random transforms, noise of numpy. Passes are compared, over
        the first images and over random ones, for noise that multiplies shows nothing of black ones: some at
        first, two ever after where they were equal, for what is off may be switched on.

        `trusting`: then only if a module, a mode or a plain value of the network has changed.
        """
        if len(inputs) == 0:
            return any(self._others.values())
        shape = tuple(inputs.shape[1:])
        settings = self.settings()
        if trusting and not self._others.get(shape, False) and self._quiet.get(shape) == settings:
            return False
        if not self._others.get(shape, False):
            passes, images = (2, 1) if shape in self._others else (PASSES, 2)
            asked = with_random_images(inputs[:images], getattr(self, "bounds", None) or (0.0, 1.0))
            with noise_draw(0, 0), torch.no_grad():
                found = answers_differ(self._held, asked, passes, len(asked))
            if not found and passes == PASSES:
                with noise_disabled(self):
                    one = self.draw_logits
                    found = bool(draws_numbers(one, asked)) or draws_for_python(one, asked)
            self._others[shape] = found
            if found:
                self.folds = {}  # which a pass may draw once for all that is in it
            else:
                self._quiet[shape] = settings
        return self._others[shape]

    def images_share_noise(self, inputs: Tensor, most: int = 4) -> bool:
        """Whether a pass may draw other noise once for all of its images, not for each of them.

        Args:
            inputs: (B, ...), prepared, in the mode that is asked about.
            most: images of a pass, 2 or more.
        """
        if len(inputs) == 0 or not self.has_other_noise(inputs):
            return False
        with noise_disabled(self):
            return images_share_numbers(self.draw_logits, inputs, most)

    def _held(self, inputs: Tensor) -> Tensor:
        """A pass whose random layers draw what they drew before."""
        with noise_draw(0, 0):
            return self.draw_logits(inputs)
