"""Images that a detector was trained on and images that its run held out, by the record in its configuration."""

import logging
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from ..data.image_digests import FINGERPRINT_SIZE, MOST_DECODED, are_alike, image_digests, image_fingerprints, unpack
from ..data.load import DetectionData, load_data
from ..data.raw import SPLITS
from ..data.rows import CocoData

logger = logging.getLogger(__name__)


class SeenImages(NamedTuple):
    """Digests and fingerprints of images from `dino_hf.data.image_digests`.

    A set is empty if it is not in the record. Records of earlier versions have no fingerprints, or only those of trained images.
    """

    trained: Set[bytes] = frozenset()  # by the last run, and by the runs that its start came from
    held_out: Set[bytes] = frozenset()  # by the last run
    trained_fingerprints: Set[bytes] = frozenset()
    held_out_fingerprints: Set[bytes] = frozenset()


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
        unpack(record.get("held_out_looks"), FINGERPRINT_SIZE),
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

    If the data have no validation images, the validation part is the part that the run of the first model held out. Images that
    were added after the run belong to no part; a note counts them. Without a record of that run, the validation part is a fifth of
    the training images, chosen by seed 0.

    With several models, held-out images that another model was trained on are left out.

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
    seen = [(_name(model), seen_images(model)) for model in models]
    if isinstance(data, CocoData):
        return data, _check_overlap(data, seen, True, "given", log)
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
    if isinstance(data, DetectionData):
        loaded = data
    else:
        reading = {"box_format": box_format, "allow_outside": allow_outside, "trust_boxes": trust_boxes}
        loaded = None
        if split != "test" and any(record.held_out for _, record in seen):
            whole = load_data(data, validation_fraction=0, only="validation", **reading)
            if whole.validation is None and whole.train is not None:
                loaded = _split_as_in_run(whole, seen, allow_trained)
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


def _name(model: PreTrainedModel | None) -> str:
    return getattr(model, "name_or_path", None) or type(model).__name__


def _split_as_in_run(
    data: DetectionData, seen: Sequence[tuple[str, SeenImages]], allow_trained: bool
) -> DetectionData | None:
    """Split the training images as the run of the first model did. None: the run held out none of these images.

    Args:
        seen: name and record of each model.
        allow_trained: keep held-out images that another model was trained on.
    Raises:
        ValueError: other models were trained on all held-out images.
    """
    first = next(index for index, (_, record) in enumerate(seen) if record.held_out)
    name, own = seen[first]
    digests = image_digests(data.train)
    parts = [_part_of(digest, own) for digest in digests]
    unknown = [index for index, part in enumerate(parts) if part is None]
    # If all held-out files are there, the unknown images are new, even if they look like others.
    has_changed = len(own.held_out - set(digests)) > 0
    if has_changed and own.held_out_fingerprints and 0 < len(unknown) <= MOST_DECODED:
        for index, part in zip(unknown, _parts_by_looks(data.train, unknown, own), strict=True):
            parts[index] = part
    held_out = [index for index, part in enumerate(parts) if part == "held out"]
    trained = [index for index, part in enumerate(parts) if part == "trained on"]
    if not held_out:
        return None
    notes = [
        f"There are no validation data: the {len(held_out)} of {len(digests)} training images that the training run held out are "
        "the validation images."
    ]
    if num_new := len(digests) - len(held_out) - len(trained):
        notes.append(
            f"{num_new} of the {len(digests)} training images are not in the record of the run: they were added or changed later. "
            "They belong to neither part and are left out."
        )
    others = set().union(*(record.trained for index, (_, record) in enumerate(seen) if index != first))
    if not allow_trained and (shared := [index for index in held_out if digests[index] in others]):
        held_out = [index for index in held_out if digests[index] not in others]
        if not held_out:
            raise ValueError(
                f"The models have different splits: another model was trained on all {len(shared)} images that {name} held out. "
                "Evaluate on other images, or use --allow-trained (in Python, allow_trained=True) to evaluate anyway."
            )
        notes.append(
            f"{len(shared)} images that {name} held out are left out, because another model was trained on them: "
            f"{len(held_out)} images remain."
        )
    train, validation = (
        data.train._replace(dataset=data.train.dataset.select(indices), name=f"{data.train.name}, {what} by the run")
        if indices
        else None
        for indices, what in ((trained, "trained on"), (held_out, "held out"))
    )
    return data._replace(train=train, validation=validation, notes=[*data.notes, *notes])


