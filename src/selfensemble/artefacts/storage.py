"""A trained ensemble on disk: `model.safetensors` and a versioned `config.json`.

Nothing is pickled, so loading a file from a stranger runs none of its code.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..ensemble.ensemble import SelfEnsemble
from ..ensemble.promises import check_kept
from ..ensemble.sets import SetRule
from ..ensemble.stopping import Calibrated
from ..fast.ensemble import checked_original
from ..networks.names import is_network_name
from ..noise.calls import to_eval_mode_
from ..noise.copies import OptimizedCopy
from ..noise.graphs import plain_name, unwrapped
from ..noise.injection import attach_noise_
from ..noise.layer import GaussianNoise, NoiseConfig
from ..noise.resize_pad import ResizePadConfig, ResizePadNetwork
from ..runtime.files import atomic_pair, atomic_write, digest_of, only_writer, to_json
from .config import Architecture, ArtefactConfig, config_of
from .opening import ensemble_of, seeded_network
from .outline import CONFIG as CONFIG
from .outline import read_as
from .rebuilding import (
    as_saved,
    in_float32_,
    is_meta_safe,
    misfit,
    network_named,
    rebuilt,
    with_its_arguments,
    wrapped,
)
from .zoo import locate

WEIGHTS = "model.safetensors"


def save(
    ensemble: SelfEnsemble,
    folder: str | Path,
    *,
    architecture: Architecture | None = None,
    classes: tuple[str, ...] | None = None,
    input_shape: tuple[int, ...] | None = None,
    metrics: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `ensemble` to `folder`; both files are replaced as a whole or not at all.

    A process that is killed just between the two leaves files of two networks, which `load` refuses. Several
    processes can save to one folder: the last one wins, and `load` waits for a save in progress.

    Args:
        ensemble: what to save; for an optimised copy, its original with the draws, bounds and stopping rule
            of the copy.
        folder: where to.
        architecture: of a network of `MODELS`; by default what `create_model` was asked for.
        classes, input_shape, metrics, recipe: see `ArtefactConfig`.
        dtype: dtype for weights of two or more dimensions, e.g. bfloat16 for half the size; they are float32
            again after loading. None stores them as they are.

    Raises:
        ValueError: a rule of the ensemble (`stopping`, `sets`) was calibrated on other weights or noise than
            those that would be saved; a copy has different noise from its original, or a part of the network
            is a copy. Nothing is written.
    """
    check_kept(ensemble)
    model, resize_pad = _to_save(ensemble)
    # Tensors that share memory are copied apart: safetensors refuses them otherwise.
    exact = {key: tensor.detach().cpu().clone() for key, tensor in _weights(model).items()}
    tensors = {key: _stored(tensor, dtype) for key, tensor in exact.items()}
    _check_rounding(ensemble, exact, tensors)
    content = safetensors.torch.save(tensors)
    config = config_of(
        ensemble, model, resize_pad, weights=digest_of(content), architecture=architecture, classes=classes,
        input_shape=input_shape, metrics=metrics or {}, recipe=recipe,
    )  # fmt: skip
    with atomic_pair(Path(folder) / CONFIG, Path(folder) / WEIGHTS) as (text, weights):
        text.write(to_json(config.model_dump(mode="json")))
        weights.write(content)


def describe(ensemble: SelfEnsemble, **about: Any) -> ArtefactConfig:
    """The `config.json` that `save` would write, but for the digest of the weights."""
    model, resize_pad = _to_save(ensemble)
    return config_of(ensemble, model, resize_pad, **about)


def _to_save(ensemble: SelfEnsemble) -> tuple[nn.Module, ResizePadConfig | None]:
    """The network that stands for `ensemble` on disk, never one that was rewritten, and what is before it."""
    original = checked_original(ensemble)
    if any(isinstance(module, OptimizedCopy) for module in original.modules()):
        raise ValueError(
            "a part of this network is an optimised copy, which no other process could build: put its "
            "original there, save that, and optimize what is loaded"
        )
    model = unwrapped(original.model)
    return (unwrapped(model.network), model.config) if isinstance(model, ResizePadNetwork) else (model, None)


def save_stopping(folder: str | Path, stopping: Calibrated, *, of: ArtefactConfig | None = None) -> None:
    """Put calibrated thresholds into the `config.json` of a saved ensemble; nothing else is changed.

    Args:
        folder: of the ensemble.
        stopping: the thresholds.
        of: its configuration before it was loaded to be calibrated, if it can have been saved again since.

    Raises:
        FileNotFoundError, ValueError: no such ensemble, one that cannot be read, another one than `of`, or
            another than the rule was calibrated on.
    """
    _save_rule(folder, "stopping", stopping, of)


