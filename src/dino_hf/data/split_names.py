"""Splits told by names of files and folders: train2017 and instances_val tell one, test_tube and training_day do not."""

import re
from collections.abc import Iterable
from pathlib import Path

from .raw import SPLITS

_SPLIT_WORDS = {
    "train": "train training trainval trn",
    "validation": "val valid validation validate dev development eval evaluation minival",
    "test": "test testing testdev",
}
_SPLIT_OF = {word: split for split, words in _SPLIT_WORDS.items() for word in words.split()}
# Words that stand beside a split in names of exports. None of them names a thing that a picture could show.
_PLAIN_WORDS = (
    "annotated annotation annotations ann anns anno annos aug augmented bbox bboxes caption captions challenge clean cleaned "
    "coco create csv cvat darknet data dataset datasets default det detect detection detections final fixed fold folder full "
    "gt groundtruth image images img imgs info instance instances jpeg jpegimages jpg json jsonl keypoints label labeled "
    "labelled labels large list lists mini new obj object objects orig original panoptic parquet part pascal pascalvoc photo "
    "photos picture pictures png polygons private public raw ready release resized sample set shard small split splits subset "
    "tiny ultralytics unlabeled unlabelled v version voc xml xmls yolo"
)
_PLAIN = frozenset(_PLAIN_WORDS.split())
# a, 00000, 2017, v2, 640x480, 1080p, voc2007, the digest of a shard
_PLAIN_FORM = re.compile(
    r"[a-d]|\d+|v\d+|\d+x\d+|\d+(px|p|k)|(voc|coco|yolo|fold|part|stage|set|split)v?\d+|(?=\D*\d)[0-9a-f]{8,}"
)


def canonical_split(word: str) -> str:
    """ "train", "validation" or "test" for the words that data sets use ("valid", "val2017", "dev", ...), else the word itself."""
    return _SPLIT_OF.get(re.sub(r"[-_ ]?\d*$", "", word.lower()), word)


def split_in(name: str, at_end: bool = False) -> str | None:
    """The split told by the name of a file or folder, such as "instances_val2017". None: the name tells no split, or two.

    Args:
        at_end: accept other words before the split, if it is the last word: "raccoon_val" tells a split, "test_tube" does not.
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
    """Whether a name has only plain words and words for splits, so it does not say what the pictures show."""
    return all(_is_plain(word) or canonical_split(word) in SPLITS for word in _words(name))


def _words(name: str) -> list[str]:
    name = re.sub(r"(\d+)[-_]of[-_](\d+)", r"\1-\2", name.lower().replace("test-dev", "testdev"))  # a shard
    return [word for word in re.split(r"[^a-z0-9]+", name) if word]


def _is_plain(word: str) -> bool:
    return word in _PLAIN or bool(_PLAIN_FORM.fullmatch(word))


class SplitNames:
    """The splits told by the names in one data set.

    A name of plain words and a word for a split tells this split: train, val2017, test_images, instances_train. Other words may
    name the content of the pictures, as in test_tube or crash_test. A name with other words tells a split in three cases:

    - another name differs from it only in the split: raccoon_train and raccoon_val;
    - a folder's last word is the split, and a folder beside it is a split: train and raccoon_val;
    - an annotation file's last word is the split: raccoon_val.json.

    Args:
        root: folder of the data set. Its own name is ignored.
        paths: paths of files in the data set.
        files_tell: whether names of files tell splits too. They then go before the names of folders.
    """

    def __init__(self, root: Path, paths: Iterable[Path], files_tell: bool = False):
        self.root, self.files_tell = root, files_tell
        self._folders_in: dict[Path, set[str]] = {}  # folder -> names of those in it
        stems = set()
        for path in paths:
            stems.add(path.stem)
            folder = path.parent
            while folder != root and folder.name not in self._folders_in.setdefault(folder.parent, set()):
                self._folders_in[folder.parent].add(folder.name)
                folder = folder.parent
        names = set().union(*self._folders_in.values(), stems if files_tell else ())
        splits_of: dict[tuple[str, ...], set[str]] = {}
        for name in names:
            split, pattern, *_ = _parse(name)
            if split:
                splits_of.setdefault(pattern, set()).add(split)
        self._contrasted = {pattern for pattern, splits in splits_of.items() if len(splits) > 1}
        self._of_folder: dict[Path, str | None] = {}
        self._unclear: dict[Path, str] = {}  # folder -> the split that it may tell

    def of_file(self, path: Path) -> str | None:
        """The split told by the name of a file, if names of files count, else by its nearest folder that tells one."""
        if self.files_tell and (split := split_in(path.stem, at_end=True) or self._by_contrast(path.stem)):
            return split
        folder = path.parent
        while folder != self.root:
            if split := self.of_folder(folder):
                return split
            folder = folder.parent
        return None

    def of_folder(self, folder: Path) -> str | None:
        """The split told by the name of a folder."""
        if folder not in self._of_folder:
            self._of_folder[folder] = self._tell(folder)
        return self._of_folder[folder]

    def _tell(self, folder: Path) -> str | None:
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
        """A note on folders that are not taken as a split although a word of their name is one."""
        if not self._unclear:
            return []
        folder, split = min(self._unclear.items())
        more = f" The same holds for {len(self._unclear) - 1} other folders." if len(self._unclear) > 1 else ""
        return [
            f"The folder {folder} is not taken as {split} data, as its name has other words too; if it is, call it {split}.{more}"
        ]
