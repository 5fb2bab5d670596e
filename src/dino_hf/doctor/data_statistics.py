"""Statistics of a data set: numbers of images and boxes by class, size and shape."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from ..data.raw import BoxTable, RawDataset, count_boxes

SIZE_NAMES = ("small", "medium", "large")
_SIZE_EDGES = (32**2, 96**2)  # COCO's, in square pixels
RELATIVE_EDGES = (
    0.0,
    0.02,
    0.05,
    0.1,
    0.2,
    0.3,
    0.5,
    0.75,
    1.0,
)  # square root of the share of the image that a box covers
ASPECT_EDGES = (0.0, 0.125, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0, 8.0, np.inf)  # width : height
COUNT_EDGES = (0, 1, 2, 3, 5, 10, 20, 50, 100, 300, np.inf)  # boxes in an image


def describe(
    raw: RawDataset, tables: Mapping[str, BoxTable], boxes: Mapping[str, np.ndarray], sizes: Mapping[str, np.ndarray]
) -> dict:
    """Statistics for json. Crowds count only as crowds. Boxes without size or image are left out of the histograms.

    Args:
        boxes: split -> (N, 4) x, y, width, height in pixels.
        sizes: split -> (I, 2) width and height of its images; NaN if unknown.
    Returns:
        `splits`: name -> images, boxes, crowds, images_without_boxes; `classes`: id, name and boxes by split; `sizes`,
        `relative_sizes`, `aspect_ratios`, `boxes_per_image`: split -> counts, with the edges under `edges`; `largest_image` and
        `most_boxes`: the images that need most memory, or None.
    """
    splits, histograms, class_counts = {}, {}, {}
    for name, split in raw.splits.items():
        table = tables[name]
        per_image = count_boxes(table, len(split.images))
        splits[name] = {
            "images": len(split.images),
            "boxes": int((~table.is_crowd).sum()),
            "crowds": int(table.is_crowd.sum()),
            "images_without_boxes": int((per_image == 0).sum()),
        }
        known = table.category[(table.category >= 0) & ~table.is_crowd]
        class_counts[name] = np.bincount(known, minlength=len(raw.categories))
        histograms[name] = _histograms(table, boxes[name]) | {"boxes_per_image": _count(per_image, COUNT_EDGES)}
    edges = {"relative_sizes": RELATIVE_EDGES, "aspect_ratios": ASPECT_EDGES, "boxes_per_image": COUNT_EDGES}
    return {
        "splits": splits,
        "classes": [
            {
                "id": entry.get("id"),
                "name": str(entry.get("name")),
                "boxes": {name: int(counts[place]) for name, counts in class_counts.items()},
            }
            for place, entry in enumerate(raw.categories)
        ],
        "sizes": {
            name: dict(zip(SIZE_NAMES, histogram["sizes"], strict=True)) for name, histogram in histograms.items()
        },
        **{kind: {name: histogram[kind] for name, histogram in histograms.items()} for kind in edges},
        # json has no infinity.
        "edges": {kind: [None if edge == np.inf else edge for edge in values] for kind, values in edges.items()},
        **_worst_images(raw, tables, sizes),
    }


def _histograms(table: BoxTable, boxes: np.ndarray) -> dict[str, list[int]]:
    with np.errstate(invalid="ignore"):
        counted = (boxes[:, 2:] > 0).all(1) & ~table.is_crowd
    boxes, sizes, areas = boxes[counted], table.sizes[counted], table.area[counted]
    box_areas = boxes[:, 2] * boxes[:, 3]
    areas = np.where(
        areas > 0, np.minimum(areas, box_areas), box_areas
    )  # COCO states the area of the mask, which is smaller than the box
    relative = np.sqrt(box_areas / sizes.prod(1))
    return {
        "sizes": np.bincount(np.searchsorted(_SIZE_EDGES, areas, side="right"), minlength=3).tolist(),
        "relative_sizes": _count(np.minimum(relative[~np.isnan(relative)], 1), RELATIVE_EDGES),
        "aspect_ratios": _count(boxes[:, 2] / boxes[:, 3], ASPECT_EDGES),
    }


def _count(values: np.ndarray, edges: tuple[float, ...]) -> list[int]:
    """Number of values in each bin [edge, next edge). The last bin includes its upper edge."""
    return np.histogram(values, bins=np.array(edges, dtype=np.float64))[0].tolist()


def _worst_images(raw: RawDataset, tables: Mapping[str, BoxTable], sizes: Mapping[str, np.ndarray]) -> dict:
    largest, most = None, None
    for name, split in raw.splits.items():
        table = tables[name]
        targets = np.bincount(table.image[(table.image >= 0) & ~table.is_crowd], minlength=len(split.images))
        pixels = np.nan_to_num(sizes[name].prod(1))

        def describe_image(place: int, name=name, images=split.images, targets=targets) -> dict:
            size = sizes[name][place]
            width, height = (None, None) if np.isnan(size).any() else map(int, size)
            file = images[place].get("file_name")
            return {"split": name, "file": file, "width": width, "height": height, "boxes": int(targets[place])}

        if pixels.size and pixels.max() > 0 and (largest is None or pixels.max() > largest[0]):
            largest = pixels.max(), describe_image(int(pixels.argmax()))
        if targets.size and targets.max() > 0 and (most is None or targets.max() > most[0]):
            most = targets.max(), describe_image(int(targets.argmax()))
    return {"largest_image": largest and largest[1], "most_boxes": most and most[1]}


def relative_texts(edges: Sequence[float]) -> list[str]:
    """Names of the bins of `relative_sizes`."""
    return [f"{low:g} to {high:g}" for low, high in pairwise(edges)]


def aspect_texts(edges: Sequence[float | None]) -> list[str]:
    """Names of the bins of `aspect_ratios`, such as 1:2 to 4:5 for 0.5 to 0.8."""
    ratio = {0.125: "1:8", 0.25: "1:4", 0.5: "1:2", 0.8: "4:5", 1.25: "5:4", 2.0: "2:1", 4.0: "4:1", 8.0: "8:1"}
    texts = [f"{ratio[low]} to {ratio[high]}" for low, high in pairwise(edges[1:-1])]
    return [f"< {ratio[edges[1]]}", *texts, f"> {ratio[edges[-2]]}"]


def count_texts(edges: Sequence[int | None]) -> list[str]:
    """Names of the bins of `boxes_per_image`, such as 5 to 9 for [5, 10)."""
    return [
        f"{low}+" if high is None else str(low) if high == low + 1 else f"{low} to {high - 1}"
        for low, high in pairwise(edges)
    ]
