"""How long OpenMP's threads spin while they wait for each other."""

import os
import sys

_SPINS = "1000"
# What people set who have chosen how threads wait.
_CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def sleep_sooner() -> bool:
    """Have threads sleep after some microseconds of waiting, where the environment leaves it open.

    GNU's OpenMP, which PyTorch has on Linux, spins 300,000 times at the end of every operator that has two
    threads. On an idle machine that is never reached. Beside a busy process one thread waits so for the
    other, which waits for a core: a small network takes several times as long (`benchmarks/busy.py`). It has
    to be set before PyTorch is loaded, and numbers do not change with it. For a separate process, not for a
    library.

    Returns:
        Whether it was set.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _CHOSEN):
        return False
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    return True
