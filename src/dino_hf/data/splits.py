"""Hold out a part of a data set: each class has its share, and copies of an image stay together."""

from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

from .image_digests import MOST_DECODED, image_digests
from .image_facts import exact_copies, image_key, inspect_images, near_copies
from .raw import RawSplit
from .rows import CocoData

# A group of near copies with a larger share of the images is probably from a fixed camera. It cannot be split by groups.
MOST_NEAR = 0.5


def stratified_split(
    classes: list[set[int]], fraction: float, seed: int, groups: list[int] | None = None
) -> tuple[list[int], list[int]]:
    """Split images so that each class has its share in both parts.

    This is iterative stratification of multi-label data (Sechidis, Tsoumakas, Vlahavas, ECML PKDD 2011). The images of the
    rarest class are distributed first. Each goes to the part that lacks most images of this class. Images without objects form
    a separate class.

    Args:
        classes: classes of each image.
        fraction: share of the images to hold out, 0 < fraction < 1. Each part gets at least one image.
        seed: random seed for the order of images.
        groups: group number of each image. Images of a group, such as augmented copies of a photo, stay together.
    Returns:
        ascending indices of the remaining images, and of the held-out images.
    """
    members = defaultdict(list)
    for index in range(len(classes)):
        members[index if groups is None else groups[index]].append(index)
    units = list(members.values())
    if len(units) < 2:
        images = "1 image" if len(classes) == 1 else f"{len(classes)} images, all copies of one image,"
        raise ValueError(f"{images} cannot be split into training and validation data; add images, or your own split.")
    labels = [set().union(*(classes[index] or {-1} for index in unit)) for unit in units]
    order = np.random.default_rng(seed).permutation(len(units)).tolist()
    remaining = {unit: labels[unit] for unit in order}
    units_of = defaultdict(dict)
    for unit in order:
        for label in labels[unit]:
            units_of[label][unit] = None
    shares = (1 - fraction, fraction)
    counts = Counter(label for unit in units for index in unit for label in classes[index] or {-1})
    missing = [{label: share * count for label, count in counts.items()} for share in shares]
    room = [share * len(classes) for share in shares]
    parts = ([], [])
    while remaining:
        label = min((label for label in units_of if units_of[label]), key=lambda label: (len(units_of[label]), label))
        for unit in list(units_of[label]):
            part = max((0, 1), key=lambda part: (missing[part][label], room[part]))
            parts[part].append(unit)
            room[part] -= len(units[unit])
            for index in units[unit]:
                for each in classes[index] or {-1}:
                    missing[part][each] -= 1
            for each in remaining.pop(unit):
                del units_of[each][unit]
    for empty, other in (parts, parts[::-1]):
        if not empty:
            empty.append(other.pop())
    kept, held_out = (sorted(index for unit in part for index in units[unit]) for part in parts)
    return kept, held_out


def copy_groups(split: RawSplit, data: CocoData) -> tuple[list[int], list[str]]:
    """Group images that are copies. All images of a group must be on the same side of a split.

    Copies are files of equal content, images that look the same after compression or scaling, and Roboflow's augmented copies
    (named <photo>.rf.<hash>.jpg).

    Args:
        split: the source of `data`, with the same images in the same order.
    Returns:
        a group number for each image, and notes for the user.
    """
    names = data.dataset.select_columns("file_name")[:]["file_name"]
    by_name = _Groups(len(names))
    by_name.join_equal([_photo(name) for name in names])
    exact = by_name.copy()
    exact.join_equal(image_digests(data))
    if len(names) > MOST_DECODED:
        note = f"Of {len(names)} images only exact copies are kept on one side of the split; near copies are not searched for."
        near, notes = exact, [note]
    else:
        near, notes = exact.copy(), []
        facts = inspect_images({"": split}, decode=True)[""]
        for group in exact_copies(facts, [image_key(image) for image in split.images]):
            near.join_all(group)
        for pairs in near_copies(facts):
            for pair in pairs.tolist():
                near.join_all(pair)
    most = max(np.bincount(near.numbers()), default=0)
    if most > max(2, MOST_NEAR * len(names)) and near.numbers() != exact.numbers():
        notes.append(
            f"{most} of {len(names)} images look the same, as with a fixed camera, so near copies may be on both sides of "
            "the split."
        )
        near = exact
    numbers = near.numbers()
    if (num_groups := len(set(numbers))) > 1:
        if num_groups < len(names):
            notes.append(
                f"{len(names) - num_groups} of {len(names)} images are copies of others and stay on their side of the split."
            )
        return numbers, notes
    notes.append("All images are copies of one image, so copies may be on both sides of the split.")
    return by_name.numbers(), notes


def _photo(name: str | None) -> str | None:
    return name.split(".rf.")[0] if name and ".rf." in name else None


class _Groups:
    """Disjoint sets of places (union-find)."""

    def __init__(self, num: int):
        self._parent = list(range(num))

    def copy(self) -> "_Groups":
        other = _Groups(0)
        other._parent = list(self._parent)
        return other

    def find(self, place: int) -> int:
        while self._parent[place] != place:
            self._parent[place] = self._parent[self._parent[place]]
            place = self._parent[place]
        return place

    def join_all(self, places: Iterable[int]) -> None:
        roots = sorted({self.find(place) for place in places})
        for root in roots[1:]:
            self._parent[root] = roots[0]

    def join_equal(self, keys: Iterable[object]) -> None:
        """Join places with equal keys. None is no key."""
        places: dict[object, int] = {}
        for place, key in enumerate(keys):
            if key is not None:
                self.join_all((place, places.setdefault(key, place)))

    def numbers(self) -> list[int]:
        return [self.find(place) for place in range(len(self._parent))]