def save_sets(folder: str | Path, sets: SetRule, *, of: ArtefactConfig | None = None) -> None:
    """The same for the rule of conformal sets."""
    _save_rule(folder, "sets", sets, of)


def _save_rule(folder: str | Path, name: str, rule: Calibrated | SetRule, of: ArtefactConfig | None) -> None:
    config = read_config(folder)
    if of is not None and config != of:
        raise ValueError(f"{folder} was written again while it was being calibrated: calibrate it again")
    if rule.fingerprint is not None and rule.fingerprint.sampling != config.sampling:
        raise ValueError(
            f"the rule is of predictions with sampling={rule.fingerprint.sampling!r}, and {folder} says "
            f"{config.sampling!r}: leave --sampling out, or write a folder that says so, selfensemble pack "
            f"{folder} FOLDER --sampling {rule.fingerprint.sampling}"
        )
    read_weights(folder, config)
    if config.transformers is not None or config.architecture is not None:  # others are asked when it is used
        different = rule.differences(load(folder))
        if different:
            raise ValueError(
                f"the rule was calibrated on other {', other '.join(different)} than {folder} holds: "
                "calibrate what rse.load returns (`selfensemble calibrate` does)"
            )
    place, named = locate(folder), config.model_copy(update={name: rule})
    with only_writer(place):
        if read_config(place) != config:
            raise ValueError(f"{folder} was written again just now: calibrate it again")
        atomic_write(place / CONFIG, to_json(named.model_dump(mode="json")))


def copy_weights_(source: str | Path, ensemble: SelfEnsemble) -> None:
    """Give `ensemble` the weights of a saved one; noise levels stay as they are.

    Args:
        source: what `load` takes.
        ensemble: of the same architecture.

    Raises:
        FileNotFoundError, ValueError: no such ensemble, or of another architecture.
    """
    theirs, mine = (_weights(each.model) for each in (load(source), ensemble))
    shapes = [{key: tuple(tensor.shape) for key, tensor in each.items()} for each in (theirs, mine)]
    if shapes[0] != shapes[1]:
        other = sorted(key for key in theirs.keys() | mine.keys() if shapes[0].get(key) != shapes[1].get(key))
        raise ValueError(
            f"the network in {source} is another one than the recipe's (different: {', '.join(other[:4])}): "
            "set model.name, width and activation to its, or train without model.weights"
        )
    with torch.no_grad():
        for key, tensor in mine.items():
            tensor.copy_(theirs[key])


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None and tensor.dim() > 1 and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.contiguous()


def _check_rounding(ensemble: SelfEnsemble, exact: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Raise a ValueError where rules would be saved with other weights than they were calibrated on."""
    rules = [name for name in ("stopping", "sets") if getattr(ensemble, name) is not None]
    if rules and not all(torch.equal(stored[key].to(each.dtype), each) for key, each in exact.items()):
        drop = " and ".join(f"ensemble.{name} = None" for name in rules)
        raise ValueError(
            "dtype= rounds the weights, and calibrated rules are not about what would be stored: set "
            f"{drop}, save, and calibrate what rse.load returns"
        )


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that `model` has without its injected noise, whose levels are in the config.

    Names are those of the network, whatever is compiled in it.
    """
    names = model.named_modules(remove_duplicate=False)
    random = tuple(f"{fqn}." for fqn, module in names if isinstance(module, GaussianNoise))
    state = model.state_dict().items()
    return {plain_name(key): tensor for key, tensor in state if not key.startswith(random)}


def read_config(folder: str | Path) -> ArtefactConfig:
    """The checked `config.json` of a saved ensemble; a folder, or a name of the zoo.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: the file is damaged, foreign, or written by a newer version.
    """
    return read_as(ArtefactConfig, folder)


def read_weights(folder: str | Path, config: ArtefactConfig) -> dict[str, Tensor]:
    """The tensors of a saved ensemble, if they are those that its `config.json` was written with.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged, or of another network.
    """
    path = locate(folder) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"no {WEIGHTS} in {folder}: the artefact is incomplete")
    with path.open("rb") as file:
        try:
            tensors = safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: restore it") from error
        found = None
        if config.weights is not None:
            found = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        replaced = not os.path.samestat(os.fstat(file.fileno()), path.stat())
    if replaced or config.weights not in (None, found):
        raise ValueError(
            f"{path} is not the file that its {CONFIG} was written with: a save was cut off between the two "
            "or is under way, or one of them was copied alone. Save the ensemble again (after a training: "
            "selfensemble train --resume), or copy both files from one place"
        )
    return tensors


