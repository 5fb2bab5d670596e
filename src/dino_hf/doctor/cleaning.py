"""Decide which entries of a data set are corrected or left out, and record every change."""

import re
from collections import Counter
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from ..common.images import IMAGE_SUFFIXES
from ..common.text import count_text
from ..data.image_facts import ImageFacts, image_key
from ..data.raw import BoxTable, RawDataset, area_text, count_boxes, make_box_table, stated_sizes
from .boxes import CleanedBoxes, ImageGeometry, clean_boxes, near_repeats, repeated_boxes, without_near_repeats
from .checks import Report, images_in_other_splits, wrong_layout_kind
from .findings import box_text
from .image_checks import find_copies, has_no_files

ANNOTATION_FILE = "_annotations.coco.json"
_LONGEST_NAME = 200  # bytes of a file or folder name
_MOST_NEAR = 0.5  # share of the images of a split
_SAME_SHAPE = 0.01  # relative difference of two aspect ratios, for a side that was rounded when an image was resized
_SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif", "MPO": ".jpg"}  # other formats: the name of the format in lower case


class Change(NamedTuple):
    """One difference between the copy and the original."""

    kind: str  # kind of finding that the change corrects
    action: str
    split: str | None
    where: str
    file: str | None
    before: str
    after: str  # empty if the entry was left out


class CleanedSplit(NamedTuple):
    """COCO's images and annotations of the copy."""

    images: list[dict]
    annotations: list[dict]
    sources: list[int]  # place of each image in the original split


