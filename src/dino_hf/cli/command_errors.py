"""End commands: exit codes, one sentence on standard error, and a traceback with --debug.

Exit codes of all commands:
    0    done
    1    an error: the command line or the input is wrong, or the work failed; the message says how far it came
    2    `doctor` found errors in the data
    3    `predict` skipped sources that it could not read
    130, 143, 129  stopped by Ctrl-C, SIGTERM or SIGHUP
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

from ..common.free_memory import is_lack_of_memory
from ..common.text import first_line, printable
from .stopping import Terminated, stop_like_ctrl_c

FAILED, ERRORS_FOUND, SOME_SKIPPED, INTERRUPTED = 1, 2, 3, 130

Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from.", rich_help_panel="Other")]

_LONGEST = 4000  # characters of a message; names in it can have any length
_PATIENCE = 3.0  # seconds; after an error of the first process, torchrun stops the others within this time
_CURES = {
    errno.ENOSPC: "the disk is full; make room, or choose another place.",
    errno.EDQUOT: "your quota of the disk is used up; make room, or choose another place.",
    errno.EFBIG: "the file would be larger than this machine allows (ulimit -f).",
    errno.ENOMEM: "there is not enough memory; choose smaller batches or images, or end other programs.",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n).",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter name.",
    errno.ENOENT: "it does not exist; was it moved or deleted meanwhile?",
    errno.EACCES: "access is denied; check its permissions.",
    errno.EROFS: "it cannot be written, because its disk is read-only; choose another place.",
}


@contextmanager
def one_sentence_errors(debug: bool) -> Iterator[None]:
    """If a command fails, end it with "error: ..." and one of the exit codes above. With `debug`, show the traceback first.

    A user can cure ValueError, OSError, ImportError and a lack of memory. Other errors are our mistakes and always show their
    traceback. SIGTERM is handled like Ctrl-C. Control characters in messages are escaped, so they cannot act on the terminal.
    """
    _accept_any_text()
    with _printable_warnings(), stop_like_ctrl_c():
        try:
            _check_current_folder()
            yield
        except BrokenPipeError:  # the program that read our output has ended, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILED) from None
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as interrupt:
            is_signal = isinstance(interrupt, Terminated)
            _show("stopped by a signal." if is_signal else "stopped.", interrupt, debug)
            raise typer.Exit(interrupt.exit_code if is_signal else INTERRUPTED) from None
        except Exception as error:
            if type(error).__module__.startswith(("click.", "typer.")):  # typer reports wrong command lines itself
                raise
            sentence = _sentence(error)
            _let_first_process_report()
            _show(sentence or f"{type(error).__name__}: {error}", error, debug or sentence is None)
            raise typer.Exit(FAILED) from None


@contextmanager
def script_errors() -> Iterator[None]:
    """Like `one_sentence_errors`, for a script that does not use typer."""
    try:
        with one_sentence_errors(debug=False):
            yield
    except typer.Exit as ending:
        sys.exit(ending.exit_code)


def _sentence(error: Exception) -> str | None:
    """The message of an error that a user can cure. None: the error is our mistake."""
    text = str(error)
    if is_lack_of_memory(error):
        return f"There is not enough memory; choose smaller batches or images. ({first_line(error)})"
    if isinstance(error, OSError) and error.errno in _CURES and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {_CURES[error.errno]}"
    if isinstance(error, OSError) and error.errno in _CURES and text.startswith("[Errno"):
        return f"{error.strerror}: {_CURES[error.errno]}"
    return text if isinstance(error, ValueError | OSError | ImportError) or _is_unavailable_backend(error) else None


def _is_unavailable_backend(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    from ..model.attention_backends import BackendUnavailable  # imported here, because it imports torch

    return isinstance(error, BackendUnavailable)


def _show(sentence: str, error: BaseException, with_traceback: bool) -> None:
    """Show a sentence and the notes of the error, which say where it happened and how to continue."""
    if with_traceback:
        typer.echo(printable("".join(traceback.format_exception(error)), limit=100 * _LONGEST), err=True)
    text = " ".join([sentence, *getattr(error, "__notes__", [])])
    typer.echo(f"error: {printable(text, limit=_LONGEST)}", err=True)


def _let_first_process_report() -> None:
    """Under torchrun, wrong data fails in all processes. The others wait until the first has reported. Then torchrun ends them."""
    rank = os.environ.get("RANK", "0")
    if rank.isdecimal() and int(rank) > 0:
        time.sleep(_PATIENCE)


def _accept_any_text() -> None:
    """Let standard output and error write every character. A character that their encoding lacks is written as an escape.

    Without this, a command would fail if its output goes to a file in an old encoding, as on Windows.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _check_current_folder() -> None:
    """Raise FileNotFoundError if the current folder was deleted."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise FileNotFoundError(
            "The folder that this command was started in has been deleted; change to a folder that exists."
        ) from None


@contextmanager
def _printable_warnings() -> Iterator[None]:
    """Inside the context, warnings and log records show control characters as escapes."""
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
