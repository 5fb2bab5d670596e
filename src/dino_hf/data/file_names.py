"""Interpret names of files and folders: find the split that they name, and the image that a listed name means."""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..common.images import IMAGE_SUFFIXES
from ..common.regular_files import is_regular
from .files import DataFolder
from .raw import SPLITS

_SPLIT_WORDS = {
    "train": "train training trainval trn",
    "validation": "val valid validation validate dev development eval evaluation minival",
    "test": "test testing testdev",
}
_SPLIT_OF = {word: split for split, words in _SPLIT_WORDS.items() for word in words.split()}
# Words that exports put beside the name of a split. None of them describes the content of pictures.
_PLAIN_WORDS = (
    "annotated annotation annotations ann anns anno annos aug augmented bbox bboxes caption captions challenge clean cleaned "
    "coco create csv cvat darknet data dataset datasets default det detect detection detections final fixed fold folder full "
    "gt groundtruth image images img imgs info instance instances jpeg jpegimages jpg json jsonl keypoints label labeled "
    "labelled labels large list lists mini new obj object objects orig original panoptic parquet part pascal pascalvoc photo "
    "photos picture pictures png polygons private public raw ready release resized sample set shard small split splits subset "
    "tiny ultralytics unlabeled unlabelled v version voc xml xmls yolo"
)
_PLAIN = frozenset(_PLAIN_WORDS.split())
# Also plain: a, 00000, 2017, v2, 640x480, 1080p, voc2007, the digest of a shard
_PLAIN_FORM = re.compile(
    r"[a-d]|\d+|v\d+|\d+x\d+|\d+(px|p|k)|(voc|coco|yolo|fold|part|stage|set|split)v?\d+|(?=\D*\d)[0-9a-f]{8,}"
)


def canonical_split(word: str) -> str:
    """ "train", "validation" or "test" for their usual words ("valid", "val2017", "dev", ...); else the word itself."""
    return _SPLIT_OF.get(re.sub(r"[-_ ]?\d*$", "", word.lower()), word)


def split_in(name: str, at_end: bool = False) -> str | None:
    """The split in the name of a file or folder, such as "instances_val2017". None: the name has no split, or two.

    Args:
        at_end: accept other words before the split, if it is the last word: "raccoon_val" names a split, "test_tube" does not.
    """
    split, _, is_whole, is_last = _parse(name)
    return split if is_whole or (at_end and is_last) else None


def _parse(name: str) -> tuple[str | None, tuple[str, ...], bool, bool]:
    """Split a name into its parts.

    Returns:
        the only split that a word names, or None; all words, with "" in place of the split; whether all other words are plain;
        whether all words after the split are plain.
    """
    words = _words(name)
    splits = [canonical_split(word) for word in words]
    places = [place for place, split in enumerate(splits) if split in SPLITS]
    if len({splits[place] for place in places}) != 1:
        return None, tuple(words), False, False
    others = ["" if place in places else word for place, word in enumerate(words)]
    plain = [not word or _is_plain(word) for word in others]
    return splits[places[0]], tuple(others), all(plain), all(plain[places[-1] :])


def is_plain(name: str) -> bool:
    """Whether a name has only plain words and words for splits, so it does not describe the content of pictures."""
    return all(_is_plain(word) or canonical_split(word) in SPLITS for word in _words(name))


def _words(name: str) -> list[str]:
    name = re.sub(r"(\d+)[-_]of[-_](\d+)", r"\1-\2", name.lower().replace("test-dev", "testdev"))  # a shard
    return [word for word in re.split(r"[^a-z0-9]+", name) if word]


def _is_plain(word: str) -> bool:
    return word in _PLAIN or bool(_PLAIN_FORM.fullmatch(word))


