"""Find the class that a name means: upper case, spaces, hyphens and the synonyms of COCO's classes do not count."""

import re
from collections.abc import Callable, Sequence

NO_CLASS = "N/A"  # the outputs of the release's 91 that have no category
_PLACEHOLDER = re.compile(r"LABEL_\d+")  # what the library calls a class without a name: it says nothing of what it is

# Names that COCO's classes have in PASCAL VOC, Open Images, Objects365, LVIS, BDD100K and Cityscapes, where nothing but
# upper case, spaces and hyphens is different anyway. Only names that can be read in one way: BDD100K's "bike" and "motor" are
# not here, nor are parts of a class (man, van) or more than one class (luggage, ball).
SYNONYMS: dict[str, tuple[str, ...]] = {
    "person": ("human", "pedestrian"),
    "car": ("automobile", "car (automobile)"),
    "motorcycle": ("motorbike",),
    "airplane": ("aeroplane",),
    "bus": ("bus (vehicle)",),
    "train": ("train (railroad vehicle)",),
    "fire hydrant": ("fireplug",),
    "cow": ("cattle",),
    "handbag": ("handbag/satchel",),
    "tie": ("necktie",),
    "frisbee": ("flying disc",),
    "skis": ("ski",),
    "tennis racket": ("tennis racquet",),
    "bowl": ("bowl/basin",),
    "orange": ("orange (fruit)", "orange/tangerine"),
    "donut": ("doughnut",),
    "couch": ("sofa",),
    "potted plant": ("houseplant",),
    "dining table": ("dinning table", "kitchen & dining room table"),
    "tv": ("television", "television set", "tv monitor", "monitor/tv"),
    "laptop": ("laptop computer",),
    "mouse": ("computer mouse", "mouse (computer equipment)"),
    "remote": ("remote control",),
    "keyboard": ("computer keyboard",),
    "cell phone": ("mobile phone", "cellular telephone"),
    "microwave": ("microwave oven",),
    "refrigerator": ("fridge",),
    "hair drier": ("hair dryer",),
}


def match_names(old_names: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each of `names`, the index of the class of `old_names` that is meant, or None."""
    readings: tuple[Callable[[str], str], ...] = (str, _normalised, _canonical)  # the most exact one first
    tables = []
    for read in readings:
        table: dict[str, int] = {}
        for index, name in enumerate(old_names):
            if _is_name(name):
                table.setdefault(read(name), index)
        tables.append(table)

    def match(name: str) -> int | None:
        found = (table.get(read(name)) for read, table in zip(readings, tables, strict=True))
        return next((index for index in found if index is not None), None)

    return [match(name) if _is_name(name) else None for name in names]


def _is_name(name: str) -> bool:
    return name != NO_CLASS and not _PLACEHOLDER.fullmatch(name)


def _normalised(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.casefold()) or name  # a name of hyphens alone is equal to itself only


_COCO_NAME = {_normalised(synonym): _normalised(name) for name, synonyms in SYNONYMS.items() for synonym in synonyms}


def _canonical(name: str) -> str:
    return _COCO_NAME.get(_normalised(name), _normalised(name))
