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
