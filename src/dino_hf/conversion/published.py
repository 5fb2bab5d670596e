"""The published checkpoints of all projects, and their list in docs/checkpoints.md. Nothing here imports torch."""

from difflib import get_close_matches

from .errors import ConversionError
from .options import PROJECT_NAMES
from .published_aligndetr import PUBLISHED as _ALIGNDETR
from .published_codetr import PUBLISHED as _CODETR
from .published_detrex import PUBLISHED as _DETREX
from .published_mmdet import PUBLISHED as _MMDET
from .published_original import PUBLISHED as _ORIGINAL
from .published_row import Published, ap_text

PUBLISHED: tuple[Published, ...] = (*_ORIGINAL, *_DETREX, *_ALIGNDETR, *_MMDET, *_CODETR)
_BY_TITLE = {title: row for row in PUBLISHED for title in row.titles}


def lookup_published(title: str) -> Published | None:
    """The published checkpoint with this title or alias, PROJECT/NAME; None if there is none."""
    return _BY_TITLE.get(title)


def find_published(title: str) -> Published:
    """The published checkpoint with this title or alias, PROJECT/NAME.

    Raises:
        ConversionError: there is no checkpoint of this name.
    """
    if (row := lookup_published(title)) is None:
        raise ConversionError(f"{title!r} is not the name of a published checkpoint.{_suggestion(str(title))}")
    return row


def similar_titles(name: str) -> list[str]:
    """Titles that resemble a wrong name, best first. The name may lack the project or be in another case."""
    name = name[:200].lower()
    by_title = {title.lower(): title for title in _BY_TITLE}
    by_name = {title.partition("/")[2]: full for title, full in by_title.items()}
    near = [by_title[one] for one in get_close_matches(name, by_title, n=3)]
    return near or [by_name[one] for one in get_close_matches(name, by_name, n=3)]


def _suggestion(title: str) -> str:
    """A sentence with similar titles, or with the command that lists all."""
    similar = similar_titles(title)
    start = f" Did you mean {' or '.join(similar)}?" if similar else ""
    return f"{start} `dino-hf models` lists all names."


def table() -> str:
    """The list of files in docs/checkpoints.md: a table for each project, with post-processing if a file of the project has any."""
    lines = []
    for project in PROJECT_NAMES:
        if not (rows := [row for row in PUBLISHED if row.project == project]):
            continue
        is_plain = all(row.post_processing == "plain" for row in rows)
        titles = ["name", "backbone", "scales", "published AP", *([] if is_plain else ["post-processing"]), "file"]
        lines += [f"### {project}", "", _line(titles), _line(["---"] * len(titles))]
        for row in rows:
            note = "" if row.is_supported else ", [not supported](#not-supported)"
            cells = [f"`{row.title}`", f"{row.backbone}{note}", str(row.num_levels), ap_text(row.ap, row.ap_data)]
            cells += [] if is_plain else [row.post_processing]
            lines += [_line([*cells, f"[{row.file}]({row.url})"])]
        lines += ["", *(f"- `{row.name}`: {row.note}" for row in rows if row.note)]
        lines += [""] if lines[-1] else []
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
