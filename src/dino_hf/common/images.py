"""Read image files. Training, evaluation, prediction and the doctor all read them here, so they see the same pixels."""

import io
import os
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

# Formats that Pillow decodes itself. For others, such as EPS and WMF, it starts programs or calls other libraries.
_WANTED_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP",
)  # fmt: skip
Image.init()
# Pillow allocates images in blocks of 16 MiB. glibc keeps blocks of this size after they are freed, in each thread and worker, but
# returns blocks of more than 32 MiB to the system.
Image.core.set_block_size(2**26)
FORMATS = tuple(name for name in _WANTED_FORMATS if name in Image.OPEN)  # this build of Pillow may lack some
IMAGE_SUFFIXES = frozenset((
    ".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
))  # fmt: skip
# Raw photos are not read, although Pillow opens some: they are TIFF files whose first page is a thumbnail.
RAW_SUFFIXES = frozenset((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"))
UNREAD_SUFFIXES = RAW_SUFFIXES | {".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl"}  # photos that cannot be read
VIDEO_SUFFIXES = frozenset((
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".flv", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg",
    ".mts", ".mxf", ".ogm", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv",
))  # fmt: skip
MAX_PIXELS = 500_000_000  # pixels of one image; Pillow holds 4 bytes per RGB pixel, so 2 GB
MAX_BYTES = 2**31  # size of one file
_STRIP_PIXELS = 2**22  # pixels converted at once, so that a large image is never copied as a whole
_WHITE = (255, 255, 255)
_NO_MEMORY = "There is not enough memory to read it; scale it down, or end other programs."

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> the transposition that turns the stored pixels upright
_SWAPPING = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class UnreadableImage(OSError):
    """An image cannot be read. The message is one sentence with the reason."""


class TooManyPixels(UnreadableImage):
    """An image has more than `MAX_PIXELS`. It may be intact otherwise."""


class UnknownRange(UnreadableImage):
    """An image is intact, but it is unknown which value is white."""


def read_image(origin: Path | str | bytes | BinaryIO | Image.Image) -> Image.Image:
    """An upright RGB image with 8 bits per channel, independent of its file.

    The image is turned as its EXIF orientation says. `to_rgb` converts its mode. Only the first of several frames or pages is read.

    Args:
        origin: a file, its bytes, an open binary file, or a Pillow image, which is not changed.
    Raises:
        FileNotFoundError: there is no such file.
        UnreadableImage: the format is not one of `FORMATS`, the image is damaged, it has more than `MAX_PIXELS`, the range of
            its values is unknown, or there is not enough memory for it.
    """
    try:
        if isinstance(origin, Image.Image):
            return to_rgb(upright(origin))
        with open_image(origin) as image:
            load(image)
            return to_rgb(upright(image))
    except MemoryError:
        raise UnreadableImage(_NO_MEMORY) from None


def open_image(origin: Path | str | bytes | BinaryIO) -> Image.Image:
    """Open an image without decoding its pixels. Use the result as a context manager, or its file stays open.

    Raises:
        FileNotFoundError, UnreadableImage: as `read_image`.
    """
    if isinstance(origin, Path | str):
        check_file(origin)
    file = io.BytesIO(origin) if isinstance(origin, bytes) else origin
    with _pillow_limit():
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:  # its message has the memory address of the bytes
            raise UnreadableImage(_why_unknown(_head(file))) from None
        except (FileNotFoundError, PermissionError):
            raise
        except Image.DecompressionBombError:
            raise TooManyPixels(_too_large("too many")) from None
        except Exception as error:  # Pillow's errors have no common type
            raise UnreadableImage(_sentence(error)) from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise TooManyPixels(_too_large(f"{image.width} x {image.height}"))
    return image


def check_file(path: Path | str) -> None:
    """Raises FileNotFoundError, or UnreadableImage for a pipe, a device, a folder, or a file of more than `MAX_BYTES`."""
    try:
        status = os.stat(path)
    except ValueError:  # a name with a NUL
        raise FileNotFoundError(f"There is no file {str(path)!r}.") from None
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImage("It is not a regular file.")
    if status.st_size > MAX_BYTES:
        raise UnreadableImage(f"It is larger than {MAX_BYTES >> 30} GiB.")


def load(image: Image.Image) -> None:
    """Decode the pixels of an image from `open_image`.

    Raises:
        UnreadableImage: the pixels are damaged or end too early.
    """
    with _pillow_limit():
        try:
            image.load()
        except Exception as error:  # Pillow's errors have no common type
            raise UnreadableImage(_sentence(error)) from error


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none or its block is damaged. The pixels need not be decoded."""
    if image.format == "PNG" and "exif" not in image.info and not _has_late_chunks(image):
        # Pillow would decode all pixels to look for an EXIF block after them.
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return found if found in _TURNS else 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except UnreadableImage:
        raise
    except Exception:  # a damaged EXIF block can raise errors of many types
        return 1
    return found if found in _TURNS else 1


def stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) before the EXIF orientation turns the image."""
    if image.format == "TIFF" and (tags := getattr(image, "tag_v2", None)):  # Pillow has already turned its `size`
        return tags[256], tags[257]
    return image.size


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of the image that `read_image` would return. The pixels need not be decoded."""
    size = stored_size(image)
    return size[::-1] if orientation(image) in _SWAPPING else size


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says. Without an orientation, return the same object."""
    return turn(image, orientation(image))


def turn(image: Image.Image, exif_orientation: int) -> Image.Image:
    """Turn stored pixels upright. For orientation 1, return the same object."""
    return image if exif_orientation == 1 else image.transpose(_TURNS[exif_orientation])


def other_frames(image: Image.Image) -> str | None:
    """ "pages" or "frames" if the file has more than the one we read, else None.

    The further pictures in a phone's JPEG (MPO) are views of the same scene and do not count.
    """
    if image.format == "MPO":
        return None
    try:
        has_more = getattr(image, "is_animated", False)
    except Exception:  # only later frames are damaged, and they are not read
        return None
    return None if not has_more else "pages" if image.format == "TIFF" else "frames"


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to a new RGB image with 8 bits per channel and without metadata.

    Transparent pixels are composited on white, as the image processors of transformers do. 16-bit grey is scaled from its full
    range: 65,535 is white. Mode I is read in the same way if its values fit into 16 bits.

    Raises:
        UnreadableImage: the image has no pixels; or its mode is F, or I with values beyond 16 bits, so white is unknown.
    """
    if 0 in image.size:
        raise UnreadableImage(f"It is {image.width} x {image.height} pixels, so it has no content.")
    if image.mode == "F":
        raise UnknownRange(_unknown_range(image))
    convert = _to_8_bits if image.mode.startswith("I") else _composite if image.has_transparency_data else _plain
    result = Image.new("RGB", image.size)
    height = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        with _pillow_limit():  # Pillow before 13 applies its limit to a part too
            strip = image.crop((0, top, image.width, min(top + height, image.height)))
        result.paste(convert(strip), (0, top))
    return result


def _plain(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":  # the only mode that `convert` cannot convert
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.applyTransform(image, ImageCms.buildTransform(lab, rgb, "LAB", "RGB"))
    return image.convert("RGB")


def _composite(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise UnknownRange(_unknown_range(image))
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def _unknown_range(image: Image.Image) -> str:
    return f"It has 32 bits per pixel, mode {image.mode!r}, of unknown range; save it with 8 or 16 bits."


class DecodingBudget:
    """Limits the memory of images that threads decode at the same time. An image that needs more than the limit is decoded alone.

    Args:
        num_bytes: limit for all images together.
    """

    def __init__(self, num_bytes: int):
        self._free = self._all = num_bytes
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, num_bytes: int) -> Iterator[None]:
        """Wait until `num_bytes` are free, and hold them inside the context."""
        num_bytes = min(num_bytes, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= num_bytes)
            self._free -= num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._free += num_bytes
                self._changed.notify_all()


class _QuietLimit(int):
    """A limit of pixels for Pillow that never causes a warning.

    Pillow warns above the limit and raises an error above twice the limit. We raise our own error above the limit, so the warning
    is not needed. This number makes Pillow's comparison for the warning, `pixels > limit`, false.
    """

    def __lt__(self, pixels: int) -> bool:
        return False


class _PillowLimit:
    """Raises Pillow's global limit of pixels to `MAX_PIXELS` while any of our threads reads an image."""

    def __init__(self):
        self._lock, self._num_users, self._old = threading.Lock(), 0, None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._num_users:
                self._old, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, _QuietLimit(MAX_PIXELS)
            self._num_users += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_users -= 1
                if not self._num_users:
                    Image.MAX_IMAGE_PIXELS = self._old


_pillow_limit = _PillowLimit()


def _has_late_chunks(image: Image.Image) -> bool:
    """Whether a PNG that is not decoded yet has chunks after its pixels. One of them may be an EXIF block."""
    file = getattr(image, "fp", None)
    if file is None:
        return True
    start, seen_pixels = file.tell(), False
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"IEND":
                return False
            if seen_pixels and kind != b"IDAT":
                return True
            seen_pixels |= kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
        return True
    finally:
        file.seek(start)


def _head(file: Path | str | BinaryIO) -> bytes:
    if isinstance(file, Path | str):
        with open(file, "rb") as opened:
            return opened.read(16)
    file.seek(0)
    return file.read(16)


def _why_unknown(head: bytes) -> str:
    if not head:
        return "It is empty."
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        return "It is a HEIC image, which cannot be read; convert it to JPEG."
    if head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "It is PostScript (EPS), which cannot be read; convert it to PNG."
    return f"It is not an image of a known format ({', '.join(FORMATS)}), or its beginning is damaged."


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return _NO_MEMORY
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:  # the full text of a system error also has a number and the path
        return f"{error.strerror}."
    return f"Its pixels cannot be decoded, {type(error).__name__}: {text.rstrip('.')}."


def _too_large(size: str) -> str:
    return f"It has {size} pixels, and at most {MAX_PIXELS // 10**6} million are read; scale it down, or cut it into parts."
