"""Check that the boxes of a data set have the layout of its format, before training or evaluation."""

from .box_layouts import LAYOUT_TEXTS, SWAPPED, Reading, guess_reading
from .box_table import BoxTable, make_box_table
from .missing_sizes import fill_sizes
from .raw import RawDataset


def guess_readings(
    raw: RawDataset, tables: dict[str, BoxTable], sizes_are_of_files: bool = False
) -> dict[str, Reading]:
    """The reading of each split. If one wrong reading explains the whole data set, all splits get it.

    Args:
        tables: the boxes of each split.
        sizes_are_of_files: the sizes in the tables are those of the image files, not only stated.
    """
    readings = _guess(tables, raw.format)
    if sizes_are_of_files or not any(reading.layout in SWAPPED for reading in readings.values()):
        return readings
    # Right boxes look swapped if the stated width and height are, so the image files decide.
    splits = {name: fill_sizes(split, replace=True) for name, split in raw.splits.items()}
    return _guess({name: make_box_table(split, raw.categories) for name, split in splits.items()}, raw.format)


def _guess(tables: dict[str, BoxTable], raw_format: str) -> dict[str, Reading]:
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
    for name, reading in guess_readings(raw, tables).items():
        if reading.is_as_read:
            continue
        raise ValueError(f"{raw.splits[name].origin}: {_what_is_wrong(reading, raw.format)}")


def _what_is_wrong(reading: Reading, raw_format: str) -> str:
    is_yolo = raw_format == "yolo"
    expected = "cxcywh" if is_yolo else "xywh"
    units = {
        "relative": "relative to the image",
        "pixels": "in pixels",
        "percent": "in percent of the image (0 to 100)",
    }
    num_leaving = reading.num_leaving
    if reading.unit != ("relative" if is_yolo else "pixels"):
        wanted = "relative to the image (0 to 1)" if is_yolo else "in pixels"
        text = f"the boxes are {units[reading.unit]}, while {raw_format} data have them {wanted}"
        factor = "100" if reading.unit == "percent" else "width and height"
        cure = f"divide them by {factor}" if is_yolo else f"multiply them by {_PER_PIXEL[reading.unit]}"
        if reading.unit == "percent" and reading.layout != expected:
            cure += f", and convert them from {LAYOUT_TEXTS[reading.layout]} to {LAYOUT_TEXTS[expected]}"
    else:
        text = (
            f"{num_leaving[expected]} of {reading.num_boxes} boxes leave their images as {LAYOUT_TEXTS[expected]}, which "
            f"{raw_format} data have; as {LAYOUT_TEXTS[reading.layout]}, {num_leaving[reading.layout]} do"
        )
        cure = f"convert them to {LAYOUT_TEXTS[expected]}"
    if raw_format == "huggingface" and (box_format := reading.box_format):
        cure += f', or name their format with box_format="{box_format}" (--box-format {box_format})'
    return f"{text}: {cure}. If they are right as they are, say so with trust_boxes=True (--trust-boxes)."


_PER_PIXEL = {"relative": "width and height", "percent": "width / 100 and height / 100"}
