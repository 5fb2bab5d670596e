"""Consoles for the commands. Text from files cannot act on the terminal, because its control characters are escaped."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from .text import printable


class _PrintableConsole(Console):
    """Escapes control characters in all text, but keeps the codes with which rich moves the cursor."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def make_console(stderr: bool = False, **settings) -> Console:
    """A rich console that shows text literally: it does not interpret markup, and it escapes control characters.

    Args:
        settings: passed to `rich.console.Console`.
    """
    return _PrintableConsole(stderr=stderr, **{"highlight": False, "markup": False, "emoji": False, **settings})
