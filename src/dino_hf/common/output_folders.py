"""Write outputs of commands: check that they may be written, write them beside their place, then rename them.

An output that exists is refused unless the user wants to replace it (`--overwrite`). Then only files that an earlier run wrote are
replaced. Nothing is written or deleted outside of the folder, or through a link in it.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psutil

from .regular_files import read_settings

logger = logging.getLogger(__name__)

MANIFEST = ".dino_hf_files.json"
_REPLACED = ".old"  # in a scratch folder: the earlier folder that is being replaced
_LARGEST_MANIFEST = 2**24  # bytes
_FOREIGN_AGE = 24 * 3600  # seconds; a scratch file of another machine that is older is a leftover
_LONGEST_STEM = 40  # characters of a name that its scratch file keeps; file systems allow 255 bytes


# -- checks before the work


def check_output_file(path: Path, overwrite: bool) -> None:
    """Check, before the work, that a file can be written.

    Args:
        overwrite: an existing file may be replaced. A link is replaced; its target is not changed.
    Raises:
        FileExistsError: the file exists and `overwrite` is False.
        OSError: the path is a folder, or its folder cannot be written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it.")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name, or replace it with --overwrite.")
    check_writable(path.parent)


def check_output_folder(
    folder: Path,
    overwrite: bool,
    is_ours: Callable[[Path], bool],
    results: str,
    cure: str = "replace it with --overwrite",
    ignored: str = "",
) -> bool:
    """Check, before the work, that a folder can take results.

    Args:
        overwrite: results of an earlier run may be replaced.
        is_ours: folder -> whether it holds results of the same command.
        results: name of the results in messages, such as "an evaluation".
        cure: the way to replace the results, for the message.
        ignored: name of a file that may be in the folder, such as a lock.
    Returns:
        whether the folder holds results of an earlier run.
    Raises:
        FileExistsError: the folder has earlier results and `overwrite` is False, or it has other files, or is a file itself.
        OSError: it cannot be written.
    """
    check_writable(folder)
    if not folder.is_dir() or all(entry.name == ignored or is_leftover(entry) for entry in folder.iterdir()):
        return False
    if not is_ours(folder):
        raise FileExistsError(f"{folder} has files that are not of {results}; choose a new or empty folder.")
    if not overwrite:
        raise FileExistsError(f"{folder} has {results} in it; choose another folder, or {cure}.")
    return True


def check_writable(folder: Path) -> None:
    """Raise OSError if a folder, or the nearest existing folder above it, is a file or cannot be written."""
    nearest = next((place for place in (folder, *folder.absolute().parents) if os.path.lexists(place)), Path("/"))
    if not nearest.is_dir():
        raise FileExistsError(f"{nearest} is not a folder; choose another place for the results.")
    try:
        # Permissions do not show whether the file system is read-only or full.
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise type(error)(
            f"{folder} cannot be written ({error.strerror}); choose another place for the results."
        ) from error


# -- a record of the written files


def write_manifest(folder: Path, command: str, names: Iterable[str]) -> None:
    """Record the files that a command wrote into a folder, so that a later run replaces only them."""
    with replace_file(folder / MANIFEST) as path:
        path.write_text(json.dumps({"command": command, "files": sorted(names)}, ensure_ascii=False), encoding="utf-8")


def read_manifest(folder: Path, command: str) -> list[str] | None:
    """The file names that `write_manifest` recorded for this command. None: there is no readable record."""
    path = folder / MANIFEST
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _LARGEST_MANIFEST:
            return None
        content = read_settings(path)
    except (OSError, ValueError):
        return None
    names = content.get("files") if isinstance(content, dict) and content.get("command") == command else None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


# -- write beside, then rename


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a hidden path in the same folder. At the end, the file written there replaces `path` in one step.

    After an error or an interruption, `path` is unchanged and the hidden file is deleted. If `path` is a link, the link itself is
    replaced.
    """
    _remove_leftovers_once(os.path.realpath(path.parent))
    scratch = _scratch(path)
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `path`. At the end, the folder and its content are deleted.

    A file or folder can be moved from there to its place in one step. The scratch folder is kept if `replace_folder` left the
    earlier folder in it.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    scratch = _scratch(path)
    if os.path.lexists(scratch / _REPLACED):  # left by an earlier error in this process
        _remove_scratch(scratch)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        if not os.path.lexists(scratch / _REPLACED):
            shutil.rmtree(scratch, ignore_errors=True)


def new_scratch(path: Path) -> Path:
    """Make an empty hidden folder beside `path`, which only this user can read. Its name is new at each call.

    The caller deletes or moves it. If the process is killed before, `remove_leftovers` deletes it.
    """
    return Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{_scratch(path.with_suffix('')).name}."))


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `folder`. At the end, it replaces `folder`.

    An existing folder is moved away first and deleted last. If replacing it fails, it is put back. If that fails too, both folders
    are kept, and a note of the error names them. The caller must have checked that `folder` may be replaced.
    """
    folder = folder.absolute()
    with scratch_folder(folder) as scratch:
        new, old = scratch / folder.name, scratch / _REPLACED
        new.mkdir()
        yield new
        try:
            if os.path.lexists(folder):
                folder.rename(old)
            new.rename(folder)
        except BaseException as error:
            _take_back(folder, old, error)
            raise
        if old.is_symlink():
            old.unlink()
        else:
            shutil.rmtree(old, ignore_errors=True)


