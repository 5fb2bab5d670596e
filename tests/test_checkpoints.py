"""Checkpoints of a run: which is old, which is damaged, how they reach the disk."""

import errno
import json
import os
import stat
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from dino_hf.run.machine_failures import machine_failure
from dino_hf.training import checkpoint_files
from dino_hf.training.checkpoint_files import (
    check_checkpoint,
    check_moments,
    checkpoints_by_age,
    describe_load_errors,
    sync_to_disk,
    write_checksums,
)
from dino_hf.training.checkpoints import WholeCheckpointTrainer


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
        ("trainer_state.json", lambda content: b"[" * 100_000, "nested too deeply"),
        ("trainer_state.json", lambda content: b'{"global_step": ' + b"9" * 6000, "digits"),
        ("trainer_state.json", lambda content: b"\xff\xfe", "UTF-16"),
    ],
)
def test_what_is_damaged_is_named(tmp_path, name, spoil, reason):
    make(tmp_path, 1)
    path = make(tmp_path, 3) / name
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} is damaged .*({reason}).* from the newest of \['checkpoint-1'\]"):
        check_checkpoint(path.parent)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"global_step": 4}, "its global_step is 4, but.* step 3"),
        ({"global_step": True}, "its global_step is True"),
        ({"epoch": float("nan")}, "its epoch is nan"),
        ({"epoch": "<b>"}, "its epoch is '<b>'"),
        ({"best_metric": "x" * 10_000}, "its best_metric is 'x+"),
        ({"log_history": [1]}, "log_history has the entry 1"),
        ({"log_history": [{"eval_AP": 0.5}]}, "log_history has the entry"),
        ({"log_history": [{"step": 1, "eval_new_AP": "y"}]}, "log_history has 'y' as 'eval_new_AP'"),
        ({"train_batch_size": "4"}, "its train_batch_size is '4'"),
        ({"stateful_callbacks": "x"}, "its stateful_callbacks is 'x'"),
        (
            {"stateful_callbacks": {"EarlyStoppingCallback": 3}},
            "the state of the callback 'EarlyStoppingCallback' is 3",
        ),
        ({"evil\x1b[2J": 1}, "a Trainer has no state .evil"),
    ],
    ids=str,
)
def test_states_that_no_trainer_wrote_are_refused(tmp_path, changes, reason):
    path = make(tmp_path, 3) / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"trainer_state.json is damaged \({reason}") as caught:
        check_checkpoint(path.parent)
    assert len(str(caught.value)) < 800
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_states_that_trainers_write_pass(tmp_path):
    path = make(tmp_path, 3) / "trainer_state.json"
    state = TrainerState(global_step=3, epoch=0.5, best_metric=float("nan"), train_batch_size=4)
    state.log_history = [{"step": 1, "loss": float("nan")}, {"step": 3, "eval_AP": 0.1, "eval_other": [1, 2]}]
    state.stateful_callbacks = {"TrainerControl": TrainerControl().state(), "Own": [EarlyStoppingCallback(3).state()]}
    state.save_to_json(str(path))
    check_checkpoint(path.parent)
    copy = path.parent.rename(tmp_path / "best")  # a folder of another name tells no step
    check_checkpoint(copy)


def test_a_pipe_in_a_checkpoint_is_not_opened(tmp_path):
    checkpoint = make(tmp_path, 3)
    os.mkfifo(checkpoint / "more.json")
    with pytest.raises(ValueError, match=r"more.json is damaged \(it is not a regular file\)"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.update(exp_avg=torch.zeros(3)),
            r"exp_avg of a parameter with shape \(4, 5\) has shape \(3,\)",
        ),
        (
            lambda state: state.update(exp_avg_sq=0.5),
            r"exp_avg_sq of a parameter with shape \(4, 5\) has another size",
        ),
        (lambda state: state.update(exp_avg=torch.zeros(())), r"exp_avg of a parameter"),
    ],
)
def test_moments_of_other_shapes_do_not_reach_a_kernel(change, message):
    parameter = torch.nn.Parameter(torch.zeros(4, 5))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones(4, 5)
    optimizer.step()
    check_moments(optimizer)
    change(optimizer.state[parameter])
    with pytest.raises(ValueError, match=message):
        check_moments(optimizer)


