"""Find errors in a data set before training."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ..common.text import count_text
from ..data.box_layouts import LAYOUT_TEXTS, SWAPPED, Reading, guess_readings
from ..data.image_facts import ImageFacts, inspect_images
from ..data.raw import RawDataset, are_supercategories, area_text, count_boxes, make_box_table, stated_sizes
from ..data.rows import MOST_PIXELS, SMALLEST_SIDE
from .boxes import near_repeats, repeated_boxes
from .data_statistics import describe
from .findings import Finding, FindingCollector, Offender, box_text
from .image_checks import (
    SizeFit,
    check_copies,
    check_files,
    check_image_entries,
    fit_sizes,
    has_no_files,
    repeated_places,
)

_MANY_BOXES = 300  # post-processing keeps at most 300 detections
_WHOLE_IMAGE = 0.99  # share of the sides of the image
_RARE = 0.01  # share of the boxes of the most frequent class
_BACKGROUND = {
    "background",
    "bg",
    "na",
    "none",
}  # names without punctuation; `load_data` leaves them out if they have no boxes


class Report(NamedTuple):
    """The result of `inspect`."""

    origin: str
    format: str
    findings: list[Finding]  # worst first
    statistics: dict  # of `describe`
    facts: dict[str, list[ImageFacts]]  # facts of the images of each split
    fits: dict[str, SizeFit]  # sizes of the images of each split
    readings: dict[str, Reading]  # layout of the boxes of each split
    images_were_decoded: bool

    def __repr__(self) -> str:
        counts = Counter(finding.severity for finding in self.findings)
        found = ", ".join(f"{count} {severity}s" for severity, count in counts.items()) or "nothing found"
        return f"Report({self.origin!r:.100}, {self.format}: {found})"

    @property
    def has_errors(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)

    def as_dict(self) -> dict:
        """The report for json: findings with their first 1,000 offenders, and statistics."""
        return {
            "dataset": self.origin,
            "format": self.format,
            "images_were_decoded": self.images_were_decoded,
            "findings": [finding.as_dict() for finding in self.findings],
            "statistics": self.statistics,
        }


def inspect(
    raw: RawDataset,
    *,
    check_images: bool = True,
    trust_boxes: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Check detection data for all known kinds of errors. The data are not changed.

    Args:
        check_images: open and decode every image, compare its size with the stated one, and look for copies. Otherwise only
            check that its file exists, which takes seconds for 100,000 images.
        trust_boxes: take the boxes as their format says, even if another layout fits the images better.
        progress: called with the number of images done, and of all images.
    """
    facts = inspect_images(raw.splits, check_images, progress)
    fits = {
        name: fit_sizes(facts[name], stated_sizes(split), make_box_table(split, raw.categories))
        for name, split in raw.splits.items()
    }
    sizes = {name: fit.sizes for name, fit in fits.items()}
    tables = {name: make_box_table(split, raw.categories, sizes[name]) for name, split in raw.splits.items()}
    readings = guess_readings(raw, tables, sizes_are_from_files=check_images)
    if trust_boxes:
        readings = {name: reading._replace(is_as_read=True) for name, reading in readings.items()}
    found = FindingCollector(raw, tables)
    _check_problems(found, check_images)
    _check_categories(found)
    for name in raw.splits:
        check_image_entries(found, name)
        check_files(found, name, facts[name], fits[name])
        _check_references(found, name)
        _check_reading(found, name, readings[name])
        if readings[name].is_as_read:  # checks of single boxes are meaningless in a wrong layout
            _check_geometry(found, name)
        _check_repetitions(found, name, readings[name])
        _check_counts(found, name, facts[name])
    check_copies(found, facts)
    _fit_advice(found, facts)
    pixels = {name: readings[name].to_xywh(table, raw.format) for name, table in tables.items()}
    statistics = describe(raw, tables, pixels, sizes)
    return Report(str(raw.origin), raw.format, found.findings(), statistics, facts, fits, readings, check_images)


