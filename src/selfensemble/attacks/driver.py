"""From a user's model and batch to an attack's oracle: checks, eval mode, batches, devices."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..data.labels import class_numbers
from ..ensemble.checks import check_count, check_images, explain_shape, floating_dtype, logits_of
from ..ensemble.draws import Draws
from ..ensemble.ensemble import SelfEnsemble
from ..ensemble.randomness import PASSES, answers_differ, with_random_images
from ..fast.ensemble import FastEnsemble, original_of
from ..fast.exact import exact_float32
from ..noise.calls import OwnHooks, without_weight_gradients
from ..noise.injection import eval_mode, random_layers
from ..noise.own_numbers import OwnNumbers
from ..noise.streams import Sampling, fresh_seed, stream_seed
from .averaging import Noise
from .expectation import Forward, Oracle
from .masking import are_labels
from .units import bounds_of, from_units, rounded_towards

_HALF = (torch.bfloat16, torch.float16)


def run_attack(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    run: Callable[[Oracle, Tensor, Tensor], Tensor],
    noise: Noise,
    max_batch: int | None = None,
) -> Tensor:
    """Check the input, then `run(oracle, images, labels)` on `max_batch` images at a time.

    Returns:
        What `run` returned, clamped into [0, 1], on the device and in the dtype of `inputs`.
    """
    labels = check_batch(inputs, labels)
    if len(inputs) == 0:
        return inputs.clone()
    size = len(inputs) if max_batch is None else check_count("max_batch", max_batch)
    seed = fresh_seed() if noise.seed is None else noise.seed
    device, parts = device_of(model, inputs), []
    with attacked(model) as (forward, follow):
        with explain_shape(model, inputs):
            first = _prepared(inputs[:size], device)
            classes, is_random, reseed = _probe(original_of(model), forward, first)
            sampling = _sampling_of(original_of(model), forward, first)
        class_numbers(labels, len(inputs), device=labels.device, classes=classes)
        rooms = [0 if reseed else _room(each, first, max_batch) for each in (original_of(model), model)]
        for number, (x, y) in enumerate(zip(inputs.split(size), labels.split(size), strict=True)):
            own = seed if number == 0 or noise.frozen else stream_seed(seed, number, 1)
            if number and not is_random:  # which the images before did not show
                is_random = answers_differ(forward, _prepared(x, device), most=len(x))
            oracle = Oracle(
                forward, noise, seed=own, is_random=is_random, classes=classes, reseed=reseed,
                follow=follow, room=(rooms[0], rooms[1]), sampling=sampling,
            )  # fmt: skip
            # In float32, whatever the model computes in: smaller types cannot hold small changes.
            part = run(oracle, _prepared(x, device), y.to(device, copy=True))
            # To the device first: that of the model may not know the dtype.
            parts.append(rounded_towards(x, part.detach().clamp(0.0, 1.0).to(inputs.device)))
    return torch.cat(parts)


def _prepared(inputs: Tensor, device: torch.device) -> Tensor:
    """A copy in float32 on the device, which may not know the dtype that it had."""
    return inputs.detach().to(torch.float32, copy=True).to(device)


@contextmanager
def attacked(model: nn.Module) -> Iterator[tuple[Forward, Forward | None]]:
    """The single-draw forward of `model` in eval mode, without gradients of its parameters.

    Of an optimised copy it is that of its original, and second the copy's own, to follow its gradients.

    Raises:
        ValueError: a copy and its original differ, see `FastEnsemble.check_original`.
    """
    original = original_of(model)
    if isinstance(model, FastEnsemble):
        model.check_original()
    with (
        without_weight_gradients(original),
        eval_mode(original),
        eval_mode(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        exact_float32(),
    ):
        own = from_units(single_draw(original))
        yield own, None if model is original else from_units(single_draw(model))


def single_draw(model: nn.Module) -> Forward:
    """The logits of one noise draw: of an ensemble, a single draw rather than the mean of many.

    Inputs of another floating dtype than the model's are converted on the way, differentiably.
    """
    draw = model.draw_logits if isinstance(model, SelfEnsemble) else lambda x: logits_of(model(x), x.shape[0])
    dtype = model.input_dtype if isinstance(model, SelfEnsemble) else floating_dtype(model)
    return draw if dtype is None else lambda inputs: draw(inputs.to(dtype))


def check_batch(inputs: Tensor, labels: Tensor, model: nn.Module | None = None) -> Tensor:
    """The labels as int64 beside the images; a ValueError or TypeError unless both fit the rules.

    `model`: whose range the images are to be in; None for [0, 1].
    """
    check_images(inputs, (0.0, 1.0) if model is None else bounds_of(model))
    return class_numbers(labels, len(inputs), device=inputs.device)


def device_of(model: nn.Module, inputs: Tensor) -> torch.device:
    """Where the model lives."""
    return next((parameter.device for parameter in model.parameters()), inputs.device)


@torch.no_grad()
def _probe(model: nn.Module, forward: Forward, inputs: Tensor) -> tuple[int, bool, bool]:
    """Number of classes, whether two passes differ, and whether they use torch's global generators."""
    with OwnNumbers() as numbers:
        first = forward(inputs)
    if not torch.isfinite(first).all():
        raise ValueError("the model returns NaN or infinite logits: fix it before attacking it")
    if _are_probabilities(first, forward, inputs) and not (are_labels(first) and _is_masked(forward, inputs)):
        raise ValueError(
            "the model returns probabilities, and attacks need logits: leave out its final softmax, or wrap "
            "it in a module that returns their logarithm"
        )
    reseed = numbers.drew
    noise = any(layer.is_active for layer in random_layers(model))
    if not (reseed or noise):  # noise may be of some images alone, and show nothing of black ones
        noise = answers_differ(forward, inputs, most=len(inputs))
        noise = noise or answers_differ(forward, with_random_images(inputs[:2], (0.0, 1.0)), PASSES, 4)
    return first.shape[1], reseed or noise, reseed


