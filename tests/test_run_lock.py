"""One process at a time trains in a folder."""

import errno
import hashlib
import json
import os
import socket
import time
from functools import partial

import psutil
import pytest

from dino_hf.training import run_lock
from dino_hf.training.run_lock import LOCK_NAME, locked_run
from processes import exit_codes_of_forks, needs_fork


def write_lock(folder, **changes):
    started = psutil.Process().create_time()
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": started, "token": "other"} | changes
    folder.mkdir(exist_ok=True)
    (folder / LOCK_NAME).write_text(json.dumps(holder))


def test_the_lock_names_its_process_and_goes(tmp_path):
    with locked_run(tmp_path, True):
        holder = json.loads((tmp_path / LOCK_NAME).read_text())
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
        with locked_run(tmp_path, True):
            pass
        assert (tmp_path / LOCK_NAME).is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_made_for_the_lock_goes_with_it(tmp_path):
    with pytest.raises(KeyError), locked_run(tmp_path / "a/run", True):
        raise KeyError
    assert not (tmp_path / "a/run").exists()


def test_a_running_process_keeps_its_lock(tmp_path):
    write_lock(tmp_path)
    message = rf"Process {os.getpid()} on .* trains in .*Choose another --output-dir"
    with pytest.raises(ValueError, match=message), locked_run(tmp_path, True):
        pass
    assert json.loads((tmp_path / LOCK_NAME).read_text())["token"] == "other"


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"started": 1.0}, {"pid": "x"}])
def test_the_lock_of_a_process_that_ended_is_taken_over(tmp_path, changes, monkeypatch):
    monkeypatch.setattr(run_lock, "_PAUSE", 0.0)
    write_lock(tmp_path, **changes)
    with locked_run(tmp_path, True):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_cut_off_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_PAUSE", 0.0)
    (tmp_path / LOCK_NAME).write_text('{"host": ')
    with locked_run(tmp_path, True):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_being_written_is_waited_for(tmp_path, monkeypatch):
    (tmp_path / LOCK_NAME).touch()
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: write_lock(tmp_path, token="slower"))
    with pytest.raises(ValueError, match=f"Process {os.getpid()} on"), locked_run(tmp_path, True):
        pass
    assert json.loads((tmp_path / LOCK_NAME).read_text())["token"] == "slower"


def test_a_slow_process_does_not_replace_the_lock_of_a_faster_one(tmp_path, monkeypatch):
    """It sleeps, for however long, after it has seen that the old lock has ended."""
    write_lock(tmp_path, pid=2**22 + 1)
    is_running, faster = run_lock._is_running, run_lock._lock(tmp_path / LOCK_NAME)

    def is_running_slowly(holder, path):
        monkeypatch.setattr(run_lock, "_is_running", is_running)
        found = is_running(holder, path)
        faster.__enter__()
        return found

    monkeypatch.setattr(run_lock, "_is_running", is_running_slowly)
    with pytest.raises(ValueError, match=f"Process {os.getpid()} on .* trains in"), locked_run(tmp_path, True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
    faster.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


@needs_fork
@pytest.mark.forks
def test_of_many_processes_that_take_over_one_goes_on(tmp_path):
    folder, outcomes = tmp_path / "run", tmp_path / "outcomes"
    outcomes.mkdir()
    write_lock(folder, pid=2**22 + 1)

    def wait_for(count):
        end = time.monotonic() + 20
        while len(list(outcomes.iterdir())) < count:
            assert time.monotonic() < end
            time.sleep(0.001)

    def compete(number):
        (outcomes / f"{number}.ready").touch()
        wait_for(8)
        try:
            with locked_run(folder, True):
                (outcomes / f"{number}.holds").touch()
                wait_for(16)
        except ValueError:
            (outcomes / f"{number}.refused").touch()

    assert exit_codes_of_forks([partial(compete, number) for number in range(8)]) == [0] * 8
    assert len(list(outcomes.glob("*.holds"))) == 1
    assert list(folder.iterdir()) == []


def test_the_claim_of_a_process_that_was_killed_is_taken_over_too(tmp_path):
    write_lock(tmp_path, pid=2**22 + 1)
    ended = (tmp_path / LOCK_NAME).read_bytes()
    (tmp_path / f"{LOCK_NAME}.{hashlib.sha256(ended).hexdigest()[:16]}").write_bytes(ended)
    with locked_run(tmp_path, True):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]


def test_a_file_system_without_hard_links_has_locks_too(tmp_path, monkeypatch):
    def refuse(*places):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(run_lock.os, "link", refuse)
    with locked_run(tmp_path, True):
        monkeypatch.setattr(run_lock, "_held", set())  # as in another process
        with pytest.raises(ValueError, match="trains in"), locked_run(tmp_path, True):
            pass
    assert list(tmp_path.iterdir()) == []


@needs_fork
@pytest.mark.forks
def test_a_container_of_the_same_name_keeps_its_lock_while_it_runs(tmp_path, monkeypatch):
    """Its process numbers mean nothing in this one."""
    held, checked = tmp_path / "held", tmp_path / "checked"
    monkeypatch.setattr(run_lock, "machine_mark", lambda: "another")

    def hold():
        with locked_run(tmp_path / "run", True):
            held.touch()
            while not checked.exists():
                time.sleep(0.001)
            os._exit(0)  # killed

    def try_to_lock():
        end = time.monotonic() + 20
        while not held.exists() and time.monotonic() < end:
            time.sleep(0.001)
        monkeypatch.undo()
        try:
            with pytest.raises(ValueError, match=r"trains in .*delete"), locked_run(tmp_path / "run", True):
                pass
        finally:
            checked.touch()

    assert exit_codes_of_forks([hold, try_to_lock]) == [0, 0]
    monkeypatch.undo()
    with locked_run(tmp_path / "run", True):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_without_locks_of_the_file_system_the_lock_of_another_container_stands(tmp_path, monkeypatch):
    write_lock(tmp_path, machine="another", pid=2**22 + 1)
    monkeypatch.setattr(run_lock, "fcntl", None)
    with pytest.raises(ValueError, match="trains in"), locked_run(tmp_path, True):
        pass


def test_a_folder_in_the_place_of_the_lock_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_PAUSE", 0.0)
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(IsADirectoryError), locked_run(tmp_path, True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]


def test_the_lock_of_another_machine_stands(tmp_path):
    write_lock(tmp_path, host="elsewhere", pid=2**22 + 1)
    with pytest.raises(ValueError, match="on elsewhere trains in"), locked_run(tmp_path, True):
        pass


def test_other_processes_of_the_run_need_no_lock(tmp_path):
    write_lock(tmp_path)
    with locked_run(tmp_path, False):
        pass
