"""Noise in 16 bits by a few lines of C, where there is a compiler: the same numbers, in one pass over memory.

`optimize` and the trainer compile `kernel.c` once for each kind of machine, which takes under a second, and
keep it in the cache folder. Without a compiler, or with SELFENSEMBLE_KERNEL=0, torch makes the same
numbers (docs/decisions/0037-kernel.md).
"""

import ctypes
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from ..runtime.files import atomic_write, cache_dir

_SOURCE = Path(__file__).with_suffix(".c")
_OPTIONS = ("-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared")
_PointerIn = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_lock = threading.Lock()
_found: list[tuple[ctypes.CDLL | None, str]] = []  # one entry, once it was looked for


class NoKernelError(Exception):
    """Why there is none."""


_FAULTS = (NoKernelError, OSError, RuntimeError, subprocess.SubprocessError)  # no home is a RuntimeError


def kernel() -> ctypes.CDLL | None:
    """The compiled functions, where `prepare` found a way to have them."""
    return _found[0][0] if _found else None


def reaches(tensor: Tensor) -> bool:
    """Whether its memory can be handed to them: a tensor of the CPU, with nothing around it."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not is_functorch_wrapped_tensor(tensor)


def state_of(generator: np.random.SFC64) -> int:
    """Address of its state: what NumPy's `bitgen_t` begins with."""
    address = _PointerIn(generator.capsule, b"BitGenerator")
    state = ctypes.c_void_p.from_address(address).value
    assert state is not None
    return state


def prepare() -> str:
    """Load them, compiled if need be; the reason why torch's operators make the noise here, or ""."""
    with _lock:
        if not _found:
            try:
                _found.append((_load(), ""))
            except _FAULTS as error:
                _found.append((None, " ".join(str(error).split()) or type(error).__name__))
    return _found[0][1]


def _load() -> ctypes.CDLL:
    if os.environ.get("SELFENSEMBLE_KERNEL") == "0":
        raise NoKernelError("SELFENSEMBLE_KERNEL is 0")
    if sys.byteorder != "little" or not sys.platform.startswith("linux"):
        raise NoKernelError("it was tried on Linux with little-endian processors only")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NoKernelError("there is no C compiler (cc, gcc or clang) on the PATH")
    command = [compiler, *_OPTIONS, str(_SOURCE), *_openmp()]
    about = [_SOURCE.read_text(encoding="utf-8"), *command, str(Path(compiler).stat().st_mtime_ns)]
    digest = hashlib.sha256("\0".join([*about, _processor()]).encode()).hexdigest()
    kept = cache_dir() / f"noise-{digest[:20]}.so"
    if _is_our_own(kept):
        with suppress(OSError, NoKernelError):  # damaged: it is made anew
            return _checked(kept)
    with tempfile.TemporaryDirectory(prefix="selfensemble-") as folder:
        made = Path(folder) / kept.name
        done = subprocess.run([*command, "-o", str(made)], check=False, capture_output=True, timeout=60)
        if done.returncode:
            raise NoKernelError(f"{compiler} failed: {done.stderr.decode(errors='replace')[:300]}")
        functions = _checked(made)
        with suppress(OSError):  # no room, or not ours to write to: the next process compiles again
            atomic_write(kept, made.read_bytes())
            kept.chmod(0o700)
    return functions


def _openmp() -> list[str]:
    """Torch's own library of threads, so that there are no two of them; one thread where it is not found."""
    found = re.search(r"(/\S*libgomp\S*)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return ["-fopenmp", found.group(1)] if found else []


def _processor() -> str:
    """What -march=native looks at: a cache folder may be shared by machines of several kinds."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(sorted({line for line in lines if re.match(r"(model name|flags|Features)\b", line)}))


def _is_our_own(file: Path) -> bool:
    """Whether it is there, and nobody but us could have written it."""
    try:
        about = [path.stat() for path in (file, file.parent)]
    except OSError:
        return False
    others = stat.S_IWGRP | stat.S_IWOTH
    return all(each.st_uid == os.geteuid() and not each.st_mode & others for each in about)


def _checked(file: Path) -> ctypes.CDLL:
    """The functions in a file, if they do what they should."""
    functions = ctypes.CDLL(str(file))
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    functions.add_noise.argtypes = [pointer, pointer, pointer, pointer, size, size, number, number]
    functions.fill16.argtypes = functions.fill32.argtypes = [pointer, pointer, pointer, size, number]
    for function in (functions.add_noise, functions.fill16, functions.fill32):
        function.restype = None
    own, numpys = np.random.SFC64(1), np.random.SFC64(1)
    table = torch.arange(2**16, dtype=torch.int32, device="cpu").to(torch.int16)
    found = torch.empty(1003, dtype=torch.int16, device="cpu")
    functions.fill16(state_of(own), table.data_ptr(), found.data_ptr(), len(found), 1)
    expected = numpys.random_raw(251).view(np.int16)[:1003]
    if not np.array_equal(found.numpy(), expected) or own.random_raw() != numpys.random_raw():
        raise NoKernelError("it does not draw the numbers of this version of NumPy")
    return functions
