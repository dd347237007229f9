"""What a promise is about: the weights, the noise and the precision that it was calibrated on.

A calibrated rule travels with an ensemble, and an ensemble changes: other levels, more training, another file
of weights. So the rule knows what it was calibrated on, and is refused elsewhere.
"""

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ..noise.copies import OptimizedCopy
from ..noise.layer import GaussianNoise, RandomLayer
from ..noise.learned import LearnedNoise
from ..noise.streams import Sampling
from .classifier import Digests, Precision, RandomClassifier
from .settings import Settings, as_text, hooks_of, settings_of

_SPOTS = 16  # numbers of each tensor that are looked at every time
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)  # which compute nothing
_USUAL = (Tensor, nn.Parameter)


class Fingerprint(BaseModel):
    """What tells an ensemble from others.

    Attributes:
        weights: digest of parameters and buffers in their order, and of the kinds of modules and their
            settings. Of an optimised copy, those that the original had when the copy was made.
        noise: digest of the random layers that are on: names, kinds, levels, sampling; of a copy, those of
            its original.
        sampling: of the ensemble.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    weights: str
    noise: str
    sampling: Sampling


class Promise(BaseModel):
    """What was calibrated on an ensemble, and holds for it alone.

    Attributes:
        precision: of the ensemble it was calibrated on.
        fingerprint: of that ensemble. Without one, as early versions saved it, a promise is bound to the
            ensemble that it is given to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    precision: Precision = "float32"
    fingerprint: Fingerprint | None = None

    def bound_to(self, ensemble: RandomClassifier) -> Self:
        """The same, about `ensemble` where it does not say what it is about."""
        if self.fingerprint is not None:
            return self
        return self.model_copy(update={"fingerprint": fingerprint(ensemble)})

    def differences(self, ensemble: RandomClassifier) -> list[str]:
        """In what `ensemble` is another than that of the promise, its precision left aside."""
        if self.fingerprint is None:
            return []
        now, then = fingerprint(ensemble), self.fingerprint
        names = {"weights": "weights or layers", "noise": "noise", "sampling": "sampling"}
        return [text for name, text in names.items() if getattr(now, name) != getattr(then, name)]

    def check(self, ensemble: RandomClassifier, name: str, remedy: str) -> None:
        """Raise a ValueError unless the promise is about `ensemble` as it is now.

        Args:
            ensemble: what is to keep it.
            name: of the promise, for the message.
            remedy: how to calibrate again, for the message.
        """
        if different := self.differences(ensemble):
            raise ValueError(
                f"{name} was calibrated on other {', other '.join(different)} than this ensemble has now: "
                f"{remedy}"
            )
        if (computed := computes_in(ensemble)) != self.precision:
            form = "the ensemble itself" if self.precision == "float32" else "rse.optimize(..., 'bf16')"
            raise ValueError(
                f"{name} was calibrated in {self.precision}, and this ensemble computes in {computed}: "
                f"predict with {form}, outside of torch.autocast, or {remedy}"
            )


def computes_in(ensemble: RandomClassifier) -> str:
    """The precision that a pass of `ensemble` would have now, that of a surrounding `torch.autocast` too."""
    device = next((tensor.device.type for tensor in ensemble.parameters()), "cpu")
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if ensemble.precision == "float32" and casts:
        return f"{torch.get_autocast_dtype(device)} by autocast".removeprefix("torch.")
    return ensemble.precision


def origin(ensemble: RandomClassifier) -> dict[str, Any]:
    """Fields of a `Promise` that is calibrated on `ensemble` as it is now.

    Raises:
        ValueError: within `torch.autocast`, which is no precision of the ensemble.
    """
    if (computed := computes_in(ensemble)) != ensemble.precision:
        raise ValueError(
            f"the ensemble computes in {computed} here: calibrate outside of torch.autocast, or what "
            'rse.optimize(ensemble, inputs, "bf16") returns'
        )
    return {"precision": ensemble.precision, "fingerprint": fingerprint(ensemble)}


def still(ensemble: RandomClassifier, about: dict[str, Any]) -> dict[str, Any]:
    """`about`, an earlier `origin`, or a ValueError where `ensemble` has changed since."""
    if fingerprint(ensemble) != about["fingerprint"]:
        raise ValueError(
            "the ensemble is another one than when its calibration began: leave it alone meanwhile; if its "
            "own passes change attributes of its modules (counters, lists), keep those elsewhere"
        )
    return about


def fingerprint(ensemble: RandomClassifier) -> Fingerprint:
    """That of an ensemble as it is now.

    Weights are read again only where their tensors are others, where torch knows that one was written to, or
    where one of a few numbers of each changed: torch knows nothing of writing through `.data`, or by NumPy.
    """
    parts = _parts_of(ensemble)
    key = (parts.modules, [_place(each) for each in parts.tensors], parts.noise, ensemble.sampling)
    known = _known.get(ensemble)
    if known is not None and known.key == key and known.looks_the_same():
        return known.found
    spots = _spots(parts.tensors)  # before all is read: what changes meanwhile is then noticed
    values = _looked_at(spots)
    weights, noise = _digests(parts)
    if (copied := ensemble.copied) is not None:
        weights = copied.original.weights if weights == copied.own.weights else weights
        noise = copied.original.noise if noise == copied.own.noise else noise
    found = Fingerprint(weights=weights, noise=noise, sampling=ensemble.sampling)
    _known[ensemble] = _Known(key, spots, values, found)
    return found


