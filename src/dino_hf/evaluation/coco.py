"""COCO's average precision: boxes as columns go in, the 12 numbers of pycocotools come out."""

import contextlib
import io
from collections import Counter

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

# COCOeval's twelve numbers, in its order.
NAMES = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_1",
    "AR_10",
    "AR_100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
COCO_LIMIT = 100  # detections that COCO counts per image and class
TOP_K = 300  # detections kept per image, over all classes
TRUTH_TYPES = {"boxes": np.float64, "labels": np.int64, "area": np.float64, "iscrowd": np.int64}
DETECTION_TYPES = {"boxes": np.float64, "scores": np.float64, "labels": np.int64}

Columns = dict[str, np.ndarray]  # one row per box, over all images: image_id, labels (category ids), boxes (N, 4), ...
ClassResult = tuple[np.ndarray, np.ndarray]  # precision (T, R, 1, A, M) and recall (T, 1, A, M) of pycocotools


def coco_scores(
    predictions: list[dict],
    references: list[dict],
    class_names: dict[int, str],
    max_detections: int | None = None,
) -> dict[str, float]:
    """The 12 COCO numbers, and `AP_class_<name>` for each class. They equal the numbers of pycocotools bit by bit.

    If more than 100 detections count, also `AR_<number>`.

    Args:
        predictions: per image {"image_id", "boxes" (N, 4) as (x0, y0, x1, y1) in pixels, "scores" (N,), "labels" (N,)}.
        references: per image {"image_id", "boxes" (T, 4) as (x, y, width, height) in pixels, "labels" (T,), "area" (T,),
            "iscrowd" (T,)}.
        class_names: category id -> name. All labels must be among these ids.
        max_detections: number of detections that count per image and class, at least 100. None: see `detection_limit`.
    Returns:
        numbers in [0, 1], or -1 if there is no ground truth.
    Raises:
        ValueError: an image is given twice or has no reference, lengths differ, a label is unknown, or a value is not finite.
    """
    known = _unique_image_ids(references)
    if missing := [image_id for image_id in _unique_image_ids(predictions) if image_id not in known]:
        raise ValueError(
            f"The prediction for image {missing[0]} has no reference. An image without objects needs one with empty lists."
        )
    truth = join_images(references, "reference", TRUTH_TYPES)
    detections = join_images(predictions, "prediction", DETECTION_TYPES)
    check_columns(truth, "reference", class_names)
    check_columns(detections, "prediction", class_names)
    limit = detection_limit(truth, max_detections)
    return summarize(evaluate_classes(truth, detections, sorted(class_names), limit), class_names, limit)


def _unique_image_ids(images: list[dict]) -> set[int]:
    counts = Counter(image["image_id"] for image in images)
    if twice := [image_id for image_id, count in counts.items() if count > 1]:
        raise ValueError(f"Image {twice[0]} was added twice; every image must be evaluated once.")
    return set(counts)


def join_images(images: list[dict], kind: str, types: dict[str, type]) -> Columns:
    """Join the boxes of all images into columns.

    Args:
        images: per image its `image_id`, and a list for each name in `types`.
        kind: "reference" or "prediction", for error messages.
        types: `TRUTH_TYPES` or `DETECTION_TYPES`.
    Raises:
        ValueError: the lists of an image have different lengths.
    """
    for image in images:
        lengths = {name: len(image[name]) for name in types}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"The {kind} for image {image['image_id']} has lists of different lengths: {lengths}; each box needs one "
                "value in each."
            )
    counts = [len(image["labels"]) for image in images]
    columns = {"image_id": np.repeat(np.array([image["image_id"] for image in images], dtype=np.int64), counts)}
    for name, dtype in types.items():
        values = np.array([value for image in images for value in image[name]], dtype=dtype)
        columns[name] = values.reshape(-1, 4) if name == "boxes" else values
    return columns


def check_columns(columns: Columns, kind: str, class_names: dict[int, str]) -> None:
    """Check labels and numbers, and name the image of the first error.

    Raises:
        ValueError: a label is not in `class_names`, or a box, score or area is NaN or infinite.
    """
    unknown = ~np.isin(columns["labels"], list(class_names))
    if unknown.any():
        image_id = columns["image_id"][unknown][0]
        labels = columns["labels"][unknown & (columns["image_id"] == image_id)]
        raise ValueError(
            f"The {kind} for image {image_id} has the labels {np.unique(labels).tolist()}, but class_names has "
            f"{sorted(class_names)}; labels are category ids, not class indices."
        )
    finite = np.isfinite(columns["boxes"]).all(axis=1)
    for name in ("scores", "area"):
        if name in columns:
            finite &= np.isfinite(columns[name])
    if not finite.all():
        raise ValueError(
            f"The {kind} for image {columns['image_id'][~finite][0]} has scores or boxes that are NaN or infinite. They "
            "cannot be ranked."
        )


