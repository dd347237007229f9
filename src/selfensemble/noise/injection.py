"""Noise into a network that exists, and out of it again.

Each chosen module gets a `GaussianNoise` child and a forward pre-hook that calls it. Nothing is
renamed or replaced: state-dict keys stay, and root, aliased and shared convolutions work.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .layer import GaussianNoise, NoiseConfig, RandomLayer, Std

CHILD = "gaussian_noise"
FilterFn = Callable[[nn.Module, str], bool]


def is_convolution(module: nn.Module, fqn: str = "") -> bool:
    """The default filter: 1-d, 2-d, 3-d and transposed convolutions."""
    return isinstance(module, _ConvNd)


def noise_layers(model: nn.Module) -> dict[str, GaussianNoise]:
    """The injected noise layers, in order of their numbers, by the name of the module that each precedes."""
    found = {
        fqn: child
        for fqn, module in model.named_modules()
        if isinstance(child := getattr(module, CHILD, None), GaussianNoise)
    }
    return dict(sorted(found.items(), key=lambda item: item[1].layer))


def random_layers(model: nn.Module) -> list[RandomLayer]:
    """All random layers, injected or placed by hand."""
    return [module for module in model.modules() if isinstance(module, RandomLayer)]


@contextmanager
def noise_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context `model` is not random: noise layers are the identity, others do what is fixed."""
    layers = random_layers(model)
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within this context `model` is in eval mode; each module's own mode comes back after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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

    handles = [model.get_submodule(fqn).register_forward_pre_hook(note(fqn)) for fqn in fqns]
    try:
        with torch.no_grad(), torch.random.fork_rng(), eval_mode(model), noise_disabled(model):
            call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return order


def _pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    noise = getattr(module, CHILD)
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
    filter_fn: FilterFn = is_convolution,
    example_inputs: Any = None,
) -> nn.Module:
    """Put Gaussian noise in front of every convolution of `model`, in place.

    Args:
        model: any module; its parameters, buffers and state-dict keys are left as they are.
        config: noise levels, by default those published.
        filter_fn: called with each module and its fully qualified name; True where noise goes in
            front. Linear layers: `lambda module, fqn: isinstance(module, nn.Linear)`.
        example_inputs: a batch (a tensor, a tuple of arguments or a dict of keywords). With it, the
            *first* layer, which gets `init_std`, is the first that a forward pass calls; without
            it, the first in order of registration.

    Returns:
        The same model.

    Raises:
        ValueError: no module matches, or the model holds injected noise already.
    """
    config = NoiseConfig() if config is None else config
    if noise_layers(model):
        raise ValueError("the model has noise layers already: call remove_noise_(model) first")
    fqns = [fqn for fqn, module in model.named_modules() if filter_fn(module, fqn)]
    if not fqns:
        raise ValueError(
            "no module matches filter_fn (by default convolutions): nothing to put noise in front "
            "of. Pass filter_fn, e.g. lambda module, fqn: isinstance(module, nn.Linear), and see "
            "validate(model, example_inputs) for convolutions that are called as functions"
        )
    if example_inputs is not None:
        called = execution_order(model, fqns, example_inputs)
        if not called:
            raise ValueError(
                f"none of the {len(fqns)} matching modules ran on example_inputs: pass inputs that "
                "reach them, or leave example_inputs out"
            )
        fqns = called + [fqn for fqn in fqns if fqn not in called]
    stds = dict.fromkeys(fqns, config.inner_std)
    stds[fqns[0]] = config.init_std
    return attach_noise_(model, stds)


def attach_noise_(model: nn.Module, stds: Mapping[str, Std]) -> nn.Module:
    """Put noise of the given levels in front of the named modules; their order numbers the layers."""
    modules = [(model.get_submodule(fqn), fqn or "the model") for fqn in stds]
    for module, name in modules:
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{name} is a TorchScript module: inject noise before scripting")
        if isinstance(getattr(module, CHILD, None), GaussianNoise):
            raise ValueError(f"{name} has noise already: call remove_noise_(model) first")
        if hasattr(module, CHILD):
            raise ValueError(f"{name} has an attribute {CHILD!r} of its own: rename it")
    for layer, ((module, _), std) in enumerate(zip(modules, stds.values(), strict=True)):
        noise = GaussianNoise(std, layer=layer).to(device_of_parameters(module, model))
        noise.train(module.training)
        module.add_module(CHILD, noise)
        module.register_forward_pre_hook(_pre_hook, with_kwargs=True)
    return model


def device_of_parameters(*modules: nn.Module) -> torch.device:
    """Where the first parameter lies that any of the modules has; the CPU if there is none, or no memory."""
    places = (parameter.device for module in modules for parameter in module.parameters())
    found = next(places, torch.device("cpu"))
    return torch.device("cpu") if found.type == "meta" else found


def set_levels_(model: nn.Module, config: NoiseConfig) -> nn.Module:
    """Give the noise layers of `model` other levels, in place.

    Raises:
        ValueError: there are none.
    """
    layers = noise_layers(model)
    if not layers:
        raise ValueError("the network has no noise layers: inject_noise_ first")
    for number, layer in enumerate(layers.values()):
        layer.std = config.inner_std if number else config.init_std
    return model


def remove_noise_(model: nn.Module) -> nn.Module:
    """Undo `inject_noise_`, in place; a model without injected noise is left as it is."""
    for fqn in noise_layers(model):
        module = model.get_submodule(fqn)
        delattr(module, CHILD)
        # By function, not by handle: handles do not survive deepcopy.
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _pre_hook:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return model


def make_static_(model: nn.Module) -> nn.Module:
    """Take all randomness out of `model`, in place; what is left is the defense's static base."""
    remove_noise_(model)
    for layer in random_layers(model):
        layer.fix_()
    return model