class SplitNames:
    """Finds the splits in the names of a data set's files and folders.

    A name of plain words and a word for a split names this split: train, val2017, test_images, instances_train. Other words
    may describe the content of the pictures, as in test_tube or crash_test. A name with other words names a split in three
    cases:

    - another name differs from it only in the split: raccoon_train and raccoon_val;
    - a folder's last word is the split, and a folder beside it is a split: train and raccoon_val;
    - an annotation file's last word is the split: raccoon_val.json.

    Args:
        root: folder of the data set. Its own name is ignored.
        paths: paths of files in the data set.
        files_name_splits: whether names of files name splits as well. They then take precedence over names of folders.
    """

    def __init__(self, root: Path, paths: Iterable[Path], files_name_splits: bool = False):
        self.root, self.files_name_splits = root, files_name_splits
        self._folders_in: dict[Path, set[str]] = {}  # folder -> names of its subfolders
        stems = set()
        for path in paths:
            stems.add(path.stem)
            folder = path.parent
            while folder != root and folder.name not in self._folders_in.setdefault(folder.parent, set()):
                self._folders_in[folder.parent].add(folder.name)
                folder = folder.parent
        names = set().union(*self._folders_in.values(), stems if files_name_splits else ())
        splits_of: dict[tuple[str, ...], set[str]] = {}
        for name in names:
            split, pattern, *_ = _parse(name)
            if split:
                splits_of.setdefault(pattern, set()).add(split)
        self._contrasted = {pattern for pattern, splits in splits_of.items() if len(splits) > 1}
        self._of_folder: dict[Path, str | None] = {}
        self._unclear: dict[Path, str] = {}  # folder -> the split that its name may mean

    def split_of_file(self, path: Path) -> str | None:
        """The split that the name of a file gives, if names of files count; else the split of the nearest folder with one."""
        if self.files_name_splits and (split := split_in(path.stem, at_end=True) or self._by_contrast(path.stem)):
            return split
        folder = path.parent
        while folder != self.root:
            if split := self.split_of_folder(folder):
                return split
            folder = folder.parent
        return None

    def split_of_folder(self, folder: Path) -> str | None:
        """The split that the name of a folder gives."""
        if folder not in self._of_folder:
            self._of_folder[folder] = self._find_split(folder)
        return self._of_folder[folder]

    def _find_split(self, folder: Path) -> str | None:
        split, _, is_whole, is_last = _parse(folder.name)
        if split is None or is_whole or self._by_contrast(folder.name):
            return split
        beside = self._folders_in.get(folder.parent, set()) - {folder.name}
        if is_last and any(split_in(name) for name in beside):
            return split
        self._unclear[folder] = split
        return None

    def _by_contrast(self, name: str) -> str | None:
        split, pattern, *_ = _parse(name)
        return split if pattern in self._contrasted else None

    def notes(self) -> list[str]:
        """A note about folders that are not used as a split although their name contains the word of a split."""
        if not self._unclear:
            return []
        folder, split = min(self._unclear.items())
        more = f" The same holds for {len(self._unclear) - 1} other folders." if len(self._unclear) > 1 else ""
        return [
            f"The folder {folder} is not taken as {split} data, because its name has other words too; "
            f"if it is {split} data, rename it to {split}.{more}"
        ]


