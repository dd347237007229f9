"""A trained ensemble on disk: `model.safetensors` and a versioned `config.json`.

Nothing is pickled, so loading a file from a stranger runs none of its code.
"""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..ensemble.ensemble import SelfEnsemble
from ..ensemble.stopping import Calibrated
from ..networks.models import create_model
from ..noise.injection import attach_noise_, noise_layers
from ..noise.layer import NoiseConfig, RandomLayer
from ..noise.resize_pad import ResizePadNetwork
from ..runtime.files import atomic_file, read_versioned, sync, to_json
from .config import FORMAT_VERSION, Architecture, ArtefactConfig, TransformersNetwork
from .zoo import locate

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(
    ensemble: SelfEnsemble,
    folder: str | Path,
    *,
    architecture: Architecture | None = None,
    classes: tuple[str, ...] | None = None,
    input_shape: tuple[int, int, int] | None = None,
    metrics: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `ensemble` to `folder`; each file is replaced as a whole or not at all.

    Args:
        ensemble: what to save.
        folder: where to.
        architecture, classes, input_shape, metrics, recipe: see `ArtefactConfig`.
        dtype: that weights of two dimensions or more are stored in, e.g. bfloat16 for half the size; they
            are float32 again when they are loaded. None stores them as they are.
    """
    model = ensemble.model
    resize_pad = None
    if isinstance(model, ResizePadNetwork):
        resize_pad, model = model.config, model.network
    config = ArtefactConfig(
        architecture=architecture,
        transformers=None if architecture is not None else TransformersNetwork.of(model),
        noise={fqn: layer.std for fqn, layer in noise_layers(model).items()},
        resize_pad=resize_pad,
        draws=ensemble.draws,
        sampling=ensemble.sampling,
        bounds=ensemble.bounds,
        classes=classes,
        input_shape=input_shape,
        metrics=metrics or {},
        recipe=recipe,
        stopping=ensemble.stopping,
    )
    # Tensors that share memory are copied apart: safetensors refuses them otherwise.
    tensors = {key: tensor.detach().cpu().clone() for key, tensor in _weights(model).items()}
    tensors = {key: _stored(tensor, dtype) for key, tensor in tensors.items()}
    # Both are on disk before either replaces an earlier one.
    with atomic_file(Path(folder) / WEIGHTS) as weights, atomic_file(Path(folder) / CONFIG) as text:
        weights.write(safetensors.torch.save(tensors))
        text.write(to_json(config.model_dump(mode="json")))
        for file in (weights, text):
            sync(file)


def save_stopping(folder: str | Path, stopping: Calibrated) -> None:
    """Put calibrated thresholds into the `config.json` of a saved ensemble; nothing else is changed.

    Raises:
        FileNotFoundError, ValueError: no such ensemble, or one that cannot be read.
    """
    config = read_config(folder).model_copy(update={"stopping": stopping})
    with atomic_file(locate(folder) / CONFIG) as text:
        text.write(to_json(config.model_dump(mode="json")))
        sync(text)


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


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that `model` has without its random layers; learned levels are in the config."""
    names = model.named_modules(remove_duplicate=False)
    random = tuple(f"{fqn}." for fqn, module in names if isinstance(module, RandomLayer))
    return {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(random)}


def read_config(folder: str | Path) -> ArtefactConfig:
    """The checked `config.json` of a saved ensemble; a folder, or a name of the zoo.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: the file is damaged, foreign, or written by a newer version.
    """
    path = locate(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"no {CONFIG} in {folder}: pass the folder that `selfensemble train` wrote (its --out)"
        )
    return read_versioned(
        path, ArtefactConfig, "selfensemble", FORMAT_VERSION, "train again or restore the file"
    )


def _built(config: ArtefactConfig, folder: str | Path) -> nn.Module:
    """The network with fresh weights."""
    if config.transformers is not None:
        return config.transformers.build()
    if config.architecture is None:
        raise ValueError(f"{folder} holds a network of your own: pass it, load(folder, model=...)")
    try:
        return create_model(**config.architecture.model_dump())
    except (TypeError, RuntimeError) as error:  # of sizes beyond all bounds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the network that {folder} describes cannot be built: {reason}") from error


def load(folder: str | Path, model: nn.Module | None = None) -> SelfEnsemble:
    """Read a saved ensemble, in eval mode, on the CPU.

    Args:
        folder: what `save` or `selfensemble train` wrote, the name of a network of the zoo, or
            "hf-hub:owner/name" on the Hugging Face Hub.
        model: a fresh network of the saved one's class, where it is neither one of `MODELS` nor of
            transformers.

    Raises:
        FileNotFoundError, ValueError: files missing, damaged, foreign, or of another network.
    """
    config = read_config(folder)
    path = locate(folder) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"no {WEIGHTS} in {folder}: the artefact is incomplete")
    try:
        tensors = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error})") from error
    if model is None:
        with torch.device("meta"):  # takes no memory, whatever sizes a damaged configuration asks for
            planned = _weights(_built(config, folder))
        if {key: tensor.shape for key, tensor in planned.items()} != {k: t.shape for k, t in tensors.items()}:
            raise ValueError(f"{path} does not fit the network that {CONFIG} describes: restore both")
        with torch.device("cpu"):  # whatever the program's default is
            model = _built(config, folder)
    if any(tensor.device.type == "meta" for tensor in model.state_dict().values()):
        raise ValueError(
            "the network that was passed lies on the meta device, which keeps no weights: make it "
            "on the CPU, e.g. within `with torch.device('cpu'):`"
        )
    try:
        model.load_state_dict(tensors)
        attach_noise_(model, config.noise)
    except (RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit the network: {reason}") from error
    if config.resize_pad is not None:
        model = ResizePadNetwork(model, config.resize_pad)
    # A network that was saved without noise stays without.
    levels = None if config.noise else NoiseConfig(0, 0)
    ensemble = SelfEnsemble(model, levels, draws=config.draws, sampling=config.sampling, bounds=config.bounds)
    ensemble.stopping = config.stopping
    return ensemble.eval()
