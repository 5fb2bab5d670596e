"""How commands fail: one sentence on standard error, and the traceback for who asks for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from.", rich_help_panel="Other")]


@contextmanager
def one_sentence_errors(debug: bool) -> Iterator[None]:
    """What a user can cure ends the command with "error: ..." and exit code 1; with `debug`, with its traceback. Errors of other
    kinds are ours, and always show theirs."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        _say(str(error), error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as interrupt:
        if debug:
            raise
        _say("stopped.", interrupt)
        raise typer.Exit(130) from None


def _say(sentence: str, error: BaseException) -> None:
    """With the notes of the error, which say where it was and how to go on."""
    typer.echo(f"error: {' '.join([sentence, *getattr(error, '__notes__', [])])}", err=True)
