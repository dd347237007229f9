"""What is worth saying and stops nothing: a warning in Python, a note of a command."""

import os
import warnings
from collections.abc import Callable
from typing import TextIO


class Remark(UserWarning):
    """Something works, but perhaps not as it was meant."""


def show_remarks(note: Callable[[str], None]) -> None:
    """Have this process's remarks shown by `note`, each once, and no other warnings."""
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, Remark):
            before(message, category, filename, lineno, file, line)
        elif int(os.environ.get("LOCAL_RANK", "0")) == 0 and str(message) not in said:
            said.add(str(message))
            note(str(message))

    said = set[str]()
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", Remark)
    warnings.showwarning = show
