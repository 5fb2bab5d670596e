"""The one reading of an image file: training, evaluation, prediction and the doctor all see the same pixels."""

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

# Formats that Pillow decodes by itself. For others, such as EPS and WMF, it starts programs or asks other libraries.
_WANTED_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP",
)  # fmt: skip
Image.init()
FORMATS = tuple(name for name in _WANTED_FORMATS if name in Image.OPEN)  # this build of Pillow may lack some
IMAGE_SUFFIXES = frozenset((
    ".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
))  # fmt: skip
MAX_PIXELS = 500_000_000  # of one image: 2 GB as Pillow holds RGB
MAX_BYTES = 2**31  # of one file
_STRIP_PIXELS = 2**22  # that are converted at once, so that a large image is not copied whole
_WHITE = (255, 255, 255)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what brings the stored pixels upright
_SWAPPING = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class UnreadableImage(OSError):
    """One sentence: why there is no image."""


class TooManyPixels(UnreadableImage):
    """It may be whole, but has more than `MAX_PIXELS`."""


class UnknownRange(UnreadableImage):
    """It is whole, but which value is white is not known."""


def read_image(origin: Path | str | bytes | BinaryIO | Image.Image) -> Image.Image:
    """An upright RGB image with 8 bits per channel, independent of its file.

    It is turned as its EXIF orientation says. Modes become RGB as in `to_rgb`. Of several frames or pages, the first is read.

    Args:
        origin: a file, its bytes, an open binary file, or an image of Pillow, which stays as it is.
    Raises:
        FileNotFoundError: there is no such file.
        UnreadableImage: it is no image of the `FORMATS`, is damaged, has more than `MAX_PIXELS`, or values of unknown range.
    """
    if isinstance(origin, Image.Image):
        return to_rgb(upright(origin))
    with open_image(origin) as image:
        load(image)
        return to_rgb(upright(image))


def open_image(origin: Path | str | bytes | BinaryIO) -> Image.Image:
    """An image whose pixels are not yet decoded. Use it as a context manager, or its file stays open.

    Raises:
        FileNotFoundError, UnreadableImage: as `read_image`.
    """
    if isinstance(origin, Path | str):
        check_file(origin)
    file = io.BytesIO(origin) if isinstance(origin, bytes) else origin
    with _pillow_limit():
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:  # its message has the address of the bytes
            raise UnreadableImage(_why_unknown(_head(file))) from None
        except (FileNotFoundError, PermissionError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
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
        raise UnreadableImage("It is no regular file.")
    if status.st_size > MAX_BYTES:
        raise UnreadableImage(f"It is larger than {MAX_BYTES >> 30} GiB.")


def load(image: Image.Image) -> None:
    """Decode the pixels of an image that `open_image` gave.

    Raises:
        UnreadableImage: they are damaged or end too early.
    """
    with _pillow_limit():
        try:
            image.load()
        except Exception as error:  # Pillow's errors have no common type
            raise UnreadableImage(_sentence(error)) from error


def orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1 where there is none or its block is damaged. Also known before the pixels are decoded."""
    if image.format == "PNG" and "exif" not in image.info and not _has_late_chunks(image):
        # Pillow would decode all pixels to look for a block behind them.
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return found if found in _TURNS else 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except UnreadableImage:
        raise
    except Exception:  # a damaged block says nothing, and there are many ways to be damaged
        return 1
    return found if found in _TURNS else 1


def stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) before the EXIF orientation turns the image."""
    if image.format == "TIFF" and (tags := getattr(image, "tag_v2", None)):  # Pillow has turned its `size` already
        return tags[256], tags[257]
    return image.size


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of the image that `read_image` gives; its pixels need not be decoded."""
    size = stored_size(image)
    return size[::-1] if orientation(image) in _SWAPPING else size


def upright(image: Image.Image) -> Image.Image:
    """Turned as the EXIF orientation says; the same object where it says nothing."""
    return turn(image, orientation(image))


def turn(image: Image.Image, exif_orientation: int) -> Image.Image:
    """Stored pixels -> upright ones; the same object for 1."""
    return image if exif_orientation == 1 else image.transpose(_TURNS[exif_orientation])


def other_frames(image: Image.Image) -> str | None:
    """ "pages" or "frames" if the file has more than the one that is read, else None.

    The further pictures in a phone's JPEG (MPO) are views of the same scene and do not count.
    """
    if image.format == "MPO":
        return None
    try:
        has_more = getattr(image, "is_animated", False)
    except Exception:  # what follows the first frame is damaged, and is not read
        return None
    return None if not has_more else "pages" if image.format == "TIFF" else "frames"


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow -> a new RGB image with 8 bits per channel and without metadata.

    Transparency is composited on white, as the image processors of transformers do. Grey of 16 bits is scaled from its full
    range: 65,535 is white. Mode I is read like that if its values fit into 16 bits.

    Raises:
        UnreadableImage: it has no pixels, or mode F, or I of another range: which value is white is not known.
    """
    if 0 in image.size:
        raise UnreadableImage(f"It is {image.width} x {image.height} pixels, so there is nothing to see.")
    if image.mode == "F":
        raise UnknownRange(_unknown_range(image))
    convert = _to_8_bits if image.mode.startswith("I") else _composite if image.has_transparency_data else _plain
    result = Image.new("RGB", image.size)
    height = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        strip = image.crop((0, top, image.width, min(top + height, image.height)))
        result.paste(convert(strip), (0, top))
    return result


def _plain(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":  # the only one that `convert` does not know
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


class DecodingRoom:
    """Lets threads decode at once only as many images as fit in some bytes; one that alone needs more waits for all others.

    Args:
        num_bytes: for all of them together.
    """

    def __init__(self, num_bytes: int):
        self._free = self._all = num_bytes
        self._changed = threading.Condition()

    @contextmanager
    def take(self, num_bytes: int) -> Iterator[None]:
        """Wait until there is room for so much."""
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


class _PillowLimit:
    """Pillow's limit is a global one, and lower. It is raised while any of our threads reads an image."""

    def __init__(self):
        self._lock, self._num_users, self._old = threading.Lock(), 0, None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._num_users:
                self._old, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS
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
    """Whether a PNG that was not decoded yet has metadata behind its pixels, where an EXIF block may be."""
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
        return "It is a HEIC image, which is not read; convert it to JPEG."
    if head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "It is PostScript (EPS), which only another program could draw; convert it to PNG."
    return f"It is no image of a known format ({', '.join(FORMATS)}), or its beginning is damaged."


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:  # of the system, whose text has a number and the whole path
        return f"{error.strerror}."
    return f"Its pixels cannot be decoded, {type(error).__name__}: {text.rstrip('.')}."


def _too_large(size: str) -> str:
    return f"It has {size} pixels, and at most {MAX_PIXELS // 10**6} million are read; scale it down, or cut it into parts."
