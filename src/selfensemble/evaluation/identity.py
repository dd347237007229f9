"""What a run is of, and the folder that is its own."""

import hashlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artefacts.config import Architecture
from ..data.images import Inputs
from ..ensemble.ensemble import SelfEnsemble
from ..fast.ensemble import original_of, precision_of
from ..networks.flipping import FlipAveraged
from ..networks.naming import name_of
from ..noise.injection import device_of_parameters, eval_mode, noise_disabled, noise_layers, random_layers
from ..runtime.files import write_json
from ..runtime.provenance import surroundings
from ..runtime.texts import read_json
from .balls import UNIT
from .results import DataRecord, ModelRecord

_CLOSE = 0.01  # of the largest logit


def claim(path: Path, identity: dict[str, Any]) -> None:
    """Write what a run is to a file in its folder, or find that the folder holds just this run.

    Raises:
        ValueError: the folder holds another run or other files, which are left untouched.
    """
    folder = path.parent
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: pass the folder to write to")
    if not path.is_file():
        others = [file for file in folder.glob("*") if file.name != path.name and file.name[0] != "."]
        if others:
            raise ValueError(f"{folder} holds other files ({others[0].name}): pass a new folder")
        write_json(path, identity)
        return
    before = read_json(path, "restore it, or use another folder")
    from ..training.recipe import differing_keys

    if (then := _compared(before)) != (now := _compared(identity)):
        different = differing_keys(then, now)[:6] if isinstance(then, dict) else ["all"]
    else:
        different = [name for name in _MADE_BY if _differ(before.get(name), identity.get(name))]
    if different:
        names = ", ".join(different)
        raise ValueError(f"{folder} holds a run that differs in {names}; it is untouched: use another folder")


# What runs of earlier versions do not say of themselves.
_MADE_BY = ("versions", "logits")


def _compared(identity: Any) -> Any:
    """What has to be equal: not the description of a protocol, which has no effect."""
    if not isinstance(identity, dict):
        return identity
    found = {key: value for key, value in identity.items() if key not in _MADE_BY}
    if isinstance(found.get("protocol"), dict):
        found["protocol"] = found["protocol"] | {"description": ""}
    return found


def _differ(one: Any, other: Any) -> bool:
    """Whether both are known and not the same; logits of other machines differ by rounding."""
    if one is None or other is None:
        return False
    if isinstance(one, dict):
        return bool(one != other)
    first, second = (torch.tensor(each, dtype=torch.float64, device="cpu") for each in (one, other))
    close = first.shape == second.shape and bool((first - second).abs().max() <= _CLOSE * first.abs().max())
    return not close


def made_by(ensemble: SelfEnsemble, images: Tensor) -> dict[str, Any]:
    """Whose figures are not to be mixed in one run: versions, and what the network says without noise.

    Args:
        ensemble: what is evaluated.
        images: (B, ...), a few. Networks that are random without the noise of this package say nothing.
    """
    known = surroundings()["versions"]
    found: dict[str, Any] = {"versions": {name: known[name] for name in ("selfensemble", "torch")}}
    original = original_of(ensemble)
    assert isinstance(original, SelfEnsemble)
    with eval_mode(original), torch.no_grad():
        asked = images.to(device_of_parameters(original), original.input_dtype)
        if not original.has_other_noise(asked):
            with noise_disabled(original):
                logits = original.draw_logits(asked).cpu().double()
            if logits.isfinite().all():
                found["logits"] = [[float(f"{value:.6g}") for value in row] for row in logits.tolist()]
    return found


def data_record(inputs: Inputs, labels: Tensor) -> DataRecord:
    """The images of a run."""
    data = inputs.data
    digest = hashlib.sha256()
    digest.update(f"{torch.float32}{tuple(inputs.shape)}".encode())
    for part in inputs.parts():
        digest.update(part.contiguous().numpy().tobytes())
    digest.update(f"{labels.dtype}{tuple(labels.shape)}".encode())
    digest.update(labels.numpy().tobytes())
    return DataRecord(
        source=data.name,
        images=len(inputs),
        classes=tuple(data.classes),
        digest=f"sha256:{digest.hexdigest()}",
        drawn=data.drawn,
        cut=data.cut,
        skipped=data.skipped,
        revision=data.revision,
    )