@torch.no_grad()
def _are_probabilities(first: Tensor, forward: Forward, inputs: Tensor) -> bool:
    """Whether the model returns probabilities, of other images as well: logits may add up to 1 by chance."""
    if not looks_like_probabilities(first):
        return False
    image = inputs[:1]
    others = torch.cat([1 - image, torch.zeros_like(image), torch.ones_like(image), image.flip(-1) * 0.5])
    with OwnNumbers():
        more = torch.cat([forward(each) for each in others.split(1)])
    return looks_like_probabilities(torch.cat([first, more[more.isfinite().all(dim=1)]]))


def _is_masked(forward: Forward, inputs: Tensor) -> bool:
    """Whether the outputs of the model do not depend differentiably on its inputs."""
    with torch.enable_grad():
        return not forward(inputs[:1].detach().requires_grad_()).requires_grad


@torch.no_grad()
def _sampling_of(model: nn.Module, forward: Forward, inputs: Tensor) -> Sampling:
    """An ensemble's own way; of others "per_image" where parts of an image are rows of the batch."""
    if isinstance(model, SelfEnsemble):
        return model.sampling
    layers = random_layers(model)
    if not layers:
        return "shared"
    few, rows = inputs[:2], list[int]()
    with OwnNumbers(), OwnHooks() as hooks:
        for layer in random_layers(model):
            hooks.add(layer.register_forward_pre_hook, lambda module, args: rows.append(len(args[0])))
        forward(few)
    return "per_image" if any(count != len(few) for count in rows) else "shared"


def _room(model: nn.Module, example: Tensor, max_batch: int | None) -> int:
    """Images that a pass of several noise draws may hold; of a pair of draws, the noise is drawn once."""
    too_few = max_batch is not None and max_batch < 4  # to find out whether the network allows it
    if too_few or not (isinstance(model, SelfEnsemble) and model.is_random and model.sampling == "shared"):
        return 0
    draws = Draws(model, example, sampling="shared")
    if not draws.folds():
        return 0
    return max_batch or max(draws.capacity, 2 * len(example))


def looks_like_probabilities(outputs: Tensor) -> bool:
    """Whether every row of outputs (B, K) is a distribution.

    Sums may differ from 1 by what float32 rounds, or a little more where rows differ by far more than sums
    do; where half precision could hold all outputs, by what that rounds.
    """
    half = any(torch.equal(outputs.to(dtype).to(outputs.dtype), outputs) for dtype in _HALF)
    outputs = outputs.float()
    away = float((outputs.sum(dim=1) - 1).abs().max())
    apart = float((outputs.amax(dim=0) - outputs.amin(dim=0)).max())
    room = 1e-2 if half else max(1e-5, min(1e-3, 0.1 * apart))
    return bool((outputs >= 0).all()) and away <= room
