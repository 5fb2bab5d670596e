"""The journal of a prediction: a json line with the settings, then a line for each image, frame and end of a video."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from ..common.paths import path_below
from ..common.values import is_number
from .sources import Source, replace_bad_bytes

JOURNAL = "predictions.jsonl"
MEMORY = "memory"
_LONGEST_LINE = 2**25  # bytes; a record of 10,000 objects has about 2 million bytes


class Journal:
    """The readable lines of the journal in a folder. Damaged lines are skipped.

    Args:
        folder: folder with the results of `predict`.
    Attributes:
        settings: settings of the run. None: the first line is damaged or missing.
        num_records: number of readable lines after the first.
        num_damaged: number of damaged lines. A last line that was cut off when the run was killed does not count.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings: dict | None = None
        self.num_records = self.num_damaged = 0
        for number, (content, is_whole) in enumerate(_lines(folder / JOURNAL)):
            if number == 0 and isinstance(content, dict) and isinstance(content.get("settings"), dict):
                self.settings = content["settings"]
            elif _is_record(content, folder):
                self.num_records += 1
            elif is_whole:
                self.num_damaged += 1

    @property
    def is_empty(self) -> bool:
        """Whether the run was killed before it had written a line."""
        return self.settings is None and not self.num_records and not self.num_damaged

    @property
    def is_ours(self) -> bool:
        """Whether the file is a journal of `predict`."""
        return self.settings is not None or self.num_records > 0 or self.is_empty

    def records(self, with_ends: bool = False) -> Iterator[dict]:
        """Records of images and frames. With `with_ends`, also the records that mark the end of a video."""
        for content, _ in _lines(self.folder / JOURNAL):
            if _is_record(content, self.folder) and (with_ends or "end" not in content):
                yield content


def _lines(path: Path) -> Iterator[tuple[object, bool]]:
    """The content of each line (None if it is damaged or too long), and whether the line is complete."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        while line := file.readline(_LONGEST_LINE):
            is_short = True
            while not line.endswith(b"\n") and (rest := file.readline(_LONGEST_LINE)):
                line, is_short = rest, False
            try:
                content = json.loads(line.decode("utf-8", errors="replace")) if is_short else None
                if b"\\ud" in line.lower():  # half of a surrogate pair cannot be written to UTF-8 files
                    as_line(content).encode("utf-8")
            except (ValueError, RecursionError):
                content = None
            yield content, line.endswith(b"\n")


def _is_record(record, folder: Path) -> bool:
    """Whether `PredictionFolder` may have written a record. Its file must be below the folder, because overwriting deletes it."""
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in ("file", "origin")):
        return False
    try:
        path_below(folder, record["file"])
    except ValueError:
        return False
    if "end" in record:
        return True
    frame, time, objects = (record.get(name) for name in ("frame", "time", "objects"))
    return (
        (frame is None or _is_count(frame))
        and (time is None or _is_number(time))
        and all(_is_count(record.get(name)) for name in ("width", "height"))
        and isinstance(objects, list)
        and all(map(_is_object, objects))
    )


def _is_object(found) -> bool:
    return (
        isinstance(found, dict)
        and isinstance(found.get("label"), str)
        and isinstance(found.get("category_id"), int)
        and _is_number(found.get("score"))
        and isinstance(found.get("box"), list)
        and len(found["box"]) == 4
        and all(map(_is_number, found["box"]))
    )


def _is_number(value) -> bool:
    return is_number(value) and abs(value) < 1e15


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15


def describe(source: Source) -> str:
    """The origin of a source as text, without the password of an address."""
    if source.kind == "camera" and isinstance(source.origin, int):
        return f"camera {source.origin}"
    if not isinstance(source.origin, str | Path):
        return MEMORY
    return replace_bad_bytes(re.sub(r"//[^/@]*@", "//", str(source.origin)))


def identity(record: dict) -> tuple[str, str]:
    """Name and origin of the source of a record."""
    return record["file"], record["origin"]


def as_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