def detection_limit(truth: Columns, max_detections: int | None = None) -> int:
    """The number of detections that count per image and class.

    Args:
        max_detections: number that the user chose. None: COCO's 100, or the most objects of one class in an image. With 100, a
            perfect detector would have an AP of 0.25 on an image with 400 cells.
    Raises:
        ValueError: it is below 100.
    """
    if max_detections is not None:
        if max_detections < COCO_LIMIT:
            raise ValueError(f"max_detections={max_detections} must be at least {COCO_LIMIT}, COCO's own limit.")
        return max_detections
    pairs = np.stack([truth["image_id"], truth["labels"]], axis=1)[truth["iscrowd"] == 0]
    return max([COCO_LIMIT, *np.unique(pairs, axis=0, return_counts=True)[1].tolist()])


def num_kept(limit: int) -> int:
    """The number of detections to keep per image, over all classes, for a limit per image and class."""
    return TOP_K if limit == COCO_LIMIT else max(TOP_K, 3 * limit)


def evaluate_classes(
    truth: Columns, detections: Columns, category_ids: list[int], limit: int = COCO_LIMIT
) -> dict[int, ClassResult]:
    """Precision and recall of each class.

    Classes are evaluated one by one. For all at once, pycocotools would need gigabytes for 5,000 images with 300 detections.
    """
    results = {}
    for category_id in category_ids:
        evaluation = evaluate_class(of_class(truth, category_id), of_class(detections, category_id), limit).eval
        results[category_id] = evaluation["precision"], evaluation["recall"]
    return results


def of_class(columns: Columns, category_id: int) -> Columns:
    """The rows of one class."""
    return {name: column[columns["labels"] == category_id] for name, column in columns.items()}


def evaluate_class(truth: Columns, detections: Columns, limit: int = COCO_LIMIT) -> COCOeval:
    """Run pycocotools on the boxes of one class. The result holds matches in `evalImgs`, precision and recall in `eval`.

    Args:
        limit: number of detections that count per image, at least 100. The last axis of `eval` stands for 1, 10 and 100
            detections, and for this limit if it is higher.
    """
    image_ids = np.union1d(truth["image_id"], detections["image_id"])
    corners = detections["boxes"].astype(np.float64)
    sizes = corners[:, 2:] - corners[:, :2]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        true = _index(
            image_ids,
            image_id=truth["image_id"],
            bbox=truth["boxes"],
            area=truth["area"],
            iscrowd=truth["iscrowd"],
        )
        found = _index(
            image_ids,
            image_id=detections["image_id"],
            bbox=np.concatenate([corners[:, :2], sizes], axis=1),
            area=sizes.prod(axis=1),
            score=detections["scores"],
        )
        evaluation = COCOeval(true, found, iouType="bbox")
        if limit > COCO_LIMIT:
            evaluation.params.maxDets = [*evaluation.params.maxDets, limit]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _index(image_ids: np.ndarray, **columns: np.ndarray) -> COCO:
    """The boxes of one class as an index of pycocotools. Columns have pycocotools' names; the class gets the id 1."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image_id} for image_id in image_ids.tolist()],
        "categories": [{"id": 1}],
        # ids start at 1, because pycocotools reads a match with id 0 as "no match"
        "annotations": [
            {"id": number, "category_id": 1, **dict(zip(columns, row, strict=True))}
            for number, row in enumerate(rows, start=1)
        ],
    }
    coco.createIndex()
    return coco


def summarize(
    results: dict[int, ClassResult], class_names: dict[int, str], limit: int = COCO_LIMIT
) -> dict[str, float]:
    """The 12 COCO numbers and `AP_class_<name>` of each class, in [0, 1]. A number without ground truth is -1.

    Args:
        results: category id -> result of `evaluate_classes`.
        limit: number of detections that counted per image and class. Above 100, there is also `AR_<limit>`; then AP, and AP and
            AR of each size, are of this number.
    """
    category_ids = sorted(results)
    precision = np.concatenate([results[category_id][0] for category_id in category_ids], axis=2)
    recall = np.concatenate([results[category_id][1] for category_id in category_ids], axis=1)
    scores = dict(zip(NAMES, _twelve_numbers(precision, recall), strict=True))
    if limit > COCO_LIMIT:
        scores[f"AR_{limit}"] = mean_or_absent(recall[..., 0, -1])
    for index, category_id in enumerate(category_ids):
        # (T, R): all areas, and the highest limit of detections
        scores[f"AP_class_{class_names[category_id]}"] = mean_or_absent(precision[:, :, index, 0, -1])
    return scores


def mean_or_absent(values: np.ndarray) -> float:
    """The mean of the values that are not -1. It is -1 if all are, as in pycocotools."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _twelve_numbers(precision: np.ndarray, recall: np.ndarray) -> list[float]:
    """
    Args:
        precision, recall: (T, R, K, A, M) and (T, K, A, M).
    """
    if precision.shape[-1] == 3:
        evaluation = COCOeval(iouType="bbox")
        evaluation.eval = {"precision": precision, "recall": recall}
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.summarize()
        return list(map(float, evaluation.stats))
    # With other limits, pycocotools' `summarize` would still look for the AP of 100 detections.
    areas = range(1, precision.shape[3])
    values = [precision[..., 0, -1], precision[0, ..., 0, -1], precision[5, ..., 0, -1]]
    values += [precision[..., area, -1] for area in areas]
    values += [recall[..., 0, index] for index in range(3)]
    values += [recall[..., area, -1] for area in areas]
    return list(map(mean_or_absent, values))
