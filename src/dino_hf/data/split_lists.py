"""Text files that list the images or annotations of each split."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .file_names import TailIndex, ambiguous_text, canonical_split, posix
from .files import DataFolder
from .raw import SPLITS

_TRAINVAL = "trainval"
MISSING = "does not exist"


class SplitLists(NamedTuple):
    """The split lists of one data set."""

    lists: dict[str, list[Path]]  # split -> its lists
    where: str  # name of their place, for messages

    def shares(self, files: DataFolder, root: Path, paths: Iterable[Path]) -> tuple[dict[Path, list[str]], list[tuple]]:
        """Map each file to the splits that list it. Entries without a file are returned as (split, entry, reason).

        Args:
            root: folder that contains all paths.
        """
        index = TailIndex(root, paths, with_suffix=False)
        splits_of: dict[Path, list[str]] = {}
        missing = []
        for split, lists in self.lists.items():
            for line in dict.fromkeys(line for path in lists for line in files.read_lines(path)):
                found = _find(index, line, split)
                if len(found) != 1:
                    missing.append((split, line, ambiguous_text(sorted(found)) if found else MISSING))
                elif split not in splits_of.setdefault(found[0], []):
                    splits_of[found[0]].append(split)
        return splits_of, missing


def _find(index: TailIndex, line: str, split: str) -> list[Path]:
    """The file of a line, or the files that it may mean.

    A line is a path or a name without suffix; a class mark or a second path may follow.
    """
    several = []
    for name in dict.fromkeys([line, *line.split()]):
        found = index.find(posix(name), split) or index.find(
            f"{posix(name)}.", split
        )  # the name may contain a dot and no suffix
        if len(found) == 1:
            return found
        several = several or found
    return several


def image_set_lists(folder: Path, files: DataFolder) -> SplitLists | None:
    """The lists in VOC's folder ImageSets: in Main, else in ImageSets itself, else in its first other folder with lists."""
    top = folder / "ImageSets"
    if not top.is_dir():
        return None
    others = sorted(path for path in top.iterdir() if path.is_dir() and path.name != "Main")
    for place in (top / "Main", top, *others):
        if lists := _lists_in(place, files):
            return SplitLists(lists, place.relative_to(folder).as_posix())
    return None


def lists_beside(folder: Path, files: DataFolder) -> SplitLists | None:
    """Lists such as train.txt and val_list.txt in a folder, or in its subfolders such as `data` and `splits`."""
    for place in (folder, folder / "data", folder / "splits", folder / "ImageSets", folder / "Main"):
        if lists := _lists_in(place, files):
            where = place.relative_to(folder).as_posix()
            return SplitLists(lists, "its split lists" if where == "." else where)
    return None


def darknet_lists(folder: Path, files: DataFolder) -> SplitLists | None:
    """The lists that a Darknet file, such as obj.data, names."""
    for path in sorted(files.files(folder, {".data"})):
        lists: dict[str, list[Path]] = {}
        for line in files.read_lines(path):
            key, _, value = (part.strip() for part in line.partition("="))
            split = canonical_split(key.lower())
            if split in SPLITS and value and (found := _beside(path.parent, folder, posix(value), files)):
                lists[split] = [found]
        # Darknet requires a validation list. If there are no validation images, its files name the training list twice.
        if lists.get("validation") == lists.get("train"):
            lists.pop("validation", None)
        if lists:
            return SplitLists(lists, path.name)
    return None


def _beside(beside: Path, root: Path, value: str, files: DataFolder) -> Path | None:
    """The file that a listed path means. Its first folders may be from another computer, so they may be missing."""
    parts = [part for part in value.split("/") if part not in ("", ".", "..")]
    places = [base.joinpath(*parts[start:]) for base in (beside, root) for start in range(len(parts))]
    return next((place for place in places if files.is_file(place)), None)


def _lists_in(folder: Path, files: DataFolder) -> dict[str, list[Path]]:
    """Map each split to its lists in a folder. A list `trainval` is used for training if there is no train or val list."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.txt")) if folder.is_dir() else ():
        split = _TRAINVAL if _word(path.stem) == _TRAINVAL else canonical_split(_word(path.stem))
        if split in (*SPLITS, _TRAINVAL) and files.is_file(path) and _is_list(path, files):
            found.setdefault(split, []).append(path)
    both = found.pop(_TRAINVAL, None)
    if both and not {"train", "validation"} & set(found):
        found["train"] = both
    return {split: found[split] for split in SPLITS if split in found}


def _word(stem: str) -> str:
    """The word for the split in a name: "train" for train_list, list_train and train_files."""
    parts = [
        part for part in stem.lower().replace("-", "_").split("_") if part not in ("list", "files", "images", "set")
    ]
    return "_".join(parts)


def _is_list(path: Path, files: DataFolder) -> bool:
    """Whether a text file is a list. The label file of an image `train.jpg` has the same name, but its lines are boxes.

    An empty file lists nothing. It may be the label file of an image without objects.
    """
    first = next(iter(files.read_lines(path)), "")
    return bool(first) and not _is_box(first.split())


def _is_box(values: list[str]) -> bool:
    try:
        return len([float(value) for value in values]) >= 5
    except ValueError:
        return False