def _fit_advice(found: FindingCollector, facts: dict[str, list[ImageFacts]]) -> None:
    """Replace advice that would not help with these data."""
    splits = found.raw.splits
    found.can_be_copied = any(
        facts[name][place].is_readable
        for name, table in found.tables.items()
        for place in np.unique(table.image[table.image >= 0])
    )
    listed = [fact for of_split in facts.values() for fact in of_split]
    if listed and all(fact.is_missing for fact in listed):
        found.cures["image-missing"] = (
            "No image is where the annotations say. Put the images there, or give the folder that has both the images and the "
            "annotations."
        )
    if "train" in splits and "validation" not in splits:
        one_side = "Training holds out a part of these images, and keeps copies on one side of that split."
        found.cures["duplicate-image"] = f"Keep one of them. {one_side}"
        found.cures["near-copy"] = f"Keep one if they are the same picture. {one_side}"


def _check_problems(found: FindingCollector, images_are_decoded: bool) -> None:
    for problem in found.raw.problems:
        if images_are_decoded and problem.kind == "unreadable-image":
            continue  # from the YOLO reader; the checks of images report it for all formats
        found.add(problem.kind, [Offender(None, problem.where, None, problem.message)])


def _check_categories(found: FindingCollector) -> None:
    categories = found.raw.categories
    if not categories:
        found.add("no-categories", [Offender(None, str(found.raw.origin), None, "no categories")])
    names = [str(entry.get("name")) for entry in categories]

    def add(kind: str, places: Iterable[int], value: Callable[[int], str]) -> None:
        found.add(kind, [Offender(None, f"categories[{place}]", None, value(place)) for place in places])

    def entry_text(place: int) -> str:
        return f"id {categories[place].get('id')}, name {names[place]!r}"

    add("duplicate-category-id", repeated_places([entry.get("id") for entry in categories]), entry_text)
    add("duplicate-category-name", repeated_places(names), entry_text)
    plain = [re.sub(r"[\W_]", "", name).casefold() for name in names]
    first = {key: names[place] for place, key in reversed(list(enumerate(plain)))}
    similar = [place for place, name in enumerate(names) if plain[place] and first[plain[place]] != name]
    add("similar-category-name", similar, lambda place: f"{names[place]!r} and {first[plain[place]]!r}")
    is_background = [key in _BACKGROUND for key in plain]
    used = {place for table in found.tables.values() for place in np.unique(table.category).tolist()}
    add("background-class", [place for place in used - {-1} if is_background[place]], entry_text)
    is_group = are_supercategories(categories)
    placeholders = {
        place for place in range(len(names)) if place not in used and (is_background[place] or is_group[place])
    }
    add("placeholder-category", sorted(placeholders), entry_text)
    _check_class_counts(found, entry_text, placeholders)


def _check_class_counts(found: FindingCollector, entry_text: Callable[[int], str], left_out: set[int]) -> None:
    categories, labelled = found.raw.categories, {}
    first_of_id = {entry.get("id"): place for place, entry in reversed(list(enumerate(categories)))}
    for name, table in found.tables.items():
        if len(table.category):
            labelled[name] = np.bincount(table.category[table.category >= 0], minlength=len(categories))  # (K,)
    if not labelled or not categories:
        return
    total = sum(labelled.values())
    # A repeated id is a separate error. Its boxes count for the first category.
    places = [p for p, entry in enumerate(categories) if first_of_id[entry.get("id")] == p and p not in left_out]

    def add(kind: str, is_wrong: Callable[[int], bool], value: Callable[[int], str]) -> None:
        wrong = [place for place in places if is_wrong(place)]
        texts = [f"{entry_text(place)}{value(place)}" for place in wrong]
        found.add(kind, [Offender(None, f"categories[{p}]", None, t) for p, t in zip(wrong, texts, strict=True)])

    add("category-without-boxes", lambda place: not total[place], lambda place: "")
    if "train" in labelled:
        train = labelled["train"]
        add(
            "category-not-in-train",
            lambda place: total[place] and not train[place],
            lambda place: ": " + ", ".join(f"{counts[place]} in {name}" for name, counts in labelled.items()),
        )
        if "validation" in labelled:
            add(
                "category-not-in-validation",
                lambda place: train[place] and not labelled["validation"][place],
                lambda place: f": {train[place]} in train",
            )
    trained = labelled.get("train", total)
    most = trained[places].max() if places else 0
    add(
        "class-imbalance",
        lambda place: 0 < trained[place] < _RARE * most,
        lambda place: f": {trained[place]} of {most} of the most frequent",
    )


