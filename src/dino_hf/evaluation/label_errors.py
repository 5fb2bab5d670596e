"""Annotations that a detector contradicts: missing, of the wrong class, badly placed, or without an object. Ranked by certainty.

The four kinds follow ObjectLab (arXiv:2309.00832) and confident learning (arXiv:1911.00068): a model that was trained on other
images disagrees with wrong labels more often than with right ones. The scores are simpler than theirs, see `LabelError`.
"""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..common.output_folders import replace_file
from ..common.text import count_text, csv_cell
from ..data.rows import CocoData
from ..inference.predictor import Predictor
from .classes import ClassMap, map_classes
from .coco import Columns
from .columns import Progress, detect_images, image_name, truth_columns
from .mistakes import MIN_IOU, POOR_IOU, overlaps

KINDS = ("missing", "wrong class", "poor box", "spurious")
SUSPECTS_NAME = "suspects.csv"
_LOWEST = 0.1  # score of a suspect that is kept
_LOWEST_DETECTION = 0.05  # score of a detection that is looked at
_MOST_DETECTIONS = 300  # of an image
_COLUMNS = (
    *("rank", "kind", "score", "split", "image_id", "file_name", "annotation", "x", "y", "width", "height", "class"),
    *("model_class", "model_score", "model_x", "model_y", "model_width", "model_height", "iou"),
)

_Box = tuple[float, float, float, float]  # (x0, y0, x1, y1) in pixels


class LabelError(NamedTuple):
    """A suspicious annotation, or a place without an annotation. s is the score of a detection.

    - *missing*: no annotation has an IoU of at least 0.5 with the detection. Score: s.
    - *wrong class*: a detection of another class has an IoU of at least 0.5, and no annotation of its own class there.
      Score: s minus the highest score of a detection of the annotated class.
    - *poor box*: the detection of the class that supports the box best (largest s * IoU, IoU of at least 0.1) has another
      place. Score: s * (1 - IoU).
    - *spurious*: no detection of any class has an IoU of at least 0.5. Score: 1 minus the highest score of a detection with
      an IoU of at least 0.1, times the share of annotations of this class that the model finds: a model that misses many
      objects says little.

    An annotation has only the kind with the highest score. Crowds, and detections in them, are never suspicious.
    """

    kind: str  # one of KINDS
    score: float  # in (0, 1]
    split: str
    index: int  # of the image in the data of its split
    image_id: int
    file_name: str
    annotation: Any  # id in the files, or else file and line. None for a missing one
    box: _Box | None  # of the annotation
    category_id: int | None  # of the annotation
    model_box: _Box | None  # of the detection; None if there is none
    model_category_id: int | None
    model_score: float | None
    iou: float | None  # of annotation and detection


class _Row(NamedTuple):
    """A suspect of one image. Rows are rows of its columns, or -1."""

    kind: str
    score: float
    true: int
    found: int