def _take_back(folder: Path, old: Path, error: BaseException) -> None:
    """Put back a folder that was moved away before an error. If this fails, add a note with its place to the error."""
    if not os.path.lexists(old) or os.path.lexists(folder):
        return
    try:
        old.rename(folder)
    except OSError:
        error.add_note(
            f"The earlier {folder} is kept as {old}, and the new folder as {old.with_name(folder.name)}; move the folder that you "
            "want to keep. Otherwise, the next command that writes there puts the earlier folder back."
        )


def remove_leftovers(folder: Path) -> None:
    """Delete hidden files and folders that killed processes left in `replace_file`, `scratch_folder` or `replace_folder`."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in list(entries):
            if not is_leftover(Path(entry)):
                continue
            with suppress(OSError):  # go on with the other leftovers
                if entry.is_dir(follow_symlinks=False):
                    _remove_scratch(Path(entry))
                else:
                    os.unlink(entry.path)


def _remove_scratch(scratch: Path) -> None:
    """Delete a scratch folder. If it holds a folder that was moved away but not replaced, that folder is put back first.

    Raises:
        OSError: the folder cannot be put back. Nothing was deleted.
    """
    old = scratch / _REPLACED
    new = next((entry for entry in scratch.iterdir() if entry.name != _REPLACED), None)
    if new is not None and os.path.lexists(old):
        places = (scratch.with_name(name) for name in (new.name, *(f"{new.name}-{n}" for n in range(2, 1000))))
        place = next(place for place in places if not os.path.lexists(place))
        old.rename(place)
        if place.name != new.name:
            logger.warning("A stopped command had moved a folder away. It is put back as %s.", place)
    shutil.rmtree(scratch, ignore_errors=True)


@cache
def _remove_leftovers_once(folder: str) -> None:
    """Like `remove_leftovers`, but once per process: listing a folder again for each of 100,000 files would take hours."""
    remove_leftovers(Path(folder))


def is_leftover(path: Path) -> bool:
    """Whether a path is a hidden file or folder of `replace_file` or `scratch_folder` whose process has ended."""
    found = _SCRATCH.fullmatch(path.name)
    if found is None or path.is_symlink():
        return False
    try:
        changed = path.stat().st_mtime
    except OSError:
        return False
    if found["host"] != machine_mark():
        return time.time() - changed > _FOREIGN_AGE
    start = _start_of(int(found["process"]))
    return start is None or (start != found["start"] and _UNKNOWN not in (start, found["start"]))


_SCRATCH = re.compile(
    r"\.(?P<stem>.+)\.(?P<host>[A-Za-z0-9-]+)-(?P<process>\d{1,9})-(?P<start>\d{1,20})\.partial(\.[^.]+)?", re.DOTALL
)
_UNKNOWN = "0"  # start of a running process that we have no permission to inspect


def _scratch(path: Path) -> Path:
    """A hidden path beside `path`. It keeps the suffix, because libraries choose the format by it."""
    stem, suffix = path.stem, path.suffix
    if len(os.fsencode(path.name)) > _LONGEST_STEM:
        digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
        stem = f"{stem[:_LONGEST_STEM]}-{digest}"
    suffix = suffix if len(suffix) <= 16 else ""
    process = os.getpid()
    return path.with_name(f".{stem}.{machine_mark()}-{process}-{_start_of(process) or _UNKNOWN}.partial{suffix}")


@cache
def machine_mark() -> str:
    """The host's name and a digest of its boot and process namespace.

    Process numbers are unique only within one boot and one container. The digest also tells machines of the same name apart.
    """
    marks = []
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: str(os.stat("/proc/self/ns/pid").st_ino),
    ):
        with suppress(OSError):  # only Linux has them
            marks.append(read())
    host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname())[:24] or "host"
    return f"{host}-{hashlib.sha256('/'.join(marks).encode()).hexdigest()[:8]}"


def _start_of(process: int) -> str | None:
    """When a process started. It distinguishes processes with the same number. None: no process has this number."""
    with suppress(OSError, IndexError):  # in ticks since the machine started, so setting the clock does not change it
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    try:
        return f"{psutil.Process(process).create_time() * 100:.0f}"
    except psutil.NoSuchProcess:
        return None
    except (psutil.Error, OverflowError):
        return _UNKNOWN
