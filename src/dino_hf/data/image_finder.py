"""Where the images of annotations are."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from .raw import IMAGE_SUFFIXES, canonical_split, split_in


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

        def find(file_name: str) -> Path:
            for name in dict.fromkeys([file_name, file_name.replace("\\", "/"), Path(file_name).name]):
                for index, base in enumerate(bases):
                    if (base / name).is_file():
                        if index:
                            bases.insert(0, bases.pop(index))  # where the others will be too
                        return base / name
            return self._anywhere(Path(file_name.replace("\\", "/")).name, split) or bases[0] / file_name

        return find

    def _anywhere(self, name: str, split: str) -> Path | None:
        if self._by_name is None:
            self._by_name = {}
            for path in image_files(self.root):
                self._by_name.setdefault(path.name, []).append(path)
        found = [path for path in self._by_name.get(name, []) if self._may_be_of(path, split)]
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


def image_files(folder: Path) -> Iterator[Path]:
    """All images below a folder, in the order of their names."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield Path(parent, name)
