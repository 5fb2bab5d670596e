"""Check that the boxes of a data set have the layout of its format, before training or evaluation."""

from .box_table import LAYOUT_TEXTS, BoxTable, Reading, guess_reading, make_box_table
from .raw import RawDataset


def guess_readings(tables: dict[str, BoxTable], raw_format: str) -> dict[str, Reading]:
    """The reading of each split. If one wrong reading explains the whole data set, all splits get it."""
    if not tables:
        return {}
    of_all = guess_reading(list(tables.values()), raw_format)
    if not of_all.is_as_read:
        return dict.fromkeys(tables, of_all)
    return {name: guess_reading([table], raw_format) for name, table in tables.items()}


def check_reading(raw: RawDataset) -> None:
    """
    Raises:
        ValueError: many boxes leave their images, and all fit when read in another way.
    """
    tables = {name: make_box_table(split, raw.categories) for name, split in raw.splits.items()}
    for name, reading in guess_readings(tables, raw.format).items():
        if reading.is_as_read:
            continue
        raise ValueError(f"{raw.splits[name].origin}: {_what_is_wrong(reading, raw.format)}")


def _what_is_wrong(reading: Reading, raw_format: str) -> str:
    is_yolo = raw_format == "yolo"
    expected = "cxcywh" if is_yolo else "xywh"
    units = {True: "relative to the image", False: "in pixels"}
    num_leaving = reading.num_leaving
    if reading.is_relative != is_yolo:
        text = f"the boxes are {units[reading.is_relative]}, while {raw_format} data have them {units[is_yolo]}"
        cure = f"{'divide' if is_yolo else 'multiply'} them by width and height"
    else:
        text = (
            f"{num_leaving[expected]} of {reading.num_boxes} boxes leave their images as {LAYOUT_TEXTS[expected]}, which "
            f"{raw_format} data have; as {LAYOUT_TEXTS[reading.layout]}, {num_leaving[reading.layout]} do"
        )
        cure = f"convert them to {LAYOUT_TEXTS[expected]}"
    if raw_format == "huggingface":
        box_format = f"{reading.layout}{'n' if reading.is_relative else ''}"
        cure += f', or name their format with box_format="{box_format}" (--box-format {box_format})'
    return f"{text}: {cure}. If they are right as they are, say so with trust_boxes=True (--trust-boxes)."