def images_in_other_splits(raw: RawDataset, name: str) -> dict[int, str]:
    """Map the ids of images in all other splits to their split."""
    return {image["id"]: other for other, split in raw.splits.items() if other != name for image in split.images}


def _check_references(found: FindingCollector, name: str) -> None:
    split, table = found.raw.splits[name], found.tables[name]
    others = images_in_other_splits(found.raw, name)
    is_unknown = table.image < 0
    in_other = is_unknown & np.isin(split.annotations.image_id, np.array(list(others), dtype=np.int64))

    def image_text(place: int) -> str:
        image_id = int(split.annotations.image_id[place])
        return f"image_id {image_id}" + (f", which is in {others[image_id]}" if in_other[place] else "")

    found.add_boxes("image-of-other-split", name, in_other, image_text)
    found.add_boxes("unknown-image", name, is_unknown & ~in_other, image_text)
    found.add_boxes(
        "unknown-category",
        name,
        table.category < 0,
        lambda place: f"category_id {split.annotations.category_id[place]}",
    )


def _check_reading(found: FindingCollector, name: str, reading: Reading) -> None:
    """Check the layout of the boxes. If it is wrong, the finding lists all boxes of the split, also those that fit by chance."""
    table = found.tables[name]
    found.add_boxes("box-not-numbers", name, ~table.is_number)
    if reading.is_as_read:
        return
    if not reading.num_leaving:  # no image has a known size
        found.add_boxes(
            wrong_layout_kind(reading, found.raw.format), name, table.is_number, detail="all lie within one pixel"
        )
        return
    outside = [f"{count} as {LAYOUT_TEXTS[layout]}" for layout, count in reading.num_leaving.items()]
    detail = (
        f"{'certainly' if reading.is_sure else 'probably'} {reading.text}: of {reading.num_boxes} boxes, "
        f"{', '.join(outside)} do not fit their images"
    )
    kind = wrong_layout_kind(reading, found.raw.format)
    if not reading.is_sure:
        found.not_fixed.add(kind)
    if found.raw.format == "huggingface" and reading.box_format:
        found.cures[kind] = f"Name their format with --box-format {reading.box_format}, or convert them."
    found.add_boxes(kind, name, table.is_number, detail=detail)


def wrong_layout_kind(reading: Reading, raw_format: str) -> str:
    """Kind of finding for boxes in a layout that is wrong for their format."""
    if reading.unit == "percent":
        return "boxes-are-percent"
    if reading.is_relative != (raw_format == "yolo"):
        return "boxes-are-normalised" if reading.is_relative else "boxes-are-pixels"
    if reading.layout in SWAPPED:
        return "boxes-are-swapped"
    return {"xyxy": "boxes-are-corners", "xywh": "boxes-are-xywh", "cxcywh": "boxes-are-centres"}[reading.layout]