class Cleaner:
    """Cleans a data set, one split at a time.

    Attributes:
        categories: COCO categories of the copy.
        changes: all changes so far.
        kept: one sentence for each decision that is left to the owner of the data.
    """

    def __init__(self, raw: RawDataset, report: Report, drop_near_copies: bool = False):
        self.raw, self.report, self.drop_near_copies = raw, report, drop_near_copies
        self.changes: list[Change] = []
        self.kept: list[str] = []
        for problem in raw.problems:
            if problem.kind == "unreadable-image":
                continue  # reported as image-broken
            self._note(problem.kind, "left out", None, problem.where, None, problem.message)
        self.categories, self._category_ids = self._clean_categories()  # (K,) id in the copy of each category
        self._reasons = {name: self._reasons_to_leave_out(name) for name in raw.splits}
        self._add_copies()

    def _note(self, kind, action, split, where, file, before, after="") -> None:
        self.changes.append(Change(kind, action, split, where, file, str(before), str(after)))

    def _clean_categories(self) -> tuple[list[dict], np.ndarray]:
        by_id, id_of_name, ids = {}, {}, []
        for place, entry in enumerate(self.raw.categories):
            category_id, name, where = entry["id"], str(entry["name"]), f"categories[{place}]"
            before = f"id {category_id}, name {name!r}"
            if category_id in by_id:
                first = by_id[category_id]["name"]
                self._note("duplicate-category-id", "left out", None, where, None, before)
                if name != first:
                    self.kept.append(
                        f"Category id {category_id} was {first!r} and {name!r}; its boxes are now {first!r}."
                    )
            elif name in id_of_name:
                category_id = id_of_name[name]
                self._note("duplicate-category-name", "merged", None, where, None, before, f"id {category_id}")
            else:
                by_id[category_id] = {key: entry[key] for key in ("id", "name", "supercategory") if key in entry}
                id_of_name[name] = category_id
            ids.append(category_id)
        return list(by_id.values()), np.array(ids, dtype=np.int64)

    def _reasons_to_leave_out(self, name: str) -> dict[int, tuple[str, str]]:
        """Map places of images to a kind of finding and a text."""
        split, facts, stated = self.raw.splits[name], self.report.facts[name], stated_sizes(self.raw.splits[name])
        kinds = self.report.fits[name].kinds
        keys_of_id = {}
        for place, image in enumerate(split.images):
            keys_of_id.setdefault(image["id"], set()).add(image_key(image) or place)
        reasons = {}
        for place, (image, fact) in enumerate(zip(split.images, facts, strict=True)):
            if fact.is_missing:
                reasons[place] = "image-missing", str(image.get("path"))
            elif fact.error is not None:
                reasons[place] = fact.error_kind, fact.error
            elif len(keys_of_id[image["id"]]) > 1:
                reasons[place] = (
                    "duplicate-image-id",
                    f"id {image['id']}: its boxes cannot be assigned to one of the images",
                )
            elif kinds[place] == "image-resized":
                scale = np.array(fact.size) / stated[place]
                if abs(scale[0] / scale[1] - 1) > _SAME_SHAPE:
                    shapes = "{} x {}, stated {:g} x {:g}".format(*fact.size, *stated[place])
                    reasons[place] = "image-resized", f"{shapes}, which is a different shape"
        return reasons

    def _add_copies(self) -> None:
        """Find copies among the images that would stay.

        Near copies inside a split stay, because they may be intended. Near copies of images in another split also stay if they are
        most of their split, because then they come from a fixed camera.
        """
        gone = ImageFacts(is_missing=True)
        facts = {
            name: [gone if place in self._reasons[name] else fact for place, fact in enumerate(of_split)]
            for name, of_split in self.report.facts.items()
        }
        num_boxes = {
            name: count_boxes(make_box_table(split, self.raw.categories), len(split.images))
            for name, split in self.raw.splits.items()
        }
        copies = find_copies(self.raw, facts, num_boxes)
        num_all = sum(copy.kind == "near-leak" for copy in copies)
        if num_all and not self.drop_near_copies:
            self.kept.append(
                f"{count_text(num_all, 'image')} look like an image in another split and are kept. Look at them; "
                "--drop-near-copies leaves them out."
            )
        num_near = Counter(copy.split for copy in copies if copy.kind == "near-leak")
        staying = {name for name, count in num_near.items() if count > _MOST_NEAR * len(facts[name])}
        self.kept += [
            f"{count_text(num_near[name], 'image')} of {name} look like an image in another split. They are most of {name}, as "
            "with a fixed camera, so they are kept; split by scene, not by frame."
            for name in sorted(staying if self.drop_near_copies else ())
        ]
        for copy in copies:
            is_dropped = copy.is_exact or (
                self.drop_near_copies and copy.kind == "near-leak" and copy.split not in staying
            )
            if is_dropped:
                other, place = copy.original
                original = self.raw.splits[other].images[place].get("file_name")
                lost = f"left out with {count_text(int(num_boxes[copy.split][copy.image]), 'annotation')}"
                self._reasons[copy.split][copy.image] = copy.kind, f"as {original} of {other}; {lost}"

    def clean(self, name: str) -> CleanedSplit:
        split = self.raw.splits[name]
        if has_no_files(split, self.report.facts[name]):
            images = f"{len(split.images)} images"
            self._note("split-not-here", "left out", name, str(split.origin), None, images)
            return CleanedSplit([], [], [])
        images, sources, new_place = self._clean_images(name)
        annotations = self._clean_annotations(name, new_place)
        ids = [image["id"] for image in images]
        for entry in annotations:
            entry["image_id"] = ids[entry["image_id"]]
        if not images:
            self._note("no-images", "left out", name, str(split.origin), None, f"split {name}")
            if split.images:
                self.kept.append(f"No image of {name} is left, so the copy has no such split; split the data again.")
        return CleanedSplit(images, annotations, sources)

    def _clean_images(self, name: str) -> tuple[list[dict], list[int], np.ndarray]:
        """Images, their sources, and (I,) the place in the copy of each image of the split; -1 if it is left out."""
        split, facts, stated = self.raw.splits[name], self.report.facts[name], stated_sizes(self.raw.splits[name])
        images, sources, place_of_key, kinds = [], [], {}, self.report.fits[name].kinds
        new_place = np.full(len(split.images), -1)
        names = {ANNOTATION_FILE}
        for place, (image, fact) in enumerate(zip(split.images, facts, strict=True)):
            where, file, key = f"images[{place}]", image.get("file_name"), image_key(image)
            if place in self._reasons[name]:
                kind, text = self._reasons[name][place]
                self._note(kind, "left out", name, where, file, text)
                continue
            if key is not None and key in place_of_key:
                first = images[place_of_key[key]]["id"]
                kind = "duplicate-image-id" if image["id"] == first else "duplicate-file"
                self._note(kind, "merged", name, where, file, f"id {image['id']}", f"id {first}")
                new_place[place] = place_of_key[key]
                continue
            if key is not None:
                place_of_key[key] = len(images)
            width, height = fact.size
            kind = kinds[place]
            if kind == "stated-size-unclear":
                width, height = map(int, stated[place])
                self.kept.append(
                    f"{file} of {name} is {fact.size[0]} x {fact.size[1]}, stated {width} x {height}, and its boxes fit both: "
                    "size and boxes are as they were. Correct the size, or the boxes."
                )
            elif fact.size != tuple(stated[place]):
                if kind not in ("image-rotated", "image-resized", "stated-size-wrong"):
                    kind = (
                        "image-size-unknown"
                        if None in (image.get("width"), image.get("height"))
                        else "image-size-wrong"
                    )
                before = f"{image.get('width')} x {image.get('height')}"
                action = (
                    "boxes turned"
                    if kind == "image-rotated"
                    else "boxes scaled"
                    if kind == "image-resized"
                    else "stated"
                )
                self._note(kind, action, name, where, file, before, f"{width} x {height}")
            elif kind == "image-orientation-unclear":
                self.kept.append(
                    f"{file} of {name} has an EXIF orientation; whether its boxes are for the upright image is unclear."
                )
            new_place[place] = len(images)
            sources.append(place)
            file_name = _free_name(file or str(image["id"]), image["id"], fact, names)
            images.append({"id": image["id"], "file_name": file_name, "width": width, "height": height})
        return images, sources, new_place

    def _clean_annotations(self, name: str, new_place: np.ndarray) -> list[dict]:
        """Annotations of the copy. Their `image_id` is the place of the image in the copy."""
        split = self.raw.splits[name]
        geometry, known_sizes = self._geometry(name)
        table = make_box_table(split, self.raw.categories, known_sizes)
        cleaned = self._clean_boxes(name, table, geometry)
        image = np.where(table.image >= 0, np.append(new_place, -1)[table.image], -1)  # (N,) in the copy
        category = np.where(table.category >= 0, np.append(self._category_ids, 0)[table.category], -1)
        is_kept = cleaned.is_kept & (image >= 0) & (table.category >= 0)
        final = table._replace(boxes=cleaned.boxes, image=np.where(is_kept, image, -1), category=category)
        is_repeat, _ = repeated_boxes(final)
        is_near_repeat = self._near_repeats(name, final)
        annotations, taken, others = [], set(), images_in_other_splits(self.raw, name)
        originals = split.annotations
        next_id = 1 + max((number for number in originals.id if isinstance(number, int)), default=0)
        for place in range(len(originals)):
            kind, before, after = cleaned.kinds[place], box_text(originals.bbox[place]), ""
            if table.image[place] >= 0 and image[place] < 0:
                continue  # left out with its image, for which a change is recorded
            if table.image[place] < 0:
                # The box is not moved to the other split. Ids may be equal by chance, and a wrong box is worse than a missing one.
                image_id = int(originals.image_id[place])
                kind, before = "image-of-other-split" if image_id in others else "unknown-image", f"image_id {image_id}"
            elif table.category[place] < 0:
                kind, before = "unknown-category", f"category_id {originals.category_id[place]}"
            elif is_repeat[place]:
                kind = "duplicate-box"
            elif is_near_repeat[place]:
                kind = "near-duplicate-box"
            box, area = cleaned.boxes[place].tolist(), float(cleaned.areas[place])
            stays = is_kept[place] and not is_repeat[place] and not is_near_repeat[place]
            if kind:
                if kind in ("area-wrong", "area-not-number"):
                    before, after = f"area {area_text(originals.area[place])}", f"area {area:.6g}"
                elif stays:
                    after = box_text(box)
                where = originals.where(place)
                old_image = int(table.image[place])
                file = split.images[old_image].get("file_name") if old_image >= 0 else None
                self._note(kind, "corrected" if stays else "left out", name, where, file, before, after)
            if not stays:
                continue
            annotation_id = originals.id[place]
            if not isinstance(annotation_id, int) or annotation_id in taken:
                if annotation_id is not None:
                    where = originals.where(place)
                    self._note("duplicate-annotation-id", "renumbered", name, where, None, annotation_id, next_id)
                annotation_id, next_id = next_id, next_id + 1
            taken.add(annotation_id)
            annotations.append(
                {
                    "id": annotation_id,
                    "image_id": int(image[place]),
                    "category_id": int(category[place]),
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(table.is_crowd[place]),
                }
            )
        return annotations

    def _near_repeats(self, name: str, table: BoxTable) -> np.ndarray:
        """(N,) whether a box is left out because it nearly repeats another box. All False unless requested."""
        if not self.report.readings[name].is_as_read and not self.report.readings[name].is_sure:
            return np.zeros(len(table.boxes), dtype=bool)  # the boxes are not in pixels
        pairs = near_repeats(table)
        count = len(np.unique(pairs[:, 1]))
        if count and not self.drop_near_copies:
            repeat, are, them = ("repeats", "is", "it") if count == 1 else ("repeat", "are", "them")
            self.kept.append(
                f"{count_text(count, 'box')} of {name} nearly {repeat} another box of the same class, and {are} kept. Look "
                f"at {them}; --drop-near-copies leaves {them} out."
            )
        return ~without_near_repeats(pairs if self.drop_near_copies else pairs[:0], len(table.boxes))

    def _geometry(self, name: str) -> tuple[ImageGeometry, np.ndarray]:
        """Geometry of the images of a split, and (I, 2) sizes of the images on which its boxes were drawn."""
        facts, fit = self.report.facts[name], self.report.fits[name]
        stated = stated_sizes(self.raw.splits[name])
        unknown = np.nan, np.nan
        sizes = np.array([fact.size or unknown for fact in facts], dtype=np.float64).reshape(-1, 2)
        stored = np.array([fact.stored_size or unknown for fact in facts], dtype=np.float64).reshape(-1, 2)
        is_rotated = np.array([kind == "image-rotated" for kind in fit.kinds], dtype=bool)
        is_resized = np.array([kind == "image-resized" for kind in fit.kinds], dtype=bool)
        is_unclear = np.array([kind == "stated-size-unclear" for kind in fit.kinds], dtype=bool)
        sizes = np.where(is_unclear[:, None], stated, sizes)
        orientations = np.where(is_rotated, [fact.orientation for fact in facts], 1)
        scales = np.where(is_resized[:, None], sizes / np.where(is_resized[:, None], stated, 1), 1.0)
        return ImageGeometry(sizes, stored, orientations, scales), fit.sizes

    def _clean_boxes(self, name: str, table: BoxTable, geometry: ImageGeometry) -> CleanedBoxes:
        reading = self.report.readings[name]
        if not reading.is_as_read and not reading.is_sure:
            self.kept.append(
                f"The boxes of {name} are probably {reading.text}, "
                "but that is not certain, so they were not changed; convert them yourself."
            )
            is_number = table.is_number
            kinds = np.where(is_number, "", "box-not-numbers").astype(object)
            areas = np.where(np.isnan(table.area), np.abs(table.boxes[:, 2:].prod(1)), table.area)
            return CleanedBoxes(table.boxes, areas, kinds, is_number)
        boxes = reading.to_xywh(table, self.raw.format)
        areas = table.area
        if not reading.is_as_read:
            kind = wrong_layout_kind(reading, self.raw.format)
            where, after = str(self.raw.splits[name].origin), "(x, y, width, height) in pixels"
            self._note(kind, f"{count_text(len(boxes), 'box')} converted", name, where, None, reading.text, after)
            areas = np.full_like(areas, np.nan)  # areas of wrong boxes are wrong too
        if not len(geometry.sizes):
            geometry = ImageGeometry(np.ones((1, 2)), np.ones((1, 2)), np.ones(1), np.ones((1, 2)))
        return clean_boxes(boxes, areas, geometry.of_boxes(table.image))


def portable_name(name: str) -> str:
    """A name of a file or folder that is valid on Windows and has at most 200 bytes in UTF-8. The end of a long name stays."""
    text = name.encode(errors="replace").decode()
    text = re.sub(r'[\x00-\x1f\x7f<>:"|?*\\/]', "_", text).rstrip(". ") or "_"
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", text):
        text = f"_{text}"
    return text.encode()[-_LONGEST_NAME:].decode(errors="ignore")


def _free_name(file_name: str, image_id: int, fact: ImageFacts, taken: set[str]) -> str:
    """A relative path inside the folder of the split that no other image has. Case is ignored, as in some file systems."""
    parts = [part for part in PurePosixPath(file_name.replace("\\", "/")).parts if part not in ("/", "..", ".")]
    parts = [portable_name(part) for part in parts] or [str(image_id)]
    path = PurePosixPath(*parts)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        path = path.with_name(path.name + _SUFFIXES.get(fact.format, f".{fact.format.lower()}"))
    number, free = image_id, path
    while str(free).casefold() in taken:
        free, number = path.with_name(f"{path.stem}_{number}{path.suffix}"), number + 1
    taken.add(str(free).casefold())
    return str(free)
