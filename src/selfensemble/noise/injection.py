"""Noise into a network that exists, and out of it again.

Each chosen module gets a `GaussianNoise` child and a forward pre-hook that calls it. Nothing is
renamed or replaced: state-dict keys stay, and root, aliased and shared convolutions work.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from .calls import OwnHooks, in_eval_mode, keep_hooks_apart, modules_of, switched_off
from .copies import with_originals
from .filters import Filter, filter_named, matching
from .filters import FilterFn as FilterFn
from .filters import is_convolution as is_convolution
from .graphs import closed_parts, forget_graphs, leave_out_
from .layer import CHILD as CHILD
from .layer import GaussianNoise, RandomLayer
from .levels import NoiseConfig, Std
from .own_numbers import OwnNumbers
from .records import forget_, remember_, renew_, saved_levels


def noise_layers(model: nn.Module) -> dict[str, GaussianNoise]:
    """The injected noise layers, in order of their numbers, by the name of the module that each precedes."""
    found = {
        fqn: child
        for fqn, module in model.named_modules()
        # Not by getattr, which wrappers (of torch.compile, FSDP) answer for what they wrap.
        if isinstance(child := dict(module.named_children()).get(CHILD), GaussianNoise)
        and _is_injected(module, child)
    }
    return dict(sorted(found.items(), key=lambda item: item[1].layer))


def _is_injected(module: nn.Module, child: GaussianNoise) -> bool:
    """Whether a child of the usual name was put there by `inject_noise_`, and not by hand."""
    hooked = isinstance(module, fx.GraphModule) or _pre_hook in module._forward_pre_hooks.values()
    return hooked or child.injected


def random_layers(model: nn.Module) -> list[RandomLayer]:
    """All random layers, injected or placed by hand."""
    return [module for module in modules_of(model) if isinstance(module, RandomLayer)]


@contextmanager
def noise_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context `model` is not random: noise layers are the identity, others do their fixed part.

    For an optimised copy, this includes the original. The context applies to the thread that enters it:
    passes of other threads keep their noise.
    """
    layers = [layer for network in with_originals(model) for layer in random_layers(network)]
    with switched_off([layer.identity for layer in layers]):
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within this context `model` is in eval mode; each module's own mode comes back after it.

    Where several threads want it, after the last of them.
    """
    with in_eval_mode(model):
        yield


def call(model: nn.Module, example_inputs: Any) -> Any:
    """`model(example_inputs)`, with tuples spread over arguments and dicts over keywords."""
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple):
        return model(*example_inputs)
    return model(example_inputs)


def execution_order(model: nn.Module, fqns: list[str], example_inputs: Any) -> list[str]:
    """`fqns` in the order in which one forward pass first calls them; those not called are left out."""
    order: list[str] = []

    def note(fqn: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if fqn not in order:
                order.append(fqn)

        return hook

    with OwnHooks() as hooks:
        for fqn in fqns:
            hooks.add(model.get_submodule(fqn).register_forward_pre_hook, note(fqn))
        with torch.no_grad(), OwnNumbers(), eval_mode(model), noise_disabled(model):
            call(model, example_inputs)
    return order


def _pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    noise = getattr(module, CHILD, None)
    if noise is None or kwargs is None:
        raise RuntimeError(
            f"{type(module).__name__} has taken over the hook of a noisy module, but not its noise (torch.ao "
            "does that where it fuses, prepares or converts): call remove_noise_ before, and inject after"
        )
    if args:
        return (_noisy(module, noise, args[0]), *args[1:]), kwargs
    if "input" not in kwargs:
        raise TypeError(
            f"{type(module).__name__} is called by keywords ({', '.join(kwargs)}): noise needs the input as "
            "the first positional argument or as input="
        )
    return args, {**kwargs, "input": _noisy(module, noise, kwargs["input"])}


def _noisy(module: nn.Module, noise: nn.Module, inputs: Tensor) -> Tensor:
    unbatched = inputs.dim() == 1 or (
        isinstance(module, _ConvNd) and inputs.dim() == len(module.kernel_size) + 1
    )
    noisy: Tensor = noise(inputs.unsqueeze(0)).squeeze(0) if unbatched else noise(inputs)
    return noisy


def inject_noise_(
    model: nn.Module,
    config: NoiseConfig | None = None,
    *,
    filter_fn: FilterFn | Filter = is_convolution,
    example_inputs: Any = None,
) -> nn.Module:
    """Put Gaussian noise before every convolution of `model`, in place.

    Args:
        model: any module; its parameters, buffers and state-dict keys are left as they are.
        config: noise levels, by default those published; for a transformers network that was saved with
            noise, by default the noise that it had.
        filter_fn: called with each module and its fully qualified name; True for modules that get noise
            before them. Or "conv" (the default), "linear", or "conv+linear", for transformers, which have
            mostly linear layers.
        example_inputs: a batch (a tensor, a tuple of arguments or a dict of keywords). With it, the
            *first* layer, which gets `init_std`, is the first that a forward pass calls; without
            it, the first in order of registration. If another one runs first, `validate` says so, and a
            `SelfEnsemble` at its first pass.

    Returns:
        The same model.

    Raises:
        ValueError: no module matches, some matching modules cannot be hooked (TorchScript, quantised or
            exported parts), or the model already has injected noise.
    """
    if noise_layers(model):
        raise ValueError(
            "the model has noise layers already: call remove_noise_(model) first, or name no levels "
            "(--noise) to keep them"
        )
    if config is None and (saved := saved_levels(model)):
        return attach_noise_(model, saved)
    config = NoiseConfig() if config is None else config
    filter_fn = filter_named(filter_fn)
    if config.init_std or config.inner_std:
        _check_open(model, filter_fn)
    fqns = matching(model, filter_fn)
    if not fqns:
        raise ValueError(
            "no module matches filter_fn (by default convolutions): nothing to put noise before. "
            'Pass filter_fn, "linear" or "conv+linear" say (--filter, noise.filter of recipes), and see '
            "validate(model, example_inputs) for convolutions that are called as functions"
        )
    if example_inputs is not None:
        called = execution_order(model, fqns, example_inputs)
        if not called:
            raise ValueError(
                f"none of the {len(fqns)} matching modules ran on example_inputs: pass inputs that "
                "reach them, choose other modules by filter_fn (--filter), or leave example_inputs out"
            )
        fqns = called + [fqn for fqn in fqns if fqn not in called]
    stds = dict.fromkeys(fqns, config.inner_std)
    stds[fqns[0]] = config.init_std
    attach_noise_(model, stds)
    noise_layers(model)[fqns[0]].by_registration = example_inputs is None
    return model


def _check_open(model: nn.Module, filter_fn: FilterFn) -> None:
    for fqn, _, what in closed_parts(model, filter_fn):
        raise ValueError(
            f"{fqn or 'the model'} is {what}: no noise can enter what it holds. Put noise into the original "
            "network, before it is scripted, exported or quantised, or leave this part out by "
            "filter_fn(module, fqn)"
        )


def attach_noise_(model: nn.Module, stds: Mapping[str, Std]) -> nn.Module:
    """Put noise of the given levels before the named modules; their order numbers the layers."""
    modules = [(model.get_submodule(fqn), fqn or "the model") for fqn in stds]
    for module, name in modules:
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{name} is a TorchScript module: inject noise into the original network")
        child = getattr(module, CHILD, None)
        if isinstance(child, GaussianNoise) and _is_injected(module, child):
            raise ValueError(f"{name} has noise already: call remove_noise_(model) first")
        if hasattr(module, CHILD):
            raise ValueError(f"{name} has an attribute {CHILD!r} of its own: rename it")
    layers = {
        fqn: GaussianNoise(std, layer=layer).to(device_of_parameters(module, model))
        for layer, ((module, _), (fqn, std)) in enumerate(zip(modules, stds.items(), strict=True))
    }
    keep_hooks_apart(*(module for module, _ in modules))
    for (module, _), noise in zip(modules, layers.values(), strict=True):
        noise.train(module.training)
        noise.injected = True
        if _has_features_last(module):
            noise.features_last = True
        module.add_module(CHILD, noise)
        module.register_forward_pre_hook(_pre_hook, with_kwargs=True)
    model.register_load_state_dict_pre_hook(_on_load)
    remember_(model, layers)
    forget_graphs()
    return model


_ALONG_THE_LAST = (nn.Linear, nn.MultiheadAttention, nn.LayerNorm, nn.RMSNorm, nn.RNNBase)


def _has_features_last(module: nn.Module) -> bool:
    """Whether a layer works on the last dimension of its inputs, as linear layers of anybody do."""
    if hasattr(module, "in_channels"):
        return False
    own = getattr(module, "in_features", getattr(module, "nx", None))  # as Conv1D of transformers calls it
    return isinstance(module, _ALONG_THE_LAST) or isinstance(own, int)


def _on_load(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """Levels in a state dict are optional, but not those of some layers without those of the others."""
    fixed = [fqn for fqn, noise in noise_layers(module).items() if not noise._parameters]  # none is learned
    keys = [prefix + f"{fqn}.{CHILD}.std".lstrip(".") for fqn in fixed]
    absent = [key for key in keys if key not in state_dict]
    if len(absent) < len(keys):
        missing_keys: list[str] = rest[2]
        missing_keys += absent


def device_of_parameters(*modules: nn.Module) -> torch.device:
    """Where the first parameter lies that any of the modules has; the CPU if there is none, or no memory."""
    places = (parameter.device for module in modules for parameter in module.parameters())
    found = next(places, torch.device("cpu"))
    return torch.device("cpu") if found.type == "meta" else found


def set_levels_(model: nn.Module, config: NoiseConfig) -> nn.Module:
    """Give the noise layers of `model` other levels, in place; of an optimised copy, its original's as well.

    Raises:
        ValueError: there are none.
    """
    if not noise_layers(model):
        raise ValueError("the network has no noise layers: inject_noise_ first")
    for network in with_originals(model):
        renew_(network)
        for number, layer in enumerate(noise_layers(network).values()):
            layer.std = config.inner_std if number else config.init_std
    forget_graphs()
    return model


def remove_noise_(model: nn.Module) -> nn.Module:
    """Undo `inject_noise_`, in place; a model without injected noise stays unchanged.

    For an optimised copy, the original loses its noise as well.
    """
    networks = with_originals(model)
    for network in networks[1:]:  # an original may be seen from several copies
        if noise_layers(network):
            remove_noise_(network)
    layers = noise_layers(model)
    for fqn in layers:
        module = model.get_submodule(fqn)
        if isinstance(module, fx.GraphModule):
            leave_out_(module, CHILD)
        delattr(module, CHILD)
    for module in model.modules():
        # By function, not by handle: handles do not survive deepcopy.
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _pre_hook:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, hook in list(module._load_state_dict_pre_hooks.items()):
            if getattr(hook, "hook", None) is _on_load:
                del module._load_state_dict_pre_hooks[key]
    forget_(model, layers)
    forget_graphs()
    return model


def make_static_(model: nn.Module) -> nn.Module:
    """Take all randomness out of `model`, in place; what is left is the defense's static base.

    Of an optimised copy, it is taken out of its original as well, on which attacks decide.
    """
    remove_noise_(model)
    for network in with_originals(model):
        for layer in random_layers(network):
            layer.fix_()
    forget_graphs()
    return model
