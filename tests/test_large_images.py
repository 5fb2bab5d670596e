"""Very large images in training: one is read at a time, so memory does not grow with workers, threads or batches."""

import json
import pickle
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from dino_hf.data import load_data
from dino_hf.run import image_check
from dino_hf.training import large_images
from dino_hf.training.large_images import LockedLargeImages, ReadLock, lock_large_images
from processes import exit_codes_of_forks, needs_fork


def write_images(folder, sizes):
    folder.mkdir(parents=True)
    images = []
    for number, size in enumerate(sizes):
        Image.new("L", size).save(folder / f"{number}.png", compress_level=1)
        images.append({"id": number, "file_name": f"{number}.png", "width": size[0], "height": size[1]})
    boxes = [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 2, 30, 20], "area": 600, "iscrowd": 0}]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "ship"}]}
    (folder / "annotations.json").write_text(json.dumps(content))
    return load_data(folder, validation_fraction=0).train


def test_only_data_with_large_images_are_read_in_turn(tmp_path, monkeypatch):
    data = write_images(tmp_path / "data", [(50, 40), (41, 50), (40, 50)])
    rows, lock = data.dataset, ReadLock()
    assert lock_large_images(rows, data, lock) is rows
    monkeypatch.setattr(large_images, "LARGE", 2000)
    wrapped = lock_large_images(rows, data, lock)
    assert wrapped._is_large == [False, True, False]
    assert [sample["image"].size for sample in (wrapped[index] for index in range(len(wrapped)))] == [
        (50, 40),
        (41, 50),
        (40, 50),
    ]
    assert not hasattr(wrapped, "__getitems__")  # by which a loader would decode a batch at once


class Slow:
    """Rows that note how many processes read at the same time."""

    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return 4

    def __getitem__(self, index):
        mark = self.folder / f"reading-{index}"
        mark.touch()
        (self.folder / f"seen-{index}").write_text(str(len(list(self.folder.glob("reading-*")))))
        time.sleep(0.1)
        mark.unlink()
        return index


@needs_fork
@pytest.mark.forks
@pytest.mark.parametrize("is_large", [True, False])
def test_processes_read_large_images_one_after_another(is_large, tmp_path):
    pytest.importorskip("fcntl", reason="this system has no fcntl")
    rows = LockedLargeImages(Slow(tmp_path), [is_large] * 4, ReadLock())
    start = time.monotonic() + 0.2

    def read(index):
        time.sleep(max(0.0, start - time.monotonic()))
        assert rows[index] == index

    assert exit_codes_of_forks([partial(read, index) for index in range(4)]) == [0] * 4
    most = max(int(path.read_text()) for path in tmp_path.glob("seen-*"))
    assert (most == 1) == is_large


@needs_fork
@pytest.mark.forks
def test_the_turn_of_a_worker_that_was_killed_is_free(tmp_path):
    lock = ReadLock()

    def die():
        lock.hold().__enter__()
        raise SystemExit

    exit_codes_of_forks([die])
    copy = pickle.loads(pickle.dumps(lock))  # as in a worker that was spawned
    with copy.hold():
        pass
    assert Path(lock._path).exists()


def test_the_check_before_training_decodes_as_many_images_as_fit_into_its_room(tmp_path, monkeypatch):
    data = write_images(tmp_path / "data", [(300, 200)] * 6)
    monkeypatch.setattr(image_check, "_budget", image_check.DecodingBudget(2 * 8 * 300 * 200))
    lock, now, most = threading.Lock(), [0], [0]

    def load(image):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        image.load()
        with lock:
            now[0] -= 1

    monkeypatch.setattr(image_check, "load", load)
    monkeypatch.setattr(image_check.os, "cpu_count", lambda: 6)
    assert image_check.bad_images(data, decode=True) == {}
    assert most == [2]


def test_memory_of_large_images_goes_back_to_the_system():
    """glibc keeps freed blocks of up to 32 MiB, so with the default of Pillow, 16 MiB, each thread keeps its last image."""
    assert Image.core.get_block_size() > 32 * 2**20
