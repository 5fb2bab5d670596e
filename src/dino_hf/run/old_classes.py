"""`train(keep_classes=True)`: boxes of old classes by the old detector before training, and the AP of old classes after it."""

import json
import os
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import TrainingArguments

from ..common.output_folders import replace_file
from ..common.progress import ProgressBar
from ..common.regular_files import read_json
from ..common.text import list_some
from ..data import DetectionData
from ..data.rows import CocoData, check_image_size
from ..inference.predictor import Predictor, TooLarge
from ..training.checkpoint_files import newest_checkpoint
from ..training.kept_classes import (
    MAX_IOU,
    Boxes,
    ClassGroups,
    KeptClasses,
    add_boxes,
    boxes_to_add,
    count_boxes,
    keep_classes,
)
from .record import RunRecord
from .starting_model import load_trained

FILE_NAME = "old_boxes.json"
MIN_SCORE = 0.3  # of boxes, for a detector without thresholds of its own
_MOST_CLASSES = 12  # classes listed in the plan
_BATCH_SIZE = 8


class OldClasses(NamedTuple):
    """The classes that a run keeps, and the detections of the old detector that became annotations."""

    classes: KeptClasses
    boxes: dict[str, dict[int, Boxes]]  # "train" and "validation": image id -> boxes
    min_scores: dict[str, float]  # old class -> score that its boxes exceed
    num_left_out: int  # detections that overlap an annotation or a better detection
    num_skipped: int  # images that cannot be read or are too large

    @property
    def groups(self) -> ClassGroups | None:
        return self.classes.groups if self.classes.old else None

    def add_to(self, splits: DetectionData) -> DetectionData:
        """Data with the classes of the detector and with its boxes, to train on and to choose weights by.

        Test images have no part in training, so they stay as they are.
        """
        changed = {
            name: add_boxes(part, self.classes, boxes)
            for name, boxes in self.boxes.items()
            if (part := getattr(splits, name)) is not None
        }
        return splits._replace(**changed)

    def notes(self) -> list[str]:
        """Sentences for the plan."""
        classes = self.classes
        if not classes.old:
            return [
                f"The data annotate all {len(classes.shared)} classes of the detector, so --keep-classes has no class to keep"
            ]
        counts = count_boxes(classes, self.boxes["train"])
        listed = [f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: -item[1])]
        held_out = sum(map(len, self.boxes.get("validation", {}).values()))
        skipped = f"; {self.num_skipped:,} images cannot be read or are too large" if self.num_skipped else ""
        notes = [
            f"The old detector annotates its own classes: {list_some(listed, _MOST_CLASSES)} boxes in training, {held_out:,} in "
            f"held-out images. Their scores are above {_range_text(self.min_scores.values())}",
            f"{self.num_left_out:,} of its detections overlap an annotation or a better detection (IoU {MAX_IOU:g} or more) and "
            f"are left out{skipped}",
        ]
        if classes.shared:
            names = list_some(classes.shared, _MOST_CLASSES)
            notes.append(f"Old classes that the data annotate are learnt from these annotations alone: {names}")
        if classes.renumbered:
            ids = [f"{name} {category_id}" for name, category_id in classes.renumbered.items()]
            notes.append(f"New category ids, because old classes have theirs: {list_some(ids, _MOST_CLASSES)}")
        return notes

    def write(self, folder: Path) -> None:
        """Write the boxes in one step, for a resumed run."""
        content = {
            "classes": self.classes._asdict() | {"old_places": list(self.classes.old_places.items())},
            "boxes": {name: list(boxes.items()) for name, boxes in self.boxes.items()},
            "min_scores": self.min_scores,
            "num_left_out": self.num_left_out,
            "num_skipped": self.num_skipped,
        }
        with replace_file(folder / FILE_NAME) as path:
            path.write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "OldClasses":
        """Read the boxes exactly as `write` wrote them.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            content = read_json(folder / FILE_NAME)
            classes = dict(content["classes"])
            classes["id2label"] = {int(index): name for index, name in classes["id2label"].items()}
            classes["old_places"] = dict(classes["old_places"])
            boxes = {
                name: {image_id: [tuple(entry) for entry in entries] for image_id, entries in images}
                for name, images in content["boxes"].items()
            }
            numbers = (content[name] for name in ("min_scores", "num_left_out", "num_skipped"))
            return cls(KeptClasses(**classes), boxes, *numbers)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder / FILE_NAME} is damaged ({error}), so the run cannot be resumed with the same boxes. Start another run "
                "in a new --output-dir."
            ) from error


def find_old_classes(record: RunRecord, splits: DetectionData, use_cpu: bool, console: Console) -> OldClasses:
    """The classes that a run keeps, with boxes by the old detector. A resumed run reads the boxes of its first start.

    Args:
        use_cpu: setting of the run.
    Raises:
        ValueError, OSError: there is no old detector, or a resumed run lacks its boxes.
    """
    folder = record.output_dir
    if record.is_resumed:
        if (folder / FILE_NAME).is_file():
            return OldClasses.read(folder)
        if record.is_finished or newest_checkpoint(folder) is not None:
            raise ValueError(
                f"{folder} has no {FILE_NAME}, with the boxes that its run was trained on, so the run cannot be resumed. Start "
                "another run in a new --output-dir."
            )
    if (source := record.values["model"]) is None:
        raise ValueError(
            "--keep-classes keeps the classes of a trained detector: name it by --model (in Python, model=...). A new detector on "
            "a backbone has no classes to keep."
        )
    model, image_processor = load_trained(source)
    classes = keep_classes(model.config, splits.train)
    parts = {"train": splits.train, "validation": splits.validation}
    parts = {name: part for name, part in parts.items() if part is not None}
    if not classes.old:
        return OldClasses(classes, {name: {} for name in parts}, {}, 0, 0)
    rank, world_size, device = 0, 1, "cpu" if use_cpu else None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        args = TrainingArguments(str(folder), use_cpu=use_cpu, report_to="none")  # connects the processes
        rank, world_size, device = args.process_index, args.world_size, args.device
    predictor = Predictor(model, image_processor, device=device)
    min_scores = _min_scores(predictor, classes)
    found = {}
    with ProgressBar(console) as bar:
        for name, part in parts.items():
            own = range(rank, len(part.dataset), world_size)
            found[name] = _detect(predictor, part, classes, min_scores, own, name, bar if rank == 0 else None)
    if world_size > 1:
        found = _joined(found, world_size)
    model_names = predictor.id2label
    if predictor.device.type == "cuda":
        del predictor, model
        torch.cuda.empty_cache()  # the forecast of memory counts free memory
    boxes = {name: images for name, (images, _, _) in found.items()}
    by_name = {model_names[label]: score for label, score in min_scores.items()}
    return OldClasses(classes, boxes, by_name, *(sum(part[place] for part in found.values()) for place in (1, 2)))


def _min_scores(predictor: Predictor, classes: KeptClasses) -> dict[int, float]:
    """Class index of the old detector -> score that its boxes must exceed.

    It is the class's best threshold, if the detector keeps one: scores of detectors differ, and 0.3 may find nothing or too much.
    """
    kept = predictor.thresholds
    default = MIN_SCORE if kept.origin is None else kept.default
    return {label: kept.by_class.get(predictor.id2label[label], default) for label in classes.old_places}


def _range_text(values: Collection[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}, by class"


_Found = tuple[dict[int, Boxes], int, int]  # boxes by image id, numbers of left-out detections and of skipped images


def _detect(
    predictor: Predictor,
    data: CocoData,
    classes: KeptClasses,
    min_scores: Mapping[int, float],
    own: Sequence[int],
    part: str,
    bar: ProgressBar | None,
) -> _Found:
    """The boxes of some images of a part.

    Args:
        part: its name, for the progress.
        min_scores: see `boxes_to_add`.
        own: indices of the images.
    """
    waiting: deque[dict[str, Any]] = deque()  # rows of the images that the predictor has taken
    boxes, num_left_out, num_skipped = {}, 0, 0

    def images() -> Iterator:
        nonlocal num_skipped
        for index in own:
            try:
                row = data.dataset[index]
                check_image_size(row["image_id"], row["image"], (row["width"], row["height"]))
            except (OSError, ValueError):  # training reports bad images and leaves them out, see `ReadableImages`
                num_skipped += 1
                continue
            waiting.append(row | {"image": None, "size": row["image"].size})
            yield row["image"]

    threshold = min(min_scores.values())
    for found in predictor(images(), batch_size=_BATCH_SIZE, threshold=threshold, skip_too_large=True):
        row = waiting.popleft()
        if isinstance(found, TooLarge):
            num_skipped += 1
            continue
        annotated = row["objects"]["bbox"]
        boxes[row["image_id"]], overlapping = boxes_to_add(
            found, annotated, row["size"], classes.old_places, min_scores
        )
        num_left_out += overlapping
        if bar is not None:
            bar(f"{part}: images of the old detector", len(boxes), len(own))
    return boxes, num_left_out, num_skipped


def _joined(found: dict[str, _Found], world_size: int) -> dict[str, _Found]:
    """The boxes that all processes found. Each process calls it and gets the same result."""
    gathered: list[dict[str, _Found]] = [{}] * world_size
    torch.distributed.all_gather_object(gathered, found)
    return {
        name: (
            {image_id: entry for part in gathered for image_id, entry in part[name][0].items()},
            sum(part[name][1] for part in gathered),
            sum(part[name][2] for part in gathered),
        )
        for name in found
    }
