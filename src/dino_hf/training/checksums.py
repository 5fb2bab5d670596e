"""Checksums of the files of a checkpoint, which show later that a disk has damaged one."""

import json
import zlib
from pathlib import Path

from ..common.regular_files import is_regular, open_regular, read_settings
from ..common.values import short_repr

CHECKSUMS_NAME = "checksums.json"
_CHUNK = 2**22  # bytes read at once


def write_checksums(folder: Path) -> None:
    """Write the CRC-32 of all files of a folder into `checksums.json`. Call it after the last file is written."""
    sums = {name: _checksum(path) for name, path in _files(folder).items()}
    (folder / CHECKSUMS_NAME).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def read_checksums(folder: Path) -> dict[str, str]:
    """Name of a file in the folder -> its checksum. Empty if the folder has no record, as in checkpoints of older versions.

    Raises:
        ValueError: the record is damaged.
    """
    path = folder / CHECKSUMS_NAME
    if not path.exists():
        return {}
    sums = read_settings(path)
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise ValueError(f"it holds {short_repr(sums)} instead of checksums")
    return sums


def check_checksum(path: Path, recorded: str) -> None:
    """
    Raises:
        ValueError: the file has another checksum than was recorded.
    """
    found = _checksum(path)
    if found != recorded:
        raise ValueError(
            f"its checksum is {found} and was {short_repr(recorded)} when it was written; if you changed it on purpose, delete "
            f"{CHECKSUMS_NAME} instead"
        )


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in sorted(folder.rglob("*")) if is_regular(path) and path != folder / CHECKSUMS_NAME)
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _checksum(path: Path) -> str:
    checksum = 0
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"
