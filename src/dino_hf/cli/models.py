"""`dino-hf models`: list the published checkpoints. Nothing here imports torch."""

import json as json_format
from typing import Annotated, Any

import typer

from ..common.console import make_console
from .command_errors import Debug, one_sentence_errors

_WIDE = 200  # columns of a table that is not printed to a terminal, so that no line is broken


def models(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WORD]...", help="List only rows that have all words, such as swin.", show_default=False
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all details of each checkpoint as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """List the published checkpoints. Their names are accepted wherever a model is.

    \b
    Example: dino-hf models swin 5scale
    """
    with one_sentence_errors(debug):
        rows = [row for row in _rows() if all(word.lower() in _text(row) for word in words or [])]
        if not rows:
            raise ValueError(
                f"No published checkpoint has {' and '.join(map(repr, words))}; `dino-hf models` lists all."
            )
        if json:
            print(json_format.dumps(rows, indent=2))
        else:
            _print_table(rows)


def _rows() -> list[dict[str, Any]]:
    """The facts about each published checkpoint, for a table or JSON."""
    # Imported here: other commands need not wait for it.
    from ..conversion.by_name import cached_folder, is_cached
    from ..conversion.published import PUBLISHED

    return [
        {
            "name": row.title,
            "other_names": list(row.titles[1:]),
            "backbone": row.backbone,
            "is_supported": row.is_supported,
            "scales": row.num_levels,
            "published_ap": row.ap,
            "ap_data": row.ap_data,
            "post_processing": row.post_processing,
            "image_processor": row.processor,
            "size": row.size,
            "license": row.license,
            "folder": str(cached_folder(row)) if row.is_supported and is_cached(row) else None,
            "file": row.file,
            "sha256": row.sha256 or None,
            "addresses": list(row.addresses),
            "page": row.page or None,
            "note": row.note or None,
        }
        for row in PUBLISHED
    ]


def _text(row: dict[str, Any]) -> str:
    """The text of a row that words are looked for in, in lower case."""
    texts = [row["name"], *row["other_names"], row["backbone"], row["file"], f"{row['scales']}scale", _state(row)]
    texts += [row["post_processing"], row["ap_data"]]
    return " ".join(texts).lower()


def _state(row: dict[str, Any]) -> str:
    if not row["is_supported"]:
        return "not supported"
    if row["folder"]:
        return "here"
    return "download" if row["addresses"] else "browser"


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from ..conversion.published_row import ap_text

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("name", overflow="fold")
    for title in ("backbone", "scales", "AP", "post-processing", "MB", "license", "state"):
        table.add_column(title, justify="right" if title in ("scales", "AP", "MB") else "left")
    for row in rows:
        size = "" if row["size"] is None else f"{row['size'] / 1e6:.0f}"
        license = row["license"] or "not stated"
        table.add_row(
            "\n  or ".join([row["name"], *row["other_names"]]),
            row["backbone"],
            str(row["scales"]),
            ap_text(row["published_ap"], row["ap_data"]),
            row["post_processing"],
            size,
            license,
            _state(row),
        )
    console = make_console()
    if not console.is_terminal:
        console = make_console(width=_WIDE)
    console.print(table)
    wraps = not console.is_terminal
    console.print(
        "\nAP is on COCO val2017 or the named data set, as the project reports it. Post-processing: plain is DINO's, the best 300 "
        "detections; soft NMS lowers the scores of detections that overlap a better one by the given IoU; canvas is the side in "
        "pixels of the square that images are padded to; images from 800 to 1333 pixels are not named. MB is the size of the file, "
        "if it is known. States: here (converted, in the cache), download (at the first use), browser (the project gives the file "
        "only to a browser), not supported (the backbone).",
        soft_wrap=wraps,
    )
    for row in rows:
        if row["note"]:
            console.print(f"{row['name']}: {row['note']}", soft_wrap=wraps, highlight=False)
    if usable := next((row["name"] for row in rows if _state(row) in ("here", "download")), None):
        console.print(f"Use a name as a model: dino-hf predict {usable} street.jpg --save found", soft_wrap=True)
