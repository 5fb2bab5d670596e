"""Check a checkpoint file before it is read. A damaged or forged file must not take much time or memory."""

import zipfile
from pathlib import Path

from safetensors import safe_open

from ..common.text import first_line
from .errors import ConversionError
from .pickle_checks import MAX_TENSORS, TooLarge, check_pickle

# Bytes of the table of contents of an archive, and of the header of safetensors. Published files have 2**18.
_MAX_DIRECTORY = 2**24
# A file without an archive starts with pickles of: magic number, version, machine, content. Then follow the keys of storages.
_NUM_LEGACY_PICKLES = 4


def check_pickle_file(path: Path) -> None:
    """Check a file of torch.save.

    Raises:
        ConversionError: the file is damaged, or reading it would take too much time or memory.
    """
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
            with zipfile.ZipFile(path) as archive:
                pickles = [entry for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
                if len(pickles) > 1:
                    raise ConversionError(f"{path} has {len(pickles):,} parts data.pkl, where torch writes one.")
                for entry in pickles:
                    with archive.open(entry) as stream:
                        check_pickle(stream)
        else:
            with path.open("rb") as stream:
                if stream.peek(2).startswith(b"\x80"):  # torch.load rejects other files at their first byte
                    contents = [check_pickle(stream) for _ in range(_NUM_LEGACY_PICKLES)]
                    _check_storages(contents[-1].storages, check_pickle(stream).texts, path)
    except ConversionError:
        raise
    except TooLarge as error:
        raise ConversionError(f"{path} was refused, and nothing in it was run: {error}.") from error
    except (ValueError, LookupError, OSError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise _damaged(path, first_line(error, 200)) from error


def check_safetensors_file(path: Path) -> None:
    """
    Raises:
        ConversionError: the file has so many tensors that reading their names takes long.
        SafetensorError: it is damaged.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if _MAX_DIRECTORY < size <= path.stat().st_size:  # a larger header is damaged, and the reader raises
        raise ConversionError(f"{path} has a header of {size:,} bytes; at most {_MAX_DIRECTORY:,} are read.")
    with safe_open(path, "pt") as file:
        if (count := len(file.keys())) > MAX_TENSORS:
            raise ConversionError(f"{path} has {count:,} tensors; a training checkpoint of DINO has fewer than 10,000.")


def _damaged(path: Path, reason: str) -> ConversionError:
    return ConversionError(f"{path} is truncated or damaged ({reason}). Download it again.")


def _check_archive(path: Path) -> None:
    """Check the entries and checksums of an archive.

    Raises:
        ConversionError: a part of the archive is damaged, or was not written by torch.
    """
    try:
        if (size := _directory_size(path)) > _MAX_DIRECTORY:
            raise ConversionError(
                f"{path} has a table of contents of {size:,} bytes, at most {_MAX_DIRECTORY:,} are read."
            )
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if len(parts) > MAX_TENSORS:
                raise ConversionError(
                    f"{path} has {len(parts):,} tensors; a training checkpoint of DINO has fewer than 10,000."
                )
            # overlapping parts would be read again and again
            if sum(entry.file_size for entry in parts) > path.stat().st_size:
                raise ConversionError(f"{path} claims to hold more bytes than it has: it is damaged or forged.")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in parts):
                raise ConversionError(f"{path} has compressed parts, which torch never writes; save it by torch.save.")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        if isinstance(error, ConversionError):
            raise
        raise _damaged(path, str(error)) from error
    if damaged is not None:
        raise _damaged(path, f"the checksum of {damaged} is wrong")


def _directory_size(path: Path) -> int:
    """Bytes from the beginning of an archive's table of contents to its end; 0 if there is none.

    `zipfile` reads the whole table when it opens an archive, however long it is.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        start = file.seek(max(0, size - 2**16 - 22))  # a comment has 2**16 bytes at most
        end = file.read()
        position = end.rfind(b"PK\5\6")
        if position < 0 or len(end) < position + 22:
            return 0
        length = int.from_bytes(end[position + 12 : position + 16], "little")
        if end[position - 20 : position - 16] == b"PK\6\7":  # 64 bit: the true length is in the record before
            file.seek(max(0, start + position - 20 - 56))
            record = file.read(56)
            length = int.from_bytes(record[40:48], "little") if record.startswith(b"PK\6\6") else length
    return length


def _check_storages(sizes: dict[str, int], keys: set[str], path: Path) -> None:
    """Check that a file without an archive holds the numbers that it claims. Torch allocates memory for all claimed numbers.

    Args:
        sizes: key of each storage -> how many numbers its tensors claim.
        keys: storages that the file lists.
    Raises:
        ConversionError: the file has fewer numbers. The tensors would contain uninitialised memory.
    """
    if missing := sorted(set(sizes) - keys):
        raise ConversionError(f"{path} has no numbers for {len(missing):,} of its tensors: it is damaged or forged.")
    if (claimed := sum(sizes.values())) > path.stat().st_size:  # a number has one byte at least
        raise ConversionError(f"{path} claims {claimed:,} numbers, but has fewer bytes: it is damaged or forged.")
