"""What other libraries do to a process, kept from it."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..noise.own_numbers import OwnNumbers
from ..runtime.random_state import kept_random_state

_WARNINGS = r"(torchattacks|foolbox|eagerpy|art)(\.|$)"  # modules whose warnings nobody here can mend


@contextmanager
def isolated(seed: int | None) -> Iterator[None]:
    """The libraries' warnings off; global generators seeded (but for None), and put back at the end.

    Those of torch as well: some libraries seed them, which other threads of the process then notice.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with warnings.catch_warnings(), kept_random_state(), OwnNumbers(seed):
            warnings.filterwarnings("ignore", module=_WARNINGS)
            warnings.filterwarnings("ignore", message="torch.meshgrid")  # foolbox's, raised in torch
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
