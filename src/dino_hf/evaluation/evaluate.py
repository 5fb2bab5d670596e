"""A detector and annotated images -> COCO's numbers with intervals, and what is needed to draw and to compare them."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..data.load import load_data
from ..data.raw import SPLITS
from ..inference.predictor import Detections, Predictor
from ..training.coco_data import CocoData, _check_image
from ..training.coco_metric import Columns, check_columns, evaluate_class, of_class, summarize
from .bootstrap import AP75_INDEX, STATISTICS, draw_images, interval, mean_over_classes, resample
from .classes import ClassMap, map_classes
from .curves import Best, Curves, make_curves
from .matching import AREA_RANGES, SIZES, ClassMatches, class_matches
from .mistakes import Mistake, confusion_matrix, find_mistakes

_FALLBACK_THRESHOLD = 0.5  # of the confusion matrix where nothing was found
NUM_MISTAKES = 4  # of each kind

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


@dataclass(eq=False)
class Evaluation:
    """What a detector is worth on a data set. Numbers are in [0, 1]; one without any ground truth is -1, as pycocotools has it."""

    model: str
    data_name: str | None
    class_names: dict[int, str]  # category id -> name, in the order of the ids' classes
    metrics: dict[str, float]  # COCO's twelve, AP_class_<name>
    intervals: dict[
        str, tuple[float, float]
    ]  # 95 %, of AP, AP50, AP75, AP by size and AP_class_<name>; {} without resamples
    per_class: list[dict[str, Any]]
    curves: Curves
    confusion: np.ndarray  # (K + 1, K + 1) of `confusion_matrix` at `threshold`
    mistakes: list[Mistake]
    truth: Columns  # image_id, labels (category ids), boxes (x, y, w, h), area, iscrowd
    found: Columns  # image_id, labels (category ids), boxes (x0, y0, x1, y1), scores
    image_ids: np.ndarray  # (I,) ascending
    samples: np.ndarray  # (B, K, 6) of `resample`
    seed: int  # of the resamples
    left_out: dict[str, int]  # classes of the model that the data do not have -> how many detections
    notes: list[str]

    @property
    def best(self) -> Best | None:
        """Where F1 over all classes is highest; None if no object was found."""
        return self.curves.best

    @property
    def best_threshold(self) -> float | None:
        return None if self.best is None else self.best.threshold

    @property
    def threshold(self) -> float:
        """Of the confusion matrix and the mistakes: the best one, or 0.5 if there is none."""
        return _FALLBACK_THRESHOLD if self.best is None else self.best.threshold

    @property
    def counts(self) -> dict[str, int]:
        is_crowd = self.truth["iscrowd"].astype(bool)
        area = self.truth["area"][~is_crowd]
        # pycocotools' ranges, whose borders belong to both sides
        ranges = zip(SIZES[1:], AREA_RANGES[1:], strict=True)
        return {
            "images": len(self.image_ids),
            "objects": len(area),
            **{f"objects_{size}": int(((area >= low) & (area <= high)).sum()) for size, (low, high) in ranges},
            "crowds": int(is_crowd.sum()),
            "detections": len(self.found["labels"]),
            "detections_left_out": sum(self.left_out.values()),
        }

    @property
    def detections(self) -> list[dict]:
        """COCO's list of results, with the image ids and category ids of the data, boxes as [x, y, width, height] in pixels;
        made anew in each call. `pycocotools` reads it, and gives the same numbers."""
        corners = self.found["boxes"]
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        columns = (self.found["image_id"], self.found["labels"], boxes, self.found["scores"])
        return [
            {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            for image_id, category_id, box, score in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def as_dict(self) -> dict[str, Any]:
        """For json; None where there is no ground truth."""
        names = list(self.class_names.values())
        return {
            "model": self.model,
            "dataset": self.data_name,
            "counts": self.counts,
            "metrics": {name: _none_for_absent(value) for name, value in self.metrics.items()},
            "intervals_95": {name: list(bounds) for name, bounds in self.intervals.items()},
            "best_threshold": None if self.best is None else self.best._asdict(),
            "per_class": [
                {name: _none_for_absent(value) if name in _ROW_NUMBERS else value for name, value in row.items()}
                for row in self.per_class
            ],
            "confusion": {
                "iou": 0.5,
                "threshold": self.threshold,
                "rows": [*names, "background"],
                "columns": [*names, "missed"],
                "counts": self.confusion.tolist(),
            },
            "bootstrap": {"resamples": len(self.samples), "seed": self.seed},
            "left_out": self.left_out,
            "notes": self.notes,
        }


_ROW_NUMBERS = {*STATISTICS, "AR_100"}


def evaluate(
    model: str | Path | PreTrainedModel | Predictor,
    data: Any,
    *,
    split: str = "validation",
    output_dir: str | Path | None = None,
    batch_size: int = 8,
    num_bootstrap: int = 1000,
    seed: int = 0,
    device: str | None = None,
    box_format: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """AP of a detector with 95 % intervals, on any data that can be recognised; what `dino-hf eval` does.

        evaluation = dino_hf.evaluate("my-detector", "my-data", output_dir="outputs/eval")
        print(evaluation.metrics["AP"], evaluation.intervals["AP"])

    Args:
        model: folder, id on the Hub, or a detector: any that `AutoModelForObjectDetection` loads. Its classes are found in the
            data by name.
        data: whatever `dino_hf.data.load_data` reads, or the `CocoData` to evaluate on.
        split: "train", "validation" or "test"; of a `CocoData` there is but one.
        output_dir: numbers, detections and pictures are written there (`save_report`); None: nothing is written.
        num_bootstrap, seed: of the intervals, see `evaluate_model`.
        device: "cuda", "cpu", ...; None: the best one that is there.
        box_format: of data that do not tell it, see `load_data`.
        progress: called as in `evaluate_model`.
    Raises:
        ValueError, FileNotFoundError, OSError: what cannot be read, or does not fit, in one sentence.
    """
    from .report import check_folder, save_report  # here: they need matplotlib

    if output_dir is not None:
        check_folder(Path(output_dir))
    data, notes = load_split(data, split, box_format)
    predictor = model if isinstance(model, Predictor) else Predictor(model, device=device)
    evaluation = evaluate_model(
        predictor, data, batch_size=batch_size, num_bootstrap=num_bootstrap, seed=seed, progress=progress
    )
    evaluation.notes[:0] = notes
    if output_dir is not None:
        save_report(evaluation, data, Path(output_dir))
    return evaluation


def load_split(data: Any, split: str = "validation", box_format: str | None = None) -> tuple[CocoData, list[str]]:
    """One part of a data set, with its class space, and what was decided when it was read.

    Raises:
        ValueError: there is no such part.
    """
    if isinstance(data, CocoData):
        return data, []
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
    loaded = load_data(data, box_format=box_format)
    if (part := getattr(loaded, split)) is None:
        there = [name for name in SPLITS if getattr(loaded, name) is not None]
        raise ValueError(f"{loaded.origin} has no {split} images, but {', '.join(there)}; choose split {there[0]}.")
    return part, loaded.notes


def evaluate_model(
    predictor: Predictor,
    data: CocoData,
    *,
    batch_size: int = 8,
    num_bootstrap: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Predict all images and score the detections: COCO's numbers are pycocotools', to the last bit.

    Args:
        data: the images, read one after another.
        num_bootstrap: resamples of the images that the 95 % intervals are made of; 0: no intervals.
        seed: of the resamples.
        progress: called with what is being done ("images", "classes" or "resampled classes"), how many, and of how many.
    Raises:
        ValueError: model and data have no class in common, or an image is not of the size that it was annotated at. An error of
            any kind that comes up with an image names it in a note.
    """
    if num_bootstrap < 0:
        raise ValueError(f"num_bootstrap={num_bootstrap} must be at least 0, which leaves out the intervals.")
    progress = progress or _silent
    classes = map_classes(predictor.id2label, predictor.category_ids, data, predictor.name)
    truth = truth_columns(data)
    found, left_out = _predict(predictor, data, classes, batch_size, progress)
    class_names = {category_id: data.id2label[index] for index, category_id in enumerate(data.category_ids)}
    check_columns(truth, "reference", class_names)
    check_columns(found, "prediction", class_names)

    image_ids = np.unique(np.array(list(data.dataset["image_id"]), dtype=np.int64))
    results, matches = _match(truth, found, list(class_names), image_ids, progress)
    weights = draw_images(len(image_ids), num_bootstrap, seed)
    samples = resample(matches, weights, lambda done, total: progress("resampled classes", done, total))
    curves = make_curves(matches, np.stack([results[category_id][0][0, :, 0, 0, -1] for category_id in class_names]))
    threshold = _FALLBACK_THRESHOLD if curves.best is None else curves.best.threshold
    metrics = summarize(results, class_names)
    intervals = _intervals(mean_over_classes(samples), metrics)
    per_class = [
        _class_row(category_id, name, results[category_id], matches[index], samples[:, index], curves.class_best[index])
        for index, (category_id, name) in enumerate(class_names.items())
    ]
    intervals |= {f"AP_class_{row['name']}": row["intervals"]["AP"] for row in per_class if "AP" in row["intervals"]}
    return Evaluation(
        model=predictor.name,
        data_name=data.name,
        class_names=class_names,
        metrics=metrics,
        intervals=intervals,
        per_class=per_class,
        curves=curves,
        confusion=confusion_matrix(truth, found, list(class_names), threshold),
        mistakes=find_mistakes(truth, found, threshold, NUM_MISTAKES),
        truth=truth,
        found=found,
        image_ids=image_ids,
        samples=samples,
        seed=seed,
        left_out=left_out,
        notes=classes.notes,
    )


