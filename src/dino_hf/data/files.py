"""Files of a data set as they come from all sorts of computers."""

import os
from collections.abc import Iterator
from pathlib import Path


def files_below(folder: Path, suffixes: set[str]) -> Iterator[Path]:
    """Files of these suffixes, given in lower case, below a folder: those in it by name, then those of its folders by name.
    Hidden ones are passed over, links are followed.

    Raises:
        OSError: a folder cannot be listed, so that its files would be lost.
    """
    yield from _files_below(folder, suffixes, ())


def _files_below(folder: Path, suffixes: set[str], above: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it is in
        return
    with os.scandir(folder) as listed:
        entries = sorted((entry for entry in listed if not entry.name.startswith(".")), key=lambda entry: entry.name)
    is_folder = [entry.is_dir() for entry in entries]
    for entry, no_file in zip(entries, is_folder, strict=True):
        if not no_file and os.path.splitext(entry.name)[1].lower() in suffixes:
            yield folder / entry.name
    for entry, no_file in zip(entries, is_folder, strict=True):
        if no_file:
            yield from _files_below(folder / entry.name, suffixes, (*above, real))


def read_text(path: Path) -> str:
    """Content in UTF-8, without the mark that Windows sets at its beginning.

    Raises:
        ValueError: it is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}; save it in that encoding.") from error


def read_lines(path: Path) -> list[str]:
    """Those that are not blank, without white space around them. Raises ValueError as `read_text`."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]