def _check_geometry(found: FindingCollector, name: str) -> None:
    """Check single boxes, in pixels and in the layout of the format. Each box gets at most one finding."""
    table = found.tables[name]
    with np.errstate(invalid="ignore"):  # unknown sizes are NaN, which compares as False
        boxes, sizes = table.boxes, np.where(np.isnan(table.sizes), np.inf, table.sizes)
        smaller = boxes[:, 2:].min(1)  # (N,)
        visible = (np.minimum(table.corners[:, 2:], sizes) - np.maximum(boxes[:, :2], 0)).min(1)  # (N,) shorter side
        sticking = np.maximum(-boxes[:, :2], table.corners[:, 2:] - sizes).max(1)  # (N,) pixels
        is_whole = (boxes[:, 2:] >= _WHOLE_IMAGE * sizes).all(1)
        box_areas = boxes[:, 2] * boxes[:, 3]
    has_size = smaller >= SMALLEST_SIDE
    is_inside = has_size & (visible >= SMALLEST_SIDE)
    found.add_boxes("box-negative", name, smaller < 0)
    found.add_boxes("box-empty", name, (smaller >= 0) & ~has_size | has_size & (visible > 0) & ~is_inside)
    found.add_boxes("box-outside", name, has_size & (visible <= 0))
    found.add_boxes(
        "box-sticks-out", name, is_inside & (sticking > 1)
    )  # one pixel, for rounding and for tools that count from 1
    found.add_boxes("box-tiny", name, is_inside & (smaller < 1))
    found.add_boxes("box-whole-image", name, is_inside & is_whole & ~table.is_crowd)
    is_no_area = (table.area < 0) | (table.area >= MOST_PIXELS**2)
    is_area_wrong = ~np.isnan(table.area) & ~is_no_area & ((table.area == 0) | (table.area > 1.01 * box_areas + 1))
    annotations = found.raw.splits[name].annotations
    found.add_boxes("area-not-number", name, is_no_area, lambda place: f"area {area_text(annotations.area[place])}")
    found.add_boxes(
        "area-wrong",
        name,
        is_inside & is_area_wrong,
        lambda place: f"area {area_text(annotations.area[place])} of {box_text(annotations.bbox[place])}",
    )


def _check_repetitions(found: FindingCollector, name: str, reading: Reading) -> None:
    split, table = found.raw.splits[name], found.tables[name]
    same_class, other_class = repeated_boxes(table)
    found.add_boxes("duplicate-box", name, same_class)
    names = [entry.get("name") for entry in found.raw.categories]

    def class_text(place: int) -> str:
        category = table.category[place]
        text = names[category] if category >= 0 else int(split.annotations.category_id[place])
        return f"{box_text(split.annotations.bbox[place])} as {text!r}"

    found.add_boxes("duplicate-box-other-class", name, other_class, class_text)
    if reading.is_as_read:
        pairs = near_repeats(table)
        first_of = np.full(len(table.boxes), -1)
        first_of[pairs[::-1, 1]] = pairs[::-1, 0]  # the first box that a box nearly repeats

        def pair_text(place: int) -> str:
            box, first = split.annotations.bbox[[place, first_of[place]]]
            return f"{box_text(box)}, nearly as {box_text(first)}"

        found.add_boxes("near-duplicate-box", name, first_of >= 0, pair_text)
    if found.raw.format != "coco":  # in other formats, no tool reads ids of annotations
        return
    ids = split.annotations.id.tolist()
    is_repeated = np.zeros(len(ids), dtype=bool)
    is_repeated[repeated_places(ids)] = True
    found.add_boxes("duplicate-annotation-id", name, is_repeated, lambda place: f"id {ids[place]}")


def _check_counts(found: FindingCollector, name: str, facts: list[ImageFacts]) -> None:
    split, table = found.raw.splits[name], found.tables[name]
    if not split.images:
        found.add("no-images", [Offender(name, str(split.origin), None, f"split {name!r}")])
        return
    if not split.annotations:
        if has_no_files(split, facts):
            return
        is_all = not any(other.annotations for other in found.raw.splits.values())
        if name == next(iter(found.raw.splits)) or not is_all:
            kind = "no-boxes" if is_all else "unlabelled-train" if name == "train" else "unlabelled-split"
            found.add(kind, [Offender(name, str(split.origin), None, count_text(len(split.images), "image"))])
        return
    if table.is_crowd.all() and name == next(iter(found.raw.splits)):
        found.add("only-crowds", [Offender(name, str(split.origin), None, count_text(len(table.boxes), "crowd"))])
    found.add_boxes("crowd", name, table.is_crowd)
    known = table.image >= 0
    counts = count_boxes(table, len(split.images))  # (I,)
    without = np.flatnonzero(counts == 0).tolist()
    found.add_images("image-without-boxes", name, without, lambda place: "0 boxes")
    targets = np.bincount(table.image[known & ~table.is_crowd], minlength=len(split.images))
    many = np.flatnonzero(targets > _MANY_BOXES)
    most_first = many[np.argsort(-targets[many], kind="stable")].tolist()
    found.add_images("many-boxes", name, most_first, lambda place: count_text(int(targets[place]), "box"))
