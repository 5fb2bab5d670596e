"""Consoles of the commands: tables and sentences without escape sequences of strangers, in any encoding."""

import sys
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from .text import printable


class _PrintableConsole(Console):
    """Escapes control characters in all text, except those by which rich itself moves the cursor."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def make_console(stderr: bool = False, **settings) -> Console:
    """A console of rich that shows text as it is: no markup, and control characters escaped.

    Args:
        settings: of `rich.console.Console`.
    """
    return _PrintableConsole(stderr=stderr, **{"highlight": False, "markup": False, "emoji": False, **settings})


def accept_any_text() -> None:
    """Let standard output and error write every character, those that their encoding lacks as an escape.

    Otherwise a name or a line of a table ends the command where output goes to a file in an old encoding, as on Windows.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
