"""Match class names of two data sets. Case, spaces and hyphens are ignored, and synonyms of COCO's classes are known."""

import re
from collections.abc import Callable, Sequence

NO_CLASS = "N/A"  # name of an output without a category; the release has 91 outputs for 80 categories
_PLACEHOLDER = re.compile(r"LABEL_\d+")  # the library's name for a class without a name

# Names of COCO's classes in PASCAL VOC, Open Images, Objects365, LVIS, BDD100K and Cityscapes, if they differ in more than case,
# spaces and hyphens. Ambiguous names (BDD100K's "bike" and "motor"), parts of a class (man, van) and names of several classes
# (luggage, ball) are left out.
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
    """For each of `names`, the index of the same class in `old_names`, or None."""
    readings: tuple[Callable[[str], str], ...] = (
        str,
        _normalised,
        _canonical,
    )  # from the most exact reading to the least exact
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
    return re.sub(r"[\s_-]+", "", name.casefold()) or name  # a name of hyphens alone would be empty


_COCO_NAME = {_normalised(synonym): _normalised(name) for name, synonyms in SYNONYMS.items() for synonym in synonyms}


def _canonical(name: str) -> str:
    return _COCO_NAME.get(_normalised(name), _normalised(name))
