"""Training data that go on where an image cannot be read: another image takes its place."""

import logging
from collections.abc import Sequence

import torch
from datasets import Dataset as Table

from ..data.rows import ImageSizeError

logger = logging.getLogger(__name__)

SHARE_LEFT_OUT = 0.1  # of the images may be bad; then training stops
FEWEST_LEFT_OUT = 10  # may be bad in any case
_SHOWN = 3  # that are named at the end


class TooManyBadImages(ValueError):
    """Training cannot go on."""


class ReadableImages(torch.utils.data.Dataset):
    """Samples of a data set, in which the next image that can be read takes the place of a bad one.

    An image is bad if it cannot be read, or has another size than its annotations say. Each is named once, in a warning. Which
    image takes its place depends on nothing else than on which are bad, so a resumed run repeats it.

    Args:
        rows: with the transform of training.
        names: of the images, for people.
        most: bad images that are left out; one more is an error. None: a tenth of them, at least 10. 0: none.
    """

    def __init__(self, rows: Table, names: Sequence[str], most: int | None = None):
        self.rows, self.names = rows, names
        self.most = max(FEWEST_LEFT_OUT, int(SHARE_LEFT_OUT * len(rows))) if most is None else most
        # In shared memory, so that the main process knows what its workers met.
        self._is_bad = torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        """
        Raises:
            TooManyBadImages: there are more than `most`, or no others.
        """
        for offset in range(len(self)):
            place = (index + offset) % len(self)
            if self._is_bad[place]:
                continue
            try:
                return self.rows[place]
            except (OSError, ImageSizeError) as error:
                self._leave_out(place, error)
        raise TooManyBadImages(self.summary())

    def _leave_out(self, place: int, error: Exception) -> None:
        self._is_bad[place] = True
        if self.has_too_many:
            raise TooManyBadImages(f"{error} {self.summary()}") from error
        logger.warning("Training goes on without the image %s: %s", self.names[place], error)

    @property
    def bad_images(self) -> list[str]:
        """Names of the bad images that this process and its workers met."""
        return [self.names[place] for place in self._is_bad.nonzero()[:, 0].tolist()]

    @property
    def has_too_many(self) -> bool:
        return int(self._is_bad.sum()) > self.most or bool(self._is_bad.all())

    def summary(self) -> str:
        """One sentence about the bad images."""
        names = self.bad_images
        listed = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        what = f"{len(names)} of {len(self)} images to train on could not be read, or have another size than annotated: {listed}."
        if not self.has_too_many:
            return f"{what} Other images took their places."
        if not self.most:
            return f"{what} Mend or remove them, or leave them out by --on-bad-image skip (in Python, on_bad_image='skip')."
        return f"{what} They are too many to leave out: mend them, then go on with --resume (in Python, resume=True)."
