"""Findings in a data set: for each kind, the count and the first offenders."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ..data.raw import BoxTable, RawDataset, number_text
from .kinds import KINDS, SEVERITIES, UNREADABLE

MAX_OFFENDERS = 1000  # offenders kept for each kind; all are counted


class Offender(NamedTuple):
    """One image, annotation, category, split or line of a file."""

    split: str | None
    where: str  # "annotations[3]", "images[7]", "labels/7.txt, line 3"
    file: str | None  # file_name of the image
    value: str  # the wrong value
    image: int | None = None  # place of the image in its split
    annotation: int | None = None  # place of the annotation in its split
    other: tuple[str, int] | None = None  # split and place of the original, for a copy


class Finding(NamedTuple):
    """All offenders of one kind."""

    kind: str  # a key of KINDS, or the kind of a `Problem`
    severity: str
    count: int
    what: str  # plural noun with a description
    cure: str
    offenders: list[Offender]  # the first offenders only
    is_fixed: bool  # a cleaned copy corrects them or leaves them out

    def as_dict(self) -> dict:
        offenders = [
            {"split": offender.split, "where": offender.where, "file": offender.file, "value": offender.value}
            for offender in self.offenders
        ]
        return self._replace(offenders=offenders)._asdict()


class FindingCollector:
    """Counts the offenders of each kind over all splits, and keeps the first."""

    def __init__(self, raw: RawDataset, tables: dict[str, BoxTable]):
        self.raw = raw
        self.tables = tables
        self._counts: dict[str, int] = {}
        self._offenders: dict[str, list[Offender]] = {}
        self._details: dict[str, str] = {}
        self.not_fixed: set[str] = set()  # kinds that a cleaned copy corrects in general, but not in these data
        self.cures: dict[str, str] = {}  # kind -> advice for these data, in place of the general advice
        self.can_be_copied = True  # whether a cleaned copy would contain a box

    def add(self, kind: str, offenders: Iterable[Offender], count: int | None = None, detail: str = "") -> None:
        """Add offenders of one kind.

        Args:
            count: number of all offenders, if `offenders` are only the first.
            detail: added in parentheses to the description of the kind.
        """
        offenders = list(offenders)
        count = len(offenders) if count is None else count
        if not count:
            return
        kept = self._offenders.setdefault(kind, [])
        kept += offenders[: MAX_OFFENDERS - len(kept)]
        self._counts[kind] = self._counts.get(kind, 0) + count
        if detail:
            self._details[kind] = detail

    def add_images(self, kind: str, split: str, places: Iterable[int], value: Callable[[int], str]) -> None:
        places = list(places)
        images = self.raw.splits[split].images
        self.add(
            kind,
            (
                Offender(split, f"images[{place}]", images[place].get("file_name"), value(place), place)
                for place in places[:MAX_OFFENDERS]
            ),
            len(places),
        )

    def add_boxes(
        self, kind: str, split: str, is_wrong: np.ndarray, value: Callable[[int], str] | None = None, detail: str = ""
    ) -> None:
        """
        Args:
            is_wrong: (N,) mask of the annotations of the split.
            value: function from the place of an annotation to its text. None: its box and the size of its image.
        """
        places = np.flatnonzero(is_wrong)
        value = value or (lambda place: self._box_text(split, place))
        offenders = (self._annotation(split, place, value) for place in places[:MAX_OFFENDERS].tolist())
        self.add(kind, offenders, len(places), detail)

    def _annotation(self, split: str, place: int, value: Callable[[int], str]) -> Offender:
        of_split, image = self.raw.splits[split], int(self.tables[split].image[place])
        image = None if image < 0 else image
        file = None if image is None else of_split.images[image].get("file_name")
        return Offender(split, of_split.annotations.where(place), file, value(place), image, place)

    def _box_text(self, split: str, place: int) -> str:
        box, size = box_text(self.raw.splits[split].annotations.bbox[place]), self.tables[split].sizes[place]
        return box if np.isnan(size).any() else f"{box} in {size[0]:g} x {size[1]:g}"

    def findings(self) -> list[Finding]:
        """All findings, sorted by severity and then by count."""
        found = []
        for kind, count in self._counts.items():
            known = KINDS.get(kind, UNREADABLE)
            what = known.what + (f" ({self._details[kind]})" if kind in self._details else "")
            is_fixed = self.can_be_copied and known.is_fixed and kind not in self.not_fixed
            cure = self.cures.get(kind, known.cure)
            found.append(Finding(kind, known.severity, count, what, cure, self._offenders[kind], is_fixed))
        return sorted(found, key=lambda finding: (SEVERITIES.index(finding.severity), -finding.count, finding.kind))


def box_text(box: np.ndarray) -> str:
    """(x, y, width, height) with few digits."""
    return f"({', '.join(map(number_text, box))})"