def truth_columns(data: CocoData) -> Columns:
    """The annotations of all images: one row for each box."""
    rows = list(data.dataset.select_columns(["image_id", "objects"]))
    counts = [len(row["objects"]["category"]) for row in rows]
    category_ids = np.array(data.category_ids, dtype=np.int64)

    def joined(name: str, dtype: type) -> np.ndarray:
        return np.array([value for row in rows for value in row["objects"][name]], dtype=dtype)

    return {
        "image_id": np.repeat(np.array([row["image_id"] for row in rows], dtype=np.int64), counts),
        "labels": category_ids[joined("category", np.int64)],
        "boxes": joined("bbox", np.float64).reshape(-1, 4),
        "area": joined("area", np.float64),
        "iscrowd": joined("iscrowd", np.int64),
    }


def image_name(data: CocoData, index: int) -> str:
    """The file of an image, or its id where the data have no files."""
    name = data.dataset["file_name"][index] if "file_name" in data.dataset.column_names else None
    return name or f"image {data.dataset['image_id'][index]}"


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _predict(
    predictor: Predictor, data: CocoData, classes: ClassMap, batch_size: int, progress: Progress
) -> tuple[Columns, dict[str, int]]:
    """The detections in the class space of the data, and how many of which other classes there were."""
    image_ids, columns, left_out = list(data.dataset["image_id"]), [], Counter()
    progress("images", 0, len(image_ids))
    try:
        for found in _detect(predictor, data, batch_size):
            known, category_ids = classes.apply(found.labels)
            image_id = np.full(len(category_ids), image_ids[len(columns)])
            columns.append((image_id, category_ids, found.boxes[known], found.scores[known]))
            left_out.update(found.labels[~known].tolist())
            progress("images", len(columns), len(image_ids))
    except KeyboardInterrupt as error:
        error.add_note(
            f"The evaluation was broken off after {len(columns)} images, at {image_name(data, max(0, len(columns) - 1))}."
        )
        raise
    image_id, labels, boxes, scores = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    names = {predictor.id2label.get(label, str(label)): count for label, count in left_out.most_common()}
    return {"image_id": image_id, "labels": labels, "boxes": boxes.reshape(-1, 4), "scores": scores}, names