def _read(folder: Path) -> tuple[ArtefactConfig, dict[str, Tensor]]:
    """Both files of a saved ensemble; while someone saves, when they have."""
    try:
        config = read_config(folder)
        return config, read_weights(folder, config)
    except (FileNotFoundError, ValueError):
        if not folder.is_dir():
            raise
    with only_writer(folder):
        config = read_config(folder)
        return config, read_weights(folder, config)


def load(
    folder: str | Path,
    model: nn.Module | str | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    trust_network: bool = False,
) -> SelfEnsemble:
    """Read a saved ensemble, in eval mode, on the CPU.

    Args:
        folder: what `save` or `selfensemble train` wrote, the name of a network of the zoo, or
            "hf-hub:owner/name" on the Hugging Face Hub. Or the name of a network, see `network_from`, which
            gets the published noise unless it already has noise.
        model: if the saved network is neither one of `MODELS` nor of a known library: a fresh network of its
            class, or the name of what makes it, see `network_from`.
        arguments: of what makes it, instead of those that it was saved with.
        weights: of a named network, a file; saved ensembles have theirs.
        trust_network: whether to import what the folder itself names. That runs code: do so only for folders
            from an author you trust.

    Raises:
        UntrustedNetwork: the network is custom code, and neither `model` nor `trust_network` says what to
            import.
        FileNotFoundError, ValueError: files missing, damaged, foreign, or of another network.
    """
    if is_network_name(folder):
        if model is not None:
            raise ValueError(f"{folder} names a network already: leave model= out")
        return ensemble_of(seeded_network(str(folder), arguments, weights), str(folder))
    if weights is not None:
        raise ValueError(f"{folder} is a saved ensemble, which has its weights: leave weights= out")
    folder = locate(folder)  # once, for on the Hub the next one may be another
    config, tensors = _read(folder)
    path = folder / WEIGHTS
    if model is None:
        model = _planned(config, folder, tensors, trust_network)
        _fill_(model, config, tensors, path)
    else:
        is_named = isinstance(model, str)
        with with_its_arguments(folder, config, arguments if isinstance(model, str) else None):
            model = network_named(config, model, arguments) if isinstance(model, str) else model
            model = as_saved(wrapped(model, config), tensors, is_named)
            _fill_(model, config, tensors, path)
    if config.resize_pad is not None:
        model = ResizePadNetwork(model, config.resize_pad)
    # A network that was saved without noise stays without.
    levels = None if config.noise else NoiseConfig(0, 0)
    ensemble = SelfEnsemble(model, levels, draws=config.draws, sampling=config.sampling, bounds=config.bounds)
    ensemble.stopping, ensemble.sets = config.stopping, config.sets
    to_eval_mode_(ensemble)
    return ensemble


def _fill_(model: nn.Module, config: ArtefactConfig, tensors: dict[str, Tensor], path: Path) -> None:
    """Give a network the weights and the noise that were saved."""
    if any(tensor.device.type == "meta" for tensor in model.state_dict().values()):
        raise ValueError(
            "the network that was passed is on the meta device, which keeps no weights: make it "
            "on the CPU, e.g. within `with torch.device('cpu'):`"
        )
    keys = {plain_name(key): key for key in model.state_dict()}  # of what is compiled in it
    names = {plain_name(fqn): fqn for fqn, _ in model.named_modules()}  # what is wrapped comes last
    plain = {plain_name(key): tensor for key, tensor in tensors.items()}
    try:
        weights = OrderedDict((keys.get(key, key), tensor) for key, tensor in plain.items())
        # Versions of modules, which files of weights do not hold, and some networks ask for.
        weights._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
        model.load_state_dict(weights)
        attach_noise_(model, {names.get(fqn, fqn): std for fqn, std in config.noise.items()})
    except (RuntimeError, AttributeError) as error:
        reason = misfit(_weights(model), plain) or " ".join(str(error).split())
        raise ValueError(f"{path} does not fit the network: {reason}") from error


def _planned(
    config: ArtefactConfig, folder: Path, tensors: dict[str, Tensor], trust_network: bool
) -> nn.Module:
    """The network that a folder describes, if its weights are of that."""
    if is_meta_safe(config):
        with torch.device("meta"):  # takes no memory, whatever sizes a damaged configuration asks for
            planned = _weights(rebuilt(config, folder))
        if {key: tensor.shape for key, tensor in planned.items()} != {k: t.shape for k, t in tensors.items()}:
            raise ValueError(
                f"{folder / WEIGHTS} does not fit the network that {CONFIG} describes: restore both"
            )
    with torch.device("cpu"):  # whatever the program's default is
        model = rebuilt(config, folder, trust_network=trust_network)
    in_float32_(model)
    return as_saved(model, tensors, True)
