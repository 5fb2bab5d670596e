"""Untrusted text for terminals, Markdown, HTML and csv: names of classes and files can hold anything."""

import re
import unicodedata

from ..model.card_text import code_span, escape_html, escape_markdown, one_line

__all__ = ["code_span", "csv_cell", "escape_html", "escape_markdown", "one_line", "printable", "shorten"]

# Control and format characters, halves of pairs, separators of lines: they move the cursor, fake lines or fill the clipboard.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_SUSPECT = re.compile(r"[^\x20-\x7e\n\t]")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# Joiners that emoji and words of many languages need. Terminals do not act on them.
_HARMLESS = {"\N{ZERO WIDTH JOINER}", "\N{ZERO WIDTH NON-JOINER}", "\N{SOFT HYPHEN}"}


def printable(text: str, limit: int | None = None) -> str:
    """Text with control characters replaced by escapes such as `\\x1b`, so a terminal only shows them. Line feeds and tabs stay.

    Args:
        limit: most characters. The rest is left out, and its length is stated.
    """
    if limit is not None:
        text = shorten(text, limit)
    return _SUSPECT.sub(lambda found: _visible(found[0]), text)


def shorten(text: str, limit: int) -> str:
    """Cut a text to `limit` characters and say how many more there were."""
    more = len(text) - limit
    return text if more <= 0 else f"{text[:limit]}... ({more:,} more characters)"


def csv_cell(value: object) -> object:
    """A value for a csv file. Control characters become escapes such as `\\x1b`, because terminals show csv files too.

    Text that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if value.startswith(_FORMULA) and not _NUMBER.fullmatch(value) else text


def _visible(character: str) -> str:
    if unicodedata.category(character) not in _UNPRINTABLE or character in _HARMLESS:
        return character
    return character.encode("unicode_escape").decode()
