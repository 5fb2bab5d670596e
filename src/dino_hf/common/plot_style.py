"""How plots are written on."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from matplotlib import font_manager, rc_context

_FONTS = (  # with Chinese, Japanese and Korean, as they come with Linux, Windows and macOS
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Hiragino Sans",
    "Arial Unicode MS",
)


@contextmanager
def style() -> Iterator[None]:
    """For texts that are names of anyone's: "$" is a dollar and begins no formula, which might not even parse, and other scripts
    are written in a font that has them, if one is installed."""
    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in _FONTS if name in installed)]
    with rc_context({"text.parse_math": False, "font.family": fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # it is drawn as a box
        yield
