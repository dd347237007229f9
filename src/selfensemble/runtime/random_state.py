"""The global random states of a program, which are not ours to change."""

from collections.abc import Iterator
from contextlib import contextmanager

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