def _detect(predictor: Predictor, data: CocoData, batch_size: int) -> Iterator[Detections]:
    """Detections of each image. An error gets a note that names the image."""
    num_read = num_done = 0
    is_reading = False

    def images():
        nonlocal num_read, is_reading
        for index in range(len(data.dataset)):
            is_reading = True
            row = data.dataset[index]
            _check_image(row["image_id"], row["image"], (row["width"], row["height"]))
            is_reading = False
            num_read = index + 1
            yield row["image"]

    try:
        for found in predictor(images(), batch_size=batch_size, threshold=0.0):
            yield found
            num_done += 1
    except Exception as error:
        if is_reading:
            error.add_note(f"This is {image_name(data, num_read)}.")
        else:
            error.add_note(_who_fails(predictor, data, error, range(num_done, num_read)))
        raise


def _who_fails(predictor: Predictor, data: CocoData, error: Exception, suspects: range) -> str:
    """The predictor works on many images at a time: one after another tells whose error it is."""
    if not isinstance(error, torch.AcceleratorError):  # after which nothing runs any more
        for index in suspects:
            try:
                list(predictor([data.dataset[index]["image"]], batch_size=1, threshold=0.0))
            except type(error):
                return f"This is {image_name(data, index)}."
    first, last = image_name(data, suspects[0]), image_name(data, suspects[-1])
    return f"It came up between {first} and {last}; a smaller batch size needs less memory."


