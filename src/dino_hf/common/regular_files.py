"""Read untrusted files: only regular files are opened, sizes and depths are bounded, and walks end.

A folder from the internet may hold pipes (reading waits forever), devices such as /dev/zero (reading never ends), links to private
files or to parent folders, and texts that fill the memory.
"""

import codecs
import gc
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from .values import short_repr

MIB = 2**20
LARGEST_TEXT = 64 * MIB  # bytes of a list of images, a label file or an xml
LARGEST_YAML = MIB  # a list of 40,000 class names; PyYAML takes seconds for a megabyte
LARGEST_JSON = 16 * 1024 * MIB  # the largest published COCO files have about 6 GiB
LARGEST_SETTINGS = 256 * MIB  # bytes of a json in a model folder; a large index of weights has a few MiB
DEEPEST_SETTINGS = 100  # levels of lists and objects; transformers copies settings by recursion
DEEPEST_YAML = 50  # levels of lists and mappings
LARGEST_YAML_CONTENT = 200_000  # values; the values of an alias count each time
EVERYWHERE = ("/",)  # value of `roots` that allows any place
_READ_AT_ONCE = 2**24


class OutsideError(OSError):
    """A path leads out of the folders that may be read."""


# -- files and folders


def is_regular(path: str | os.PathLike) -> bool:
    """Whether a path is a regular file or a link to a regular file, not a folder, pipe, device or socket. Never raises."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # ValueError: a NUL or half a surrogate pair in the name
        return False


def is_folder(path: str | os.PathLike) -> bool:
    """Whether a path is a folder or a link to a folder. Never raises."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for reading bytes, without waiting for a pipe or a device.

    Raises:
        OSError: the file does not exist, or is not a regular file.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:
        raise FileNotFoundError(f"{short_repr(os.fspath(path))} is not the name of a file: {error}.") from error
    _check_mode(path, mode)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        _check_mode(path, os.fstat(file.fileno()).st_mode)  # the file may have been replaced after the first check
    except OSError:
        file.close()
        raise
    return file


def _check_mode(path: str | os.PathLike, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder, not a file.")
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        raise OSError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'special')}, not a regular file; it is not opened.")


