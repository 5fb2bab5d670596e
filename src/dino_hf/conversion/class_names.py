"""Names and original category ids of the classes of a checkpoint."""

import json
import operator
from pathlib import Path

from ..model.coco_classes import coco_class_space
from .checkpoint_files import ConversionError


def class_space(
    num_labels: int, names_in_file: list[str] | None, label_file: Path | None, data_set: str | None
) -> tuple[dict[int, str] | None, list[int] | None, str]:
    """Names and original category ids, and in words where they are from. No names: None.

    Args:
        data_set: what the training was on, if the file says so.
    """
    if label_file is not None:
        return (*read_label_names(label_file, num_labels), f"from {label_file.name}")
    coco = coco_class_space(num_labels) if data_set in (None, "coco") else None
    is_text = names_in_file is not None and all(name.isprintable() for name in names_in_file)
    if is_text and len(names_in_file) == num_labels:
        is_coco = coco is not None and list(coco[0].values()) == names_in_file
        return dict(enumerate(names_in_file)), coco[1] if is_coco else None, "from the file"
    if coco is not None:
        return (*coco, f"taken to be COCO's, because there are {num_labels}")
    return None, None, "not known; --label-names FILE gives them"


def read_label_names(path: Path, num_labels: int) -> tuple[dict[int, str], list[int] | None]:
    """Class names from a file: a COCO json (its categories; also gives the ids), a json list or dictionary of index to name,
    or a text file with one name per line.

    Raises:
        ConversionError: it cannot be read, or is not for this number of classes.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"The label names cannot be read: {error}.") from error
    category_ids = None
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ConversionError(f"{path} is nested too deep for a file of names.") from error
    except ValueError:
        content = [line.strip() for line in text.splitlines() if line.strip()]
    try:
        if isinstance(content, dict) and "categories" in content:
            by_id = {operator.index(category["id"]): category["name"] for category in content["categories"]}
            if len(by_id) < len(content["categories"]):
                raise ConversionError(f"{path} has two categories of one id; ids must differ.")
            if len(by_id) == num_labels:
                names, category_ids = dict(enumerate(by_id[i] for i in sorted(by_id))), sorted(by_id)
            elif by_id and min(by_id) >= 0 and max(by_id) < num_labels:  # outputs are the raw ids
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
            f"{path} is neither a COCO json, nor a json list or dictionary of names, nor one name per line ({error!r})."
        ) from error
    if others := [name for name in names.values() if not isinstance(name, str) or not name.isprintable()]:
        raise ConversionError(f"{path} has the names {others[:3]}, which are not text.")
    if twice := sorted({name for name in names.values() if name != "N/A" and list(names.values()).count(name) > 1}):
        raise ConversionError(f"{path} has the names {twice[:3]} more than once; each class has its own.")
    if sorted(names) != list(range(num_labels)):
        raise ConversionError(
            f"{path} names {len(names)} classes (indices {sorted(names)[:3]} to {max(names, default=None)}), but the checkpoint "
            f"has {num_labels}, numbered from 0."
        )
    return {index: names[index] for index in range(num_labels)}, category_ids
