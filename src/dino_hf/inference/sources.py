"""Read upright RGB images from files, folders, patterns, addresses, videos, cameras and memory."""

import glob
import itertools
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from ..common.downloads import LARGEST_DOWNLOAD
from ..common.free_memory import is_lack_of_memory
from ..common.image_origins import read_image
from ..common.images import (
    IMAGE_SUFFIXES,
    RAW_SUFFIXES,
    UNREAD_SUFFIXES,
    VIDEO_SUFFIXES,
    open_image,
    other_frames,
)
from ..common.paths import expand_home
from ..common.regular_files import is_regular
from ..common.text import count_text
from ..model.package_warning import DinoDetrWarning
from .ahead import map_ahead
from .videos import read_frames

_PICTURE_HEADS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"%PDF-", b"<svg")
_MOST_CHECKED = 10_000  # files of a folder whose first bytes are checked
_LIVE = ("rtsp", "rtmp", "udp")
_AHEAD_BYTES = 2**28  # bytes of images that threads decode at the same time


class Source(NamedTuple):
    """One picture, video or camera to read."""

    name: str  # unique name of its results, with "/", relative to the common folder of all sources
    origin: Path | str | int | Image.Image | np.ndarray  # file, address, camera index or image in memory
    kind: str  # "image", "video" or "camera"


class Picture(NamedTuple):
    """An image to predict on."""

    source: Source
    image: Image.Image  # RGB, upright
    frame: int | None = None  # number in the video, from 0
    time: float | None = None  # seconds since the beginning of the video


class Failure(NamedTuple):
    """A source that could not be read, and the reason. A video may fail after some frames."""

    source: Source
    reason: str


class End(NamedTuple):
    """Mark that a video was read to its end, or to `max_frames`. It follows the last frame."""

    source: Source


def find_sources(sources, exclude: Path | None = None) -> list[Source]:
    """List the files, addresses, cameras and images of the sources. Images and videos are not opened.

    A folder stands for all images and videos in it and in its subfolders. They are found by their suffix. Names that begin with a
    dot are skipped. Sources keep their order. Files of a folder or pattern are in natural order: 2.png before 10.png. A file
    that is named twice is used once.

    Args:
        sources: one or a sequence of: a file, a folder, a pattern such as "shots/**/*.jpg", an address (http, https; a
            camera's rtsp, rtmp, udp), a camera's index as a string or number, a PIL image, an array (h, w, 3) or (h, w) uint8.
            A list from this function is returned unchanged.
        exclude: folder to skip if it is inside another folder, such as the folder of results.
    Raises:
        FileNotFoundError: a file does not exist, or a folder or pattern has no image or video.
        ValueError: a source is of another kind.
    """
    if isinstance(sources, str | os.PathLike | int | Image.Image | np.ndarray):
        sources = [sources]
    sources = list(sources)
    if sources and all(isinstance(source, Source) for source in sources):
        return sources
    found: list[tuple] = []  # (root | None, origin, kind)
    for number, source in enumerate(sources, start=1):
        found += _find(source, number, None if exclude is None else real_path(exclude))
    if not found:
        raise ValueError("There are no sources; give images, folders, patterns, videos, addresses or a camera's index.")
    roots = {root for root, *_ in found if root is not None}
    try:
        common = Path(os.path.commonpath(roots)) if roots else None
    except ValueError:  # two drives
        common = None
    plans, seen, names = [], set(), set()
    for _, origin, kind in found:
        if isinstance(origin, Path):
            name = replace_bad_bytes(origin.relative_to(common if common is not None else origin.anchor).as_posix())
        else:
            name = _name_of(origin, kind, len(plans) + 1)
        if isinstance(origin, Path | str | int):  # an image in memory may come twice
            if origin in seen:
                continue
            seen.add(origin)
        plans.append(Source(unique_name(name, names), origin, kind))
    return plans


