"""The global random states of a program, which are not ours to change."""

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_random_state(device: torch.device | None = None) -> Iterator[None]:
    """Within this context torch's global generators may be seeded; afterwards they stand as they did.

    What other threads draw meanwhile they draw again afterwards: where there may be some, `OwnNumbers` (in
    `noise`) is what is wanted.

    `torch.manual_seed` seeds those of the CPU and of every device that there is; `torch.random.fork_rng` by
    itself puts back the CPU's and CUDA's alone.

    Args:
        device: of what runs within, where it is no device of the accelerator that torch found.
    """
    if device is None or device.type in ("cpu", "meta"):
        device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        with torch.random.fork_rng(devices=[]):
            yield
        return
    # Named, or torch warns where there are several.
    numbers = range(torch.get_device_module(device).device_count())
    with torch.random.fork_rng(devices=numbers, device_type=device.type):
        yield


@contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """Within this context the global generators of Python, numpy and torch's CPU begin at `seed`.

    Afterwards they stand as they did. Those of accelerators are not touched, so that processes which were
    forked can use it.
    """
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002


def states_of_others() -> tuple[object, ...]:
    """Where the generators of Python and of numpy stand, to be compared."""
    return random.getstate(), pickle.dumps(np.random.get_state(legacy=False))  # noqa: NPY002
