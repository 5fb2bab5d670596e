"""Find bad images before the first step, so that they do not stop training in the middle."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from ..common.images import DecodingBudget, load, open_image, to_rgb, upright_size
from ..data import DetectionData
from ..data.rows import CocoData, check_image_size

MOST_DECODED = 2000  # images decoded by default: each takes about 10 ms
_CHUNK = 100  # image files in memory at once
_SHOWN = 3  # bad images named in messages
_MODES_OF_UNKNOWN_RANGE = ("I", "F")  # Pillow modes whose range of values is only known from the pixels
_BYTES_PER_PIXEL = 8  # memory of the decoded image and its RGB copy
_budget = DecodingBudget(2**30)  # for all threads


def leave_out_bad_images(splits: DetectionData, on_bad_image: str, decode_all: bool) -> tuple[DetectionData, list[str]]:
    """Check all images and remove bad images from the data.

    The start of each file is always read: format, size and orientation. Validation and test images are also decoded, which finds
    truncated files. Training images are decoded if there are up to 2,000. In larger data sets, training finds truncated files
    later (`ReadableImages`).

    Args:
        on_bad_image: "skip": remove bad images; "raise": stop.
        decode_all: decode all images, however many.
    Returns:
        the data without bad images; warnings.
    Raises:
        ValueError: there is a bad image and `on_bad_image` is "raise", or more than half of the images of a part are bad.
    """
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    decode = decode_all or (splits.train is not None and len(splits.train.dataset) <= MOST_DECODED)
    warnings = []
    for name, data in parts.items():
        if data is None:
            continue
        # In evaluation, another image cannot take the place of a bad one, and each evaluation decodes all images anyway.
        bad = bad_images(data, decode or name != "train")
        if not bad:
            continue
        reasons = list(bad.values())
        listed = " ".join(reasons[:_SHOWN])
        problem = f"{len(bad)} of {len(data.dataset)} {name} images cannot be used. {listed}"
        if len(bad) > _SHOWN:
            problem += f" And {len(bad) - _SHOWN} more."
        if on_bad_image == "raise":
            raise ValueError(f"{problem} Repair or remove them, or leave them out by --on-bad-image skip.")
        if len(bad) > len(data.dataset) / 2:
            raise ValueError(f"{problem} They are too many to leave out: repair them.")
        warnings.append(f"{problem} They are left out (--on-bad-image raise stops instead).")
        kept = [index for index in range(len(data.dataset)) if index not in bad]
        splits = splits._replace(**{name: data._replace(dataset=data.dataset.select(kept))})
    return splits, warnings


def bad_images(data: CocoData, decode: bool) -> dict[int, str]:
    """Images that cannot be read or have another size than annotated: index -> the reason, as one sentence."""
    rows = data.dataset.select_columns(["image_id", "file_name", "width", "height", "image"]).with_format("arrow")
    bad = {}
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2)) as pool:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK].to_pylist()
            for place, problem in enumerate(pool.map(lambda row: _problem(row, decode), chunk)):
                if problem is not None:
                    bad[start + place] = problem
    return bad


class _Sized:
    """The attributes of an image that `check_image_size` uses."""

    def __init__(self, size: tuple[int, int]):
        self.size = size
        self.width, self.height = size


def _problem(row: Mapping, decode: bool) -> str | None:
    stored = row["image"] or {}
    path, content = stored.get("path"), stored.get("bytes")
    name = path or row["file_name"] or f"Image {row['image_id']}"
    if content is None and not path:
        return f"{name} has neither bytes nor a path."
    try:
        with closing(open_image(path if content is None else content)) as image:
            check_image_size(row["image_id"], _Sized(upright_size(image)), (row["width"], row["height"]))
            if decode or image.mode.startswith(_MODES_OF_UNKNOWN_RANGE):
                with _budget.reserve(_BYTES_PER_PIXEL * image.width * image.height):
                    load(image)
                    if image.mode.startswith(_MODES_OF_UNKNOWN_RANGE):
                        to_rgb(image)
                    image.close()  # free its pixels within the budget
    except (OSError, ValueError) as error:
        sentence = str(error).rstrip(".")
        return f"{sentence}." if isinstance(error, ValueError) else f"{name}: {sentence}."
    return None
