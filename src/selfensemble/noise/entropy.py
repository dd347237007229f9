"""Fresh random numbers, and streams of more than 32 bits: torch's CPU generator is seeded by no more."""

import functools
import os
import threading
from os import urandom

import numpy as np
import torch

from .half_precision import KEPT, Bits

_WORDS = 624  # of the Mersenne twister
_HEAD = 24  # bytes of torch's state before them: seed, how many are left, the next one


class WideSeed(int):
    """A seed of which every bit counts: its streams on a CPU are as many as there are seeds.

    An ordinary seed stays what it was, a function of 32 bits within torch's generator.
    """


def cpu_generator(words: np.ndarray) -> torch.Generator:
    """Torch's generator on the CPU with this state.

    Args:
        words: (624,) uint32 of the Mersenne twister.
    """
    _check_layout()
    generator = torch.Generator("cpu")
    state = generator.manual_seed(0).get_state()
    state[_HEAD : _HEAD + 8 * _WORDS] = torch.from_numpy(words.astype(np.uint64).view(np.uint8))
    generator.set_state(state)
    return generator


@functools.cache
def _check_layout() -> None:
    """The words of torch's state are where they were when this was written."""
    seed = 20_261_128
    state = torch.Generator("cpu").manual_seed(seed).get_state().numpy()
    _, expected, *_ = np.random.RandomState(seed).get_state(legacy=True)
    words = np.asarray(expected, dtype=np.uint64).tobytes()
    if state[_HEAD : _HEAD + 8 * _WORDS].tobytes() != words:
        raise RuntimeError(
            f"torch {torch.__version__} keeps the state of its CPU generator in another form: noise cannot "
            "be seeded from all of the system's entropy; please report it"
        )


def stream_of(seed: WideSeed, index: int, layer: int, device: torch.device) -> torch.Generator:
    """The generator at the start of the stream (seed, index, layer)."""
    key = np.array([int(seed) & (2**64 - 1), (index << 16) | layer], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(_WORDS // 2).view(np.uint32)
    if device.type == "cpu":
        return cpu_generator(words)
    number = int(words[0]) << 31 | int(words[1]) >> 1
    return torch.Generator(device).manual_seed(number)


class Entropy(threading.local):
    """One generator a thread and device, seeded by the operating system, and one of bits."""

    def __init__(self) -> None:
        self.generators: dict[torch.device, torch.Generator] = {}
        self.bits: Bits | None = None

    def generator(self, device: torch.device) -> torch.Generator:
        """Of this thread, for a device."""
        if device not in self.generators:
            if device.type == "cpu":
                words = np.frombuffer(urandom(4 * _WORDS), dtype=np.uint32)
                self.generators[device] = cpu_generator(words)
            else:
                seed = int.from_bytes(urandom(8), "big") >> 1
                self.generators[device] = torch.Generator(device).manual_seed(seed)
        return self.generators[device]

    def fresh_bits(self) -> Bits:
        """Of this thread, on the CPU."""
        if self.bits is None:
            words = np.random.SeedSequence(int.from_bytes(urandom(32), "big"), pool_size=8)
            self.bits = Bits(np.random.SFC64(words), kept=KEPT)
        return self.bits

    def forget(self) -> None:
        """A forked child must not repeat its parent's noise."""
        self.generators, self.bits = {}, None


entropy = Entropy()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=entropy.forget)
