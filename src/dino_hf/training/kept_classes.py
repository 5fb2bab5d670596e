"""Learn new classes and keep the old ones: the classes of a detector and of its data together, and boxes by the old detector.

Images annotated with new classes alone also show objects of the old classes. Without boxes, training treats these objects as
background, and the detector forgets their classes. So the old detector annotates them first (pseudo-labels).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..common.class_names import NO_CLASS, match_names
from ..common.text import list_some
from ..data.rows import ClassSpace, CocoData, replace_boxes
from ..inference.predictor import Detections
from ..model.box_ops import box_iou

MAX_IOU = (
    0.7  # a detection that overlaps an annotation or a better detection by at least this IoU shows the same object
)
_SMALLEST_SIDE = 1.0  # in pixels, of a detection inside its image

Boxes = list[tuple[int, list[float], float]]  # class index, (x, y, w, h) in pixels, score of each detection in an image


class KeptClasses(NamedTuple):
    """Classes of a detector that learns the classes of data and keeps its own: first the old classes, then the new ones."""

    id2label: dict[int, str]
    category_ids: list[int]
    places: list[int]  # class index in the data -> class index here
    old_places: dict[
        int, int
    ]  # class index of the old detector -> class index here, of the classes without annotations
    shared: list[str]  # old classes that the data annotate
    new: list[str]  # classes that the old detector does not know
    renumbered: dict[str, int]  # new class -> category id, if an old class has its id in the data

    @property
    def old(self) -> list[str]:
        """Old classes that the data do not annotate, so that training could forget them."""
        return [self.id2label[place] for place in self.old_places.values()]

    @property
    def groups(self) -> "ClassGroups":
        old = self.old
        return ClassGroups(old, [name for name in self.id2label.values() if name not in old])

    @property
    def space(self) -> ClassSpace:
        return ClassSpace(self.id2label, self.category_ids)

    def __repr__(self) -> str:
        return f"KeptClasses({len(self.old)} old, {len(self.shared)} shared, {len(self.new)} new)"


def keep_classes(config, data: CocoData) -> KeptClasses:
    """Join the classes of a detector and of data. Classes are matched by name, as in `transfer_classes`.

    Old classes keep their names and category ids, also if the data use a synonym. A detector without category ids has its class
    indices as ids. A new class keeps its category id unless an old class has it; then it gets the next number above all ids. If
    two classes of the data match one old class, the more exact name is this class, and the other one is a new class.

    Args:
        config: configuration of the detector, not changed. Its outputs without a class ("N/A") are left out.
        data: the training data.
    Raises:
        ValueError: the classes of the detector have no names, only placeholders such as LABEL_0.
    """
    old_names, names = list(config.id2label.values()), list(data.id2label.values())
    own = [index for index, name in enumerate(old_names) if name != NO_CLASS]
    if unnamed := [old_names[index] for index in own if match_names([old_names[index]], [old_names[index]]) == [None]]:
        raise ValueError(
            f"The detector has classes without a name ({list_some(unnamed, 3)}), so they cannot be told apart from the classes of "
            "the data. Name them in its config.json (id2label)."
        )
    sources = match_names(old_names, names)
    owner: dict[int, int] = {}  # old class -> class of the data
    for index, source in enumerate(sources):
        is_exact = source is not None and names[index] == old_names[source]
        if source is not None and (source not in owner or is_exact):
            owner[source] = index
    place_of = {index: place for place, index in enumerate(own)}
    id2label = {place: old_names[index] for index, place in place_of.items()}
    ids = config.category_ids or list(range(len(old_names)))
    category_ids, renumbered, places = [ids[index] for index in own], {}, []
    next_id = max([*category_ids, *data.category_ids]) + 1
    for index, (name, source) in enumerate(zip(names, sources, strict=True)):
        if source is not None and owner[source] == index:
            places.append(place_of[source])
            continue
        category_id = data.category_ids[index]
        if category_id in category_ids:
            category_id = renumbered[name] = next_id
            next_id += 1
        places.append(len(id2label))
        id2label[len(id2label)] = name
        category_ids.append(category_id)
    return KeptClasses(
        id2label,
        category_ids,
        places,
        old_places={index: place for index, place in place_of.items() if index not in owner},
        shared=[old_names[index] for index in own if index in owner],
        new=[id2label[place] for place in range(len(own), len(id2label))],
        renumbered=renumbered,
    )


def boxes_to_add(
    found: Detections,
    annotated: Sequence[Sequence[float]],
    size: tuple[int, int],
    old_places: Mapping[int, int],
    min_scores: Mapping[int, float],
) -> tuple[Boxes, int]:
    """Choose the detections in an image that become annotations. The best detection comes first.

    Only the part of a detection inside the image counts. A detection is left out if its IoU with an annotation, or with a
    detection chosen before, is at least 0.7: the same object is not annotated twice, even as two classes.

    Args:
        found: detections of the old detector, highest score first.
        annotated: (x, y, w, h) of the annotations, with crowd regions, in pixels.
        size: (width, height) of the image.
        old_places: see `KeptClasses`. Other classes are left out.
        min_scores: class index of the old detector -> score. Detections with at most this score are left out.
    Returns:
        the boxes, and the number of detections left out because they overlap.
    """
    corners = torch.as_tensor(np.asarray(annotated, dtype=np.float64).reshape(-1, 4)).clone()
    corners[:, 2:] += corners[:, :2]
    chosen, num_left_out = [], 0
    for box, score, label in found.rows():
        x0, x1 = (min(max(x, 0.0), float(size[0])) for x in box[::2])
        y0, y1 = (min(max(y, 0.0), float(size[1])) for y in box[1::2])
        if label not in old_places or score <= min_scores[label] or min(x1 - x0, y1 - y0) < _SMALLEST_SIDE:
            continue
        box = torch.tensor([[x0, y0, x1, y1]], dtype=torch.float64)
        if (box_iou(box, corners) >= MAX_IOU).any():
            num_left_out += 1
            continue
        corners = torch.cat([corners, box])
        chosen.append((old_places[label], [x0, y0, x1 - x0, y1 - y0], score))
    return chosen, num_left_out


def add_boxes(
    data: CocoData, classes: KeptClasses, boxes: Mapping[int, Boxes], with_annotations: bool = True
) -> CocoData:
    """The data with all classes of the detector, and with boxes of old classes.

    Args:
        boxes: image id -> boxes from `boxes_to_add`. Images without boxes may be left out.
        with_annotations: keep the annotations of the data.
    """
    objects = {}
    for row in data.dataset.select_columns(["image_id", "objects"]):
        own, added = row["objects"], boxes.get(row["image_id"], [])
        own = own if with_annotations else {name: [] for name in own}
        objects[row["image_id"]] = {
            "category": [classes.places[category] for category in own["category"]] + [entry[0] for entry in added],
            "bbox": [*own["bbox"], *(entry[1] for entry in added)],
            "area": [*own["area"], *(entry[1][2] * entry[1][3] for entry in added)],
            "iscrowd": [*own["iscrowd"], *[0] * len(added)],
        }
    return replace_boxes(data, classes.space, objects)


def select_classes(data: CocoData, names: Sequence[str]) -> CocoData:
    """The same images with the boxes of some classes only. The classes keep their names and category ids in the data.

    Args:
        names: matched with the names in the data, as in `transfer_classes`. Names that the data do not have are ignored.
    """
    sources = match_names(names, list(data.id2label.values()))
    kept = [index for index, source in enumerate(sources) if source is not None]
    place_of = {index: place for place, index in enumerate(kept)}
    objects = {}
    for row in data.dataset.select_columns(["image_id", "objects"]):
        own = row["objects"]
        chosen = [place for place, category in enumerate(own["category"]) if category in place_of]
        objects[row["image_id"]] = {name: [values[place] for place in chosen] for name, values in own.items()} | {
            "category": [place_of[own["category"][place]] for place in chosen]
        }
    id2label = {place: data.id2label[index] for index, place in place_of.items()}
    return replace_boxes(data, ClassSpace(id2label, [data.category_ids[index] for index in kept]), objects)


def count_boxes(classes: KeptClasses, boxes: Mapping[int, Boxes]) -> dict[str, int]:
    """Number of added boxes of each old class, by name."""
    counts = Counter(entry[0] for added in boxes.values() for entry in added)
    return {classes.id2label[place]: counts[place] for place in classes.old_places.values()}


class ClassGroups(NamedTuple):
    """Names of the old classes without annotations, and of all other classes of a run."""

    old: list[str]
    others: list[str]

    def mean_aps(self, metrics: Mapping[str, float], prefix: str = "") -> tuple[float, float]:
        """Mean AP of the old classes and of the others, in [0, 1]. -1: no class of the group has ground truth.

        Args:
            metrics: from `CocoEvaluator`, with a prefix such as "eval_".
        """
        means = []
        for names in self:
            found = [value for name in names if (value := metrics.get(f"{prefix}AP_class_{name}", -1.0)) >= 0]
            means.append(sum(found) / len(found) if found else -1.0)
        return means[0], means[1]

    def balanced_ap(self, metrics: Mapping[str, float], prefix: str = "") -> float:
        """The mean of both `mean_aps`: a single new class counts as much as all old classes together. -1: no ground truth."""
        present = [mean for mean in self.mean_aps(metrics, prefix) if mean >= 0]
        return sum(present) / len(present) if present else -1.0