def _find(source, number: int, exclude: Path | None) -> list[tuple]:
    if isinstance(source, Image.Image | np.ndarray):
        return [(None, source, "image")]
    if isinstance(source, bool) or not isinstance(source, str | os.PathLike | int):
        raise ValueError(
            f"Source {number} is a {type(source).__name__}; give a path, an address, a camera's index, a PIL image or an array."
        )
    text = os.fspath(source) if isinstance(source, os.PathLike) else str(source)
    if not text:  # for example an unset shell variable; as a path it would mean the current folder
        raise ValueError(
            f"Source {number} is empty; give a path, a pattern, an address or a camera's index, or . for this folder."
        )
    try:
        scheme = urlsplit(text).scheme if "://" in text else ""
    except ValueError as error:
        raise ValueError(f"{text} is not a valid address: {error}.") from error
    if scheme in ("http", "https"):
        if not urlsplit(text).netloc:
            raise ValueError(f"{text} is not a valid address: it has no host.")
        is_video = PurePosixPath(urlsplit(text).path).suffix.lower() in VIDEO_SUFFIXES
        return [(None, text, "video" if is_video else "image")]
    if scheme in _LIVE:
        return [(None, text, "camera")]
    if scheme:
        raise ValueError(f"{text} is an address of kind {scheme!r}; known are http, https, {', '.join(_LIVE)}.")
    path = Path(os.path.abspath(expand_home(text)))
    if path.is_dir():
        return _in_folder(path, text, exclude)
    if path.exists():
        return [(path.parent, path, _kind(path) or "image")]
    if text.isdecimal():
        return [(None, int(text), "camera")]
    if glob.has_magic(text):
        return _in_pattern(text, exclude)
    raise FileNotFoundError(f"There is no file or folder {text}.")


def _in_folder(folder: Path, text: str, exclude: Path | None, root: Path | None = None) -> list[tuple]:
    files, unlisted = [], []
    for parent, folders, names in os.walk(folder, onerror=lambda error: unlisted.append(Path(error.filename))):
        folders[:] = [name for name in folders if not name.startswith(".") and real_path(Path(parent, name)) != exclude]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    _warn_about_suffixes([file for file in files if _kind(file) is None], text)
    # A folder that cannot be listed becomes a source that fails when it is read, so the other sources are still processed.
    files = sorted([file for file in files if _kind(file)] + unlisted, key=_natural)
    if not files and root is None:
        raise FileNotFoundError(f"The folder {text} and its subfolders have no image or video.")
    return [(root or folder, file, "image" if file in unlisted else _kind(file)) for file in files]


def _warn_about_suffixes(files: list[Path], folder: str) -> None:
    """Warn of files that begin like a picture but have another suffix."""
    pictures = [file for file in sorted(files)[:_MOST_CHECKED] if _looks_like_picture(file)]
    if pictures:
        warnings.warn(
            f"In {folder}, the content of {count_text(len(pictures), 'file')} looks like a picture, but the suffix does not: "
            f"for example {replace_bad_bytes(pictures[0].name)!r:.200}. Pictures are found by their suffix; rename them, or name "
            "them one by one.",
            DinoDetrWarning,
            stacklevel=2,
        )


def _looks_like_picture(path: Path) -> bool:
    try:
        if not is_regular(path):
            return False
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError:
        return False
    return head.startswith(_PICTURE_HEADS) or head[8:12] == b"WEBP" or head[4:12] in (b"ftypheic", b"ftypavif")


def _in_pattern(text: str, exclude: Path | None) -> list[tuple]:
    pattern = Path(os.path.abspath(expand_home(text)))
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    found = []
    for path in sorted(map(Path, glob.glob(str(pattern), recursive=True)), key=_natural):
        if path.is_dir():
            # "**" matches folders and their files: list each file once
            found += [] if "**" in text or real_path(path) == exclude else _in_folder(path, text, exclude, root)
        elif "**" in text and any(folder.is_symlink() for folder in _between(root, path)):
            continue  # as in folders: a link to a parent folder would list each file dozens of times
        elif _kind(path) and (exclude is None or exclude not in real_path(path).parents):
            found.append((root, path, _kind(path)))
    if not found:
        raise FileNotFoundError(f"No image or video matches {text}.")
    return found


def real_path(path: Path) -> Path:
    """The path with links resolved. Before Python 3.13, `Path.resolve` raises RuntimeError for a cycle of links."""
    return Path(os.path.realpath(path))


def _between(root: Path, path: Path) -> list[Path]:
    """The folders between `root` and `path`."""
    return [folder for folder in path.parents if root in folder.parents]


