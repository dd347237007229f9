"""The command `selfensemble`: runs the app and turns errors into one line and an exit status.

Exit status: 0 done, 1 an error of the program, 2 wrong input or surroundings, or done but without some images
that cannot be used, 3 `doctor` found a fault, 130 interrupted.
"""

import errno
import io
import sys
import traceback
from importlib import metadata
from pathlib import Path

from . import _end_at_once
from .runtime.errors import InputError, MissingPackage
from .runtime.interrupts import INTERRUPTED, NOTHING_LOST, Interrupted, end_while_loading
from .runtime.memory import collect_garbage_later, keep_freed_memory
from .runtime.openmp import sleep_sooner
from .runtime.packages import needs

if __name__ == "__main__" or Path(sys.argv[0]).stem == "selfensemble":
    _end_at_once()  # before the rest is imported
    collect_garbage_later()
    sleep_sooner()

try:
    with needs("selfensemble[cli]"):
        import rich  # noqa: F401
        import typer
except MissingPackage as missing:
    if sys.argv[1:] == ["--version"]:
        sys.stdout.write(f"selfensemble {metadata.version('selfensemble')}\n")
        sys.exit(0)
    sys.stderr.write(f"error: {missing}\n")
    sys.exit(2)

from pydantic import ValidationError

# isort: off  (the help lists commands in this order)
from .cli import certainty, evaluation, experiments, models, serving, terminal, training  # noqa: F401
from .cli.base import app
from .runtime.checking import explained
from .runtime.remarks import show_remarks

# isort: on

_SOME_UNUSABLE = 2  # although all is done


def main() -> None:
    """Entry point."""
    try:
        end_while_loading()
        keep_freed_memory()
        _write_any_letter()
        arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
        debug = len(arguments) < len(sys.argv) - 1
        if not debug:
            show_remarks(terminal.note)
        status = _run(arguments, debug)
    except KeyboardInterrupt:  # while an error or an interrupt was being reported
        status = INTERRUPTED
    if status == INTERRUPTED:
        # An interrupt within exec of a string (of a dataclass, say) marks the interpreter to end by SIGINT,
        # caught or not; the next exec takes the mark away (CPython's run_eval_code_obj).
        exec("")  # noqa: S102
    sys.exit(status)


def _write_any_letter() -> None:
    """What the terminal's encoding lacks is written as its number; it ends nothing in an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(arguments: list[str], debug: bool) -> int:
    terminal.SHOWS_ALL.set(debug)
    terminal.UNUSABLE.set(0)
    try:
        status = app(arguments, prog_name="selfensemble", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception as error:
        return _report(error, debug)
    if status == INTERRUPTED:  # newer releases of typer turn KeyboardInterrupt into this
        _fail(NOTHING_LOST, debug)
    return int(status or 0) or (_SOME_UNUSABLE if terminal.UNUSABLE.get() else 0)


def _report(error: Exception, debug: bool) -> int:
    """Print one line for `error`; the exit status that fits it."""
    show = getattr(error, "show", None)
    if show is not None:  # click's own usage errors
        if isinstance(error.__cause__, ValidationError):
            error.message = explained(error.__cause__.errors(), None)  # type: ignore[attr-defined]
        show()
        return 2
    if isinstance(error, Interrupted):
        _fail(str(error), debug)
        return INTERRUPTED
    known = (InputError, ValueError, TypeError, OSError, FloatingPointError)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        _fail(f"no room to write ({error.strerror}): free some space; earlier files are intact", debug)
        return 2
    if isinstance(error, OSError) and error.filename is not None:
        _fail(f"cannot use {error.filename2 or error.filename}: {str(error.strerror).lower()}", debug)
        return 2
    if isinstance(error, known):
        _fail(" ".join(str(error).split()), debug)
        return 2
    _fail(f"{type(error).__name__}: {error} (--debug shows where)", debug)
    return 1


def _fail(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    terminal.err.print(f"error: {message}", style="red", highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