def find_label_errors(
    predictor: Predictor,
    data: CocoData,
    *,
    split: str = "",
    annotations: Sequence[Any] | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> tuple[list[LabelError], list[str]]:
    """Rank annotations that a detector contradicts, the most certain first.

    Train the detector on other images: on images that it has learned, it repeats their labels. Images are read one after
    another, and only suspects are kept in memory.

    Args:
        predictor: any detector. Its classes are matched with the classes of the data by name; annotations of classes that it
            does not know are left out.
        split: name of the data in the results.
        annotations: id or place of each annotation, in the order of the rows of `data`.
        progress: called with the stage "images", the number done, and the total.
    Returns:
        suspects; sentences for the user.
    Raises:
        ValueError: model and data have no class in common, or an image cannot be read.
    """
    classes = map_classes(predictor.id2label, predictor.category_ids, data, predictor.name)
    truth = truth_columns(data)
    known_ids = set(classes.category_ids.values())
    starts = np.cumsum([0, *(len(row["category"]) for row in data.dataset.select_columns("objects")["objects"])])
    suspects, num_true, num_found = [], Counter(), Counter()
    image_ids = list(data.dataset["image_id"])
    if progress is not None:
        progress("images", 0, len(image_ids))
    for index, detections in enumerate(detect_images(predictor, data, batch_size, _MOST_DETECTIONS, None)):
        rows = slice(starts[index], starts[index + 1])
        objects = {name: column[rows] for name, column in truth.items()}
        found = _known_columns(detections, classes)
        shares = overlaps(objects, found, np.arange(len(found["labels"])), np.arange(len(objects["labels"])))
        is_known = np.isin(objects["labels"], list(known_ids))
        num_true.update(objects["labels"][is_known & (objects["iscrowd"] == 0)].tolist())
        num_found.update(_found_labels(objects, found, shares))
        for row in _suspects_of(objects, found, shares, is_known):
            image = split, index, image_ids[index], image_name(data, index)
            place = annotations[starts[index] + row.true] if annotations is not None and row.true >= 0 else None
            suspects.append(_label_error(row, objects, found, shares, image, place))
        if progress is not None:
            progress("images", index + 1, len(image_ids))
    recall = {label: num_found[label] / count for label, count in num_true.items()}
    weighted = [
        suspect._replace(score=suspect.score * recall[suspect.category_id]) if suspect.kind == "spurious" else suspect
        for suspect in suspects
    ]
    notes = []
    if classes.unknown:
        count = sum(label not in known_ids for label in truth["labels"].tolist())
        unknown = count_text(len(classes.unknown), "class")
        notes.append(f"{predictor.name} does not know {unknown} of the data, so {count} annotations are not judged.")
    return rank(weighted), notes


def rank(suspects: Sequence[LabelError]) -> list[LabelError]:
    """Suspects by decreasing score. The order of equal scores is fixed."""
    kept = [suspect for suspect in suspects if suspect.score >= _LOWEST]
    return sorted(kept, key=lambda one: (-one.score, one.split, one.index, one.kind, one.box or one.model_box))


def _known_columns(detections: Any, classes: ClassMap) -> Columns:
    """The detections of an image that have a class of the data and are not hopeless, highest score first."""
    is_known, category_ids = classes.apply(detections.labels)
    scores, boxes = detections.scores[is_known], detections.boxes[is_known]
    kept = np.flatnonzero(scores >= _LOWEST_DETECTION)
    kept = kept[np.argsort(-scores[kept], kind="stable")]
    return {
        "labels": category_ids[kept],
        "boxes": boxes[kept].reshape(-1, 4),
        "scores": scores[kept].astype(np.float64),
    }


def _found_labels(objects: Columns, found: Columns, shares: np.ndarray) -> list[int]:
    """Classes of the annotations that a detection of their class with a score of at least 0.3 supports."""
    supports = (shares >= MIN_IOU) & (found["labels"][:, None] == objects["labels"]) & (found["scores"][:, None] >= 0.3)
    return objects["labels"][supports.any(0) & (objects["iscrowd"] == 0)].tolist()


def _suspects_of(objects: Columns, found: Columns, shares: np.ndarray, is_known: np.ndarray) -> list[_Row]:
    """The suspects of one image.

    Args:
        shares: (D, T) IoU of detections and annotations; for a crowd, the share of the detection in it.
        is_known: (T,) whether the model knows the class.
    """
    labels, scores, is_crowd = found["labels"], found["scores"], objects["iscrowd"].astype(bool)
    in_crowd = (shares[:, is_crowd] >= MIN_IOU).any(1)
    evidence = np.zeros(len(scores), dtype=bool)  # detections that belong to an annotation
    evidence |= (shares[:, ~is_crowd] >= MIN_IOU).any(1)
    is_explained = ((shares >= MIN_IOU) & (labels[:, None] == objects["labels"])).any(1)
    rows = []
    for true in np.flatnonzero(~is_crowd & is_known):
        same, iou = labels == objects["labels"][true], shares[:, true]
        candidates = []
        other = np.flatnonzero(~same & ~is_explained & (iou >= MIN_IOU))
        if other.size:
            best = other[scores[other].argmax()]
            own = scores[same & (iou >= MIN_IOU)].max(initial=0.0)
            candidates.append(_Row("wrong class", float(scores[best] - own), int(true), int(best)))
        # A detection supports the annotation that it overlaps most.
        near = np.flatnonzero(same & (iou >= POOR_IOU) & (iou >= shares[:, ~is_crowd].max(1, initial=0.0)))
        if near.size:
            best = near[(scores[near] * iou[near]).argmax()]
            candidates.append(_Row("poor box", float(scores[best] * (1 - iou[best])), int(true), int(best)))
            evidence[best] = True
        if not (iou >= MIN_IOU).any():
            weak = np.flatnonzero(iou >= POOR_IOU)
            best = int(weak[scores[weak].argmax()]) if weak.size else -1
            support = float(scores[best]) if weak.size else 0.0
            candidates.append(_Row("spurious", 1 - support, int(true), best))
        if candidates:
            rows.append(max(candidates, key=lambda row: row.score))
    return [row for row in rows if row.score >= _LOWEST] + _missing(found, evidence | in_crowd)


def _missing(found: Columns, has_annotation: np.ndarray) -> list[_Row]:
    """Detections without an annotation. A detection that overlaps one of a higher score, of any class, is the same object."""
    rows, boxes = [], found["boxes"]
    sizes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    as_objects = {"boxes": sizes, "iscrowd": np.zeros(len(boxes), dtype=np.int64)}
    places = np.arange(len(boxes))
    shares = overlaps(as_objects, found, places, places)
    for place in np.flatnonzero(~has_annotation):
        if not (shares[place, :place] >= MIN_IOU).any():
            rows.append(_Row("missing", float(found["scores"][place]), -1, int(place)))
    return rows


def _label_error(
    row: _Row, objects: Columns, found: Columns, shares: np.ndarray, image: tuple[str, int, int, str], annotation: Any
) -> LabelError:
    true, place = row.true, row.found
    x, y, width, height = objects["boxes"][true].tolist() if true >= 0 else [0.0] * 4
    is_found = place >= 0
    return LabelError(
        row.kind,
        row.score,
        *image,
        annotation,
        (x, y, x + width, y + height) if true >= 0 else None,
        int(objects["labels"][true]) if true >= 0 else None,
        tuple(found["boxes"][place].tolist()) if is_found else None,
        int(found["labels"][place]) if is_found else None,
        float(found["scores"][place]) if is_found else None,
        float(shares[place, true]) if is_found and true >= 0 else None,
    )


def write_suspects(path: Path, suspects: Sequence[LabelError], class_names: dict[int, str]) -> None:
    """Write all suspects to a csv file, the most certain first. Boxes are x, y, width and height in pixels.

    Args:
        class_names: category id -> name.
    """
    with (
        replace_file(path) as scratch,
        scratch.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for place, one in enumerate(suspects, 1):
            cells = [place, one.kind, f"{one.score:.4f}", one.split, one.image_id, one.file_name]
            cells += [one.annotation, *_numbers(one.box), class_names.get(one.category_id)]
            cells += [class_names.get(one.model_category_id), _number(one.model_score), *_numbers(one.model_box)]
            writer.writerow([csv_cell(cell) for cell in [*cells, _number(one.iou)]])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _numbers(box: _Box | None) -> list[str]:
    if box is None:
        return [""] * 4
    x0, y0, x1, y1 = box
    return [f"{value:.2f}" for value in (x0, y0, x1 - x0, y1 - y0)]
