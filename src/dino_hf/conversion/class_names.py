"""Class names and original category ids of a checkpoint."""

import json
import operator
from collections import Counter
from pathlib import Path

from ..model.coco_classes import coco_class_space
from .errors import ConversionError


def class_space(
    num_labels: int, names_in_file: list[str] | None, label_file: Path | None, data_set: str | None
) -> tuple[dict[int, str] | None, list[int] | None, str]:
    """Find the class names of a checkpoint.

    Args:
        names_in_file: names in the checkpoint file, if it has them.
        label_file: file with names, from the user.
        data_set: name of the data set of the training, if the file has it.
    Returns:
        index -> name, or None if no names are known; the original category id of each index, or None; the origin of the names,
        as text for the user.
    """
    if label_file is not None:
        return (*read_label_names(label_file, num_labels), f"from {label_file.name}")
    coco = coco_class_space(num_labels) if data_set in (None, "coco") else None
    is_text = names_in_file is not None and all(name.isprintable() for name in names_in_file)
    if is_text and len(names_in_file) == num_labels:
        is_coco = coco is not None and list(coco[0].values()) == names_in_file
        return dict(enumerate(names_in_file)), coco[1] if is_coco else None, "from the file"
    if coco is not None:
        return (*coco, f"COCO's, because there are {num_labels}")
    return None, None, "unknown; set them by --label-names FILE"


def read_label_names(path: Path, num_labels: int) -> tuple[dict[int, str], list[int] | None]:
    """Read class names from a file: a COCO json, a json list or dictionary of index to name, or a text file with one name per line.

    Returns:
        index -> name; the category id of each index if the file is a COCO json, else None.
    Raises:
        ConversionError: the file cannot be read, or has another number of classes.
    """
    names, category_ids = _parse_names(_read_content(path), path, num_labels)
    if others := [name for name in names.values() if not isinstance(name, str) or not name.isprintable()]:
        raise ConversionError(f"{path} has the names {others[:3]}, which are not text.")
    counts = Counter(names.values())
    if twice := sorted(name for name, count in counts.items() if count > 1 and name != "N/A"):
        raise ConversionError(f"{path} has the names {twice[:3]} more than once; each class needs its own name.")
    if sorted(names) != list(range(num_labels)):
        raise ConversionError(
            f"{path} names {len(names)} classes (indices {sorted(names)[:3]} to {max(names, default=None)}), but the checkpoint "
            f"has {num_labels}, numbered from 0."
        )
    return {index: names[index] for index in range(num_labels)}, category_ids


def _read_content(path: Path):
    """The JSON content of a file, or else its non-empty lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"The label names cannot be read: {error}.") from error
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ConversionError(f"{path} is nested too deep for a file of names.") from error
    except ValueError:
        return [line.strip() for line in text.splitlines() if line.strip()]


def _parse_names(content, path: Path, num_labels: int) -> tuple[dict[int, str], list[int] | None]:
    category_ids = None
    try:
        if isinstance(content, dict) and "categories" in content:
            by_id = {operator.index(category["id"]): category["name"] for category in content["categories"]}
            if len(by_id) < len(content["categories"]):
                raise ConversionError(f"{path} has two categories with the same id; ids must differ.")
            if len(by_id) == num_labels:
                names, category_ids = dict(enumerate(by_id[i] for i in sorted(by_id))), sorted(by_id)
            elif by_id and min(by_id) >= 0 and max(by_id) < num_labels:  # indices are the ids themselves
                names = {index: by_id.get(index, "N/A") for index in range(num_labels)}
                category_ids = list(range(num_labels))
            else:
                names = by_id
        elif isinstance(content, dict):
            names = {int(index): name for index, name in content.items()}
        elif isinstance(content, list):
            names = dict(enumerate(content))
        else:
            raise TypeError(f"it holds a {type(content).__name__}")
    except ConversionError:
        raise
    except (TypeError, KeyError, ValueError) as error:
        raise ConversionError(
            f"{path} is not a COCO json, a json list or dictionary of names, or a text file with one name per line ({error!r})."
        ) from error
    return names, category_ids
