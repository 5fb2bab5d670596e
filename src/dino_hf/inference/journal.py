"""The journal of a prediction: a json line of what the run depends on, then one for each image, frame, and end of a video."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from ..common.output_folders import path_below
from .sources import Source, printable

JOURNAL = "predictions.jsonl"
MEMORY = "memory"
_LONGEST_LINE = 2**25  # bytes; a record of 10,000 objects has 2 million


class Journal:
    """What can be read of the journal in a folder. Lines that are damaged are left out: what they were about is unknown.

    Args:
        folder: of results.
    Attributes:
        settings: what the run depends on; None: the first line is damaged or missing.
        num_records: lines that can be read after the first.
        num_damaged: lines that cannot, without a last one that was being written when the run was killed.
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
        return self.settings is not None or self.num_records > 0 or self.is_empty

    def records(self, with_ends: bool = False) -> Iterator[dict]:
        for content, _ in _lines(self.folder / JOURNAL):
            if _is_record(content, self.folder) and (with_ends or "end" not in content):
                yield content


def _lines(path: Path) -> Iterator[tuple[object, bool]]:
    """The content of each line, None where it is damaged or too long, and whether it has an end. Nothing without a file."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        while line := file.readline(_LONGEST_LINE):
            is_short = True
            while not line.endswith(b"\n") and (rest := file.readline(_LONGEST_LINE)):
                line, is_short = rest, False
            try:
                content = json.loads(line.decode("utf-8", errors="replace")) if is_short else None
                if b"\\ud" in line.lower():  # an escape may be half of a pair, which no file of results can hold
                    as_line(content).encode("utf-8")
            except (ValueError, RecursionError):
                content = None
            yield content, line.endswith(b"\n")


def _is_record(record, folder: Path) -> bool:
    """Whether a line is as `PredictionFolder` writes it, and names a file below the folder: overwriting deletes what it names."""
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
        (frame is None or (_is_count(frame)))
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
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15 and math.isfinite(value)


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15


def describe(source: Source) -> str:
    """Without the password of an address."""
    if source.kind == "camera" and isinstance(source.origin, int):
        return f"camera {source.origin}"
    if not isinstance(source.origin, str | Path):
        return MEMORY
    return printable(re.sub(r"//[^/@]*@", "//", str(source.origin)))


def identity(record: dict) -> tuple[str, str]:
    return record["file"], record["origin"]


def as_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