@pytest.mark.parametrize("error", [KeyError("param_groups"), TypeError("a"), RuntimeError("b\nc"), OSError("x" * 5000)])
def test_what_does_not_fit_is_one_sentence_with_the_file(tmp_path, error):
    checkpoint = make(tmp_path, 3)
    damaged = pytest.raises(ValueError, match=r"optimizer.pt is damaged \(.*Delete the folder")
    with damaged as caught, describe_load_errors(checkpoint, "optimizer.pt"):
        raise error
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700 + len(str(tmp_path)) * 2


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

    monkeypatch.setattr(checkpoint_files.os, "fsync", fsync)
    sync_to_disk(checkpoint)
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
    found = machine_failure(error, args)
    assert found is None if sentence is None else sentence in found


def test_zeroed_blocks_in_a_file_are_found_by_its_checksum(tmp_path):
    make(tmp_path, 1)
    checkpoint = make(tmp_path, 3)
    (checkpoint / "ema").mkdir()
    for path in (checkpoint / "model.safetensors", checkpoint / "ema/model.safetensors"):
        save_file({"weight": torch.randn(300, 700)}, path)
    write_checksums(checkpoint)
    check_checkpoint(checkpoint)
    for path in (checkpoint / "model.safetensors", checkpoint / "ema/model.safetensors"):
        whole = path.read_bytes()
        path.write_bytes(whole[:400_000] + bytes(4096) + whole[404_096:])
        with pytest.raises(ValueError, match=rf"{path} is damaged \(its checksum is .* newest of \['checkpoint-1'\]"):
            check_checkpoint(checkpoint)
        (checkpoint / "checksums.json").rename(tmp_path / "record")
        check_checkpoint(checkpoint)  # a checkpoint of an older version has no record
        (tmp_path / "record").rename(checkpoint / "checksums.json")
        path.write_bytes(whole)
    check_checkpoint(checkpoint)
    (checkpoint / "optimizer.pt").unlink()  # to save room
    check_checkpoint(checkpoint)


def test_a_json_that_stays_readable_is_found_by_its_checksum(tmp_path):
    checkpoint = make(tmp_path, 3)
    write_checksums(checkpoint)
    path = checkpoint / "trainer_state.json"
    path.write_text(path.read_text().replace("[]", "[ ]"))
    with pytest.raises(
        ValueError, match=r"trainer_state.json is damaged \(.*changed it on purpose, delete checksums.json"
    ):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("content", ["[1]", '{"optimizer.pt": 3}', '{"opt', "[" * 10**5])
def test_a_damaged_record_of_checksums_is_named(tmp_path, content):
    checkpoint = make(tmp_path, 3)
    (checkpoint / "checksums.json").write_text(content)
    with pytest.raises(ValueError, match=r"checksums.json is damaged \("):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_the_generator_of_a_device_that_transformers_leaves_out_is_in_the_checkpoint(kind, tmp_path, monkeypatch):
    state, module = [torch.tensor([1, 2], dtype=torch.uint8)], getattr(torch, kind)
    monkeypatch.setattr(module, "get_rng_state", lambda device=kind: state[0].clone())
    monkeypatch.setattr(module, "set_rng_state", lambda new, device=kind: state.__setitem__(0, new))
    trainer = WholeCheckpointTrainer.__new__(WholeCheckpointTrainer)
    trainer.args = SimpleNamespace(device=torch.device(kind), process_index=0, world_size=1, parallel_mode=None)
    trainer._save_rng_state(str(tmp_path))
    state[0] = torch.tensor([9, 9], dtype=torch.uint8)
    trainer._load_rng_state(str(tmp_path))
    assert state[0].tolist() == [1, 2]
    state[0] = torch.tensor([9, 9], dtype=torch.uint8)
    (tmp_path / "rng_state_device_0.pth").unlink()
    trainer._load_rng_state(str(tmp_path))  # of an older version
    assert state[0].tolist() == [9, 9]
    torch.save({kind: 3}, tmp_path / "rng_state_device_0.pth")
    monkeypatch.setattr(module, "set_rng_state", lambda new, device=kind: new.clone())
    with pytest.raises(ValueError, match=r"rng_state_device_0.pth is damaged"):
        trainer._load_rng_state(str(tmp_path))
