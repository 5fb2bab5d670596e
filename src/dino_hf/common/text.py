"""Text for terminals, messages, Markdown, HTML and csv. Names of classes and files are untrusted: they can hold anything."""

import html
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

MAX_LENGTH = 200  # characters of one value in a table or a sentence
# Characters with a meaning inside a line of Markdown. An underscore inside a word has no meaning.
_SPECIAL = re.compile(r"[\\`*\[\]|]|~(?=~)|(?<=~)~|!(?=\[)|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;"}
_ENTITY = re.compile(r"[&<>$]")
_ADDRESS = re.compile(r"(?i)\b(https?|ftp|mailto|xmpp)(:)|\b(www)(\.)")  # Markdown makes a link of it without brackets
# The start of a heading, a list or a rule.
_BLOCK = re.compile(r"^(?:#{1,6}(?=\s|$)|[+-](?=\s|$)|[=-]+$|\d{1,9}(?=[.)](?:\s|$)))")
# Control, format (such as right-to-left overrides) and private characters, surrogates, line separators.
_INVISIBLE = {"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"}
# Control and format characters, halves of surrogate pairs and line separators. They can move the cursor, fake lines or fill the
# clipboard.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_SUSPECT = re.compile(r"[^\x20-\x7e\n\t]")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# Joiners that emoji and words of many languages need. Terminals do not act on them.
_HARMLESS = {"\N{ZERO WIDTH JOINER}", "\N{ZERO WIDTH NON-JOINER}", "\N{SOFT HYPHEN}"}


def printable(text: str, limit: int | None = None) -> str:
    """Text with control characters replaced by escapes such as `\\x1b`, so a terminal only shows them. Line feeds and tabs stay.

    Args:
        limit: largest number of characters; see `shorten`.
    """
    if limit is not None:
        text = shorten(text, limit)
    return _SUSPECT.sub(lambda found: _visible(found[0]), text)


def shorten(text: str, limit: int) -> str:
    """Cut a text to `limit` characters and append how many characters were left out."""
    more = len(text) - limit
    return text if more <= 0 else f"{text[:limit]}... ({more:,} more characters)"


def abbreviate(text: str, limit: int, keep_end: bool = False) -> str:
    """Text in one line of at most `limit` characters. A cut is marked with "…".

    Args:
        keep_end: cut off the beginning instead of the end, for example of a path.
    """
    window = 4 * limit  # enough after white space is collapsed; a name of a million characters is not split
    line = " ".join((text[-window:] if keep_end else text[:window]).split())
    if len(line) <= limit and len(text) <= window:
        return line
    return f"…{line[-(limit - 1) :].lstrip()}" if keep_end else f"{line[: limit - 1].rstrip()}…"


def list_some(items: Sequence[str], most: int) -> str:
    """The first `most` items and the number of the others: "a, b and 3 more". An empty list gives an empty text."""
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more:,} more" if more > 0 else "")


def count_text(count: int, noun: str) -> str:
    """A number with its noun: "1 box", "2,000 boxes"."""
    plural = noun + ("es" if noun.endswith(("s", "x")) else "s")
    return f"{count:,} {noun if count == 1 else plural}"


def size_text(num_bytes: float) -> str:
    """A number of bytes in GiB, MiB or KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}" if num_bytes < 100 * size else f"{num_bytes / size:.0f} {unit}"
    return f"{num_bytes / 2**10:.0f} KiB"


def first_line(error: BaseException, limit: int = 300) -> str:
    """First line of an error's message, at most `limit` characters. An error without a message gives its type's name."""
    lines = (line.strip() for line in str(error).splitlines())
    return abbreviate(next(filter(None, lines), type(error).__name__), limit)


def csv_cell(value: object) -> object:
    """A value for a csv file. Control characters become escapes such as `\\x1b`, because csv files are also shown in terminals.

    A spreadsheet would run some texts as formulas; they get an apostrophe in front.
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if value.startswith(_FORMULA) and not _NUMBER.fullmatch(value) else text


def one_line(value: Any, limit: int = MAX_LENGTH) -> str:
    """A value as one line of at most `limit` characters, without control characters."""
    text = str(value)
    cut = len(text) > 4 * limit
    text = " ".join(text[: 4 * limit].split())
    text = "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(character) in _INVISIBLE else character
        for character in text
    )
    return text if len(text) <= limit and not cut else f"{text[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"


def escape_html(text: str) -> str:
    """Escape text for an HTML element or a quoted attribute."""
    return html.escape(text)


def escape_markdown(text: str) -> str:
    """Escape text for a sentence or a table cell of Markdown: no picture, link, HTML, emphasis or formula."""
    text = _SPECIAL.sub(lambda found: f"\\{found[0]}", text)
    text = _ENTITY.sub(lambda found: _ENTITIES[found[0]], text)
    text = _ADDRESS.sub(lambda found: f"{found[1] or found[3]}\\{found[2] or found[4]}", text)
    block = _BLOCK.match(text)
    if block is None:
        return text
    place = block.end() if block[0].isdigit() else 0
    return f"{text[:place]}\\{text[place:]}"


def code_span(value: Any, limit: int = MAX_LENGTH) -> str:
    """A value as inline code of Markdown.

    A value with angle brackets becomes escaped text instead, because not all pages that show cards parse Markdown alike.
    """
    text = one_line(value, limit).replace("`", "'")
    if "<" in text or ">" in text:
        return escape_markdown(text)
    return f"`{text}`" if text else ""


def _visible(character: str) -> str:
    if unicodedata.category(character) not in _UNPRINTABLE or character in _HARMLESS:
        return character
    return character.encode("unicode_escape").decode()
