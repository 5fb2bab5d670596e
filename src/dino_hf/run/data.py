"""The data of a run: read once, and checked before training starts."""

import os
import socket
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PreTrainedModel, TrainingArguments

from ..data import DetectionData, RawDataset, read_raw
from ..data.hub_files import drain
from ..data.image_digests import image_digests
from ..data.load import load_raw
from ..data.rows import box_columns
from ..doctor.checks import inspect
from ..evaluation.seen_images import seen_images
from ..training.coco_data import CocoData
from .record import RunRecord


def read_data(data: Any, record: RunRecord, use_cpu: bool) -> tuple[DetectionData, list[str]]:
    """Read the data to train and to evaluate on.

    Args:
        data: the argument of `train`.
        record: record of the run, with the settings for reading data.
        use_cpu: setting of the run, needed to connect its processes.
    Returns:
        the data; warnings of the doctor.
    Raises:
        ValueError: no training image has a box, no held-out image has a box to measure with, or the doctor finds an error.
    """
    data, settings = read_streams(data, str(record.output_dir), use_cpu), record.values
    raw = None  # content of the files; None if `data` were read before
    if isinstance(data, DetectionData):
        splits = data
    elif isinstance(data, CocoData):
        splits = DetectionData(data, None, None, [], data.name or "")
    elif isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, CocoData) for part in data):
        splits = DetectionData(*data, None, [], data[0].name or "")
    else:
        raw = read_raw(data, box_format=settings["box_format"], allow_outside=settings["allow_outside"])
        reading = {name: settings[name] for name in ("validation_fraction", "seed", "trust_boxes")}
        splits = load_raw(raw, data, **reading)
    if splits.train is None:
        raise ValueError(f"{splits.origin} has no images to train on. Name a data set that has a train split.")
    for part, purpose in ((splits.train, "to train on"), (splits.validation, "held out")):
        if part is not None and box_columns(part)[1].all():  # all boxes are crowds, or there are no boxes
            raise ValueError(
                f"None of the {len(part.dataset)} images {purpose} in {splits.origin} has a box, so there is nothing to learn "
                "or to measure. Each part needs boxes. To train without held-out images, leave out the validation images and set "
                "--validation-fraction 0."
            )
    record.check_data(splits.train, splits.validation)
    return splits, data_findings(data, splits, settings["trust_boxes"], raw)


def read_streams(data: Any, output_dir: str, use_cpu: bool) -> Any:
    """Replace each `IterableDataset` by a `Dataset`. Other data are returned unchanged.

    A stream may yield different rows each time. So only the first process of a machine reads it. The others open the Arrow files
    that the first process wrote.

    Args:
        output_dir, use_cpu: settings of the run, needed to connect its processes.
    """
    parts = data if isinstance(data, dict) else {"": data}
    if not any(isinstance(part, IterableDataset) for part in parts.values()):
        return data
    parts = _shared(parts, output_dir, use_cpu)
    return parts if isinstance(data, dict) else parts[""]


def _shared(parts: dict[str, Any], output_dir: str, use_cpu: bool) -> dict[str, Any]:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _drain_streams(parts)
    args = TrainingArguments(output_dir, use_cpu=use_cpu, report_to="none")  # connects the processes
    own = _drain_streams(parts) if args.local_process_index == 0 else None
    gathered: list = [None] * args.world_size
    torch.distributed.all_gather_object(gathered, (socket.gethostname(), own))
    return next(read for host, read in gathered if host == socket.gethostname() and read is not None)


def _drain_streams(parts: dict[str, Any]) -> dict[str, Dataset]:
    return {name: drain(part) if isinstance(part, IterableDataset) else part for name, part in parts.items()}


def data_findings(data: Any, splits: DetectionData, trust_boxes: bool, raw: RawDataset | None = None) -> list[str]:
    """Check training data without decoding images. Data from Python get the same checks as folders.

    Args:
        data: the argument of `train`.
        splits: the data sets read from it.
        raw: content of the files; None if the data were read before.
    Returns:
        the doctor's warnings, as sentences.
    Raises:
        ValueError: with these data, training would stop or learn wrong boxes.
    """
    report = inspect(_to_raw(splits) if raw is None else raw, check_images=False, trust_boxes=trust_boxes)
    name = str(data) if isinstance(data, str | Path) else splits.origin or "The data set"
    advice = "`dino_hf.doctor.inspect(dino_hf.data.read_raw(data))` lists them."
    if isinstance(data, str | Path):
        advice = f"`dino-hf doctor {data}` shows them, and --fix writes a cleaned copy."
    for finding in report.findings:
        if finding.severity == "error":
            raise ValueError(f"{name} has {finding.count} {finding.what}. {advice}")
    warnings = [finding for finding in report.findings if finding.severity == "warning"]
    copies = _copies_of_training_images(splits)
    if not warnings:
        return copies
    listed = "; ".join(f"{finding.count} {finding.what}" for finding in warnings)
    return [f"the data have {listed}. {advice}", *copies]


def _copies_of_training_images(splits: DetectionData) -> list[str]:
    """A warning for each held-out part that has copies of training images."""
    trained = set() if splits.train is None else set(image_digests(splits.train)) - {None}
    return [
        f"{count} of {total} {part} images are copies of training images. AP on them does not measure how the model performs on "
        "new images. Remove them from one of the two parts."
        for part, count, total in _held_out_among(trained, splits)
    ]


def trained_before(model: PreTrainedModel, splits: DetectionData) -> list[str]:
    """A warning for each held-out part with images that an earlier run of the start model was trained on."""
    return [
        f"the start model was trained on {count} of the {total} {part} images, so AP on them says little about other images. Hold "
        "out other images, or choose the seed and the validation fraction of the model's run, which hold out the same images again."
        for part, count, total in _held_out_among(seen_images(model).trained, splits)
    ]


def _held_out_among(digests: set[bytes], splits: DetectionData) -> list[tuple[str, int, int]]:
    """Name, number of images with these digests, and number of all images, of each held-out part with at least one of them."""
    found = []
    for name, data in (("validation", splits.validation), ("test", splits.test)):
        if data is not None and digests and (count := sum(one in digests for one in image_digests(data))):
            found.append((name, count, len(data.dataset)))
    return found


def _to_raw(splits: DetectionData) -> RawDataset:
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    raw = read_raw(DatasetDict({name: part.dataset for name, part in parts.items() if part is not None}))
    # The rows contain class indices, not the original category ids.
    categories = [{"id": index, "name": name} for index, name in splits.train.id2label.items()]
    return raw._replace(categories=categories, origin=splits.origin)
