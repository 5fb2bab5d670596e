"""Load a data set in any format: check it, number its classes and hold out validation data."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..common.regular_files import is_regular
from ..model.package_warning import DinoDetrWarning
from .box_layouts import check_reading
from .coco_format import read_json, read_split
from .files import DataFolder, only_usable
from .raw import SPLITS, RawDataset, RawSplit, are_supercategories, fill_sizes
from .recognise import read_raw
from .rows import ClassSpace, CocoData, class_space, raise_problem, to_rows
from .splits import copy_groups, stratified_split

MOST_SEEDS = 2**32  # the limit of NumPy's generators, which Trainer also seeds
_BACKGROUND = {"background", "__background__", "_background_", "bg", "n/a", "none"}


class DetectionData(NamedTuple):
    """The parts of a data set, with the same classes. A part that the data set does not have is None."""

    train: CocoData | None
    validation: CocoData | None
    test: CocoData | None
    notes: list[
        str
    ]  # decisions made while loading: the format, the split and its seed, a background class that was left out, ...
    origin: str

    def __repr__(self) -> str:
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        counts = ", ".join(f"{name} {len(one.dataset)} images" for name, one in parts.items() if one is not None)
        num_classes = next((len(part.id2label) for part in parts.values() if part is not None), 0)
        return f"DetectionData({self.origin!r:.100}: {counts}, {num_classes} classes, {len(self.notes)} notes)"


def load_data(
    source,
    *,
    validation_fraction: float = 0.2,
    seed: int = 0,
    box_format: str | None = None,
    allow_outside: bool = False,
    trust_boxes: bool = False,
    only: str | None = None,
) -> DetectionData:
    """Load a data set in COCO, YOLO, Pascal VOC or Hugging Face format. The format is recognised by the files.

    Without validation data, a part of the training images is held out, with the same share of each class. Test data are never
    used for validation. This split does not separate exact and near copies of an image. Near copies are searched for among at most
    5,000 images. If the annotations do not state the size of an image, it is read from the file.

    Classes are numbered 0 to K - 1 in the order of their original ids, which stay in `category_ids`. All parts have the same
    classes. If parts use different ids, classes of the same name are merged. A category without objects is left out if it is the
    supercategory of others or named like background.

    Args:
        source: as in `read_raw`: a folder, a json, a yaml, a parquet, arrow or jsonl file, an id on the Hub, or an object of
            the library `datasets`.
        validation_fraction: share of the training images to hold out if there are no validation data, in [0, 1).
        seed: random seed of that split.
        box_format: layout of the boxes of a Hugging Face data set, as in `read_raw`.
        allow_outside: also read files outside the data set's folder, as in `read_raw`.
        trust_boxes: do not check the layout of the boxes against the sizes of the images.
        only: load only this part, "train", "validation" or "test", and, if it must be held out, the part that it comes from.
    Raises:
        ValueError, OSError: no format is recognised, or the data have an error. The message names the entry.
    """
    _check_fraction(validation_fraction, seed)  # before the data are read
    raw = read_raw(source, box_format=box_format, allow_outside=allow_outside)
    return load_raw(raw, source, validation_fraction=validation_fraction, seed=seed, trust_boxes=trust_boxes, only=only)


def load_raw(
    raw: RawDataset,
    source,
    *,
    validation_fraction: float = 0.2,
    seed: int = 0,
    trust_boxes: bool = False,
    only: str | None = None,
) -> DetectionData:
    """Like `load_data`, for data that `read_raw` has read from `source`. `raw` is not changed."""
    _check_fraction(validation_fraction, seed)
    try:
        raise_problem(raw.problems)
        names = _splits_to_load(raw, only)
        raw = raw._replace(splits={**raw.splits, **{name: fill_sizes(raw.splits[name]) for name in names}})
        if not trust_boxes:
            check_reading(raw._replace(splits={name: raw.splits[name] for name in names}))
        return _checked(raw, names, validation_fraction, seed)
    except (ValueError, FileNotFoundError) as error:
        if not isinstance(source, str | Path):
            raise
        advice = f"`dino-hf doctor {source}` lists all errors, and --fix writes a cleaned copy."
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{error} {advice}") from error


def _check_fraction(validation_fraction: float, seed: int) -> None:
    if not isinstance(validation_fraction, int | float) or not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction!r} must be at least 0 and less than 1.")
    if not isinstance(seed, int) or not 0 <= seed < MOST_SEEDS:
        raise ValueError(f"seed={seed!r} must be a whole number, at least 0 and less than {MOST_SEEDS:,}.")


def _splits_to_load(raw: RawDataset, only: str | None) -> list[str]:
    """Names of the splits to load. Without validation data, they are split off the training data."""
    if only == "validation" and only not in raw.splits and "train" in raw.splits:
        only = "train"
    return [only] if only in raw.splits else list(raw.splits)


def _checked(raw: RawDataset, names: list[str], validation_fraction: float, seed: int) -> DetectionData:
    if raw.format == "huggingface" and not raw.categories:  # the other formats list their classes separately
        num_images = sum(len(split.images) for split in raw.splits.values())
        raise ValueError(
            f"{raw.origin}: none of its {num_images} images has a box, so there are no classes; annotate some objects."
        )
    notes = [f"{raw.origin} is read in {raw.format} format.", *raw.notes]
    classes, left_out = _classes(raw)
    notes += left_out
    if others := [name for name in raw.splits if name not in SPLITS]:
        notes.append(f"Only {', '.join(SPLITS)} are used; skipped: {', '.join(others)}.")
    if not set(SPLITS) & set(raw.splits):
        raise ValueError(
            f"{raw.origin} has the parts {others}, but none is named train, validation or test; rename a part, or give the "
            "path of a part."
        )
    parts = {}
    for name in SPLITS:
        split = raw.splits[name] if name in names else None
        if split is not None and name == "test" and not split.annotations and not _has_images(split):
            notes.append(f"{split.origin}: no file of the test images exists, so there are no test data.")
            split = None
        if split is not None:
            parts[name], own_notes = to_rows(split, classes, f"{_name(raw.origin)}, {name}")
            notes += own_notes
    if "train" in parts and "validation" not in raw.splits and validation_fraction > 0:
        groups, own_notes = copy_groups(raw.splits["train"], parts["train"])
        notes += own_notes
        train, held_out = _split(parts["train"], validation_fraction, seed, groups)
        notes.append(
            f"There are no validation data: {len(held_out.dataset)} of {len(parts['train'].dataset)} training images are held out, "
            f"with a share of each class and seed {seed}."
        )
        parts |= {"train": train, "validation": held_out}
    return DetectionData(*(parts.get(name) for name in SPLITS), notes, str(raw.origin))


def _name(origin: Path | str) -> str:
    path = Path(origin)
    if not path.exists():
        return str(origin)
    return path.absolute().name if path.is_dir() else "/".join(path.absolute().parts[-2:])


def _classes(raw: RawDataset) -> tuple[ClassSpace, list[str]]:
    """The classes, without unused categories for background, and notes for the user."""
    used = {number for split in raw.splits.values() for number in np.unique(split.annotations.category_id).tolist()}
    kept, notes = [], []
    for entry, is_group in zip(raw.categories, are_supercategories(raw.categories), strict=True):
        is_background = entry["name"].strip().lower() in _BACKGROUND or is_group
        if entry["id"] not in used and is_background:
            notes.append(
                f"Category {entry['id']}, {entry['name']!r}, has no objects and means background, so it is left out."
            )
        else:
            kept.append(entry)
    return class_space(kept, raw.origin), notes


def _has_images(split: RawSplit) -> bool:
    return any("image" in entry or is_regular(entry["path"]) for entry in split.images)


def _split(data: CocoData, fraction: float, seed: int, groups: list[int]) -> tuple[CocoData, CocoData]:
    columns = data.dataset.select_columns("objects")[:]
    classes = [set(objects["category"]) for objects in columns["objects"]]
    parts = stratified_split(classes, fraction, seed, groups)
    names = (f"{data.name}, without {fraction:g} held out", f"{data.name}, {fraction:g} held out by seed {seed}")
    return tuple(
        data._replace(dataset=data.dataset.select(indices), name=name)
        for indices, name in zip(parts, names, strict=True)
    )


def load_coco(
    annotation_file: str | Path, image_dir: str | Path, like: CocoData | None = None, allow_outside: bool = False
) -> CocoData:
    """Read COCO annotations. Categories are numbered 0 to K - 1 in the order of their original ids.

    A box that sticks out of its image is kept as it is. A box without size is left out of training and evaluation, with a warning.

    Args:
        annotation_file: json with `images`, `annotations` and `categories`.
        image_dir: folder that contains the `file_name`s.
        like: the training data. These data may only have categories of `like`.
        allow_outside: also read images outside `image_dir` to which links or names lead.
    Returns:
        the data in Arrow form. Images are read on access.
    Raises:
        FileNotFoundError: the json or an image is missing.
        ValueError: the json has an error. The message names the entry.
    """
    annotation_file, image_dir = Path(annotation_file), Path(image_dir)
    content = read_json(annotation_file)
    split, categories, problems, notes = read_split(content, annotation_file, "train", lambda name: image_dir / name)
    raw = RawDataset("coco", annotation_file, {"train": split}, categories, problems)
    raw = only_usable(raw, DataFolder(image_dir, allow_outside=allow_outside))
    raise_problem(raw.problems)
    raw = raw._replace(splits={"train": fill_sizes(raw.splits["train"])})
    check_reading(raw)
    split = raw.splits["train"]
    classes = class_space(categories, annotation_file)
    if like is not None:
        known = {category_id: like.id2label[index] for index, category_id in enumerate(like.category_ids)}
        others = {entry["id"]: entry["name"] for entry in categories if known.get(entry["id"]) != entry["name"]}
        if others:
            raise ValueError(
                f"{annotation_file} has the categories {others}, which the training data do not have: {known}."
            )
        classes = ClassSpace(like.id2label, like.category_ids)
    data, own_notes = to_rows(split, classes, "/".join(annotation_file.parts[-2:]))
    for note in notes + own_notes:
        warnings.warn(note, DinoDetrWarning, stacklevel=2)
    return data