def replace_bad_bytes(name: str) -> str:
    """Replace bytes that are not UTF-8 in a file name. The files of results are UTF-8."""
    return os.fsencode(name).decode("utf-8", errors="replace")


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES | UNREAD_SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else None


def _natural(path: Path) -> list[list]:
    """Sort key for natural order: 2.png before 10.png."""
    return [
        [(0, int(part), "") if part.isdecimal() else (1, 0, part.lower()) for part in re.split(r"(\d+)", name)]
        for name in path.parts
    ]


def _name_of(origin, kind: str, number: int) -> str:
    if isinstance(origin, int):
        return f"camera-{origin}"
    if isinstance(origin, str):
        address = urlsplit(origin)
        name = re.sub(r"[^\w.\-]+", "_", PurePosixPath(unquote(address.path)).name).strip(".")
        return name or re.sub(r"[^\w\-]+", "_", address.netloc.rpartition("@")[2])
    return f"image-{number}"


def unique_name(name: str, names: set[str]) -> str:
    """A name that is not in `names`. It is added to `names`. "a.jpg" and "a.jpg" become "a.jpg" and "a-2.jpg".

    Case is ignored, as some file systems do.
    """
    path, unused = PurePosixPath(name), name
    for number in itertools.count(2):
        if unused.lower() not in names:
            names.add(unused.lower())
            return unused
        unused = str(path.with_name(f"{path.stem}-{number}{path.suffix}"))


def read_sources(
    sources: Sequence[Source], *, every: int = 1, max_frames: int | None = None
) -> Iterator[Picture | Failure | End]:
    """Yield images and frames in the order of the sources. Threads read files ahead. A source that fails does not stop the others.

    Args:
        every: use every N-th frame of a video or camera.
        max_frames: use at most this many frames of each video or camera. None: all; a camera then runs until the process stops.
    """
    pictures = map_ahead(
        lambda source: _try_image(source) if source.kind == "image" else None,
        sources,
        cost=_decoded_bytes,
        budget=_AHEAD_BYTES,
    )
    for source, picture in pictures:
        if source.kind == "image":
            yield picture
            del picture  # the next image may need its memory
        else:
            yield from _try_frames(source, every, max_frames)


def _decoded_bytes(source: Source) -> int:
    """Memory in bytes that reading an image takes, estimated from its header."""
    if source.kind != "image":
        return 0
    if isinstance(source.origin, str):
        return LARGEST_DOWNLOAD
    if isinstance(source.origin, np.ndarray):
        return source.origin.nbytes
    if isinstance(source.origin, Image.Image):
        return 4 * source.origin.width * source.origin.height
    try:
        with open_image(source.origin) as image:
            if several := other_frames(image):
                warnings.warn(
                    f"{source.name} has several {several}; only the first one is read.", DinoDetrWarning, stacklevel=2
                )
            return 4 * image.width * image.height
    except OSError:  # reading the image will fail again and report the error
        return 0


def _try_image(source: Source) -> Picture | Failure:
    if isinstance(source.origin, Path) and source.origin.suffix.lower() in RAW_SUFFIXES:
        return Failure(source, "It is a raw image of a camera, which is not read; convert it to JPEG.")
    try:
        return Picture(source, read_image(source.origin))
    except Exception as error:  # Pillow's errors have no common type
        return Failure(source, _reason(error))


def _try_frames(source: Source, every: int, max_frames: int | None) -> Iterator[Picture | Failure | End]:
    num_read = 0
    try:
        for frame in read_frames(source.origin, every=every, max_frames=max_frames):
            num_read += 1
            yield Picture(source, frame.image, frame.index, frame.time)
    except Exception as error:  # FFmpeg's errors are of many types
        yield Failure(source, (f"After {num_read} frames: " if num_read else "") + _reason(error))
    else:
        yield End(source)


def _reason(error: Exception) -> str:
    if is_lack_of_memory(error):  # an array, a download or a frame; `read_image` has another message
        return "There is not enough memory to read it; scale it down, or end other programs."
    if isinstance(error, URLError) and not isinstance(error, HTTPError):
        return f"It cannot be fetched: {error.reason}."
    text = " ".join(str(error).split()) or type(error).__name__
    if getattr(error, "strerror", None):  # the full text of errors of the system and FFmpeg has a number and the path
        text = error.strerror
    return text if text.endswith(".") else f"{text}."
