"""Where the images of annotations are."""

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..common.images import IMAGE_SUFFIXES
from ..common.regular_files import is_regular
from .files import DataFolder
from .split_names import SplitNames, canonical_split, split_in

# Names of folders that say nothing about which images are in them
_GENERIC = {
    *(
        "images",
        "image",
        "imgs",
        "img",
        "jpegimages",
        "pngimages",
        "photos",
        "photo",
        "pictures",
        "pics",
        "picture",
        "frames",
    ),
    *("data", "dataset", "datasets", "files", "raw", "upload", "uploads", "default", "obj", "obj_train_data"),
    *("annotations", "annotation", "labels", "label", "xmls", "xml", "."),
}


class ImageFinder:
    """Where the images of a json are: beside it, in folders named as its split, in `images`, or wherever below the root a file
    lies whose path ends as the listed one does.

    Args:
        files: of the data set.
        root: its folder.
        listed: file names of all jsons.
    """

    def __init__(self, files: DataFolder, root: Path, listed: Iterable[str]):
        self.files = files
        self.root = root.absolute()
        self.candidates: dict[Path, list[Path]] = {}  # path that is not there -> files that the listed name may mean
        self._paths: TailIndex | None = None
        self._split_names: SplitNames | None = None
        folders_of: dict[str, set[str]] = {}  # last part of listed names -> folders that it is listed in
        for name in set(listed):
            folder, _, last = posix(name).rpartition("/")
            folders_of.setdefault(alike(last), set()).add(folder)
        self._of_several = {last for last, folders in folders_of.items() if len(folders) > 1}

    def of_split(self, json_file: Path, split: str) -> Callable[[str], Path]:
        """A function: file_name -> absolute path, of the file if there is one, else of where it was first looked for."""
        words = dict.fromkeys([*_words_of(json_file.stem, split), split, "val", "valid"])
        words = [word for word in words if canonical_split(word) == split]
        names = [*words, *(f"images/{word}" for word in words), *(f"{word}/images" for word in words), "images"]
        beside = json_file.absolute().parent
        parents = list(dict.fromkeys([beside, *([beside.parent] if beside != self.root else []), self.root]))
        bases = [beside, *(parent / name for parent in parents for name in names), *parents[1:]]
        bases = [base for base in dict.fromkeys(bases) if base.is_dir()] or [beside]
        listed_as: dict[Path, str] = {}

        def find(file_name: str) -> Path:
            for name in dict.fromkeys([file_name, posix(file_name)]):
                for index, base in enumerate(bases):
                    # cam1/1.jpg and cam2/1.jpg are not both the one 1.jpg that there is
                    if self.files.is_file(base / name) and listed_as.setdefault(base / name, file_name) == file_name:
                        if index:
                            bases.insert(0, bases.pop(index))  # where the others will be too
                        return base / name
            found, several = self._by_tail(posix(file_name), split, bases)
            if found and listed_as.setdefault(found, file_name) == file_name:
                return found
            # one outside of the data set is found all the same, to be named as such
            place = next((base / file_name for base in bases if is_regular(base / file_name)), bases[0] / file_name)
            if several:
                self.candidates[place] = several
            return place

        return find

    def _by_tail(self, name: str, split: str, bases: list[Path]) -> tuple[Path | None, list[Path]]:
        """The one file whose path ends as the name does, or else all such files."""
        if self._paths is None:
            paths = list(image_files(self.root, self.files))
            self._paths, self._split_names = TailIndex(self.root, paths), SplitNames(self.root, paths)
        found = self._paths.find(name, split, alike(name.rpartition("/")[2]) in self._of_several)
        found = [path for path in found if self._may_be_of(path, split)]
        in_bases = [path for base in bases for path in found if path.parent == base]
        if len(found) == 1 or in_bases:
            return (in_bases or found)[0], []
        return None, sorted(found)

    def _may_be_of(self, path: Path, split: str) -> bool:
        """Two splits may number their files alike: never take one from the folder of another split."""
        folders = [folder for folder in path.parents if folder.is_relative_to(self.root) and folder != self.root]
        told = set(filter(None, map(self._split_names.of_folder, folders)))
        return not told or split in told


class TailIndex:
    """Files found by the end of a listed path, as the beginning is of another computer.

    Args:
        root: folder that all files are in.
        with_suffix: whether a.jpg and a.png differ.
    """

    def __init__(self, root: Path, paths: Iterable[Path], with_suffix: bool = True):
        self.root, self.with_suffix = root, with_suffix
        self._by_name: dict[str, list[tuple[Path, tuple[str, ...]]]] = {}
        for path in paths:
            parts = self._parts(path.relative_to(root).as_posix())
            self._by_name.setdefault(parts[-1], []).append((path, parts))

    def _parts(self, name: str) -> tuple[str, ...]:
        name = name if self.with_suffix else os.path.splitext(name)[0]
        return tuple(alike(part) for part in name.split("/") if part not in ("", ".", "..")) or ("",)

    def find(self, name: str, split: str | None = None, needs_folder: bool = False) -> list[Path]:
        """The files whose paths have the longest common end with a listed one; none, if the folders before it contradict.

        video2/1.jpg is not video1/1.jpg, but may be images/1.jpg, and images/1.jpg may be video1/1.jpg.

        Args:
            name: with "/".
            split: whose name a listed folder may have without meaning more than that.
            needs_folder: the last part alone is not enough, as other listed files have it too.
        """
        listed = self._parts(name)
        scored = [(_common_end(listed, parts), path, parts) for path, parts in self._by_name.get(listed[-1], ())]
        most = max((score for score, _, _ in scored), default=0)
        if needs_folder and most < min(2, len(listed)):
            return []
        best = [(path, parts) for score, path, parts in scored if score == most]
        return [path for path, parts in best if not _contradict(listed[:-most], parts[:-most], split)]


def ambiguous_text(candidates: Sequence[Path]) -> str:
    """What is wrong with a listed name that several files have."""
    return (
        f"is ambiguous: {len(candidates)} files have this name, such as {candidates[0]} and {candidates[1]}; list it with its "
        "folder"
    )


def _common_end(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for first, second in zip(reversed(one), reversed(other), strict=False):
        if first != second:
            break
        count += 1
    return count


def _contradict(listed: Sequence[str], found: Sequence[str], split: str | None) -> bool:
    """Whether the last folders that differ both say which images are in them."""
    if not listed or not found or listed[-1] in _GENERIC or found[-1] in _GENERIC:
        return False
    return (split is None or split_in(listed[-1], at_end=True) != split) and split_in(found[-1]) is None


def is_generic(folder: str) -> bool:
    """Whether the name of a folder does not tell one camera or film from another."""
    return folder.lower() in _GENERIC or split_in(folder) is not None


def _words_of(stem: str, split: str) -> list[str]:
    """Folder names that a json's name suggests: train2017 for instances_train2017."""
    parts = stem.split("_")
    tails = ["_".join(parts[start:]) for start in range(len(parts))] + parts
    return [word for word in tails if canonical_split(word) == split]


def alike(name: str) -> str:
    """The same for names that are one on the computers that data are annotated on: Windows knows no case, macOS splits "é"."""
    return unicodedata.normalize("NFC", name).casefold()


def posix(path: str) -> str:
    """With "/" in paths that were written on Windows."""
    return path.replace("\\", "/")


def image_files(folder: Path, files: DataFolder) -> Iterator[Path]:
    """All images below a folder, in the order of their names."""
    return files.files(folder, IMAGE_SUFFIXES)