def _part_of(digest: bytes | None, seen: SeenImages) -> str | None:
    if digest in seen.held_out:
        return "held out"
    return "trained on" if digest in seen.trained else None


def _parts_by_looks(data: CocoData, indices: Sequence[int], seen: SeenImages) -> list[str | None]:
    """The parts of images whose files have changed, such as compressed copies. In doubt, an image was trained on."""
    fingerprints = image_fingerprints(data._replace(dataset=data.dataset.select(indices)))
    trained = _alike(fingerprints, seen.trained_fingerprints)
    held_out = _alike(fingerprints, seen.held_out_fingerprints)
    return [
        "trained on" if is_trained else "held out" if is_held_out else None
        for is_trained, is_held_out in zip(trained, held_out, strict=True)
    ]


def _alike(fingerprints: Sequence[bytes | None], known: Set[bytes]) -> list[bool]:
    return are_alike(fingerprints, known) if known else [False] * len(fingerprints)


def trained_note(model: PreTrainedModel | None, data: CocoData) -> str | None:
    """A sentence if a model was trained on images of the data. Only equal files are found, because images are not decoded."""
    trained = seen_images(model).trained
    if not trained or not (count := sum(digest in trained for digest in image_digests(data))):
        return None
    return _sentence(count, len(data.dataset), "given") + "."


def _sentence(count: int, total: int, split: str, how: str = "", by: str = "") -> str:
    return (
        f"{count} of the {total} {split} images were trained on{by}{how}, so AP on them says little about other images"
    )


def _check_overlap(
    data: CocoData, seen: Sequence[tuple[str, SeenImages]], allowed: bool, split: str, log: bool
) -> list[str]:
    """Notes on models that were trained on images of the data, or on images that look the same.

    Only images with equal files are refused. Images that look the same may be frames of one camera, so they give a warning.
    """
    if not any(record.trained or record.trained_fingerprints for _, record in seen):
        return []
    digests, fingerprints, notes, is_refused = image_digests(data), None, [], False
    for name, record in seen:
        is_equal = [digest in record.trained for digest in digests]
        is_alike = [False] * len(is_equal)
        if record.trained_fingerprints and not all(is_equal) and len(digests) <= MOST_DECODED:
            fingerprints = image_fingerprints(data) if fingerprints is None else fingerprints
            is_alike = are_alike(fingerprints, record.trained_fingerprints)
        num_equal = sum(is_equal)
        num_alike = sum(alike and not equal for alike, equal in zip(is_alike, is_equal, strict=True))
        if num_equal or num_alike:
            how = f" ({num_alike} of them compressed again or scaled)" if num_alike else ""
            notes.append(
                _sentence(num_equal + num_alike, len(digests), split, how, f" by {name}" if len(seen) > 1 else "")
            )
        is_refused |= num_equal > 0 and not allowed
    if is_refused:
        raise ValueError(
            f"{'; '.join(notes)}: evaluate on other images, or use --allow-trained (in Python, allow_trained=True) to evaluate "
            "anyway."
        )
    if log:
        for note in notes:
            logger.warning("%s.", note)
    return [f"{note}." for note in notes]


def count_trained(data: CocoData, seen: SeenImages) -> int:
    """Number of images that a model was trained on, by equal files or, if they can all be decoded soon, by their looks."""
    is_seen = [digest in seen.trained for digest in image_digests(data)]
    if seen.trained_fingerprints and not all(is_seen) and len(is_seen) <= MOST_DECODED:
        alike = are_alike(image_fingerprints(data), seen.trained_fingerprints)
        is_seen = [equal or similar for equal, similar in zip(is_seen, alike, strict=True)]
    return sum(is_seen)
