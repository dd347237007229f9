"""What `optimize` returns: an ensemble that answers for its original, and stays in step with it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ensemble.classifier import Copied, Digests
from ..ensemble.classifier import Precision as Precision
from ..ensemble.ensemble import SelfEnsemble
from ..ensemble.fingerprint import fingerprint, own_digests
from ..noise.copies import OptimizedCopy
from ..noise.injection import CHILD, random_layers
from ..noise.layer import NoiseConfig, RandomLayer


class FastEnsemble(OptimizedCopy, SelfEnsemble):
    """What `optimize` returns: computes as `original` does, faster.

    What is saved or exported of it is its original, with the draws, bounds and stopping rule of the copy.
    `noise_disabled`, `set_levels_`, `remove_noise_` and `make_static_` act on both, and so does `to` another
    device. Levels that are set in only one of them are an error where it would matter, and so are weights:
    those of the copy are what the original had; after training it further, optimise it again.

    Args:
        model: the rewritten network.
        original: what it computes as.
        precision: that it computes in.
    """

    def __init__(self, model: nn.Module, original: SelfEnsemble, precision: Precision) -> None:
        # A network without noise stays without.
        config = None if random_layers(model) else NoiseConfig(0, 0)
        super().__init__(
            model, config, draws=original.draws, sampling=original.sampling, bounds=original.bounds
        )
        self.watches_order = original.watches_order  # or said it
        self.precision = precision
        theirs = fingerprint(original)
        self.copied = Copied(Digests(theirs.weights, theirs.noise), own_digests(self))
        self.stopping, self.sets = original.stopping, original.sets
        if precision == "bf16":
            self.chunk, self.has_half_activations = 4 * original.chunk, True
        self._original = (original,)
        self.register_load_state_dict_pre_hook(_refuse_other_weights)  # type: ignore[no-untyped-call]

    @property
    def original(self) -> SelfEnsemble:
        """The ensemble this is a copy of."""
        original = super().original
        assert isinstance(original, SelfEnsemble)
        return original

    @property
    def input_dtype(self) -> torch.dtype | None:
        """That of the original: the first layer computes in it, whatever the others do."""
        return self.original.input_dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FastEnsemble":
        """What `to`, `cuda`, `half`, ... call: moves the original along, and refuses other dtypes.

        Raises:
            ValueError: weights would change their dtype.
        """
        for dtype in {tensor.dtype for tensor in self.parameters()}:
            tried = fn(torch.empty(0, dtype=dtype, device=_device_of(self)))
            if tried.dtype != dtype:
                raise ValueError(
                    f"an optimised copy computes in {self.precision}, which it was made for: convert its "
                    "original, and optimize that"
                )
            self.original.to(tried.device)
        applied: FastEnsemble = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def check_original(self) -> None:
        """Raise a ValueError unless the original has noise, weights and device of the copy."""
        here, there = _device_of(self), _device_of(self.original)
        if here != there:
            raise ValueError(
                f"an optimised copy is on {here} and its original on {there}: move the copy, which "
                "moves its original too"
            )
        network = self.model.get_submodule("network")
        ours, theirs = _noise(network), _noise(self.original.model)
        # What the original has and never calls is not in the copy.
        names = {name for name, _ in network.named_modules()}
        called = {name for name in theirs if name.removesuffix(CHILD).removesuffix(".") in names}
        differing = [name for name in {**ours, **dict.fromkeys(called)} if ours.get(name) != theirs.get(name)]
        if differing:
            raise ValueError(
                f"an optimised copy and its original differ in their noise ({', '.join(differing[:3])}): "
                "change it with set_levels_, remove_noise_ or make_static_, which change both, or optimize "
                "the original again"
            )
        if fingerprint(self).weights != fingerprint(self.original).weights:
            raise ValueError(
                "an optimised copy and its original differ in their weights or layers, as one of them was "
                "changed since the copy was made (trained on, say): optimize the original again"
            )


def _noise(network: nn.Module) -> dict[str, Any]:
    """The random layers that are on, by their names, and their levels."""
    return {
        name: getattr(layer, "std", True)
        for name, layer in network.named_modules()
        if isinstance(layer, RandomLayer) and layer.is_active
    }


def _device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def _refuse_other_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """Raise a ValueError where a state dict would make the copy another network than its original."""
    own = module.state_dict(prefix=prefix)
    mine = {key: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    same = own.keys() == mine.keys() and all(
        tensor.shape == mine[key].shape and torch.equal(tensor, mine[key].to(tensor))
        for key, tensor in own.items()
        if isinstance(tensor, Tensor)
    )
    if not same:
        raise ValueError(
            "these are not the weights of the optimised copy, which keeps those of its original: load them "
            "into the original, and optimize that"
        )


def original_of(model: nn.Module) -> nn.Module:
    """The network that `model` is an optimised copy of, or `model` itself."""
    return model.original if isinstance(model, FastEnsemble) else model


def checked_original(ensemble: SelfEnsemble) -> SelfEnsemble:
    """The same of an ensemble, or a ValueError: see `FastEnsemble.check_original`."""
    if not isinstance(ensemble, FastEnsemble):
        return ensemble
    ensemble.check_original()
    return ensemble.original


def precision_of(ensemble: SelfEnsemble) -> Precision:
    """That an ensemble computes in, as `optimize` names it."""
    return ensemble.precision
