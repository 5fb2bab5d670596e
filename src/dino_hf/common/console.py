"""Consoles of the commands. They print text from files safely: without escape sequences, in any encoding."""

import sys
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from .text import printable


class _PrintableConsole(Console):
    """Escapes control characters in all text, but keeps those that rich itself uses to move the cursor."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def make_console(stderr: bool = False, **settings) -> Console:
    """A rich console that shows text literally: it reads no markup and escapes control characters.

    Args:
        settings: passed to `rich.console.Console`.
    """
    return _PrintableConsole(stderr=stderr, **{"highlight": False, "markup": False, "emoji": False, **settings})


def accept_any_text() -> None:
    """Let standard output and error write every character. A character that their encoding lacks is written as an escape.

    Otherwise such a character would end the command if its output goes to a file in an old encoding, as on Windows.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
