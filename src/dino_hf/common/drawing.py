"""Draw boxes: on pictures with `draw_boxes`, in plots with `show_boxes` and `outline`. Both have the same colours and lines."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache

import numpy as np
from matplotlib import font_manager, get_data_path, rc_context
from matplotlib.axes import Axes
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from PIL import Image, ImageColor, ImageDraw, ImageFont

# Okabe and Ito's colours, which people with any colour vision can tell apart. Yellow is left out: it is too light for thin lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_FONTS = (  # fonts with Chinese, Japanese and Korean that come with Linux, Windows or macOS
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Hiragino Sans",
    "Arial Unicode MS",
)
_SMALLEST = 320  # pixels of the longer side; a smaller picture is enlarged, because its labels could not be read
_PAD = 2  # pixels around the text of a label
_CROWD = 20  # boxes; with more boxes, labels are smaller
_MOST_LABELS = 300  # boxes that get a label; more labels could not be read
_MOST_COVERED = 0.1  # share of the smaller of two labels; if more is covered, neither could be read

_Box = tuple[int, int, int, int]  # first column and row, last column and row, in pixels


def class_colour(label: int) -> str:
    """Colour of a class index. Colours repeat after the seventh class."""
    return COLOURS[int(label) % len(COLOURS)]


def text_colour(background: str) -> str:
    """Black or white, whichever has the higher contrast on a colour (WCAG 2.2, relative luminance)."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (channel / 255 for channel in ImageColor.getrgb(background))
    ]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"


# -- in plots


@contextmanager
def plot_style() -> Iterator[None]:
    """Style of all plots. Their texts may hold names from files, in any script and with any character.

    "$" does not start a formula: the formula might not parse, and then the plot fails. If fonts for other scripts are installed,
    they are used.
    """
    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in _FONTS if name in installed)]
    with rc_context({"text.parse_math": False, "font.family": fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # matplotlib draws an empty box instead
        yield


def outline(
    axes: Axes, box: Sequence[float], colour: str, width: float = 1.6, clip: Sequence[int] | None = None
) -> None:
    """Draw a box with a thin white line on either side, so that it is visible on any background.

    Args:
        box: (x0, y0, x1, y1) in pixels of the image that the axes show.
        width: width of the coloured line, in points.
        clip: width and height in pixels of a part of the axes; nothing is drawn outside.
    """
    x0, y0, x1, y1 = box
    for edge, line_width in (("white", width + 1.4), (colour, width)):
        style = {"fill": False, "edgecolor": edge, "linewidth": line_width}
        patch = axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, **style))
        if clip is not None:
            patch.set_clip_path(Rectangle((-0.5, -0.5), *clip, transform=axes.transData))


def write_label(axes: Axes, x: float, y: float, text: str, colour: str, **style) -> None:
    """Write a text on a background of a colour. `style` is passed to `Axes.text`."""
    style = {"fontsize": 6.5, "color": text_colour(colour)} | style
    axes.text(x, y, text, bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8}, **style)


def show_boxes(
    axes: Axes, image: Image.Image, boxes: Sequence[Sequence[float]], labels: Sequence[int], texts: Sequence[str]
) -> None:
    """Show an image with boxes, coloured by class, and a text at each box.

    Args:
        boxes: (x0, y0, x1, y1) in pixels.
        labels: class indices.
    """
    axes.imshow(np.asarray(image.convert("RGB")))
    for box, label, text in zip(boxes, labels, texts, strict=True):
        colour = class_colour(label)
        outline(axes, box, colour)
        anchor = "bottom" if box[1] > 8 else "top"
        write_label(axes, box[0] - 0.5, max(box[1] - 1.5, 0), text, colour, verticalalignment=anchor)
    axes.set_axis_off()


# -- on pictures


