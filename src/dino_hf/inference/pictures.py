"""Detections drawn on images."""

import math
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, lru_cache

import numpy as np
from matplotlib import get_data_path
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ..common.drawing import COLOURS
from .predictor import Detections

_SMALLEST = 320  # pixels of the longer side: below, labels could not be read, and the picture is drawn larger
_PAD = 2  # pixels around the text of a label
_CROWD = 20  # boxes; above, labels are smaller
_MOST_LABELS = 300  # boxes with a label, those with the highest scores; more could not be read
_MOST_COVERED = (
    0.1  # of the smaller of two labels; above, the one of the lower score is left out, for neither could be read
)
_LONGEST_NAME = 80  # characters of a label


def draw_detections(
    image: Image.Image, detections: Detections, id2label: Mapping[int, str], *, enlarge: bool = True
) -> Image.Image:
    """A copy of an image with boxes, coloured by class, and labels "name 0.87", which stay inside it.

    A label that would hide labels of higher scores is left out.

    Args:
        image: RGB.
        enlarge: an image below 320 pixels is drawn a whole number of times larger.
    """
    zoom = math.ceil(_SMALLEST / max(image.size)) if enlarge else 1
    picture = image.resize([side * zoom for side in image.size], Image.Resampling.BICUBIC) if zoom > 1 else image.copy()
    draw = ImageDraw.Draw(picture)
    side = math.sqrt(picture.width * picture.height)
    line = min(8, max(2, round(side / 180)))
    # Pillow fails on a line break.
    texts = [
        f"{_one_line(id2label[int(label)])} {score:.2f}"
        for label, score in zip(detections.labels, detections.scores, strict=True)
    ]
    font = _font(min(44, max(11, round(side / (42 if len(texts) <= _CROWD else 54)))), frozenset("".join(texts)))
    boxes = [_pixels(box, picture.size) for box in detections.boxes * zoom]
    for box, label in reversed(list(zip(boxes, detections.labels, strict=True))):  # the surest on top
        _draw_box(draw, box, line, _colour(label))
    taken: list[tuple[int, int, int, int]] = []
    for box, label, text in list(zip(boxes, detections.labels, texts, strict=True))[:_MOST_LABELS]:
        text = _shorten(
            text, font, max(box[2] - box[0], round(0.3 * picture.width)) - 2 * _PAD, picture.width - 2 * _PAD
        )
        ascent, descent = font.getmetrics()
        size = math.ceil(font.getlength(text)) + 2 * _PAD, ascent + descent + 2 * _PAD
        place = _place(box, size, picture.size, taken)
        if any(_shared(place, other) > _MOST_COVERED * min(_area(place), _area(other)) for other in taken):
            continue
        draw.rectangle(place, fill=_colour(label))
        draw.text((place[0] + _PAD, place[1] + _PAD), text, font=font, fill=_readable_on(_colour(label)), anchor="la")
        taken.append(place)
    return picture


def _one_line(name: str) -> str:
    name = " ".join(name[: 4 * _LONGEST_NAME].split())
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _pixels(box: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """First and last column and row of a box, inside the image."""
    x0, y0, x1, y1 = (int(value) for value in np.round(box))
    x0, y0 = min(max(x0, 0), size[0] - 1), min(max(y0, 0), size[1] - 1)
    return x0, y0, min(max(x1 - 1, x0), size[0] - 1), min(max(y1 - 1, y0), size[1] - 1)


def _draw_box(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], line: int, colour: str) -> None:
    """With a thin white line on either side, which is seen on any background; not in boxes that it would fill."""
    x0, y0, x1, y1 = box
    if min(x1 - x0, y1 - y0) < 4 * line:
        draw.rectangle(box, outline=colour, width=max(1, line // 2))
        return
    draw.rectangle(box, outline="white", width=line + 2)
    draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=colour, width=line)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int, widest: int) -> str:
    """The name cut off to make the text fit into `width`, but not to less than 3 letters; in `widest` the score must fit."""
    name, _, score = text.rpartition(" ")
    length = len(name)
    while font.getlength(text) > width and length > 3:
        length -= 1
        text = f"{name[:length].rstrip()}… {score}"
    return text if font.getlength(text) <= widest else score


def _place(box, size: tuple[int, int], image_size: tuple[int, int], taken: list) -> tuple[int, int, int, int]:
    """Where a label stands: above its box if there is room, else inside, below, at the right; away from others if it can."""
    x0, y0, x1, y1 = box
    width, height = size
    places = [
        (x0, y0 - height),
        (x0, y0),
        (x0, y1 + 1),
        (x1 - width + 1, y0 - height),
        (x1 - width + 1, y1 + 1 - height),
    ]
    candidates = []
    for x, y in places:
        inside_x = max(0, min(x, image_size[0] - width))
        inside_y = max(0, min(y, image_size[1] - height))
        place = (inside_x, inside_y, inside_x + width - 1, inside_y + height - 1)
        covered = sum(_shared(place, other) for other in taken)
        candidates.append((covered, abs(y - inside_y), len(candidates), place))
    return min(candidates)[-1]


def _shared(a, b) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1) * max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)


def _area(place) -> int:
    return _shared(place, place)


def _colour(label: int) -> str:
    return COLOURS[int(label) % len(COLOURS)]


def _readable_on(colour: str) -> str:
    """Black or white, whichever has the higher contrast (WCAG 2.2, relative luminance)."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (channel / 255 for channel in ImageColor.getrgb(colour))
    ]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"


@lru_cache(maxsize=64)
def _font(size: int, letters: frozenset[str]) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along; where it lacks a letter, the first font of the system that has them all."""
    default = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    if not _has(default, letters):
        for file in _system_fonts():
            with suppress(OSError, RuntimeError):  # broken ones, and pictures as fonts, which have one size
                if _has(file, letters):
                    return ImageFont.truetype(file, size)
    return ImageFont.truetype(default, size)


@cache
def _system_fonts() -> list[str]:
    return sorted(findSystemFonts())


def _has(file: str, letters: frozenset[str]) -> bool:
    return letters <= {chr(code) for code in FT2Font(file).get_charmap()}
