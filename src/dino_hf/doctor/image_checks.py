"""Check images: missing or damaged files, sizes that differ from the stated ones, and copies."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..common.text import count_text
from ..data.box_layouts import leaving
from ..data.file_names import ambiguous_text
from ..data.files import is_text
from ..data.image_facts import ImageFacts, exact_copies, image_key, near_copies
from ..data.raw import BoxTable, RawDataset, RawSplit, count_boxes, stated_sizes
from .findings import FindingCollector, Offender

_FLIPPING, _TURNING = (2, 3, 4), (5, 6, 7, 8)  # EXIF orientations that keep, and that swap, width and height
SURE = 20.0  # likelihood ratio at which one of two sizes is chosen if the boxes fit both


class SizeFit(NamedTuple):
    """Sizes of the images of a split."""

    kinds: list[str | None]  # kind of finding for the size of each image; None: the stated size is right
    sizes: np.ndarray  # (I, 2) width and height of the image on which the boxes were drawn; NaN if unknown


def fit_sizes(facts: Sequence[ImageFacts], stated: np.ndarray, table: BoxTable) -> SizeFit:
    """Decide whether the boxes fit the stated or the actual size, for each image where the two differ.

    1. The size that fewer boxes leave is right.
    2. If equally many boxes leave both, the other images of the split with the same kind of difference decide, if they agree.
    3. If no image decides, likelihood decides: the probability that boxes drawn for one size all lie inside the other.
    4. If that is not clear, the image is "stated-size-unclear", and nothing is changed.

    Args:
        stated: (I, 2) width and height; NaN if unknown.
        table: boxes of the split. Its column `sizes` is not used.
    """
    known = np.array([(math.nan, math.nan) if fact.size is None else fact.size for fact in facts]).reshape(-1, 2)
    kinds = [_simple_kind(fact, size) for fact, size in zip(facts, stated, strict=True)]
    sizes = np.where(np.isnan(stated), known, stated)
    for kind in ("image-rotated", "image-resized"):
        differing = [place for place, other in enumerate(kinds) if other == kind]
        for place, is_stated in zip(differing, _are_stated(differing, known, stated, table), strict=True):
            if is_stated is None:
                kinds[place] = "stated-size-unclear"
            elif not is_stated:
                kinds[place] = "stated-size-wrong"
                sizes[place] = known[place]
    return SizeFit(kinds, sizes)


def _simple_kind(fact: ImageFacts, stated: np.ndarray) -> str | None:
    """Kind of finding that follows from the sizes without the boxes."""
    if fact.size is None:
        return None
    is_stated = not np.isnan(stated).any()
    if is_stated and fact.size != tuple(stated):
        return "image-rotated" if fact.stored_size == tuple(stated) else "image-resized"
    is_square = fact.size[0] == fact.size[1]
    if fact.orientation in _FLIPPING or (fact.orientation in _TURNING and (is_square or not is_stated)):
        return "image-orientation-unclear"
    return None


def _are_stated(places: list[int], known: np.ndarray, stated: np.ndarray, table: BoxTable) -> list[bool | None]:
    """Whether the boxes of each image were drawn for the stated size. None: unclear."""
    if not places:
        return []
    by_boxes, log_odds, has_boxes = [], 0.0, []
    order = np.argsort(table.image, kind="stable")
    starts = np.searchsorted(table.image[order], places)
    ends = np.searchsorted(table.image[order], places, side="right")
    for place, start, end in zip(places, starts, ends, strict=True):
        mine = order[start:end]
        corners = table.corners[mine[table.is_number[mine]]]
        leaving_stated, leaving_known = (
            int(leaving(corners, np.broadcast_to(size[place], (len(corners), 2))).sum()) for size in (stated, known)
        )
        has_boxes.append(bool(len(corners)))
        by_boxes.append(None if leaving_stated == leaving_known else leaving_stated < leaving_known)
        if by_boxes[-1] is None and not leaving_stated:
            # A box drawn for one size lies inside the other with a probability of about the ratio of the sides.
            log_odds += len(corners) * float(np.log(known[place] / stated[place]).sum())
    clear = {answer for answer in by_boxes if answer is not None}
    fallback = clear.pop() if len(clear) == 1 else None
    if fallback is None and not clear and abs(log_odds) >= math.log(SURE):
        fallback = log_odds > 0
    # An image without boxes: only its stated size can be wrong.
    return [
        False if not has else fallback if one is None else one for one, has in zip(by_boxes, has_boxes, strict=True)
    ]


_HELD_OUT = {
    "train": 0,
    "validation": 2,
    "test": 3,
}  # if two splits have the same image, the higher one keeps it; other splits: 1
_DARK = 2**14  # 16-bit images with only lower values become darker than a quarter of white


def check_image_entries(found: FindingCollector, name: str) -> None:
    images, stated = found.raw.splits[name].images, stated_sizes(found.raw.splits[name])
    sizes = [(image.get("width"), image.get("height")) for image in images]
    is_known = ~np.isnan(stated).any(1)  # (I,)
    unknown = [place for place, size in enumerate(sizes) if None in size]
    wrong = [place for place, size in enumerate(sizes) if None not in size and not is_known[place]]
    found.add_images("image-size-unknown", name, unknown, lambda place: "no width and height")
    found.add_images(
        "image-size-wrong", name, wrong, lambda place: f"width {sizes[place][0]!r}, height {sizes[place][1]!r}"
    )
    names = [image.get("file_name") or "" for image in images]
    broken = [place for place, text in enumerate(names) if not is_text(text)]
    found.add_images("name-not-utf8", name, broken, lambda place: ascii(names[place]))
    ids = [image.get("id") for image in images]
    found.add_images("duplicate-image-id", name, repeated_places(ids), lambda place: f"id {ids[place]!r}")
    keys = [image_key(image) for image in images]
    found.add_images("duplicate-file", name, repeated_places(keys), lambda place: f"id {ids[place]!r}")


def repeated_places(values: list) -> list[int]:
    """Places of values that equal an earlier value. None equals no other value."""
    seen, repeated = set(), []
    for place, value in enumerate(values):
        if value is not None and value in seen:
            repeated.append(place)
        seen.add(value)
    return repeated


def has_no_files(split: RawSplit, facts: list[ImageFacts]) -> bool:
    """Whether a test split has only a list of images and no image files, as in COCO's downloads."""
    return split.name == "test" and not split.annotations and bool(facts) and all(fact.is_missing for fact in facts)


