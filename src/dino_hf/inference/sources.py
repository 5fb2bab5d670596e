"""What users point at -> upright RGB images: files, folders, patterns, addresses, videos, cameras, images in memory."""

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

from ..common import images
from ..common.free_memory import free_main_memory
from ..common.images import IMAGE_SUFFIXES, open_image, other_frames
from ..common.paths import expand_home
from ..common.regular_files import is_regular
from ..package_warning import DinoDetrWarning
from .ahead import map_ahead
from .downloads import LARGEST_DOWNLOAD, download
from .videos import read_frames

# fmt: off
VIDEO_SUFFIXES = frozenset((
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".flv", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg",
    ".mts", ".mxf", ".ogm", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv",
))
# Photos that are not read: they are named and skipped, not passed over in silence.
_RAW_SUFFIXES = frozenset((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"))
_UNREAD_SUFFIXES = _RAW_SUFFIXES | {".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl"}
# fmt: on
_PICTURE_HEADS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"%PDF-", b"<svg")
_MOST_LOOKED_AT = 10_000  # files of a folder
_LIVE = ("rtsp", "rtmp", "udp")
_LARGE = 2**24  # pixels; smaller images fit anywhere
_BYTES_OF_PIXEL = 16  # measured from the file to the resized image, for 16-bit grey, which takes most
_AHEAD_BYTES = 2**28  # of images that threads decode at the same time


class Source(NamedTuple):
    """One picture, video or camera that is to be read."""

    name: str  # of what is written for it, with "/": unique, and relative to what all sources have in common
    # a file, an address, a camera's index, or what the user handed over
    origin: Path | str | int | Image.Image | np.ndarray
    kind: str  # "image", "video" or "camera"


class Picture(NamedTuple):
    """An image to predict on."""

    source: Source
    image: Image.Image  # RGB, upright
    frame: int | None = None  # number in the video, from 0
    time: float | None = None  # seconds since the beginning of the video


class Failure(NamedTuple):
    """What could not be read, and why; of a video, what comes after the last frame that could."""

    source: Source
    reason: str


class End(NamedTuple):
    """After the last frame of a video that was read to its end, or as far as was asked for."""

    source: Source


def find_sources(sources, exclude: Path | None = None) -> list[Source]:
    """All that the sources name, without opening anything.

    A folder stands for all its images and videos, those of its folders too, by their suffix; what begins with a dot is left out.
    The order is that of `sources`, within a folder or pattern that of people: 2.png before 10.png. A file that is named twice
    comes once.

    Args:
        sources: one of these, or a sequence: a file, a folder, a pattern such as "shots/**/*.jpg", an address (http, https; a
            camera's rtsp, rtmp, udp), a camera's index as a string or number, a PIL image, an array (h, w, 3) or (h, w) uint8.
            What this function gave is given back.
        exclude: folder that is left out of other folders: that of the results.
    Raises:
        FileNotFoundError: there is no such file, or nothing to predict on in a folder or pattern.
        ValueError: a source is nothing of this.
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
            name = printable(origin.relative_to(common if common is not None else origin.anchor).as_posix())
        else:
            name = _name_of(origin, kind, len(plans) + 1)
        if isinstance(origin, Path | str | int):  # an image in memory may come twice
            if origin in seen:
                continue
            seen.add(origin)
        plans.append(Source(unused(name, names), origin, kind))
    return plans


def _find(source, number: int, exclude: Path | None) -> list[tuple]:
    if isinstance(source, Image.Image | np.ndarray):
        return [(None, source, "image")]
    if isinstance(source, bool) or not isinstance(source, str | os.PathLike | int):
        raise ValueError(
            f"Source {number} is a {type(source).__name__}; give a path, an address, a camera's index, a PIL image or an array."
        )
    text = os.fspath(source) if isinstance(source, os.PathLike) else str(source)
    if not text:  # as of an unset variable of a shell; as a path it would be the current folder
        raise ValueError(
            f"Source {number} is empty; give a path, a pattern, an address or a camera's index, or . for this folder."
        )
    try:
        scheme = urlsplit(text).scheme if "://" in text else ""
    except ValueError as error:
        raise ValueError(f"{text} is no valid address: {error}.") from error
    if scheme in ("http", "https"):
        if not urlsplit(text).netloc:
            raise ValueError(f"{text} is no valid address: it names no host.")
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
    _tell_passed_over([file for file in files if _kind(file) is None], text)
    # A folder that cannot be listed fails like a file, when it is read: it is named, and the rest goes on.
    files = sorted([file for file in files if _kind(file)] + unlisted, key=_natural)
    if not files and root is None:
        raise FileNotFoundError(f"The folder {text} has no image or video, and none of its folders has.")
    return [(root or folder, file, "image" if file in unlisted else _kind(file)) for file in files]


def _tell_passed_over(files: list[Path], folder: str) -> None:
    """Pictures are found by their suffix. A warning tells of files that are pictures by their first bytes."""
    pictures = [file for file in sorted(files)[:_MOST_LOOKED_AT] if _looks_like_picture(file)]
    if pictures:
        warnings.warn(
            f"Files in {folder} look like pictures but have no suffix of one, such as {printable(pictures[0].name)!r:.200} "
            f"({len(pictures)} in all). They are not read; rename them, or name them one by one.",
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
            # "**" gives folders and their files: each file once
            found += [] if "**" in text or real_path(path) == exclude else _in_folder(path, text, exclude, root)
        elif "**" in text and any(folder.is_symlink() for folder in _between(root, path)):
            continue  # as in folders: a link back to one above would give each file dozens of times
        elif _kind(path) and (exclude is None or exclude not in real_path(path).parents):
            found.append((root, path, _kind(path)))
    if not found:
        raise FileNotFoundError(f"No image or video matches {text}.")
    return found


def real_path(path: Path) -> Path:
    """Where links lead to; `Path.resolve` raises RuntimeError for links in a circle before Python 3.13."""
    return Path(os.path.realpath(path))


def _between(root: Path, path: Path) -> list[Path]:
    """The folders of `path` that lie in `root`."""
    return [folder for folder in path.parents if root in folder.parents]


def printable(name: str) -> str:
    """With a sign in place of bytes that are no UTF-8: no file of results could hold them."""
    return os.fsencode(name).decode("utf-8", errors="replace")


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES | _UNREAD_SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else None


def _natural(path: Path) -> list[list]:
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


def unused(name: str, names: set[str]) -> str:
    """A name that is not in `names`, and now is: "a.jpg" and "a.jpg" become "a.jpg" and "a-2.jpg".

    Compared without case, as some file systems do.
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
    """Images and frames in the order of the sources, files read ahead by a few threads; one that fails does not stop the others.

    Args:
        every: of a video or camera, each how many-th frame.
        max_frames: of each video or camera, at most this many; None: all of a video, and a camera until the process is stopped.
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
    """What reading an image takes, as far as its header tells."""
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
    except OSError:  # it fails again when it is read, where it is reported
        return 0


def _try_image(source: Source) -> Picture | Failure:
    if isinstance(source.origin, Path) and source.origin.suffix.lower() in _RAW_SUFFIXES:
        # Some are TIFF files, whose first page is a thumbnail.
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
    if isinstance(error, URLError) and not isinstance(error, HTTPError):
        return f"It cannot be fetched: {error.reason}."
    text = " ".join(str(error).split()) or type(error).__name__
    if getattr(error, "strerror", None):  # of the system or FFmpeg, whose text has a number and the whole path
        text = error.strerror
    return text if text.endswith(".") else f"{text}."


def read_image(origin: Path | str | Image.Image | np.ndarray) -> Image.Image:
    """An upright RGB image, read as in `common.images.read_image`.

    Transparency is composited on white, 16-bit grey is scaled from its full range, and of an animation the first frame is read.

    Raises:
        OSError, ValueError: it cannot be read, or has values of unknown range. Pillow raises errors of other types too.
    """
    if isinstance(origin, np.ndarray):
        if origin.dtype != np.uint8 or not (origin.ndim == 2 or (origin.ndim == 3 and origin.shape[2] in (3, 4))):
            raise ValueError(
                f"An array is {origin.dtype} of shape {origin.shape}; it must be uint8, (h, w, 3) RGB or (h, w)."
            )
        return images.read_image(Image.fromarray(np.ascontiguousarray(origin)))
    content = download(origin) if isinstance(origin, str) else origin
    if not isinstance(content, Image.Image):
        _check_memory(content)
    return images.read_image(content)


def _check_memory(origin: Path | bytes) -> None:
    """Refuse an image for which there is not enough memory: it would end the process, and the others would not be read."""
    with open_image(origin) as image:
        num_pixels, size = image.width * image.height, f"{image.width} x {image.height}"
    needed = _BYTES_OF_PIXEL * num_pixels
    if num_pixels > _LARGE and needed > (free := free_main_memory()):
        raise OSError(
            f"It has {size} pixels, which take about {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free; "
            "scale it down, or cut it into parts."
        )
