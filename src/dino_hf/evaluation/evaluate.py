"""Evaluate a detector on annotated images: COCO metrics with intervals, and everything for plots and comparisons."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..data.rows import CocoData
from ..inference.predictor import Predictor
from ..inference.score_thresholds import DEFAULT_THRESHOLD
from ..inference.tiling import choose_tiling
from .bootstrap import (
    AP75_INDEX,
    MIN_IMAGES,
    STATISTICS,
    check_memory,
    check_num_bootstrap,
    draw_images,
    interval,
    mean_over_classes,
    num_images_of,
    resample,
)
from .classes import map_classes
from .coco import (
    COCO_LIMIT,
    Columns,
    check_columns,
    detection_limit,
    evaluate_class,
    mean_or_absent,
    num_kept,
    of_class,
    summarize,
)
from .columns import Progress, detection_columns, truth_columns
from .curves import Best, make_curves
from .kept_thresholds import check_keeps_thresholds, keep_thresholds
from .matching import SIZES, ClassMatches, class_matches
from .mistakes import NUM_MISTAKES, confusion_matrix, find_mistakes
from .result import Evaluation
from .seen_images import load_split, trained_note

logger = logging.getLogger(__name__)


def evaluate(
    model: str | Path | PreTrainedModel | Predictor,
    data: Any,
    *,
    split: str = "validation",
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    batch_size: int = 8,
    num_bootstrap: int = 1000,
    seed: int = 0,
    max_detections: int | None = None,
    tiles: int | str | tuple[int, int] | None = None,
    tile_overlap: float | None = None,
    device: str | None = None,
    box_format: str | None = None,
    allow_trained: bool = False,
    allow_outside: bool = False,
    trust_boxes: bool = False,
    keep_threshold: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """AP of a detector with 95 % intervals, on data in any known format; `dino-hf eval` in Python.

        evaluation = dino_hf.evaluate("my-detector", "my-data", output_dir="outputs/eval")
        print(evaluation.metrics["AP"], evaluation.intervals["AP"])

    Args:
        model: folder, name of a published checkpoint, id on the Hub, or a detector that `AutoModelForObjectDetection` loads; or
            a `Predictor` with its own image processor and device. Its classes are matched with the data's classes by name.
        data: anything that `dino_hf.data.load_data` reads, its result, or the `CocoData` to evaluate on.
        split: "train", "validation" or "test". It is ignored for a `CocoData`. If the data have no validation images, the images
            held out by the model's training run are used. If there are none, a fifth of the training images is used, chosen by
            seed 0.
        output_dir: folder for numbers, detections and pictures, see `save_report`. None: nothing is written.
        overwrite: replace the report of an earlier evaluation in `output_dir`.
        num_bootstrap, seed: settings of the intervals, see `evaluate_model`.
        max_detections, tiles, tile_overlap: see `evaluate_model`.
        device: "cuda", "cpu", ... None: the device of a given detector, else the best available one. Not with a `Predictor`.
        box_format: layout of the boxes, for data that do not state it, see `load_data`.
        allow_trained: also evaluate on images that the model was trained on, with a note in the result.
        allow_outside: also read files outside of the data set's folder.
        trust_boxes: do not check the layout of the boxes.
        keep_threshold: make the best score threshold the default of `dino_hf.predict`, see `keep_thresholds`. For the folder of a
            model, `config.json` is changed; for a given model, only its configuration in memory. Not with training images.
        progress: see `evaluate_model`.
    Raises:
        ValueError, FileNotFoundError, OSError: something cannot be read or does not fit. The message is one sentence.
    """
    from .report import check_folder, save_report  # imported here because they need matplotlib

    if output_dir is not None:
        check_folder(Path(output_dir), overwrite)
    if keep_threshold:
        check_keeps_thresholds(model, "" if isinstance(data, CocoData) else split, allow_trained)
    if isinstance(model, Predictor) and device is not None:
        raise ValueError(
            f"device={device!r} has no effect on a Predictor, which has its own device; use Predictor(..., device=...)."
        )
    predictor = model if isinstance(model, Predictor) else Predictor(model, device=device)
    reading = {"allow_trained": allow_trained, "allow_outside": allow_outside, "trust_boxes": trust_boxes}
    data, notes = load_split(data, split, box_format, [getattr(predictor, "model", None)], **reading)
    evaluation = evaluate_model(
        predictor,
        data,
        batch_size=batch_size,
        num_bootstrap=num_bootstrap,
        seed=seed,
        max_detections=max_detections,
        tiles=tiles,
        tile_overlap=tile_overlap,
        check_trained=False,  # `load_split` has checked it
        progress=progress,
    )
    evaluation.notes[:0] = notes
    if output_dir is not None:
        save_report(evaluation, data, Path(output_dir))
    if keep_threshold:
        folder = model if isinstance(model, str | Path) else None
        evaluation.notes.append(keep_thresholds(evaluation, predictor, folder))
    return evaluation


def evaluate_model(
    predictor: Predictor,
    data: CocoData,
    *,
    batch_size: int = 8,
    num_bootstrap: int = 1000,
    seed: int = 0,
    max_detections: int | None = None,
    tiles: int | str | tuple[int, int] | None = None,
    tile_overlap: float | None = None,
    check_trained: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Predict all images and score the detections. The COCO metrics equal the numbers of pycocotools bit by bit.

    Args:
        data: the images. They are read one after another.
        num_bootstrap: number of resamples of the images for the 95 % intervals, at least 40; 0: no intervals.
        seed: seed of the resamples.
        max_detections: number of detections that count for an image and class, at least 100; the highest scores count. None: 100
            as in COCO, or the largest number of objects of a class in an image. If it is not 100, or is too small, a note says so.
        tiles: size of tiles, as in `predict`. Larger images are also cut into tiles, and AP is measured on whole images, with
            the merged detections. None: the tiles that the model was trained on, with a note. "none": no tiles.
        tile_overlap: overlap of neighbouring tiles, relative to their side, in [0, 0.9]. None: as in training, or 0.2.
        check_trained: warn, with a note in the result, if the model was trained on images of the data.
        progress: called with the stage ("images", "classes" or "resampled classes"), the number done, and the total.
    Raises:
        ValueError: model and data have no class in common, or an image has another size than annotated. Any error that an image
            causes names the image in a note.
    """
    check_num_bootstrap(num_bootstrap)
    tiling, tile_notes = choose_tiling(tiles, tile_overlap, getattr(predictor, "model", None)), []
    if tiling is not None:
        why = ", as in the training of this model" if tiles is None else ""
        tile_notes = [
            f"Images larger than a tile are cut into tiles of {tiling.text}{why}. AP is measured on whole images."
        ]
    progress = progress or _silent
    classes = map_classes(predictor.id2label, predictor.category_ids, data, predictor.name)
    trained = trained_note(getattr(predictor, "model", None), data) if check_trained else None
    notes = classes.notes + ([trained] if trained else [])
    for note in notes:
        logger.warning(note)
    truth = truth_columns(data)
    check_memory(num_bootstrap, len(data.dataset), len(data.category_ids))
    limit, limit_notes = _detection_limit(truth, max_detections)
    for note in limit_notes:
        logger.warning(note)
    found, left_out = detection_columns(predictor, data, classes, batch_size, progress, num_kept(limit), tiling)
    class_names = {category_id: data.id2label[index] for index, category_id in enumerate(data.category_ids)}
    check_columns(truth, "reference", class_names)
    check_columns(found, "prediction", class_names)

    image_ids = np.unique(np.array(list(data.dataset["image_id"]), dtype=np.int64))
    results, matches = _match(truth, found, list(class_names), image_ids, progress, limit)
    weights = draw_images(len(image_ids), num_bootstrap, seed)
    samples = resample(matches, weights, lambda done, total: progress("resampled classes", done, total))
    curves = make_curves(matches, np.stack([results[category_id][0][0, :, 0, 0, -1] for category_id in class_names]))
    threshold = DEFAULT_THRESHOLD if curves.best is None else curves.best.threshold
    metrics = summarize(results, class_names, limit)
    intervals = _intervals(mean_over_classes(samples), metrics, num_images_of(matches))
    per_class = [
        _class_row(category_id, name, results[category_id], matches[index], samples[:, index], curves.class_best[index])
        for index, (category_id, name) in enumerate(class_names.items())
    ]
    intervals |= {f"AP_class_{row['name']}": row["intervals"]["AP"] for row in per_class if "AP" in row["intervals"]}
    return Evaluation(
        model=predictor.name,
        data_name=data.name,
        class_names=class_names,
        model_classes={predictor.id2label[index]: category_id for index, category_id in classes.category_ids.items()},
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
        notes=notes + limit_notes + tile_notes,
        max_detections=limit,
        tiling=tiling,
    )


