"""Groups of images that are copies of one picture, so that a split does not put copies on both of its sides."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .image_facts import ImageFacts, exact_copies, image_key, look_at_images, near_copies
from .raw import RawSplit

MOST_NEAR = 0.5  # of the images; with more in one group of near copies they are frames of a fixed camera


def group_copies(split: RawSplit, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """Open all images of a split and group exact and near copies.

    Args:
        progress: called with the number of images done, and of all.
    Returns:
        (I,) number of the group of each image; an image without copies is alone in its group. Images that cannot be read are too.
    """
    facts = look_at_images({split.name: split}, True, progress)[split.name]
    return group_by_facts(facts, [image_key(image) for image in split.images])


def group_by_facts(facts: Sequence[ImageFacts], keys: Sequence[str | None]) -> np.ndarray:
    """(I,) as `group_copies`, of images that were looked at.

    If near copies would join more than half of the images into one group, only exact copies are grouped: such images are frames
    of a fixed camera, and a split by groups would be none.

    Args:
        keys: where each image lies, see `image_key`.
    """
    exact = [(group[0], other) for group in exact_copies(facts, keys) for other in group[1:]]
    near = [tuple(pair) for pairs in near_copies(facts) for pair in pairs.tolist()]
    groups = _join(len(facts), exact + near)
    if len(facts) and np.bincount(groups).max() > max(2, MOST_NEAR * len(facts)):
        return _join(len(facts), exact)
    return groups


def _join(count: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    """(count,) number of the connected component of each node."""
    if not pairs:
        return np.arange(count)
    first, second = np.array(pairs).T
    graph = coo_array((np.ones(len(pairs), dtype=bool), (first, second)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)