def read_bytes(path: str | os.PathLike, largest: int = LARGEST_TEXT) -> bytes:
    """Content of a regular file.

    Args:
        largest: in bytes.
    Raises:
        OSError: the file does not exist, is not a regular file, or is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise OSError(f"{path} has {size:,} bytes, more than the limit of {largest:,} for this kind of file.")
        parts, left = [], largest + 1  # files in /proc can hold more than their size states
        while left > 0 and (part := file.read(min(left, _READ_AT_ONCE))):
            parts.append(part)
            left -= len(part)
    if left <= 0:
        raise OSError(f"{path} has more bytes than the limit of {largest:,} for this kind of file.")
    return b"".join(parts)


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a regular file of any size, in hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | os.PathLike, largest: int = LARGEST_TEXT) -> str:
    """Text of a UTF-8 file, without a byte order mark and with "\\n" as the end of lines.

    Raises:
        OSError: see `read_bytes`.
        ValueError: it is in another encoding.
    """
    try:
        return read_bytes(path, largest).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}; save it in that encoding.") from error


def read_lines(path: str | os.PathLike, largest: int = LARGEST_TEXT) -> list[str]:
    """The lines of a file that are not blank, stripped of white space. Errors: see `read_text`."""
    return [line.strip() for line in read_text(path, largest).splitlines() if line.strip()]


# -- folders and links


def is_below(path: str | os.PathLike, roots: tuple[str, ...]) -> bool:
    """Whether a path is in one of the folders `roots`, after all links are followed.

    Args:
        roots: folders, as `os.path.realpath` returns them, or EVERYWHERE.
    """
    try:
        real = os.path.realpath(path)
    except (OSError, ValueError):
        return False
    return roots == EVERYWHERE or any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


def walk_files(
    folder: Path,
    suffixes: set[str] | None = None,
    roots: tuple[str, ...] = EVERYWHERE,
    outside: list[str] | None = None,
) -> Iterator[Path]:
    """Regular files below a folder. Each folder yields its own files first, then its subfolders, both sorted by name.

    Hidden files and folders are skipped. Links to folders are followed last. Each folder is walked once, even if several links
    lead to it. Depth is not limited.

    Args:
        suffixes: suffixes of the files to list, in lower case. None: all files.
        roots: files and folders outside of these folders are skipped; see `is_below`.
        outside: a list to which skipped links are appended.
    Raises:
        OSError: a folder cannot be listed.
    """
    seen, links, outside = set(), [], [] if outside is None else outside
    waiting = [folder]
    while waiting or links:
        here = waiting.pop() if waiting else links.pop(0)
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(here) as listed:
            entries = sorted(
                (entry for entry in listed if not entry.name.startswith(".")), key=lambda entry: entry.name
            )
        folders = []
        for entry in entries:
            path = here / entry.name
            is_link = entry.is_symlink()
            if is_folder(path) if is_link else entry.is_dir():
                if not is_link:
                    folders.append(path)
                elif is_below(path, roots):
                    links.append(path)
                else:
                    outside.append(str(path))
            elif suffixes is None or os.path.splitext(entry.name)[1].lower() in suffixes:
                if not (is_regular(path) if is_link else entry.is_file()):
                    continue
                if is_link and not is_below(path, roots):
                    outside.append(str(path))
                else:
                    yield path
        waiting += reversed(folders)


# -- json and yaml


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause garbage collection. Python would search millions of new values for garbage again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def parse_json(content: bytes | str, name: str, object_hook: Callable[[dict], Any] | None = None) -> Any:
    """Values of a json text.

    Args:
        name: name of the text in messages.
        object_hook: see `json.loads`.
    Raises:
        ValueError: the text is damaged, or nested too deeply.
    """
    try:
        with _no_collection():
            return json.loads(content, object_hook=object_hook)
    except RecursionError:
        raise ValueError(f"{name} is not usable json: its lists or objects are nested too deeply.") from None
    except MemoryError:
        raise ValueError(f"{name} is not usable json: it does not fit in memory.") from None
    except ValueError as error:
        raise ValueError(f"{name} is not valid json: {error}.") from error


def read_json(path: Path, largest: int = LARGEST_JSON, object_hook: Callable[[dict], Any] | None = None) -> Any:
    """Content of a json file. Errors: see `read_bytes` and `parse_json`."""
    with open_regular(path) as file:
        head = file.read(4096)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is in UTF-16; save it as UTF-8.")
    start = head.decode("utf-8-sig", "replace").lstrip()
    if not start and len(head) < 4096:
        raise ValueError(f"{path} is empty; it should be a json.")
    if start and start[0] not in '{["-0123456789tfn':  # refuse it before reading gigabytes
        raise ValueError(f"{path} is not valid json: it starts with {start[:1]!r}.")
    return parse_json(read_bytes(path, largest), str(path), object_hook)


def check_depth(content: Any, deepest: int, name: str) -> None:
    """Raise ValueError if lists and objects are nested more than `deepest` levels. `name` names the text in the message."""
    level, depth = [content], 0
    while level := [value for value in level if isinstance(value, dict | list)]:
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
        depth += 1
        if depth > deepest:
            raise ValueError(f"{name} is not usable json: its lists or objects are nested more than {deepest} deep.")


def read_settings(path: Path) -> Any:
    """Content of a json file with settings or a record, such as config.json. Its size and depth are bounded.

    Raises:
        OSError: see `read_bytes`.
        ValueError: the file is damaged, or nested too deeply.
    """
    content = read_json(path, LARGEST_SETTINGS)
    check_depth(content, DEEPEST_SETTINGS, str(path))
    return content


def check_model_folder(folder: Path) -> None:
    """Check each json file of a model folder before transformers reads it. Deep nesting would exhaust Python's stack there.

    Raises:
        ValueError, OSError: see `read_settings`; also if a configuration is not an object.
    """
    for path in sorted(folder.glob("*.json")):
        content = read_settings(path)
        if path.name.endswith("config.json") and not isinstance(content, dict):
            raise ValueError(
                f"{path} holds a {type(content).__name__}, but must hold an object with settings; save the model again."
            )


class _BoundedLoader(yaml.BaseLoader):
    """PyYAML loader that reads all values as strings and runs no code. Depth and the size of expanded aliases are bounded."""

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = 0
        self.sizes: dict[int, int] = {}  # id of a complete node -> number of values in it

    def compose_node(self, parent, index):
        is_alias = self.check_event(yaml.AliasEvent)
        self.depth += 1
        if self.depth > DEEPEST_YAML:
            raise yaml.YAMLError(f"lists or mappings are nested more than {DEEPEST_YAML} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if is_alias and id(node) not in self.sizes:
            raise yaml.YAMLError("an alias contains itself")
        if not is_alias:
            parts = node.value if isinstance(node, yaml.SequenceNode) else ()
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            self.sizes[id(node)] = size = 1 + sum(self.sizes[id(part)] for part in parts)
            if max(size, len(self.sizes)) > LARGEST_YAML_CONTENT:
                raise yaml.YAMLError(f"it has more than {LARGEST_YAML_CONTENT:,} values, aliases included")
        return node


def read_yaml(path: Path) -> Any:
    """Content of a yaml file. All values are strings, because a class may be called `no` or `007`.

    Raises:
        OSError: see `read_bytes`.
        ValueError: the file is damaged, nested too deeply, or too large after its aliases are expanded.
    """
    return parse_yaml(read_text(path, LARGEST_YAML), str(path))


def parse_yaml(text: str, name: str) -> Any:
    """Like `read_yaml`, for a text. `name` names the text in messages."""
    try:
        return _BoundedLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, TypeError) as error:  # PyYAML raises the last two for some keys and values
        raise ValueError(f"{name} is not valid yaml: {' '.join(str(error).split())}.") from error
