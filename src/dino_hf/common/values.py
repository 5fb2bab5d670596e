"""Values of any type, from files or from users: are they numbers, and how does a message show them?"""

import reprlib
import sys
from typing import Any


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, finite, and small enough for a float. True and False are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class _Short(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxstring, self.maxother, self.maxlong = 3, 8, 8, 80, 80, 40


def short_repr(value: Any) -> str:
    """`repr` of any value for a message. Its time and length are bounded."""
    return _Short().repr(value)


def numbers_by_name(text: str, option: str, example: str) -> dict[str, float]:
    """ "person=0.3,dog=0.6" -> {"person": 0.3, "dog": 0.6}, from a command line.

    Args:
        option, example: for errors, such as "--class-thresholds" and "person=0.3,dog=0.6: names and scores in [0, 1]".
    Raises:
        ValueError: the text has another form, or a name twice.
    """
    numbers: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.rpartition("="))
        if name in numbers:
            raise ValueError(f"{option} names {name!r:.100} twice; give one number for each.")
        try:
            numbers[name] = float(value)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f"{option} {text!r:.200} must be like {example}.")
    return numbers
