"""Files of a data set: where they may lie, and which are passed over."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..common import regular_files
from ..common.regular_files import EVERYWHERE, OutsideError, is_below, is_regular, walk_files

# Pictures and films that are not read; a data set that has them should not lose them in silence.
UNREAD_SUFFIXES = {
    *(".heic", ".heif", ".jxl", ".svg", ".eps", ".psd", ".dng", ".cr2", ".nef", ".arw", ".raw", ".exr", ".hdr", ".dcm"),
    *(".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".3gp", ".mts", ".m2ts"),
}


class DataFolder:
    """What may be read of a data set: regular files that lie, with all links followed, in its folders.

    Args:
        folders: of the data set.
        allow_outside: read what links and paths of the data set lead to, wherever that is.
    """

    def __init__(self, *folders: Path, allow_outside: bool = False):
        self.folder = folders[0]
        self.roots = EVERYWHERE if allow_outside else tuple(os.path.realpath(folder) for folder in folders)
        self.outside: list[str] = []  # links that walks passed over
        self._is_inside: dict[str, bool] = {}  # folder -> whether it is, after its links are followed

    def files(self, folder: Path, suffixes: Iterable[str]) -> Iterator[Path]:
        """As `walk_files`, within the data set."""
        return walk_files(folder, set(suffixes), self.roots, self.outside)

    def is_inside(self, path: Path) -> bool:
        """Whether a path may be read; it need not exist."""
        if self.roots == EVERYWHERE:
            return True
        parent = os.path.dirname(path)
        if parent not in self._is_inside:
            self._is_inside[parent] = is_below(parent, self.roots)
        if os.path.islink(path) or os.path.basename(path) in ("", ".", ".."):
            return is_below(path, self.roots)
        return self._is_inside[parent]

    def is_file(self, path: Path) -> bool:
        """Whether a path is a regular file of the data set."""
        return is_regular(path) and self.is_inside(path)

    def check(self, path: Path) -> None:
        """Raises OutsideError for a path that leads out of the data set."""
        if not self.is_inside(path):
            raise OutsideError(self.outside_text(path))

    def outside_text(self, path: Path | str) -> str:
        return (
            f"{path} leads to {os.path.realpath(path)}, outside of the data set's folder {self.folder}, and is not read; copy it "
            "into the folder, or allow such files (--allow-outside, allow_outside=True)."
        )

    def read_text(self, path: Path) -> str:
        """As `regular_files.read_text`, within the data set."""
        self.check(path)
        return regular_files.read_text(path)

    def read_lines(self, path: Path) -> list[str]:
        """As `regular_files.read_lines`, within the data set."""
        self.check(path)
        return regular_files.read_lines(path)

    def read_yaml(self, path: Path) -> Any:
        """As `regular_files.read_yaml`, within the data set."""
        self.check(path)
        return regular_files.read_yaml(path)

    def notes(self) -> list[str]:
        """What walks passed over."""
        links = list(dict.fromkeys(self.outside))
        if not links:
            return []
        more = f"; there are {len(links)} such links" if len(links) > 1 else ""
        return [f"{self.outside_text(links[0])[:-1]}{more}."]


def unread_note(folder: Path, files: DataFolder) -> list[str]:
    """A note, if a folder has pictures or films of kinds that are not read."""
    found = list(files.files(folder, UNREAD_SUFFIXES))
    if not found:
        return []
    kinds = ", ".join(sorted({path.suffix.lower() for path in found}))
    count = f"{len(found)} files ({kinds}) are" if len(found) > 1 else "1 file is"
    return [
        f"{count} of a kind that is not read, and passed over; the first is {found[0]}. Convert photos to JPEG or PNG, and films "
        "to images."
    ]
