"""Training data in which another image replaces an image that cannot be read."""

import logging
from collections.abc import Sequence

import torch
from datasets import Dataset as Table

from ..common.text import list_some
from ..data.rows import ImageSizeError

logger = logging.getLogger(__name__)

SHARE_LEFT_OUT = 0.1  # share of the images that may be bad before training stops
FEWEST_LEFT_OUT = 10  # number of images that may be bad in any case
_SHOWN = 3  # bad images named in the summary


class TooManyBadImages(ValueError):
    """Too many images are bad to leave them out."""


class ReadableImages(torch.utils.data.Dataset):
    """Samples of a data set. The next readable image replaces a bad image.

    An image is bad if it cannot be read, or has another size than annotated. A warning names each bad image once. The replacement
    depends only on which images are bad, so a resumed run repeats it.

    Args:
        rows: the training images, with their transform.
        names: names of the images for messages.
        most: maximum number of bad images. None: a tenth of all images, at least 10.
        images: for each row, the number of its image in `names`, if rows are tiles. All tiles of a bad image are left out.
    """

    def __init__(self, rows: Table, names: Sequence[str], most: int | None = None, images: Sequence[int] | None = None):
        self.rows, self.names = rows, names
        self._images = range(len(rows)) if images is None else images
        self.most = max(FEWEST_LEFT_OUT, int(SHARE_LEFT_OUT * len(names))) if most is None else most
        # In shared memory, so the main process sees the bad images that its workers found.
        self._is_bad = torch.zeros(len(names), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        """
        Raises:
            TooManyBadImages: more than `most` images are bad, or all are.
        """
        for offset in range(len(self)):
            place = (index + offset) % len(self)
            image = int(self._images[place])
            if self._is_bad[image]:
                continue
            try:
                return self.rows[place]
            except (OSError, ImageSizeError) as error:
                self._leave_out(image, error)
        raise TooManyBadImages(self.reason_to_stop())

    def _leave_out(self, image: int, error: Exception) -> None:
        self._is_bad[image] = True
        if self.has_too_many:
            raise TooManyBadImages(f"{error} {self.reason_to_stop()}") from error
        logger.warning("Training continues without the image %s: %s", self.names[image], error)

    @property
    def bad_images(self) -> list[str]:
        """Names of the bad images found by this process and its workers; after `gather`, by all processes."""
        return [self.names[place] for place in self._is_bad.nonzero()[:, 0].tolist()]

    @property
    def has_too_many(self) -> bool:
        return int(self._is_bad.sum()) > self.most or bool(self._is_bad.all())

    def gather(self) -> None:
        """Add the bad images found by other processes. All processes must call this, after training."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        found: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, self._is_bad.nonzero()[:, 0].tolist())
        for places in found:
            self._is_bad[places] = True

    def summary(self) -> str:
        """A sentence about the bad images of a finished run."""
        return f"{self._count()} Other images took their places."

    def reason_to_stop(self) -> str:
        """A sentence about the bad images that stopped a run, and what to do."""
        cure = "They are too many to leave out: repair them, then continue by --resume (in Python, resume=True)."
        if not self.most:
            cure = "Repair or remove them, or leave them out by --on-bad-image skip (in Python, on_bad_image='skip')."
        return f"{self._count()} {cure}"

    def _count(self) -> str:
        names = self.bad_images
        listed = list_some(names, _SHOWN)
        what = f"{len(names)} of {len(self.names)} training images"
        return f"{what} could not be read, or have another size than annotated: {listed}."
