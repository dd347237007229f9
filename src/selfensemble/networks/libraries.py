"""Networks of timm, torchvision and transformers by name, with pretrained weights where these can be had."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..runtime.errors import MissingPackage
from .importing import described

# Keywords that say where a configuration and its weights lie, for all files of a network of transformers.
HUB = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies")
_NAME = re.compile(r"[\w.-]+")
_FRESH = (
    "connect, pass --weights FILE, or ask for fresh weights by --network-args '{\"pretrained\": false}' "
    "(model.weights and model.arguments of recipes, weights= and arguments= in Python)"
)


def _imported(library: str, name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(library)
    except ImportError as error:
        raise MissingPackage(f"{name} needs {library}: pip install {library}") from error
    except Exception as error:  # of a torchvision that was built for another torch
        raise MissingPackage(
            f"{name} needs {library}, which cannot be imported ({described(error)}): install the versions of "
            "torch, torchvision and timm that belong together"
        ) from error


def _built(name: str, build: Callable[[], Any]) -> nn.Module:
    try:
        network = build()
    except OSError as error:
        raise FileNotFoundError(
            f"{name} cannot be had ({type(error).__name__}): check the name, {_FRESH}"
        ) from error
    except Exception as error:  # of their own kinds, about whatever was asked of them
        raise ValueError(f"{name} cannot be made: {described(error)}") from error
    if not isinstance(network, nn.Module):
        raise TypeError(f"{name} is a {type(network).__name__}, no network")
    return network


def _asked(arguments: dict[str, Any], pretrained: bool) -> tuple[dict[str, Any], bool]:
    """Arguments without "pretrained", and whether pretrained weights are wanted."""
    rest = dict(arguments)
    wanted = rest.pop("pretrained", True)
    if not isinstance(wanted, bool):
        raise TypeError(f"pretrained must be true or false, got {wanted!r}")
    return rest, wanted and pretrained


def timm_network(name: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    """`timm.create_model`."""
    full = f"timm:{name}"
    timm = _imported("timm", full)
    rest, wanted = _asked(arguments, pretrained)
    base, _, tag = name.partition(".")
    if not _NAME.fullmatch(name) or not timm.is_model(base):
        raise ValueError(f"timm has no network {name!r}{_near(base, timm.list_models())}")
    if wanted and tag == "" and not timm.is_model_pretrained(base):
        raise FileNotFoundError(f"timm has no pretrained weights of {name}: {_FRESH}")
    return _built(full, lambda: timm.create_model(name, pretrained=wanted, **rest))


def torchvision_network(name: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    """`torchvision.models.get_model`."""
    full = f"torchvision:{name}"
    models = _imported("torchvision", full).models
    rest, wanted = _asked(arguments, pretrained)
    if "weights" in rest:
        wanted = wanted and rest["weights"] is not None
    else:
        rest["weights"] = "DEFAULT"
    if not wanted:
        rest["weights"] = None
    known = models.list_models(module=models)  # classifiers
    if name.lower() not in known:
        raise ValueError(f"torchvision has no classifier {name!r}{_near(name, known)}")
    return _built(full, lambda: models.get_model(name, **rest))


def transformers_network(name: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    """The classifier that a folder or a repository of the Hub describes; none of its own code is run."""
    full = f"transformers:{name}"
    transformers = _imported("transformers", full)
    rest, wanted = _asked(arguments, pretrained)
    try:
        config, unused = transformers.AutoConfig.from_pretrained(
            name, trust_remote_code=False, return_unused_kwargs=True, **rest
        )
    except OSError as error:
        raise FileNotFoundError(
            f"{full} cannot be had ({type(error).__name__}): check the name, "
            "pass a folder that save_pretrained wrote, or connect"
        ) from error
    except Exception as error:  # of their own kinds
        raise ValueError(f"{full} has no configuration that can be read: {described(error)}") from error
    if unknown := sorted(unused.keys() & rest.keys()):
        raise ValueError(f"{full} has no {', '.join(unknown)} in its configuration: leave it out")
    kind = _classifier(transformers, config, full)
    if not wanted:
        return _built(full, lambda: kind(config)).eval()
    where = {key: rest[key] for key in HUB if key in rest}
    network, report = _with_weights(kind, name, config, full, where)
    shapes = {str(key): shape for key, _, shape in report["mismatched_keys"]}
    if rest.keys() - {*HUB, "num_labels"}:  # which may add layers to the body, or take some away
        changed = [*shapes, *report["missing_keys"], *report["unexpected_keys"]]
        others = [key for key in changed if key.startswith(f"{network.base_model_prefix}.")]
    else:
        others = [key for key, shape in shapes.items() if not _is_of_head(network, key, shape)]
    if others:
        raise ValueError(
            f"{full} has no weights, or of another shape, for {', '.join(sorted(others)[:4])}: leave out the "
            "arguments that change its body, or ask for fresh weights by --network-args "
            "'{\"pretrained\": false}'"
        )
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key, *_ in report["mismatched_keys"])
    if missing and "num_labels" not in arguments:
        raise ValueError(
            f"{full} has no weights for {', '.join(missing[:4])}: it was not trained as {kind.__name__}; "
            "name one that was, or ask for a new classifier, to be trained, by "
            "--network-args '{\"num_labels\": 10}'"
        )
    return network


def _is_of_head(network: Any, key: str, shape: Sequence[int]) -> bool:
    """Whether weights are of the classifier: outside of the body, or with a row for each class."""
    inside = key.startswith(f"{network.base_model_prefix}.")
    return not inside or (len(shape) > 0 and shape[0] == network.config.num_labels)


def _with_weights(
    kind: Any, name: str, config: Any, full: str, where: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        network, report = kind.from_pretrained(
            name,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **where,
        )
    except OSError as error:
        raise FileNotFoundError(
            f"{full} cannot be had ({type(error).__name__}): check the name, {_FRESH}"
        ) from error
    except Exception as error:  # of their own kinds
        raise ValueError(f"{full} cannot be made: {described(error)}") from error
    return network, report


def _classifier(transformers: Any, config: Any, full: str) -> Any:
    """The class of the network: the one it was saved as, or the classifier of its configuration."""
    named = [getattr(transformers, each, None) for each in config.architectures or ()]
    for kind in named:
        if isinstance(kind, type) and "Classification" in kind.__name__:
            return kind
    for task in ("IMAGE", "AUDIO", "SEQUENCE", "VIDEO"):
        mapping = getattr(transformers, f"MODEL_FOR_{task}_CLASSIFICATION_MAPPING", {})
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(
        f"{full} is a {type(config).__name__}, of which transformers has no classifier: write one around it, "
        "and name it as path/to/file.py:attribute"
    )


def _near(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, 4)
    return f"; perhaps {', '.join(near)}" if near else ""


LIBRARIES: dict[str, Callable[[str, dict[str, Any], bool], nn.Module]] = {
    "timm": timm_network,
    "torchvision": torchvision_network,
    "transformers": transformers_network,
}