def own_digests(ensemble: RandomClassifier) -> Digests:
    """Those of an ensemble itself, whatever it is a copy of."""
    return _digests(_parts_of(ensemble))


@dataclass
class _Known:
    """What an ensemble was when it was last looked at."""

    key: tuple[object, ...]
    spots: list[list[Tensor]]  # views, which keep the memory of tensors from becoming that of others
    values: list[Tensor]
    found: Fingerprint

    def looks_the_same(self) -> bool:
        return all(map(torch.equal, _looked_at(self.spots), self.values))


_known: WeakKeyDictionary[RandomClassifier, _Known] = WeakKeyDictionary()


@dataclass
class _Parts:
    """What a network consists of: modules, their parameters and buffers, and the noise that is on."""

    modules: list[tuple[type[nn.Module], Settings]]
    tensors: list[Tensor]
    noise: list[tuple[Any, ...]]


def _parts_of(ensemble: RandomClassifier) -> _Parts:
    """In the order of `ensemble.model.modules()`, which itself takes twice the time."""
    modules, tensors = list[tuple[type[nn.Module], Settings]](), list[Tensor]()
    noise = list[tuple[Any, ...]]()
    waiting, seen = [("", ensemble.model)], set[nn.Module]()
    within = "network." if isinstance(ensemble, OptimizedCopy) else ""  # where the names are its original's
    while waiting:
        fqn, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if (wrapped := _wrapped(module)) is not None:
            waiting.append((fqn, wrapped))
            if hooks := hooks_of(module):
                modules.append((type(module), hooks))
            continue
        children = [(fqn + name, child) for name, child in module._modules.items() if child is not None]
        waiting += [(f"{name}.", child) for name, child in reversed(children)]
        if isinstance(module, RandomLayer):
            if module.is_active:
                noise.append((fqn.removeprefix(within), *_settings(module)))
            if isinstance(module, GaussianNoise):
                continue  # whose tensors are its levels
        else:
            modules.append((type(module), settings_of(module)))
        for own in (module._parameters, module._buffers):
            if own:
                tensors += [each for each in own.values() if each is not None]
    return _Parts(modules, tensors, noise)


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a module passes its inputs on to, if it does nothing else: it is no part of the network."""
    return module._modules.get("module" if isinstance(module, _WRAPPERS) else "_orig_mod")  # of torch.compile


def _settings(layer: RandomLayer) -> tuple[Any, ...]:
    """What a random layer does. Learned levels are those that are saved."""
    if isinstance(layer, GaussianNoise):
        kind = "GaussianNoise" if type(layer) is LearnedNoise else type(layer).__name__
        return layer.layer, kind, layer.sampling, layer.std, *hooks_of(layer)
    kept = tuple(each for each in settings_of(layer) if each[0] != "identity")
    return layer.layer, type(layer).__name__, as_text(kept), layer.extra_repr()


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Where its numbers are, and how often they were written to; unusual ones are read again each time."""
    if type(tensor) in _USUAL:
        try:
            return tensor.data_ptr(), tensor._version, tensor.shape
        except RuntimeError:  # of sparse tensors, and of those of inference mode, which count no writing
            if tensor.is_inference() and tensor.layout is torch.strided:
                return tensor.data_ptr(), 0, tensor.shape
    return (object(),)


def _spots(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Views of a few numbers all over each tensor of floats, the first among them, by kinds."""
    groups: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        usual = type(tensor) in _USUAL and tensor.layout is torch.strided and not tensor.is_meta
        if usual and tensor.is_floating_point() and tensor.numel():
            data = tensor.detach()
            offset = data.storage_offset()
            # Of one that is expanded there is less memory than numbers.
            room = min(data.numel(), data.untyped_storage().nbytes() // data.element_size() - offset)
            count = min(_SPOTS, room)
            apart = max(1, (room - 1) // max(1, count - 1))
            groups[data.dtype, data.device].append(data.as_strided((count,), (apart,), offset))
    return list(groups.values())


def _looked_at(spots: list[list[Tensor]]) -> list[Tensor]:
    """The bytes of the numbers, so that NaN is equal to itself."""
    return [torch.cat(each).view(torch.uint8) for each in spots]


def _digests(parts: _Parts) -> Digests:
    noise = json.dumps(sorted(parts.noise, key=lambda layer: layer[0]))
    return Digests(_digest(parts), _named(noise.encode()))


def _digest(parts: _Parts) -> str:
    digest = hashlib.sha256()
    for kind, settings in parts.modules:
        digest.update(f"{kind.__name__}{as_text(settings)}".encode())
    for tensor in parts.tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            values = tensor.detach()
            values = values.to_dense() if values.layout is not torch.strided else values
            values = values.dequantize() if values.is_quantized else values
            digest.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()[:32]}"


def _named(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()[:32]}"
