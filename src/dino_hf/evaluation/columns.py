"""The annotations of a data set and the detections of a model as columns, with one row per box."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from ..common.tiles import Tiling
from ..data.rows import CocoData, check_image_size
from ..inference.predictor import Detections, Predictor
from ..inference.tiling import detect_tiled
from .classes import ClassMap
from .coco import Columns

Progress = Callable[[str, int, int], None]  # name of the stage, number done, total number


def truth_columns(data: CocoData) -> Columns:
    """The annotations of all images as columns."""
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
    """The file name of an image, or its id if the data have no files."""
    name = data.dataset["file_name"][index] if "file_name" in data.dataset.column_names else None
    return name or f"image {data.dataset['image_id'][index]}"


def detection_columns(
    predictor: Predictor,
    data: CocoData,
    classes: ClassMap,
    batch_size: int,
    progress: Progress,
    max_detections: int | None = None,
    tiling: Tiling | None = None,
) -> tuple[Columns, dict[str, int]]:
    """Detect objects in all images.

    Args:
        tiling: tiles to detect in, besides the whole images. None: no tiles.
    Returns:
        the detections as columns, with the category ids of the data; class name -> number of detections, for the classes of the
        model that the data do not have.
    """
    image_ids, columns, left_out = list(data.dataset["image_id"]), [], Counter()
    progress("images", 0, len(image_ids))
    try:
        for found in detect_images(predictor, data, batch_size, max_detections, tiling):
            known, category_ids = classes.apply(found.labels)
            image_id = np.full(len(category_ids), image_ids[len(columns)])
            columns.append((image_id, category_ids, found.boxes[known], found.scores[known]))
            left_out.update(found.labels[~known].tolist())
            progress("images", len(columns), len(image_ids))
    except KeyboardInterrupt as error:
        error.add_note(
            f"The evaluation stopped after {len(columns)} images, at {image_name(data, max(0, len(columns) - 1))}."
        )
        raise
    image_id, labels, boxes, scores = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    names = {predictor.id2label.get(label, str(label)): count for label, count in left_out.most_common()}
    return {"image_id": image_id, "labels": labels, "boxes": boxes.reshape(-1, 4), "scores": scores}, names


def detect_images(
    predictor: Predictor, data: CocoData, batch_size: int, max_detections: int | None, tiling: Tiling | None
) -> Iterator[Detections]:
    """Yield the detections of each image. An error gets a note that names the image."""
    num_read = num_done = 0
    is_reading = False

    def images():
        nonlocal num_read, is_reading
        for index in range(len(data.dataset)):
            is_reading = True
            row = data.dataset[index]
            check_image_size(row["image_id"], row["image"], (row["width"], row["height"]))
            is_reading = False
            num_read = index + 1
            yield row["image"]

    detect = partial(predictor, batch_size=batch_size, threshold=0.0, max_detections=max_detections)
    if tiling is not None:
        detect = detect_tiled(detect, *tiling, max_detections)
    try:
        for found in detect(images()):
            yield found
            num_done += 1
    except Exception as error:
        if is_reading:
            error.add_note(f"This is {image_name(data, num_read)}.")
        else:
            error.add_note(_image_of_error(predictor, data, error, range(num_done, num_read)))
        raise


def _image_of_error(predictor: Predictor, data: CocoData, error: Exception, suspects: range) -> str:
    """Say which image caused an error. The predictor works on many images at a time, so they are tried one by one."""
    if not isinstance(error, torch.AcceleratorError):  # after this error the device is unusable
        for index in suspects:
            try:
                list(predictor([data.dataset[index]["image"]], batch_size=1, threshold=0.0))
            except type(error):
                return f"This is {image_name(data, index)}."
    if not suspects:
        return "The error came before the first image."
    first, last = image_name(data, suspects[0]), image_name(data, suspects[-1])
    return f"The error came between {first} and {last}. A smaller batch size needs less memory."
