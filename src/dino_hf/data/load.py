"""A data set in any format -> what models are trained and evaluated on."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..common.regular_files import is_regular
from ..model.package_warning import DinoDetrWarning
from .box_layouts import check_reading
from .coco_format import read_json, read_split
from .files import DataFolder, only_usable
from .raw import SPLITS, RawDataset, RawSplit, fill_sizes, groups_of_others
from .recognise import read_raw
from .rows import ClassSpace, CocoData, class_space, raise_problem, to_rows
from .splits import copy_groups, stratified_split

MOST_SEEDS = 2**32  # NumPy's generators, which Trainer seeds too, take no others
_BACKGROUND = {"background", "__background__", "_background_", "bg", "n/a", "none"}


class DetectionData(NamedTuple):
    """The parts of a data set, of one class space; None where there is none."""

    train: CocoData | None
    validation: CocoData | None
    test: CocoData | None
    notes: list[str]  # what was decided: format, split and its seed, a background class that was left out, ...
    origin: str

    def __repr__(self) -> str:
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        counts = ", ".join(f"{name} {len(one.dataset)} images" for name, one in parts.items() if one is not None)
        num_classes = next((len(one.id2label) for one in parts.values() if one is not None), 0)
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
    """Read a data set in COCO, YOLO, Pascal VOC or Hugging Face format, which is recognised by its files.

    Validation data are the data set's own, else a part of its training data in which each class has its share; never test data.
    Copies of one image, exact or near, stay on one side of that split; near copies are looked for among up to 5,000 images.
    The size of an image that states none is read from its file.
    Classes are numbered 0 to K - 1 in the order of their original ids, which the data have in `category_ids`. All parts have
    the classes of all; where parts number them otherwise, those of the same name are one. A category that is the supercategory of
    others or called background, and that no object has, is left out.

    Args:
        source: as in `read_raw`: a folder, a json, a yaml, a parquet, arrow or jsonl file, an id of the Hub, or an object of
            `datasets`.
        validation_fraction: of the training images, in [0, 1), if there are no validation data; 0: none are held out.
        seed: of that split.
        box_format: as in `read_raw`, for Hugging Face data sets whose boxes are not (x, y, width, height) in pixels.
        allow_outside: as in `read_raw`, also read files outside of the data set's folder.
        trust_boxes: do not compare with the images whether the boxes are what their format says.
        only: the part that is wanted. Others are then neither checked nor told of, unless it has to be made of them.
    Raises:
        ValueError, OSError: nothing is recognised, or something is wrong with the data: what, and in which entry.
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
    """As `load_data`, for data that `read_raw` has read from `source`. `raw` is not changed."""
    _check_fraction(validation_fraction, seed)
    try:
        raise_problem(raw.problems)
        wanted = _wanted(raw, only)
        raw = raw._replace(splits={**raw.splits, **{name: fill_sizes(raw.splits[name]) for name in wanted}})
        if not trust_boxes:
            check_reading(raw._replace(splits={name: raw.splits[name] for name in wanted}))
        return _checked(raw, wanted, validation_fraction, seed)
    except (ValueError, FileNotFoundError) as error:
        if not isinstance(source, str | Path):
            raise
        advice = f"`dino-hf doctor {source}` lists everything that is wrong, and --fix writes a cleaned copy."
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{error} {advice}") from error


def _check_fraction(validation_fraction: float, seed: int) -> None:
    if not isinstance(validation_fraction, int | float) or not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction!r} must be at least 0 and less than 1.")
    if not isinstance(seed, int) or not 0 <= seed < MOST_SEEDS:
        raise ValueError(f"seed={seed!r} must be a whole number, at least 0 and less than {MOST_SEEDS:,}.")


def _wanted(raw: RawDataset, only: str | None) -> list[str]:
    """The splits to read: training data without validation data are divided, so then they are read for both."""
    if only == "validation" and only not in raw.splits and "train" in raw.splits:
        only = "train"
    return [only] if only in raw.splits else list(raw.splits)


def _checked(raw: RawDataset, wanted: list[str], validation_fraction: float, seed: int) -> DetectionData:
    if raw.format == "huggingface" and not raw.categories:  # other formats list their classes apart from the boxes
        num_images = sum(len(split.images) for split in raw.splits.values())
        raise ValueError(
            f"{raw.origin}: none of its {num_images} images has a box, so there is no class; annotate some."
        )
    notes = [f"{raw.origin} is read in {raw.format} format.", *raw.notes]
    classes, left_out = _classes(raw)
    notes += left_out
    if others := [name for name in raw.splits if name not in SPLITS]:
        notes.append(f"Only {', '.join(SPLITS)} are used; passed over: {', '.join(others)}.")
    if not set(SPLITS) & set(raw.splits):
        raise ValueError(
            f"{raw.origin} has the parts {others}, none of which is train, validation or test by its name; rename one, or give "
            "the path of one."
        )
    parts = {}
    for name in SPLITS:
        split = raw.splits[name] if name in wanted else None
        if split is not None and name == "test" and not split.annotations and not _has_images(split):
            notes.append(f"{split.origin}: none of the test images is here, so there are no test data.")
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
            f"each class by its share, with seed {seed}."
        )
        parts |= {"train": train, "validation": held_out}
    return DetectionData(*(parts.get(name) for name in SPLITS), notes, str(raw.origin))


def _name(origin: Path | str) -> str:
    path = Path(origin)
    if not path.exists():
        return str(origin)
    return path.absolute().name if path.is_dir() else "/".join(path.absolute().parts[-2:])


def _classes(raw: RawDataset) -> tuple[ClassSpace, list[str]]:
    """Without a category for background that nothing belongs to."""
    used = {number for split in raw.splits.values() for number in np.unique(split.annotations.category_id).tolist()}
    kept, notes = [], []
    for entry, is_group in zip(raw.categories, groups_of_others(raw.categories), strict=True):
        is_background = entry["name"].strip().lower() in _BACKGROUND or is_group
        if entry["id"] not in used and is_background:
            notes.append(
                f"Category {entry['id']}, {entry['name']!r}, has no objects and stands for background: left out."
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

    A box that sticks out of its image is kept as it is; one of no size is left out, of training and evaluation, with a warning.

    Args:
        annotation_file: json with `images`, `annotations` and `categories`.
        image_dir: folder that the `file_name`s are relative to.
        like: the training data, whose categories these data must have (they may lack some).
        allow_outside: also read images outside of `image_dir` that links or names lead to.
    Returns:
        the data in Arrow form; images are read when they are asked for.
    Raises:
        FileNotFoundError: the json or an image is missing.
        ValueError: what is wrong with the json, and in which entry.
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
