"""Text of strangers in Markdown: names of classes, files and data sets that must stay text in a model card or a report."""

import re
import unicodedata
from typing import Any

MAX_LENGTH = 200  # characters of one value in a table or a sentence
# Characters that Markdown gives a meaning inside a line. An underscore inside a word has none.
_SPECIAL = re.compile(r"[\\`*\[\]|]|~(?=~)|(?<=~)~|!(?=\[)|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;"}
_ENTITY = re.compile(r"[&<>$]")
_ADDRESS = re.compile(r"(?i)\b(https?|ftp|mailto|xmpp)(:)|\b(www)(\.)")  # becomes a link without any brackets
_BLOCK = re.compile(
    r"^(?:#{1,6}(?=\s|$)|[+-](?=\s|$)|[=-]+$|\d{1,9}(?=[.)](?:\s|$)))"
)  # starts a heading, a list or a rule
# Control, format (such as right-to-left overrides) and private characters, halves of pairs, separators of lines.
_INVISIBLE = {"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"}


def one_line(value: Any, limit: int = MAX_LENGTH) -> str:
    """The value as text in one line, without control characters, at most `limit` characters long."""
    text = str(value)
    cut = len(text) > 4 * limit
    text = " ".join(text[: 4 * limit].split())
    text = "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(one) in _INVISIBLE else one for one in text)
    return text if len(text) <= limit and not cut else f"{text[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"


def escape_html(text: str) -> str:
    """Text that HTML shows as it is, inside an element or a quoted attribute."""
    return (
        text.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace('"', "&quot;")
        .replace("'", "&#39;")
    )


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, in a sentence or in a cell of a table: no picture, link, HTML, emphasis or formula."""
    text = _SPECIAL.sub(lambda found: f"\\{found[0]}", text)
    text = _ENTITY.sub(lambda found: _ENTITIES[found[0]], text)
    text = _ADDRESS.sub(lambda found: f"{found[1] or found[3]}\\{found[2] or found[4]}", text)
    block = _BLOCK.match(text)
    if block is None:
        return text
    place = block.end() if block[0].isdigit() else 0
    return f"{text[:place]}\\{text[place:]}"


def code_span(value: Any, limit: int = MAX_LENGTH) -> str:
    """The value between backticks, where Markdown reads nothing else than the end of the code. A value with angle brackets is
    escaped text instead: not every page that shows cards reads Markdown alike."""
    text = one_line(value, limit).replace("`", "'")
    if "<" in text or ">" in text:
        return escape_markdown(text)
    return f"`{text}`" if text else ""
