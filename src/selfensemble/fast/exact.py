"""Float32 computed in float32: torch's switches for faster and coarser products, off for a while.

TF32 has steps of 1/2048 near 1, which swallow what an attack changes in an image. torch has two interfaces to
its switches. The old one is `allow_tf32` of cuBLAS and cuDNN, and `set_float32_matmul_precision`; since
torch 2.9 each backend has a `fp32_precision`, and so has each kind of operator of it. Both write to the same
table, the old one keeps values of its own besides, and reading it raises where the two differ. So both are
set within the context, and afterwards both are as they were, in all the parts that torch keeps.

One thing cannot be put back: as long as nobody set them, cuDNN's convolutions and recurrent layers have TF32,
and give way to what all backends are told. Once set they read as before, and no longer give way to what is
told to all backends later: a program that wants none says so before, or to `torch.backends.cudnn.conv`.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# A part that was told nothing ("none") has what its backend was told, and that what all backends were told:
# the wider first. Before torch 2.9 there are none.
_Part = tuple[str, str]
_PARTS: list[_Part] = []
if hasattr(torch._C, "_get_fp32_precision_getter"):
    _PARTS = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all")]
    _PARTS += [(backend, part) for backend in ("cuda", "mkldnn") for part in ("matmul", "conv", "rnn")]


@dataclass(frozen=True, slots=True)
class _Switches:
    """How the switches stood.

    Attributes:
        matmul: "highest", "high" or "medium".
        cudnn, onednn: whether TF32 was allowed; the second is None where torch has no such switch.
        parts: what each was told itself, of those of torch 2.9; what nobody told a part, but torch has for it
            until someone does, looks the same.
        effective: what held for each.
    """

    matmul: str
    cudnn: bool
    onednn: bool | None
    parts: dict[_Part, str]
    effective: dict[_Part, str]


def _get(part: _Part) -> str:
    return torch._C._get_fp32_precision_getter(*part)


def _set(part: _Part, value: str) -> None:
    torch._C._set_fp32_precision_setter(*part, value)


def _switch_off() -> _Switches:
    """Float32 is exact from here on; returns how the switches stood."""
    effective, parts = {part: _get(part) for part in _PARTS}, {}
    for part in _PARTS:
        # What is above it is "none" by now: this is what the part was told itself.
        parts[part] = _get(part)
        _set(part, "none")
    _all_exact()
    # Now the old interface can be read, but for cuDNN's switch where it says another thing than the new one.
    matmul = torch.get_float32_matmul_precision()
    try:
        cudnn = torch._C._get_cudnn_allow_tf32()
    except RuntimeError:
        cudnn = True
    onednn = torch._C._get_onednn_allow_tf32() if hasattr(torch._C, "_get_onednn_allow_tf32") else None
    before = _Switches(matmul, cudnn, onednn, parts, effective)
    _set_old("highest", False, False if onednn else None)
    _all_exact()
    return before


def _all_exact() -> None:
    for part in _PARTS:
        _set(part, "ieee")


def _set_old(matmul: str, cudnn: bool, onednn: bool | None) -> None:
    """By the old interface, which overwrites some of the parts."""
    # Not by torch.backends, which a program may have frozen (torch.backends.disable_global_flags).
    torch.set_float32_matmul_precision(matmul)
    torch._C._set_cudnn_allow_tf32(cudnn)
    if onednn is not None:
        torch._C._set_onednn_allow_tf32(onednn)


def _switch_back(before: _Switches) -> None:
    _set_old(before.matmul, before.cudnn, before.onednn or None)
    for part, value in before.parts.items():
        _set(part, value)
        if _get(part) != before.effective[part]:  # it gave way to what is above it
            _set(part, "none")


class _Exact:
    """How many contexts are entered, and what holds outside of them."""

    def __init__(self) -> None:
        self.lock, self.depth = threading.Lock(), 0
        self.before: _Switches | None = None
        self.warned = False

    def enter(self) -> None:
        with self.lock:
            if self.depth == 0:
                self.before = self._without_warnings()
            self.depth += 1

    def leave(self) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0 and self.before is not None:
                _switch_back(self.before)
                self.before = None

    def _without_warnings(self) -> _Switches:
        """Torch 2.9 says once in a process that the old interface will go: nothing that a caller can mend."""
        if self.warned:
            return _switch_off()
        self.warned = True  # filters are those of all threads: changed once rather than every time
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _switch_off()


_exact = _Exact()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within this context float32 is computed in float32, not in TF32 or bfloat16; in all threads.

    Contexts may be nested, and overlap in several threads: when the last one is left, every switch stands as
    it did before the first. What a program sets in between is lost.
    """
    _exact.enter()
    try:
        yield
    finally:
        _exact.leave()