# Names of folders that do not distinguish sets of images.
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
    """Finds the images that jsons list.

    Images are searched for beside the json, in a folder named like its split, and in `images`. Then any file below the root
    counts whose path ends with the listed name.

    Args:
        files: files of the data set.
        root: folder of the data set.
        listed: file names in all jsons.
    """

    def __init__(self, files: DataFolder, root: Path, listed: Iterable[str]):
        self.files = files
        self.root = root.absolute()
        self.candidates: dict[Path, list[Path]] = {}  # missing path -> files that the listed name may mean
        self._paths: TailIndex | None = None
        self._split_names: SplitNames | None = None
        folders_of: dict[str, set[str]] = {}  # last part of a listed name -> its listed folders
        for name in set(listed):
            folder, _, last = posix(name).rpartition("/")
            folders_of.setdefault(comparable_name(last), set()).add(folder)
        self._in_several_folders = {last for last, folders in folders_of.items() if len(folders) > 1}

    def for_split(self, json_file: Path, split: str) -> Callable[[str], Path]:
        """A function from file_name to an absolute path. If the file is missing, it is the first path that was tried."""
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
                    # cam1/1.jpg and cam2/1.jpg must not both mean the same file 1.jpg
                    if self.files.is_file(base / name) and listed_as.setdefault(base / name, file_name) == file_name:
                        if index:
                            bases.insert(0, bases.pop(index))  # the other images are probably there too
                        return base / name
            found, several = self._by_tail(posix(file_name), split, bases)
            if found and listed_as.setdefault(found, file_name) == file_name:
                return found
            # A file outside the data set is returned too; a later check reports it.
            place = next((base / file_name for base in bases if is_regular(base / file_name)), bases[0] / file_name)
            if several:
                self.candidates[place] = several
            return place

        return find

    def _by_tail(self, name: str, split: str, bases: list[Path]) -> tuple[Path | None, list[Path]]:
        """Search for files whose paths end like the name.

        Returns:
            the file and an empty list, if there is exactly one; otherwise None and all these files.
        """
        if self._paths is None:
            paths = list(image_files(self.root, self.files))
            self._paths, self._split_names = TailIndex(self.root, paths), SplitNames(self.root, paths)
        found = self._paths.find(name, split, comparable_name(name.rpartition("/")[2]) in self._in_several_folders)
        found = [path for path in found if self._may_be_of(path, split)]
        in_bases = [path for base in bases for path in found if path.parent == base]
        if len(found) == 1 or in_bases:
            return (in_bases or found)[0], []
        return None, sorted(found)

    def _may_be_of(self, path: Path, split: str) -> bool:
        """Whether a file is not in the folder of another split. Two splits may use the same file names."""
        folders = [folder for folder in path.parents if folder.is_relative_to(self.root) and folder != self.root]
        splits = set(filter(None, map(self._split_names.split_of_folder, folders)))
        return not splits or split in splits


class TailIndex:
    """Finds files by the end of a listed path, because its beginning may be from another computer.

    Args:
        root: folder that contains all files.
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
        return tuple(comparable_name(part) for part in name.split("/") if part not in ("", ".", "..")) or ("",)

    def find(self, name: str, split: str | None = None, needs_folder: bool = False) -> list[Path]:
        """Files with the longest common end of their path and a listed path. Empty if their other folders contradict.

        video2/1.jpg cannot mean video1/1.jpg, but it can mean images/1.jpg, and images/1.jpg can mean video1/1.jpg.

        Args:
            name: listed path with "/".
            split: a listed folder with the name of this split contradicts no other folder.
            needs_folder: the last part alone is not enough, because other listed files have the same.
        """
        listed = self._parts(name)
        scored = [(_common_end(listed, parts), path, parts) for path, parts in self._by_name.get(listed[-1], ())]
        most = max((score for score, _, _ in scored), default=0)
        if needs_folder and most < min(2, len(listed)):
            return []
        best = [(path, parts) for score, path, parts in scored if score == most]
        return [path for path, parts in best if not _differ_in_image_set(listed[:-most], parts[:-most], split)]


def ambiguous_text(candidates: Sequence[Path]) -> str:
    """Text about a listed name that several files have."""
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


def _differ_in_image_set(listed: Sequence[str], found: Sequence[str], split: str | None) -> bool:
    """Whether the last folders that differ name different sets of images."""
    if not listed or not found or listed[-1] in _GENERIC or found[-1] in _GENERIC:
        return False
    return (split is None or split_in(listed[-1], at_end=True) != split) and split_in(found[-1]) is None


def is_generic(folder: str) -> bool:
    """Whether the name of a folder does not distinguish sets of images, such as the images of a camera."""
    return folder.lower() in _GENERIC or split_in(folder) is not None


def _words_of(stem: str, split: str) -> list[str]:
    """Folder names that the name of a json suggests: train2017 for instances_train2017."""
    parts = stem.split("_")
    tails = ["_".join(parts[start:]) for start in range(len(parts))] + parts
    return [word for word in tails if canonical_split(word) == split]


def comparable_name(name: str) -> str:
    """A form that is equal for names that Windows or macOS treat as equal: Windows ignores case, and macOS splits "é"."""
    return unicodedata.normalize("NFC", name).casefold()


def posix(path: str) -> str:
    """A path with "/" instead of the "\\" of Windows."""
    return path.replace("\\", "/")


def image_files(folder: Path, files: DataFolder) -> Iterator[Path]:
    """All images below a folder, in the order of their names."""
    return files.files(folder, IMAGE_SUFFIXES)