def _match(
    truth: Columns, found: Columns, category_ids: list[int], image_ids: np.ndarray, progress: Progress
) -> tuple[dict[int, tuple[np.ndarray, np.ndarray]], list[ClassMatches]]:
    """Precision and recall of each class by pycocotools, and its matches."""
    results, matches = {}, []
    for category_id in category_ids:
        progress("classes", len(matches), len(category_ids))
        evaluation = evaluate_class(of_class(truth, category_id), of_class(found, category_id))
        results[category_id] = evaluation.eval["precision"], evaluation.eval["recall"]
        matches.append(class_matches(evaluation, image_ids))
    progress("classes", len(matches), len(category_ids))
    return results, matches


def _class_row(
    category_id: int,
    name: str,
    result: tuple[np.ndarray, np.ndarray],
    matches: ClassMatches,
    samples: np.ndarray,
    best: Best | None,
) -> dict[str, Any]:
    """A row of the table of classes.

    Args:
        result: precision (T, R, 1, A, M) and recall (T, 1, A, M).
        samples: (B, 6)
    """
    precision, recall = result[0][:, :, 0, :, -1], result[1][:, 0, 0, -1]  # (T, R, A), (T,)
    everything = precision[..., 0]
    values = [
        everything,
        everything[0],
        everything[AP75_INDEX],
        *(precision[..., area] for area in range(1, len(SIZES))),
    ]
    scores = dict(zip(STATISTICS, map(_mean, values), strict=True))
    return {
        "name": name,
        "category_id": category_id,
        "num_objects": len(matches.objects[0]),
        "num_images": len(np.unique(matches.objects[0])),
        **scores,
        "AR_100": _mean(recall),
        "intervals": _intervals(samples, scores),
        "best_threshold": None if best is None else best.threshold,
        "best_f1": None if best is None else best.f1,
        "precision": None if best is None else best.precision,
        "recall": None if best is None else best.recall,
    }


def _intervals(samples: np.ndarray, scores: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Of each of the `STATISTICS` that has one, from samples (B, 6); within [0, 1]."""
    bounds = {
        name: interval(samples[:, index], scores[name]) for index, name in enumerate(STATISTICS) if scores[name] >= 0
    }
    return {name: (max(0.0, pair[0]), min(1.0, pair[1])) for name, pair in bounds.items() if pair is not None}


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _none_for_absent(value: float) -> float | None:
    return None if value == -1 else value