def check_files(found: FindingCollector, name: str, facts: list[ImageFacts], fit: SizeFit) -> None:
    images, stated = found.raw.splits[name].images, stated_sizes(found.raw.splits[name])

    def add(kind: str, places: list[int], value) -> None:
        found.add_images(kind, name, places, value)

    def size_text(place: int) -> str:
        size, orientation = facts[place].size, facts[place].orientation
        text = f"{size[0]} x {size[1]}, stated {stated[place][0]:g} x {stated[place][1]:g}"
        return text if orientation == 1 else f"{text}, EXIF orientation {orientation}"

    if has_no_files(found.raw.splits[name], facts):
        found.add(
            "split-not-here",
            [Offender(name, str(found.raw.splits[name].origin), None, count_text(len(images), "image"))],
        )
        return
    missing = [place for place, fact in enumerate(facts) if fact.is_missing]
    add("image-missing", missing, lambda place: _missing_file(images[place]))
    broken = [place for place, fact in enumerate(facts) if fact.error is not None]
    for kind in ("image-broken", "image-too-large", "image-mode-unknown"):
        add(kind, [place for place in broken if facts[place].error_kind == kind], lambda place: facts[place].error)
    for kind in (
        "image-resized", "image-rotated", "stated-size-wrong", "stated-size-unclear", "image-orientation-unclear",
    ):  # fmt: skip
        add(kind, [place for place, other in enumerate(fit.kinds) if other == kind], size_text)
    deep = [place for place, fact in enumerate(facts) if fact.values is not None and fact.values[1] < _DARK]
    add("image-mode", deep, lambda place: "values from {:,} to {:,}, of 65,535".format(*facts[place].values))
    several = [place for place, fact in enumerate(facts) if fact.other_frames is not None]
    add("image-frames", several, lambda place: f"the first of several {facts[place].other_frames}")