def model_record(
    ensemble: SelfEnsemble, name: str, architecture: dict[str, Any] | None, images: Tensor | None = None
) -> ModelRecord:
    """What is evaluated: its noise, and a digest of weights and noise, those of a copy's original.

    With `images` also its behaviour, which see.
    """
    original = original_of(ensemble)
    assert isinstance(original, SelfEnsemble)
    noise = {fqn: layer.std for fqn, layer in noise_layers(original.model).items()}
    injected = set(noise_layers(original.model).values())
    others = [layer for layer in random_layers(original.model) if layer not in injected]
    randomness = tuple(repr(layer) for layer in others)
    text = json.dumps(noise, sort_keys=True) + "".join(randomness)
    if any(isinstance(module, FlipAveraged) for module in original.modules()):
        text += "flip-averaged"  # which has no weights of its own
    return ModelRecord(
        name=name,
        digest=_digest(list(original.state_dict().values()), text),
        draws=ensemble.draws,
        precision=precision_of(ensemble),
        noise=noise,
        randomness=randomness,
        architecture=architecture,
        behaviour=None if images is None else behaviour(ensemble, images),
    )


def behaviour(ensemble: SelfEnsemble, images: Tensor) -> dict[str, Any]:
    """What answers depend on beside weights and noise, where it is not as usual.

    Of a network that `create_model` did not make: what made it, its settings, and the code of its classes and
    of functions that are set on it; tensors that are no buffers, too. Of one that it made its activation.
    Attributes that passes over `images` (two of them, or more) change are none of its settings.
    """
    original = original_of(ensemble)
    assert isinstance(original, SelfEnsemble)
    found: dict[str, Any] = {}
    if original.bounds != UNIT:
        found["bounds"] = None if original.bounds is None else list(original.bounds)
    if original.sampling != "shared":
        found["sampling"] = original.sampling
    made = Architecture.of(original.model)
    if made is not None and made.activation != "relu":
        found["activation"] = made.activation
    if made is None:
        states = [_lines(original.model)]
        for few in (images[:1], images):
            original.predict(few, draws=1)
            states.append(_lines(original.model))
        with eval_mode(original), torch.enable_grad():
            original.draw_logits(images.to(device_of_parameters(original), original.input_dtype))
        states.append(_lines(original.model))
        lasting = {fqn: [line for line in lines if all(line in each[fqn] for each in states)]
                   for fqn, lines in states[0].items()}  # fmt: skip
        text = "\n".join(line for lines in lasting.values() for line in lines)
        found["network"] = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return found


def _lines(network: nn.Module) -> dict[str, list[str]]:
    return {fqn: _about(fqn, module) for fqn, module in network.named_modules()}


def _about(fqn: str, module: nn.Module) -> list[str]:
    """What a module is, in texts that are the same in another process."""
    kind = type(module)
    try:
        shown = re.sub(r" at 0x[0-9a-f]+", "", module.extra_repr())
    except Exception:  # code of a user
        shown = ""
    lines = [f"{fqn} {kind.__qualname__} {shown}", json.dumps(name_of(module), default=repr)]
    if kind.__module__.partition(".")[0] in ("torch", "selfensemble"):
        return lines
    plain = {key: value for key, value in vars(module).items() if key[0] != "_" and key != "training"}
    lines += [f"{key}={value!r}" for key, value in sorted(plain.items()) if _is_plain(value)]
    lines += [
        f"{key}={_digest([value])}" for key, value in sorted(plain.items()) if isinstance(value, Tensor)
    ]
    for key, value in sorted(plain.items()):
        if inspect.isroutine(value) or isinstance(value, type):
            lines += [f"{key}={value.__module__}.{value.__qualname__}", *_source(value)]
    return [*lines, *_source(kind)]


def _source(found: Any) -> list[str]:
    """Its code; of what was typed in, made at run time or compiled there is none."""
    try:
        return [inspect.getsource(found)]
    except (OSError, TypeError):
        return []


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _digest(tensors: list[Tensor], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{values.dtype}{tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def duration(seconds: float) -> str:
    """For people."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
