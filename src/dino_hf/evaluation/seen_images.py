"""Images that a detector was trained on and images that its run held out, by the record in its configuration."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from ..data.image_digests import FINGERPRINT_SIZE, MOST_DECODED, are_alike, image_digests, image_fingerprints, unpack
from ..data.load import DetectionData, load_data
from ..data.raw import SPLITS
from ..data.rows import CocoData

logger = logging.getLogger(__name__)


class SeenImages(NamedTuple):
    """Digests and fingerprints of images from `dino_hf.data.image_digests`.

    A set is empty if it is not in the record. Records of earlier versions have no fingerprints.
    """

    trained: set[bytes]
    held_out: set[bytes]  # by the run's own split of data without validation images
    trained_fingerprints: set[bytes]


def seen_images(model: PreTrainedModel | None) -> SeenImages:
    """Read the record of a run from a model's configuration. It is untrusted, so malformed parts count as missing."""
    record: Any = getattr(getattr(model, "config", None), "provenance", None)
    for name in ("training", "images"):
        record = record.get(name) if isinstance(record, dict) else None
    record = record if isinstance(record, dict) else {}
    return SeenImages(
        unpack(record.get("trained")),
        unpack(record.get("held_out")),
        unpack(record.get("trained_looks"), FINGERPRINT_SIZE),
    )


def load_split(
    data: Any,
    split: str = "validation",
    box_format: str | None = None,
    models: Sequence[PreTrainedModel | None] = (),
    allow_trained: bool = False,
    allow_outside: bool = False,
    trust_boxes: bool = False,
    log: bool = True,
) -> tuple[CocoData, list[str]]:
    """Load one part of a data set.

    If the data have no validation images, the validation part is the part that the run of the first model held out. Without a
    record of that run, it is a fifth of the training images, chosen by seed 0.

    Args:
        data: anything that `dino_hf.data.load_data` reads, its result, or the `CocoData` to evaluate on.
        split: "train", "validation" or "test". It is ignored for a `CocoData`.
        models: the evaluated models.
        allow_trained: images that a model was trained on give a note, not an error. The training part and a `CocoData` are always
            allowed, because the user chose them.
        allow_outside, trust_boxes: as in `load_data`.
        log: log the note on images that were trained on, as a warning. Commands print all notes instead.
    Returns:
        the data with their class space; notes on decisions made while reading.
    Raises:
        ValueError: the part does not exist, or a model was trained on images of it.
    """
    seen = [seen_images(model) for model in models]
    if isinstance(data, CocoData):
        return data, _check_overlap(data, seen, True, "given", log)
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
    if isinstance(data, DetectionData):
        loaded = data
    else:
        own = next((record for record in seen if record.held_out), None)
        reading = {"box_format": box_format, "allow_outside": allow_outside, "trust_boxes": trust_boxes}
        loaded = None
        if own and split != "test":
            whole = load_data(data, validation_fraction=0, only="validation", **reading)
            if whole.validation is None and whole.train is not None:
                loaded = _split_as_in_run(whole, own, split)
        if loaded is None:
            loaded = load_data(data, only=split, **reading)
    if (part := getattr(loaded, split)) is None:
        there = [name for name in SPLITS if getattr(loaded, name) is not None]
        held_out = [name for name in there if name != "train"]
        cure = (
            f"choose split {held_out[0]}"
            if held_out
            else "annotate images that the detector was not trained on; a score on training images says little about others"
        )
        raise ValueError(f"{loaded.origin} has no {split} images, but {', '.join(there)}; {cure}.")
    return part, loaded.notes + _check_overlap(part, seen, allow_trained or split == "train", split, log)


def _split_as_in_run(data: DetectionData, seen: SeenImages, split: str) -> DetectionData | None:
    """Split the training images as the run did. None: the run held out none of these images, or trained on none."""
    digests = image_digests(data.train)
    held_out = [index for index, digest in enumerate(digests) if digest in seen.held_out]
    trained = [index for index, digest in enumerate(digests) if digest in seen.trained]
    if not held_out or not trained:
        return None
    note = (
        f"There are no validation data: the {len(held_out)} of {len(digests)} training images that the training run held out are "
        "the validation images."
    )
    train, validation = (
        data.train._replace(dataset=data.train.dataset.select(indices), name=f"{data.train.name}, {what} by the run")
        for indices, what in ((trained, "trained on"), (held_out, "held out"))
    )
    return data._replace(train=train, validation=validation, notes=[*data.notes, note])


def _check_overlap(data: CocoData, seen: Sequence[SeenImages], allowed: bool, split: str, log: bool) -> list[str]:
    """A note if models were trained on images of the data, or on images that look the same.

    Only images with equal files are refused. Images that look the same may be frames of one camera, so they give a warning.
    """
    trained = set().union(*(record.trained for record in seen))
    fingerprints = set().union(*(record.trained_fingerprints for record in seen))
    if not trained and not fingerprints:
        return []
    is_equal = [digest in trained for digest in image_digests(data)]
    is_alike = [False] * len(is_equal)
    if fingerprints and not all(is_equal) and len(data.dataset) <= MOST_DECODED:
        is_alike = are_alike(image_fingerprints(data), fingerprints)
    num_equal = sum(is_equal)
    num_alike = sum(alike and not equal for alike, equal in zip(is_alike, is_equal, strict=True))
    if not num_equal and not num_alike:
        return []
    how = f" ({num_alike} of them compressed again or scaled)" if num_alike else ""
    what = (
        f"{num_equal + num_alike} of the {len(data.dataset)} {split} images were trained on{how}, so AP on them says little about "
        "other images"
    )
    if allowed or not num_equal:
        if log:
            logger.warning("%s.", what)
        return [f"{what}."]
    raise ValueError(
        f"{what}: evaluate on other images, or use --allow-trained (in Python, allow_trained=True) to evaluate anyway."
    )
