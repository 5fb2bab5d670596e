"""Checkpoints of a run: which is old, which is damaged, how they reach the disk."""

import errno
import json
import os
import stat

import pytest
import torch
from transformers import TrainingArguments

from dino_hf.training import checkpoints
from dino_hf.training.checkpoints import check_checkpoint, checkpoints_by_age, flush
from dino_hf.training.machine_failures import failure_of_the_machine


def make(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    torch.save({"state": {0: torch.arange(300.0)}}, checkpoint / "optimizer.pt")
    torch.save({"last_epoch": step}, checkpoint / "scheduler.pt")
    return checkpoint


def test_age_is_by_step_whatever_the_clock_says(tmp_path):
    for number, step in enumerate((6, 12, 100, 18)):
        os.utime(make(tmp_path, step), (10**9 - number,) * 2)
    # 100 is of a run that was resumed at an earlier checkpoint.
    assert [one.name for one in checkpoints_by_age(tmp_path, 18)] == [f"checkpoint-{step}" for step in (100, 6, 12, 18)]


def test_a_whole_checkpoint_passes(tmp_path):
    check_checkpoint(make(tmp_path, 3))


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("optimizer.pt", lambda content: content[:-200], "cut off"),
        ("optimizer.pt", lambda content: content.replace(b"\x00\x00\x80?", b"\x00\x00\x81?", 1), "checksum|Bad CRC"),
        ("scheduler.pt", lambda content: b"", "cut off"),
        ("trainer_state.json", lambda content: b"[]", "no global_step"),
        ("trainer_state.json", lambda content: b"{", "Expecting"),
        ("trainer_state.json", lambda content: b"[" * 100_000, "recursion"),
    ],
)
def test_what_is_damaged_is_named(tmp_path, name, spoil, reason):
    make(tmp_path, 1)
    path = make(tmp_path, 3) / name
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} is damaged .*({reason}).* from the newest of \['checkpoint-1'\]"):
        check_checkpoint(path.parent)


def test_code_in_an_optimizer_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    checkpoint = make(tmp_path, 3)
    torch.save(Evil(), checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer.pt is damaged .*cannot be read"):
        check_checkpoint(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_files_are_flushed_by_a_descriptor_that_can_write(tmp_path, monkeypatch):
    """As Windows demands it."""
    fcntl = pytest.importorskip("fcntl", reason="this system has no fcntl")
    checkpoint, flushed = make(tmp_path, 3), []

    def fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if not is_folder and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(is_folder)

    monkeypatch.setattr(checkpoints.os, "fsync", fsync)
    flush(checkpoint)
    assert sorted(flushed) == [False, False, False, True]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "could not be written"),
        (RuntimeError("Error while serializing: I/O error: File too large (os error 27)"), "could not be written"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"), "could not be written"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate"), "--batch-size 2, or"),
        (MemoryError(), "--batch-size 2, or"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "smaller --dataloader-num-workers"),
        (RuntimeError("shape mismatch"), None),
        (OSError("7.jpg cannot be read"), None),
    ],
)
def test_failures_of_the_machine_have_a_sentence(tmp_path, error, sentence):
    args = TrainingArguments(str(tmp_path / "out"), per_device_train_batch_size=4, use_cpu=True, report_to="none")
    found = failure_of_the_machine(error, args)
    assert found is None if sentence is None else sentence in found
