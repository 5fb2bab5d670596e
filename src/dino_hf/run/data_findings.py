"""The doctor's findings on training data, before training starts. Data from Python get the same checks as folders."""

from pathlib import Path
from typing import Any

from datasets import DatasetDict

from ..data import DetectionData, RawDataset, read_raw
from ..data.image_digests import image_digests
from ..doctor.checks import inspect


def data_findings(
    data: Any, splits: DetectionData, settings: dict[str, Any], raw: RawDataset | None = None
) -> list[str]:
    """Check training data, without decoding images, and return the warnings.

    Args:
        data: the argument of `train`.
        splits: the data sets loaded from it.
        settings: settings of the run; only `trust_boxes` is used.
        raw: raw data from the files. None: `data` was loaded before the run, so the checks use `splits`.
    Raises:
        ValueError: with these data, training would stop or learn wrong boxes.
    """
    raw = _raw_of(splits) if raw is None else raw
    report = inspect(raw, check_images=False, trust_boxes=settings["trust_boxes"])
    name = str(data) if isinstance(data, str | Path) else splits.origin or "The data set"
    advice = "`dino_hf.doctor.inspect(dino_hf.data.read_raw(data))` lists them."
    if isinstance(data, str | Path):
        advice = f"`dino-hf doctor {data}` shows them, and --fix writes a cleaned copy."
    for finding in report.findings:
        if finding.severity == "error":
            raise ValueError(f"{name} has {finding.count} {finding.what}. {advice}")
    warnings = [finding for finding in report.findings if finding.severity == "warning"]
    copies = _about_copies(splits)
    if not warnings:
        return copies
    listed = "; ".join(f"{finding.count} {finding.what}" for finding in warnings)
    return [f"the data have {listed}. {advice}", *copies]


def _about_copies(splits: DetectionData) -> list[str]:
    """A warning for validation and test data that contain copies of training images."""
    trained = set() if splits.train is None else set(image_digests(splits.train)) - {None}
    found = []
    for name, data in (("validation", splits.validation), ("test", splits.test)):
        if data is None or not trained:
            continue
        if count := sum(digest in trained for digest in image_digests(data)):
            found.append(
                f"{count} of {len(data.dataset)} {name} images are copies of training images, so their AP does not tell how the "
                "model performs on new images: remove them from one of the two parts."
            )
    return found


def _raw_of(splits: DetectionData) -> RawDataset:
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    raw = read_raw(DatasetDict({name: part.dataset for name, part in parts.items() if part is not None}))
    # The rows contain class indices, not the original category ids.
    categories = [{"id": index, "name": name} for index, name in splits.train.id2label.items()]
    return raw._replace(categories=categories, origin=splits.origin)
