"""Where the images of annotations are."""

import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from ..common.images import IMAGE_SUFFIXES
from .files import files_below
from .raw import canonical_split, split_in


class ImageFinder:
    """Where the images of a json are: beside it, in folders named as its split, in `images`, or wherever there is one file of
    that name below the root.

    Args:
        root: folder of the data set.
    """

    def __init__(self, root: Path):
        self.root = root.absolute()
        self._by_name: dict[str, list[Path]] | None = None

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
            posix = file_name.replace("\\", "/")
            for name in dict.fromkeys([file_name, posix, Path(posix).name]):
                for index, base in enumerate(bases):
                    # cam1/1.jpg and cam2/1.jpg are not both the one 1.jpg that there is
                    if (base / name).is_file() and listed_as.setdefault(base / name, file_name) == file_name:
                        if index:
                            bases.insert(0, bases.pop(index))  # where the others will be too
                        return base / name
            found = self._anywhere(Path(posix).name, split)
            return found if found and listed_as.setdefault(found, file_name) == file_name else bases[0] / file_name

        return find

    def _anywhere(self, name: str, split: str) -> Path | None:
        if self._by_name is None:
            self._by_name = {}
            for path in image_files(self.root):
                self._by_name.setdefault(_alike(path.name), []).append(path)
        found = [path for path in self._by_name.get(_alike(name), []) if self._may_be_of(path, split)]
        return found[0] if len(found) == 1 else None

    def _may_be_of(self, path: Path, split: str) -> bool:
        """Two splits may number their files alike: never take one from the folder of another split."""
        told = set(filter(None, map(split_in, path.relative_to(self.root).parts[:-1])))
        return not told or split in told


def _words_of(stem: str, split: str) -> list[str]:
    """Folder names that a json's name suggests: train2017 for instances_train2017."""
    parts = stem.split("_")
    tails = ["_".join(parts[start:]) for start in range(len(parts))] + parts
    return [word for word in tails if canonical_split(word) == split]


def _alike(name: str) -> str:
    """The same for names that are one on the computers that data are annotated on: Windows knows no case, macOS splits "é"."""
    return unicodedata.normalize("NFC", name).casefold()


def image_files(folder: Path) -> Iterator[Path]:
    """All images below a folder, in the order of their names."""
    return files_below(folder, IMAGE_SUFFIXES)
