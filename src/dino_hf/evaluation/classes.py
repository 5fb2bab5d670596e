"""Match the classes of any detector with the classes of the data, by name."""

from typing import NamedTuple

import numpy as np

from ..common.class_names import NO_CLASS, match_names
from ..common.text import list_some, shorten
from ..data.rows import CocoData

_LONGEST_NAME = 60  # characters of a name in a sentence


class ClassMap(NamedTuple):
    """A map from the class indices of a model to the category ids of the data."""

    category_ids: dict[int, int]  # class index of the model -> category id of the data; unmatched classes are missing
    unknown: list[str]  # classes of the data that the model does not know
    notes: list[str]  # sentences for the user

    def apply(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Class indices (N,) -> whether each is a class of the data (N,) bool, and the category ids of those that are."""
        table = np.full(max([*self.category_ids, *labels.tolist()], default=0) + 1, -1)
        known = np.zeros(len(table), dtype=bool)
        for index, category_id in self.category_ids.items():
            table[index], known[index] = category_id, True
        return known[labels], table[labels[known[labels]]]


def map_classes(
    id2label: dict[int, str], category_ids: list[int] | None, data: CocoData, model_name: str = "The model"
) -> ClassMap:
    """Match classes by name, as `match_names` does: case, spaces, hyphens and COCO's synonyms do not matter.

    A model may have only placeholder names such as LABEL_0. Then classes are matched by the category ids of the model, or by
    their order if model and data have the same number of classes.

    Args:
        id2label: class index -> name, of the model.
        category_ids: category id of each class of the model, or None.
        model_name: name of the model in messages.
    Raises:
        ValueError: no class of the model matches a class of the data.
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
            f"{model_name} has no class names, only placeholders such as LABEL_0. Its {len(names)} classes are matched by order "
            f"with the classes of the data: {_some(names)}."
        )
    if not matched:
        raise ValueError(
            f"{model_name} knows none of the classes of the data. The model has {len(own)} classes: {_some(list(own.values()))}. "
            f"The data have {len(names)}: {_some(names)}. Use the same names in both: change them in the data, or in the model's "
            "config.json (id2label)."
        )
    reached = set(matched.values())
    unknown = [name for name, category_id in zip(names, data.category_ids, strict=True) if category_id not in reached]
    if unknown:
        notes.append(
            f"{model_name} does not know {len(unknown)} of {len(names)} classes of the data. Their AP is 0: {_some(unknown)}."
        )
    return ClassMap(matched, unknown, notes)


def _some(names: list[str]) -> str:
    return list_some([repr(shorten(name, _LONGEST_NAME)) for name in names], 5)
