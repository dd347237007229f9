"""Honesty checks: signs that an evaluation of a model, or the model itself, is not what it seems.

Each check is a function of a `Subject`; its name is what the report shows. Sources: Carlini et al., On
Evaluating Adversarial Robustness, 2019, section 3; Athalye et al., Obfuscated Gradients Give a False
Sense of Security, ICML 2018, section 3.1.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ...attacks.masking import NoGradientError
from ...attacks.norms import check_eps, check_norm
from ...attacks.units import bounds_of
from ...data.labels import class_numbers
from ...noise.calls import own_modes, set_modes
from ...noise.own_numbers import OwnNumbers
from ...noise.streams import noise_draw, stream_seed
from ..results import CheckRecord
from . import attack_checks, noise_checks, output_checks
from .findings import failed
from .subject import Subject

Progress = Callable[[str, float], None]

CHECKS: dict[str, Callable[[Subject], CheckRecord]] = {
    "eval mode": output_checks.eval_mode_on,
    "batch independence": output_checks.batch_independence,
    "input range": output_checks.input_range,
    "logits": output_checks.logits,
    "randomness": noise_checks.randomness,
    "nothing hidden": noise_checks.nothing_hidden,
    "where noise enters": noise_checks.where_noise_enters,
    "gradients": output_checks.gradients,
    "success grows with eps": attack_checks.grows_with_eps,
    "frozen noise falls": attack_checks.frozen_noise_falls,
    "twice the steps": attack_checks.twice_the_steps,
    "twice the restarts": attack_checks.twice_the_restarts,
    "twice the draws": attack_checks.twice_the_draws,
    "random noise is weaker": attack_checks.random_noise_is_weaker,
    "transfer is weaker": attack_checks.transfer_is_weaker,
    "black box is weaker": attack_checks.black_box_is_weaker,
}


def doctor(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    eps: float = 8 / 255,
    steps: int = 20,
    eot: int = 10,
    images: int = 50,
    expect_random: bool | None = None,
    max_batch: int = 200,
    seed: int = 0,
    progress: Progress = lambda text, done: None,
) -> list[CheckRecord]:
    """Examine a model as it is handed over: mode, outputs, noise, gradients, and how attacks fare on it.

    Args:
        model: any classifier; it is left as it was.
        inputs: (B, C, H, W) in [0, 1], or in the bounds of an ensemble that has others; real images of the
            task.
        labels: (B,) integers, the true classes.
        norm, eps: threat model of the trial attacks, in the units of the inputs.
        steps, eot: their budget, which the checks of twice the budget find sufficient or not.
        images: how many images the trials use, the first ones that the model gets right.
        expect_random: whether two answers of the model should differ; None to judge by what is in it.
        max_batch: images a forward pass.
        seed: of everything random, so that records repeat.
        progress: called with the name of each check and the share done.

    Returns:
        A record for each of `CHECKS`, in order; `passed` is None where a check does not apply.

    Raises:
        ValueError, TypeError: inputs, labels or settings that cannot be used. Faults of the model are no
            errors, but failed checks.
    """
    check_norm(norm)
    check_eps(eps, norm, inputs, bounds_of(model))
    subject = Subject(
        model, inputs, labels, norm=norm, eps=eps, steps=steps, eot=eot, images=images,
        expect_random=expect_random, max_batch=max_batch, seed=seed,
    )  # fmt: skip
    class_numbers(labels, len(inputs), device=inputs.device, classes=_classes(subject))
    takes_numbers = _takes_numbers(subject)
    records = []
    with _left_as_it_was(model):
        for place, (name, check) in enumerate(CHECKS.items()):
            progress(name, place / len(CHECKS))
            # One seed for all the noise of a check: each call draws its next numbers, and records repeat.
            own = stream_seed(seed, place, 5)
            with noise_draw(own), OwnNumbers(own) if takes_numbers else nullcontext():
                record = _examine(check, subject)
            records.append(record.model_copy(update={"name": name}))
    progress("done", 1.0)
    return records


def _classes(subject: Subject) -> int | None:
    """Number of classes; None where the model fails, which the checks will say."""
    try:
        with _left_as_it_was(subject.model):
            return subject.once(subject.few[:1]).shape[1]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the model is a stranger's, and may fail in any way
        return None


def _takes_numbers(subject: Subject) -> bool:
    """Whether the model takes numbers from torch's global generators; where it fails, it may."""
    try:
        with _left_as_it_was(subject.model):
            return subject.takes_numbers
    except torch.OutOfMemoryError:
        raise
    except Exception:  # see above
        return True


def _examine(check: Callable[[Subject], CheckRecord], subject: Subject) -> CheckRecord:
    try:
        return check(subject)
    except torch.OutOfMemoryError:
        raise
    except NoGradientError:
        return failed(
            "not possible",
            "gradients are masked: the model passes none to its inputs, so only attacks without gradients "
            "say something; see `black box is weaker`",
        )
    except Exception as error:  # the model is a stranger's, and may fail in any way
        reason = " ".join(str(error).split())[:300]
        return CheckRecord(
            name="", passed=False, figure="could not be done",
            advice=f"the model failed under examination ({type(error).__name__}: {reason})",
        )  # fmt: skip


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Buffers and modes come back, also those of a model that ignores eval() and updates its statistics."""
    modes = own_modes(model)
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        set_modes(modes)
        with torch.no_grad():
            for buffer, before in buffers:
                # An equal one is not written: a graph that another thread runs backward may hold it.
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
