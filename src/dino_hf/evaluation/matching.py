"""The matches of detections and objects that pycocotools found, stored so that thousands of resamples are cheap."""

from typing import NamedTuple

import numpy as np
from pycocotools.cocoeval import COCOeval, Params

IOU_THRESHOLDS = Params("bbox").iouThrs  # 0.5, 0.55, ..., 0.95
RECALLS = Params("bbox").recThrs  # 0, 0.01, ..., 1
AREA_RANGES = Params("bbox").areaRng  # lowest and highest area of each of the `SIZES`, in pixels
SIZES = tuple(Params("bbox").areaRngLbl)  # all, small (area up to 32^2 pixels), medium (up to 96^2), large


class Hits(NamedTuple):
    """The detections that match an object, at one IoU threshold and for one range of sizes."""

    positions: np.ndarray  # (M,) their positions in the ranking of the class, ascending
    # (M,) bool: whether the object counts. A crowd or an object of another size does not; its detection is then ignored.
    counted: np.ndarray


class ClassMatches(NamedTuple):
    """The detections of one class in all images, highest score first, and their matches.

    Detections with equal scores are in the order of the image ids. Each image has at most 100 detections, or the limit of the
    evaluation. A detection without a match is a false positive if it is `in_range`.
    """

    scores: np.ndarray  # (D,) float64
    images: np.ndarray  # (D,) index of the image
    in_range: np.ndarray  # (A, D) bool: whether the area of the detection is in the range of sizes
    hits: list[list[Hits]]  # A lists of T
    objects: list[np.ndarray]  # A arrays (G,): index of the image of each object that counts

    def is_true(self, iou_index: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Whether each detection is a true positive, and whether it counts, for objects of all sizes. Two arrays (D,) of bool."""
        hits = self.hits[0][iou_index]
        is_true, counts = np.zeros(len(self.scores), dtype=bool), np.ones(len(self.scores), dtype=bool)
        is_true[hits.positions] = hits.counted
        counts[hits.positions] = hits.counted
        return is_true, counts


def class_matches(evaluation: COCOeval, image_ids: np.ndarray) -> ClassMatches:
    """Read the matches from the evaluation of one class.

    Args:
        image_ids: (I,) ids of all images of the data, ascending. Matches hold indices into it.
    """
    num_images = len(evaluation.params.imgIds)
    by_size = [
        [entry for entry in evaluation.evalImgs[area * num_images : (area + 1) * num_images] if entry is not None]
        for area in range(len(SIZES))
    ]
    scores = _joined([entry["dtScores"] for entry in by_size[0]], np.float64)
    order = np.argsort(-scores, kind="stable")
    index = {area: np.searchsorted(image_ids, [entry["image_id"] for entry in of]) for area, of in enumerate(by_size)}
    images = np.repeat(index[0], [len(entry["dtScores"]) for entry in by_size[0]])[order].astype(np.int32)

    in_range, hits, objects = np.zeros((len(SIZES), len(scores)), dtype=bool), [], []
    for area, entries in enumerate(by_size):
        matched = _joined([entry["dtMatches"] > 0 for entry in entries], bool, axis=1)[:, order]
        ignored = _joined([entry["dtIgnore"] for entry in entries], bool, axis=1)[:, order]
        hits.append(
            [Hits(np.flatnonzero(hit).astype(np.int32), ~skip[hit]) for hit, skip in zip(matched, ignored, strict=True)]
        )
        # A detection without a match is ignored if its size is out of range, at every threshold alike. A detection that has a match
        # at every threshold needs no range, because it is never a false positive.
        in_range[area] = (~matched & ~ignored).any(axis=0)
        counts = [np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0) for entry in entries]
        objects.append(np.repeat(index[area], counts))
    return ClassMatches(scores[order], images, in_range, hits, objects)


def _joined(parts: list, dtype: type, axis: int = 0) -> np.ndarray:
    empty = np.zeros((len(IOU_THRESHOLDS), 0) if axis else 0, dtype=dtype)
    return np.concatenate([empty, *parts], axis=axis).astype(dtype)
