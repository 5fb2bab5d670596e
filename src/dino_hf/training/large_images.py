"""Bound the memory for very large images: the processes of a run read them one after another."""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from datasets import Dataset as Table

from ..data.rows import CocoData
from ..data.tiled_data import tiled_images

try:
    import fcntl
except ImportError:  # Windows: memory is bounded only by the number of workers
    fcntl = None

LARGE = 2**25  # pixels; reading one pixel takes up to 15 bytes, so up to 500 MB for an image of this size


class ReadLock:
    """A lock for this process and its workers. It is released when a process ends."""

    _is_held = False  # by this process; a large image of a tiled data set is read inside `hold`

    def __init__(self):
        self._file = tempfile.NamedTemporaryFile(prefix="dino_hf_lock_")  # noqa: SIM115  it lives as long as this object
        self._path = self._file.name

    def __getstate__(self):
        return {"_path": self._path}  # for spawned workers; the file belongs to the first process

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait for the lock, and hold it inside the context."""
        if self._is_held:
            yield
            return
        with open(self._path, "rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            self._is_held = True
            try:
                yield
            finally:
                self._is_held = False

    def guard(self, num_pixels: int) -> AbstractContextManager:
        """A context to read an image in: the lock for a large image, else nothing."""
        return self.hold() if num_pixels > LARGE else nullcontext()


class LockedLargeImages(torch.utils.data.Dataset):
    """Samples of a data set. Large images are read one at a time in all workers, and each batch is read image by image.

    Args:
        rows: the images, with their transform.
        is_large: for each image, whether it has more than `LARGE` pixels.
        lock: the lock shared by all data sets of a run.
    """

    def __init__(self, rows: Table, is_large: list[bool], lock: ReadLock):
        self.rows, self._is_large, self._lock = rows, is_large, lock

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        if not self._is_large[index]:
            return self.rows[index]
        with self._lock.hold():
            return self.rows[index]


def lock_large_images(rows: Table, data: CocoData, lock: ReadLock) -> Table | LockedLargeImages:
    """Wrap rows in `LockedLargeImages` if any image is large. The images of a tiled data set are also read under the lock."""
    if (images := tiled_images(data)) is not None:
        images.guard = lock.guard
    sizes = data.dataset.select_columns(["width", "height"]).with_format("arrow")[:].to_pydict()
    is_large = [(w or 0) * (h or 0) > LARGE for w, h in zip(sizes["width"], sizes["height"], strict=True)]
    return LockedLargeImages(rows, is_large, lock) if any(is_large) else rows
