"""How commands end: exit codes, one sentence on standard error, and a traceback with --debug.

Exit codes of all commands:
    0    done
    1    an error: the command line or the input is wrong, or something failed; the message says what was done before
    2    `doctor` found errors in the data
    3    `predict` skipped sources that it could not read
    130  stopped by Ctrl-C; 143 by SIGTERM, 129 by SIGHUP
"""

import errno
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from .console import accept_any_text
from .free_memory import is_lack_of_memory
from .paths import check_current_folder
from .stopping import Terminated, stop_like_ctrl_c
from .text import printable

FAILED, ERRORS_FOUND, SOME_SKIPPED, INTERRUPTED = 1, 2, 3, 130

Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from.", rich_help_panel="Other")]

_LONGEST = 4000  # characters of a sentence; names in it can have any length
_PATIENCE = 3.0  # seconds that torchrun has to stop the other processes after an error of the first
_CURES = {
    errno.ENOSPC: "the disk is full; make room, or choose another place.",
    errno.EDQUOT: "your quota of the disk is used up; make room, or choose another place.",
    errno.EFBIG: "the file would be larger than this machine allows (ulimit -f).",
    errno.ENOMEM: "there is not enough memory; choose smaller batches or images, or end other programs.",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n).",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one.",
    errno.ENOENT: "it is not there; was it moved or deleted meanwhile?",
    errno.EACCES: "access is denied; check its permissions.",
    errno.EROFS: "it cannot be written, its disk is read-only; choose another place.",
}


@contextmanager
def one_sentence_errors(debug: bool) -> Iterator[None]:
    """End a command with "error: ..." and one of the exit codes above; with `debug` the traceback comes first.

    ValueError, OSError, ImportError and a lack of memory are what a user can cure. Errors of other kinds are ours, and always show
    their traceback. SIGTERM is handled like Ctrl-C, and no text that is shown can act on the terminal.
    """
    accept_any_text()
    with _printable_warnings(), stop_like_ctrl_c():
        try:
            check_current_folder()
            yield
        except BrokenPipeError:  # whatever read our output has ended, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILED) from None
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as interrupt:
            is_signal = isinstance(interrupt, Terminated)
            _show("stopped by a signal." if is_signal else "stopped.", interrupt, debug)
            raise typer.Exit(interrupt.exit_code if is_signal else INTERRUPTED) from None
        except Exception as error:
            if type(error).__module__.startswith(("click.", "typer.")):  # of the command line
                raise
            sentence = _sentence(error)
            _let_first_process_speak()
            _show(sentence or f"{type(error).__name__}: {error}", error, debug or sentence is None)
            raise typer.Exit(FAILED) from None


@contextmanager
def script_errors() -> Iterator[None]:
    """As `one_sentence_errors`, for a script that is no command of typer."""
    try:
        with one_sentence_errors(debug=False):
            yield
    except typer.Exit as ending:
        sys.exit(ending.exit_code)


def _sentence(error: Exception) -> str | None:
    """What went wrong, for the kinds of errors that a user can cure."""
    text = str(error)
    if is_lack_of_memory(error):
        return f"There is not enough memory; choose smaller batches or images. ({text.splitlines()[0] if text else 'MemoryError'})"
    if isinstance(error, OSError) and error.errno in _CURES and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {_CURES[error.errno]}"
    if isinstance(error, OSError) and error.errno in _CURES and text.startswith("[Errno"):
        return f"{error.strerror}: {_CURES[error.errno]}"
    return text if isinstance(error, ValueError | OSError | ImportError) or _is_unavailable_backend(error) else None


def _is_unavailable_backend(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    from ..model.attention_backends import BackendUnavailable  # imports torch, which `--help` does not need

    return isinstance(error, BackendUnavailable)


def _show(sentence: str, error: BaseException, with_traceback: bool) -> None:
    """With the notes of the error, which say where it was and how to go on."""
    if with_traceback:
        typer.echo(printable("".join(traceback.format_exception(error)), limit=100 * _LONGEST), err=True)
    text = " ".join([sentence, *getattr(error, "__notes__", [])])
    typer.echo(f"error: {printable(text, limit=_LONGEST)}", err=True)


def _let_first_process_speak() -> None:
    """Under torchrun an error of the data is met by all processes. The first one shows it, and torchrun ends the others."""
    rank = os.environ.get("RANK", "0")
    if rank.isdecimal() and int(rank) > 0:
        time.sleep(_PATIENCE)


@contextmanager
def _printable_warnings() -> Iterator[None]:
    """Within, warnings and records of logging show control characters as escapes."""
    format_before = warnings.formatwarning
    handlers = [*logging.getLogger().handlers, *logging.getLogger("transformers").handlers, logging.lastResort]
    handlers = [handler for handler in handlers if handler is not None]

    def escape(record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), None
        return True

    warnings.formatwarning = lambda *arguments, **settings: printable(format_before(*arguments, **settings))
    for handler in handlers:
        handler.addFilter(escape)
    try:
        yield
    finally:
        warnings.formatwarning = format_before
        for handler in handlers:
            handler.removeFilter(escape)
