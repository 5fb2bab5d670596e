"""A held-out part of a data set in which each class has its share."""

from collections import Counter, defaultdict

import numpy as np


def stratified_split(
    classes: list[set[int]], fraction: float, seed: int, groups: list[int] | None = None
) -> tuple[list[int], list[int]]:
    """Iterative stratification of multi-label data (Sechidis, Tsoumakas, Vlahavas, ECML PKDD 2011) for two parts: the rarest
    class is shared out first, each of its images to the part that lacks it most. Images without objects are a class of their
    own.

    Args:
        classes: of each image.
        fraction: of the images that are held out, 0 < fraction < 1; at least one image, and not all.
        seed: ties are broken at random, the same for the same seed.
        groups: of each image; images of one group, such as augmented copies of one photo, stay together.
    Returns:
        indices of the images that are kept, and of those held out, ascending.
    """
    members = defaultdict(list)
    for index in range(len(classes)):
        members[index if groups is None else groups[index]].append(index)
    units = list(members.values())
    if len(units) < 2:
        images = "1 image" if len(classes) == 1 else f"{len(classes)} images, copies of one,"
        raise ValueError(
            f"{images} cannot be split into training and validation data; add images, or a split of your own."
        )
    labels = [set().union(*(classes[index] or {-1} for index in unit)) for unit in units]
    order = np.random.default_rng(seed).permutation(len(units)).tolist()
    remaining = {unit: labels[unit] for unit in order}
    units_of = defaultdict(dict)
    for unit in order:
        for label in labels[unit]:
            units_of[label][unit] = None
    shares = (1 - fraction, fraction)
    counts = Counter(label for unit in units for index in unit for label in classes[index] or {-1})
    wanted = [{label: share * count for label, count in counts.items()} for share in shares]
    room = [share * len(classes) for share in shares]
    parts = ([], [])
    while remaining:
        label = min((label for label in units_of if units_of[label]), key=lambda label: (len(units_of[label]), label))
        for unit in list(units_of[label]):
            part = max((0, 1), key=lambda part: (wanted[part][label], room[part]))
            parts[part].append(unit)
            room[part] -= len(units[unit])
            for index in units[unit]:
                for each in classes[index] or {-1}:
                    wanted[part][each] -= 1
            for each in remaining.pop(unit):
                del units_of[each][unit]
    for empty, other in (parts, parts[::-1]):
        if not empty:
            empty.append(other.pop())
    kept, held_out = (sorted(index for unit in part for index in units[unit]) for part in parts)
    return kept, held_out
