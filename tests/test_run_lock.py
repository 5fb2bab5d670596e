"""One process at a time trains in a folder."""

import json
import os
import socket

import psutil
import pytest

from dino_hf.training import run_lock
from dino_hf.training.run_lock import LOCK_NAME, locked_run


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
    message = rf"Process {os.getpid()} on .* trains in .*choose another --output-dir"
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


def test_of_two_that_take_over_one_goes_on(tmp_path, monkeypatch):
    write_lock(tmp_path, pid=2**22 + 1)
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: write_lock(tmp_path, pid=7, token="faster"))
    with pytest.raises(ValueError, match="Process 7 on"), locked_run(tmp_path, True):
        pass
    assert json.loads((tmp_path / LOCK_NAME).read_text())["token"] == "faster"


def test_the_lock_of_another_machine_stands(tmp_path):
    write_lock(tmp_path, host="elsewhere", pid=2**22 + 1)
    with pytest.raises(ValueError, match="on elsewhere trains in"), locked_run(tmp_path, True):
        pass


def test_other_processes_of_the_run_need_no_lock(tmp_path):
    write_lock(tmp_path)
    with locked_run(tmp_path, False):
        pass
