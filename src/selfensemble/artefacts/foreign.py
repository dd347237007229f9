"""Configurations of transformers that strangers wrote: what of them a network is built from.

A configuration can ask the Hub for a kernel of attention, which is code, or for another network as a
backbone. Only keys that the class of the configuration declares are passed on, and none whose value names
something that is elsewhere.
"""

import inspect
from collections.abc import Mapping
from typing import Any

# Declared by some, or read by those that take anything else; what they hold is names or numbers.
_KNOWN = {
    "model_type", "architectures", "num_labels", "id2label", "label2id", "label_names", "num_classes",
    "torch_dtype", "problem_type", "out_features", "out_indices", "stage_names", "return_dict", "dtype",
    "pruned_heads", "output_attentions", "output_hidden_states", "tie_word_embeddings",
    "chunk_size_feed_forward", "is_encoder_decoder",
}  # fmt: skip
_NAMES = {"id2label", "label2id", "label_names", "architectures"}  # any text, and nothing but that
# What is fetched, or run, wherever in the configuration it stands.
_ELSEWHERE = {
    "backbone", "checkpoint", "checkpoint_path", "file", "hf_hub_id", "pretrained", "pretrained_cfg", "url",
    "pretrained_cfg_overlay", "pretrained_model_name_or_path", "quantization_config", "trust_remote_code",
    "use_kernels", "use_pretrained_backbone", "use_timm_backbone",
}  # fmt: skip
# Says where a network came from, or how its own code would be found, of which none is used.
_LEFT_OUT = {"_name_or_path", "name_or_path", "auto_map", "custom_pipelines", "pretrained_cfg"}


def trusted(kind: Any, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """What of `values` a configuration of class `kind` may be made of.

    Args:
        kind: of the installed package.
        values: from a file.
        where: the place of them in the file, for errors.

    Raises:
        ValueError: they ask for something that is elsewhere: code, or weights.
    """
    kept = {}
    inner: Mapping[str, Any] = getattr(kind, "sub_configs", None) or {}
    allowed = _declared(kind) | _KNOWN | set(inner)
    for key, value in values.items():
        place = f"{where}{key}"
        if key in _LEFT_OUT:
            continue
        if key not in _NAMES and (key in allowed | _ELSEWHERE or "_implementation" in key):
            _check(key, value, place)
        if key in allowed:
            is_inner = isinstance(value, Mapping) and (key in inner or "model_type" in value)
            kept[key] = trusted(_class(inner.get(key), value), value, f"{place}.") if is_inner else value
    return kept


def _declared(kind: Any) -> set[str]:
    """Arguments of a configuration and of the classes that it is derived from."""
    names: set[str] = set()
    for each in kind.__mro__:
        if "__init__" in vars(each):
            names |= set(inspect.signature(vars(each)["__init__"]).parameters)
    return names - {"self", "args", "kwargs"} - _ELSEWHERE


def _class(declared: Any, value: Mapping[str, Any]) -> Any:
    """Of a configuration within another: what it says to be, else what is declared."""
    import transformers

    named = value.get("model_type")
    if named in transformers.CONFIG_MAPPING:
        return transformers.CONFIG_MAPPING[named]
    return declared if isinstance(declared, type) else transformers.PreTrainedConfig


def _check(key: str, value: Any, place: str) -> None:
    """Refuse what names something elsewhere, however deep."""
    if key in _ELSEWHERE and value not in (None, False, "", {}, []):
        raise ValueError(f"{place} = {value!r} would be fetched or run: nothing but the network is built")
    if isinstance(value, str) and any(mark in value for mark in "/\\:"):
        raise ValueError(f"{place} = {value!r} names something that is elsewhere: nothing is fetched")
    if isinstance(value, Mapping):
        for name, part in value.items():
            if name not in _NAMES:
                _check(str(name), part, f"{place}.{name}")
    elif isinstance(value, list | tuple):
        for part in value:
            _check("", part, place)
