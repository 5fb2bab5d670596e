"""Turn the ids of images and categories, numbers or texts, into whole numbers."""

import re


class KeyNumbers:
    """Key of an entry -> its number. Whole numbers and their texts stay; other texts are numbered in their order.

    Args:
        entries: as in the files, of any type.
        field: that has the keys.
    """

    def __init__(self, entries: list, field: str):
        keys = [_as_key(entry.get(field)) for entry in entries if isinstance(entry, dict)]
        texts = list(dict.fromkeys(key for key in keys if isinstance(key, str)))
        first = max((key for key in keys if isinstance(key, int) and key < 2**62), default=0) + 1
        self._number_of = {text: first + index for index, text in enumerate(texts)}

    def number(self, value) -> int | None:
        """None for what cannot be a key; a text that no entry has is unknown, and gets -1 or less."""
        if type(value) is int and -(2**63) <= value < 2**63:  # by far the most, and this is asked for each box
            return value
        key = _as_key(value)
        if isinstance(key, str):
            return self._number_of.get(key) or self._unknown(key)
        return key

    def _unknown(self, key: str) -> int:
        return self._number_of.setdefault(key, -(2**62) - len(self._number_of))

    def notes(self, what: str) -> list[str]:
        """Says that keys were numbered."""
        known = {key: number for key, number in self._number_of.items() if number >= 0}
        if not known:
            return []
        first = next(iter(known))
        return [
            f"{what} are texts, such as {first[:40]!r}, and become numbers: {len(known)} of them, from {known[first]}."
        ]


def _as_key(value) -> int | str | None:
    if isinstance(value, dict) and set(value) == {"$oid"}:  # as MongoDB exports them
        value = value["$oid"]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and re.fullmatch(r"(0|-?[1-9][0-9]{0,18})", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    return value if isinstance(value, str) or -(2**63) <= value < 2**63 else None