def _missing_file(image: Mapping) -> str:
    path, candidates = str(image.get("path") or "no bytes and no path"), image.get("candidates")
    return f"{path} {ambiguous_text(candidates)}" if candidates else path


class Copy(NamedTuple):
    """An image that is a copy of another image."""

    split: str
    image: int  # place
    original: tuple[str, int]  # split and place of the image to keep
    is_exact: bool  # whether the bytes are equal

    @property
    def kind(self) -> str:
        """Kind of finding."""
        if self.split != self.original[0]:
            return "leak" if self.is_exact else "near-leak"
        return "duplicate-image" if self.is_exact else "near-copy"


def find_copies(raw: RawDataset, facts: dict[str, list[ImageFacts]], num_boxes: dict[str, np.ndarray]) -> list[Copy]:
    """Find copies of images.

    If two splits have the same image, the held-out split keeps it. Inside a split, the image with most boxes is kept. A file that
    is listed twice in a split is a different finding.

    Args:
        num_boxes: split -> (I,) number of boxes of each image.
    Returns:
        copies, in the order of their originals.
    """
    places = [(name, place) for name, split in raw.splits.items() for place in range(len(split.images))]
    all_facts = [facts[name][place] for name, place in places]
    keys = [image_key(raw.splits[name].images[place]) for name, place in places]

    def rank(number: int) -> tuple[int, int, int]:
        name, place = places[number]
        return -_HELD_OUT.get(name, 1), -int(num_boxes[name][place]), number

    copies, kept_of = [], np.arange(len(places))
    for group in exact_copies(all_facts, keys):
        kept, *others = sorted(group, key=rank)
        kept_of[group] = kept
        for number in others:
            is_listed_twice = (
                places[number][0] == places[kept][0] and keys[number] is not None and keys[number] == keys[kept]
            )
            if not is_listed_twice:
                copies.append(Copy(*places[number], places[kept], True))
    order = np.array(sorted(range(len(places)), key=rank), dtype=np.int64)  # images that are kept come first
    ranks = np.argsort(order)
    names = list(raw.splits)
    split_of = np.array([names.index(name) for name, _ in places], dtype=np.int64)
    # An original in another split goes before one in the same split, because it makes AP wrong. Then the lower rank goes first.
    none = 2 * len(places)
    best = np.full(len(places), none)
    for pairs in near_copies(all_facts):
        pairs = kept_of[pairs]
        kept, other = np.where(ranks[pairs[:, :1]] < ranks[pairs[:, 1:]], pairs, pairs[:, ::-1]).T
        np.minimum.at(best, other, ranks[kept] + len(places) * (split_of[kept] == split_of[other]))
    for number in np.argsort(best, kind="stable")[: (best < none).sum()].tolist():
        copies.append(Copy(*places[number], places[order[best[number] % len(places)]], False))
    return copies


def check_copies(found: FindingCollector, facts: dict[str, list[ImageFacts]]) -> None:
    splits = found.raw.splits
    num_boxes = {name: count_boxes(table, len(splits[name].images)) for name, table in found.tables.items()}
    for copy in find_copies(found.raw, facts, num_boxes):
        other, place = copy.original
        file, original = (
            splits[copy.split].images[copy.image].get("file_name"),
            splits[other].images[place].get("file_name"),
        )
        value = f"as {original} of {other}"
        found.add(
            copy.kind, [Offender(copy.split, f"images[{copy.image}]", file, value, copy.image, other=copy.original)]
        )
