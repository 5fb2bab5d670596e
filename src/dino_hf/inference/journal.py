"""The journal of a prediction: a json line of what the run depends on, then one for each image, frame, and end of a video."""

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from .sources import Source, printable

JOURNAL = "predictions.jsonl"
MEMORY = "memory"
_FIELDS = {"frame", "time", "width", "height", "objects"}


def read_journal(path: Path) -> Iterator[dict]:
    """{"settings": {...}}, then the records; the last may be cut off where a run was killed.

    Raises:
        ValueError: it is no journal, or a line is damaged.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                if not line.endswith("\n") and number > 1:
                    return
                record = None
            if number == 1 and not (isinstance(record, dict) and isinstance(record.get("settings"), dict)):
                raise ValueError(f"{path} is no journal of a prediction; save to another folder.")
            if number > 1 and not _is_record(record):
                raise ValueError(f"{path}, line {number}, is damaged; take the line out, or save to another folder.")
            yield record


def _is_record(record) -> bool:
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in ("file", "origin")):
        return False
    # Overwriting deletes what the names stand for, which must not lie outside the folder.
    name = PurePosixPath(record["file"])
    return not name.is_absolute() and ".." not in name.parts and ("end" in record or record.keys() >= _FIELDS)


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
