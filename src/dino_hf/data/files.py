"""Files of a data set: which may be read, which are skipped, and which names cannot be used."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..common import images, regular_files
from ..common.regular_files import EVERYWHERE, OutsideError, is_below, is_regular, walk_files
from ..common.values import short_repr
from .raw import Problem, RawDataset, RawSplit

# Images and videos of kinds that are not read. A note tells the user if a data set contains some.
_UNREAD = images.UNREAD_SUFFIXES | images.VIDEO_SUFFIXES | {".svg", ".eps", ".psd", ".raw", ".exr", ".hdr", ".dcm"}


class DataFolder:
    """The files of a data set that may be read: regular files inside its folders, after all links are followed.

    Args:
        folders: folders of the data set.
        allow_outside: also read files outside the folders to which links and paths of the data set lead.
    """

    def __init__(self, *folders: Path, allow_outside: bool = False):
        self.folder = folders[0]
        self.roots = EVERYWHERE if allow_outside else tuple(os.path.realpath(folder) for folder in folders)
        self.outside: list[str] = []  # links that were skipped because they lead outside
        self._is_inside: dict[str, bool] = {}  # folder -> whether it is inside after its links are followed

    def files(self, folder: Path, suffixes: Iterable[str]) -> Iterator[Path]:
        """Like `walk_files`, inside the data set."""
        return walk_files(folder, set(suffixes), self.roots, self.outside)

    def is_inside(self, path: Path) -> bool:
        """Whether a path is inside the data set. It need not exist."""
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
        """Raise OutsideError for a path that leads out of the data set."""
        if not self.is_inside(path):
            raise OutsideError(self.outside_text(path))

    def outside_text(self, path: Path | str) -> str:
        return (
            f"{path} leads to {os.path.realpath(path)}, outside of the data set's folder {self.folder}, and is not read; copy it "
            "into the folder, or allow files outside with --allow-outside (allow_outside=True)."
        )

    def read_text(self, path: Path) -> str:
        """Like `regular_files.read_text`, inside the data set."""
        self.check(path)
        return regular_files.read_text(path)

    def read_lines(self, path: Path) -> list[str]:
        """Like `regular_files.read_lines`, inside the data set."""
        self.check(path)
        return regular_files.read_lines(path)

    def read_yaml(self, path: Path) -> Any:
        """Like `regular_files.read_yaml`, inside the data set."""
        self.check(path)
        return regular_files.read_yaml(path)

    def notes(self) -> list[str]:
        """A note about skipped links."""
        links = list(dict.fromkeys(self.outside))
        if not links:
            return []
        more = f"; there are {len(links)} such links" if len(links) > 1 else ""
        return [f"{self.outside_text(links[0])[:-1]}{more}."]


def unread_note(folder: Path, files: DataFolder) -> list[str]:
    """A note, if a folder has images or videos of kinds that are not read."""
    found = list(files.files(folder, _UNREAD))
    if not found:
        return []
    kinds = ", ".join(sorted({path.suffix.lower() for path in found}))
    count = f"{len(found)} files ({kinds}) are" if len(found) > 1 else "1 file is"
    return [
        f"{count} skipped, because this format is not supported; the first is {found[0]}. Convert photos to JPEG or PNG, and "
        "videos to images."
    ]


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return is_regular(folder / "dataset_dict.json") or is_regular(folder / "state.json")


def only_usable(raw: RawDataset, files: DataFolder | None = None) -> RawDataset:
    """Leave out images whose names are not valid text or whose files may not be read, with their annotations.

    Each left-out image is recorded as a `Problem`. A class name that is not valid text is changed and also recorded.

    Args:
        files: files of the data set. None: do not check where the images are.
    """
    problems = []
    categories = [_usable_category(entry, raw, problems) for entry in raw.categories]
    splits = {name: _usable_split(split, files, problems) for name, split in raw.splits.items()}
    return raw._replace(splits=splits, categories=categories, problems=[*raw.problems, *problems])


def _usable_category(entry: dict, raw: RawDataset, problems: list[Problem]) -> dict:
    if is_text(entry["name"]):
        return entry
    where = f"{raw.origin}: category {entry['id']}"
    message = f"{where} has name={short_repr(entry['name'])}, which is not valid text; correct it."
    problems.append(Problem("bad-entry", where, message))
    return entry | {"name": entry["name"].encode("utf-8", "replace").decode().replace("\0", "?")}


def _usable_split(split: RawSplit, files: DataFolder | None, problems: list[Problem]) -> RawSplit:
    left_out = {}
    for place, image in enumerate(split.images):
        if problem := _problem(split, image, files):
            problems.append(problem)
            left_out[place] = image["id"]
    if not left_out:
        return split
    images = [image for place, image in enumerate(split.images) if place not in left_out]
    gone = set(left_out.values()) - {image["id"] for image in images}
    is_kept = ~np.isin(split.annotations.image_id, np.array(list(gone), dtype=np.int64))
    return split._replace(images=images, annotations=split.annotations.select(is_kept))


def _problem(split: RawSplit, image: dict, files: DataFolder | None) -> Problem | None:
    where = f"{split.origin}: image {image['id']}"
    if not is_text(image["file_name"]) or ("path" in image and not is_text(str(image["path"]))):
        name = short_repr(image["file_name"] if not is_text(image["file_name"]) else str(image["path"]))
        wrong = (
            "usable, because it has a zero byte"
            if "\0" in f"{image['file_name']}{image.get('path', '')}"
            else "valid UTF-8"
        )
        message = f"{where} has the file {name}, whose name is not {wrong}; rename the file or its folder."
        return Problem("bad-entry", where, message)
    if files is not None and "path" in image:
        try:
            files.check(image["path"])
        except OutsideError as error:
            return Problem("outside", where, f"{where}: {error}")
    return None


def is_text(text: str) -> bool:
    """Whether a name is valid UTF-8 without zero bytes. Names from a zip file of another computer may not be."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def is_address(path: str) -> bool:
    """Whether `datasets` would open a path on a server or inside an archive."""
    return "://" in path or "::" in path