def draw_boxes(
    image: Image.Image, boxes: np.ndarray, labels: Sequence[int], texts: Sequence[str], *, enlarge: bool = True
) -> Image.Image:
    """A copy of an image with boxes, coloured by class, and labels inside the image.

    A label that would hide an earlier label is left out.

    Args:
        image: RGB.
        boxes: (N, 4) xyxy in pixels, the most important box first.
        labels: class indices.
        texts: the text of each label, without line breaks. The last word, such as a score, is never cut.
        enlarge: an image below 320 pixels is enlarged by a whole number.
    """
    zoom = math.ceil(_SMALLEST / max(image.size)) if enlarge else 1
    picture = image.resize([side * zoom for side in image.size], Image.Resampling.BICUBIC) if zoom > 1 else image.copy()
    draw = ImageDraw.Draw(picture)
    side = math.sqrt(picture.width * picture.height)
    line = min(8, max(2, round(side / 180)))
    font = _font(min(44, max(11, round(side / (42 if len(texts) <= _CROWD else 54)))), frozenset("".join(texts)))
    colours = [class_colour(label) for label in labels]
    pixel_boxes = [_inside(box, picture.size) for box in np.asarray(boxes).reshape(-1, 4) * zoom]
    for box, colour in reversed(list(zip(pixel_boxes, colours, strict=True))):  # the most important box on top
        _draw_box(draw, box, line, colour)
    ascent, descent = font.getmetrics()
    taken: list[_Box] = []
    for box, colour, text in list(zip(pixel_boxes, colours, texts, strict=True))[:_MOST_LABELS]:
        width = max(box[2] - box[0], round(0.3 * picture.width)) - 2 * _PAD
        text = _fit(text, font, width, picture.width - 2 * _PAD)
        size = math.ceil(font.getlength(text)) + 2 * _PAD, ascent + descent + 2 * _PAD
        place = _place(box, size, picture.size, taken)
        if any(_shared(place, other) > _MOST_COVERED * min(_area(place), _area(other)) for other in taken):
            continue
        draw.rectangle(place, fill=colour)
        draw.text((place[0] + _PAD, place[1] + _PAD), text, font=font, fill=text_colour(colour), anchor="la")
        taken.append(place)
    return picture


def _inside(box: np.ndarray, size: tuple[int, int]) -> _Box:
    """First and last column and row of a box, inside the image."""
    x0, y0, x1, y1 = (int(value) for value in np.round(box))
    x0, y0 = min(max(x0, 0), size[0] - 1), min(max(y0, 0), size[1] - 1)
    return x0, y0, min(max(x1 - 1, x0), size[0] - 1), min(max(y1 - 1, y0), size[1] - 1)


def _draw_box(draw: ImageDraw.ImageDraw, box: _Box, line: int, colour: str) -> None:
    """Draw a box with a thin white line on either side, or a single thin line if the lines would fill the box."""
    x0, y0, x1, y1 = box
    if min(x1 - x0, y1 - y0) < 4 * line:
        draw.rectangle(box, outline=colour, width=max(1, line // 2))
        return
    draw.rectangle(box, outline="white", width=line + 2)
    draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=colour, width=line)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int, widest: int) -> str:
    """Cut the name in "name score" so that the text fits into `width`, but keep 3 letters. Drop it if `widest` is exceeded."""
    name, _, score = text.rpartition(" ")
    length = len(name)
    while font.getlength(text) > width and length > 3:
        length -= 1
        text = f"{name[:length].rstrip()}… {score}"
    return text if font.getlength(text) <= widest else score


def _place(box: _Box, size: tuple[int, int], image_size: tuple[int, int], taken: list[_Box]) -> _Box:
    """Place of a label: above its box, else inside, below or at the right. It covers as little of other labels as possible."""
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


def _shared(a: _Box, b: _Box) -> int:
    """Number of pixels that two boxes share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1) * max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)


def _area(box: _Box) -> int:
    return _shared(box, box)


@lru_cache(maxsize=64)
def _font(size: int, letters: frozenset[str]) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib. If it lacks a letter: the first font of the system that has all letters."""
    default = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    if not _has(default, letters):
        for file in _system_fonts():
            with suppress(OSError, RuntimeError):  # damaged fonts, and bitmap fonts, which have one size
                if _has(file, letters):
                    return ImageFont.truetype(file, size)
    return ImageFont.truetype(default, size)


@cache
def _system_fonts() -> list[str]:
    return sorted(font_manager.findSystemFonts())


def _has(file: str, letters: frozenset[str]) -> bool:
    return letters <= {chr(code) for code in FT2Font(file).get_charmap()}
