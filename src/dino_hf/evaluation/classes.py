"""Which class of the data a class of the model is: by name, for a detector of any origin."""

from typing import NamedTuple

import numpy as np

from ..common.class_names import NO_CLASS, match_names
from ..common.text import shorten
from ..data.rows import CocoData

_LONGEST_NAME = 60  # characters of a name in a sentence


class ClassMap(NamedTuple):
    """From the class indices of a model to the category ids of the data."""

    category_ids: dict[int, int]  # class index of the model -> category id of the data; others are left out
    unknown: list[str]  # classes of the data that the model does not know
    notes: list[str]  # what the user should know

    def apply(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Class indices (N,) -> which are classes of the data, (N,) bool, and the category ids of those."""
        table = np.full(max([*self.category_ids, *labels.tolist()], default=0) + 1, -1)
        known = np.zeros(len(table), dtype=bool)
        for index, category_id in self.category_ids.items():
            table[index], known[index] = category_id, True
        return known[labels], table[labels[known[labels]]]


def map_classes(
    id2label: dict[int, str], category_ids: list[int] | None, data: CocoData, model_name: str = "The model"
) -> ClassMap:
    """By name as `match_names` reads it: case, spaces, hyphens and COCO's synonyms do not count. Where the model has only
    placeholders, LABEL_0 and the like, by category id if it knows its own, else in the order of the classes if there are as many.

    Args:
        id2label, category_ids: of the model.
    Raises:
        ValueError: no class of the model is one of the data.
    """
    names = [data.id2label[index] for index in range(len(data.category_ids))]
    own = {index: name for index, name in id2label.items() if name != NO_CLASS}
    matched = dict(zip(own, match_names(names, list(own.values())), strict=True))
    matched = {index: data.category_ids[place] for index, place in matched.items() if place is not None}
    notes = []
    is_unnamed = all(match_names([name], [name]) == [None] for name in own.values())
    if not matched and is_unnamed and category_ids is not None:
        matched = {index: category_ids[index] for index in own if category_ids[index] in data.category_ids}
    if not matched and is_unnamed and len(own) == len(names):
        matched = dict(zip(sorted(own), data.category_ids, strict=True))
        notes.append(
            f"{model_name} has no class names, only LABEL_0 and the like; its {len(names)} classes are taken for those of the data "
            f"in their order: {_some(names)}."
        )
    if not matched:
        equal = ", as many, but which is which would be a guess" if len(own) == len(names) else ""
        raise ValueError(
            f"{model_name} knows none of the classes of the data by name: it has {len(own)}, {_some(list(own.values()))}, the data "
            f"have {len(names)}, {_some(names)}{equal}; give the same names to both, in the model's config.json (id2label) or in "
            "the data."
        )
    reached = set(matched.values())
    unknown = [name for name, category_id in zip(names, data.category_ids, strict=True) if category_id not in reached]
    if unknown:
        notes.append(
            f"{model_name} does not know {len(unknown)} of {len(names)} classes of the data, whose AP is 0: {_some(unknown)}."
        )
    return ClassMap(matched, unknown, notes)


def _some(names: list[str], shown: int = 5) -> str:
    listed = ", ".join(repr(shorten(name, _LONGEST_NAME)) for name in names[:shown])
    return listed + (f" and {len(names) - shown} more" if len(names) > shown else "")