def _detection_limit(truth: Columns, max_detections: int | None) -> tuple[int, list[str]]:
    """The number of detections that count per image and class, and notes for the user."""
    most, limit = detection_limit(truth), detection_limit(truth, max_detections)
    if most == COCO_LIMIT:
        return limit, []
    many = f"An image has {most} objects of one class"
    if max_detections is None:
        note = (
            f"{many}, so AP counts the best {most} detections per image and class. COCO counts {COCO_LIMIT}; choose "
            f"max_detections {COCO_LIMIT} for COCO's numbers."
        )
        return most, [note]
    if max_detections >= most:
        return max_detections, []
    return max_detections, [f"{many}, but AP counts only the best {max_detections} detections, as max_detections says."]


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _match(
    truth: Columns,
    found: Columns,
    category_ids: list[int],
    image_ids: np.ndarray,
    progress: Progress,
    limit: int,
) -> tuple[dict[int, tuple[np.ndarray, np.ndarray]], list[ClassMatches]]:
    """Precision and recall of each class from pycocotools, and the matches of the class."""
    results, matches = {}, []
    for category_id in category_ids:
        progress("classes", len(matches), len(category_ids))
        evaluation = evaluate_class(of_class(truth, category_id), of_class(found, category_id), limit)
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
    """The results of one class, as a row of the table of classes.

    Args:
        result: precision (T, R, 1, A, M) and recall (T, 1, A, M).
        samples: (B, 6)
    """
    precision, recall = result[0][:, :, 0, :, -1], result[1][:, 0, 0, 2]  # (T, R, A), (T,)
    everything = precision[..., 0]
    values = [
        everything,
        everything[0],
        everything[AP75_INDEX],
        *(precision[..., area] for area in range(1, len(SIZES))),
    ]
    scores = dict(zip(STATISTICS, map(mean_or_absent, values), strict=True))
    return {
        "name": name,
        "category_id": category_id,
        "num_objects": len(matches.objects[0]),
        "num_images": len(np.unique(matches.objects[0])),
        **scores,
        "AR_100": mean_or_absent(recall),
        "intervals": _intervals(samples, scores, num_images_of([matches])),
        "best_threshold": None if best is None else best.threshold,
        "best_f1": None if best is None else best.f1,
        "precision": None if best is None else best.precision,
        "recall": None if best is None else best.recall,
    }


def _intervals(samples: np.ndarray, scores: dict[str, float], num_images: list[int]) -> dict[str, tuple[float, float]]:
    """The interval of each of the `STATISTICS` that has enough images, from samples (B, 6)."""
    if not len(samples):
        return {}
    columns = zip(STATISTICS, samples.T, num_images, strict=True)
    return {name: interval(column, scores[name]) for name, column, count in columns if count >= MIN_IMAGES}
