"""Outputs: refused where something is, whole or not at all, and never through a link."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dino_hf.common import output_folders
from dino_hf.common.output_folders import (
    check_output_file,
    check_output_folder,
    is_leftover,
    new_scratch,
    read_manifest,
    replace_file,
    replace_folder,
    write_manifest,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_a_file_that_exists_needs_overwrite(tmp_path):
    path = tmp_path / "a.png"
    check_output_file(path, overwrite=False)
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"a.png exists; choose another name, or replace it with --overwrite"):
        check_output_file(path, overwrite=False)
    check_output_file(path, overwrite=True)
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
        check_output_file(tmp_path, overwrite=True)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError):
        check_output_file(tmp_path / "nowhere", overwrite=False)
    with pytest.raises(FileExistsError, match=r"a.png is not a folder"):
        check_output_file(path / "b.png", overwrite=True)


def test_a_folder_with_files_needs_overwrite_and_must_be_ours(tmp_path):
    def is_ours(folder):
        return (folder / "ours").exists()

    folder = tmp_path / "out"
    assert not check_output_folder(folder, False, is_ours, "an evaluation")
    folder.mkdir()
    assert not check_output_folder(folder, False, is_ours, "an evaluation")
    (folder / "mine").touch()
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="has files that are not of an evaluation; choose a new or empty"):
            check_output_folder(folder, overwrite, is_ours, "an evaluation")
    (folder / "ours").touch()
    with pytest.raises(FileExistsError, match="has an evaluation in it; choose another folder, or replace it with --o"):
        check_output_folder(folder, False, is_ours, "an evaluation")
    assert check_output_folder(folder, True, is_ours, "an evaluation")
    assert names(folder) == ["mine", "ours"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path, target = tmp_path / "a.b.png", tmp_path / "target"
    target.write_text("mine")
    path.symlink_to(target)
    with replace_file(path) as scratch:
        assert scratch.suffix == ".png"
        assert scratch.name.startswith(".")
        scratch.write_text("new")
        assert path.is_symlink()
    assert (path.read_text(), path.is_symlink(), target.read_text()) == ("new", False, "mine")

    def stop():
        with replace_file(path) as scratch:
            scratch.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.b.png", "target"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "model"
    for content in ("one", "two"):
        with replace_folder(folder) as scratch:
            assert scratch.name == "model"
            (scratch / content).touch()
        assert names(folder) == [content]

    def fail():
        with replace_folder(folder) as scratch:
            (scratch / "three").touch()
            raise ValueError("full")

    with pytest.raises(ValueError, match="full"):
        fail()
    assert names(folder) == ["two"]
    assert names(folder.parent) == ["model"]


def fail_to_rename_to(folder, monkeypatch) -> list:
    """Let the next renames to a folder fail, as on a file system that became read-only. Clear the list to end it."""
    rename, is_broken = Path.rename, [True]

    def broken(path, target):
        if is_broken and Path(target) == folder:
            raise PermissionError(13, "Permission denied", str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    return is_broken


def replace_by(folder, content):
    with replace_folder(folder) as scratch:
        (scratch / content).touch()


@pytest.mark.parametrize("is_link", [False, True])
def test_a_folder_that_can_be_neither_replaced_nor_put_back_is_kept_and_named(tmp_path, monkeypatch, is_link):
    folder = tmp_path / "out" / "model"
    folder.parent.mkdir()
    if is_link:
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
    (folder / "one").touch()
    is_broken = fail_to_rename_to(folder, monkeypatch)
    with pytest.raises(PermissionError) as raised:
        replace_by(folder, "two")
    [scratch] = folder.parent.iterdir()
    assert names(scratch / ".old") == ["one"]
    assert names(scratch / "model") == ["two"]
    assert raised.value.__notes__ == [
        f"The earlier {folder} is kept as {scratch / '.old'}, and the new folder as {scratch / 'model'}; move the folder "
        "that you want to keep. Otherwise, the next command that writes there puts the earlier folder back."
    ]
    with pytest.raises(PermissionError):  # still nothing is lost
        replace_by(folder, "two")
    assert names(scratch / ".old") == ["one"]
    is_broken.clear()
    replace_by(folder, "three")
    assert names(folder.parent) == ["model"]
    assert names(folder) == ["three"]
    if is_link:
        assert names(tmp_path / "elsewhere") == ["one"]


def test_a_folder_is_put_back_when_the_new_one_cannot_be_moved(tmp_path, monkeypatch):
    folder, rename, calls = tmp_path / "model", Path.rename, []
    replace_by(folder, "one")

    def fail_once(path, target):
        calls.append(target)
        if len(calls) == 2:
            raise PermissionError(13, "Permission denied", str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(PermissionError) as raised:
        replace_by(folder, "two")
    assert not hasattr(raised.value, "__notes__")
    assert names(tmp_path) == ["model"]
    assert names(folder) == ["one"]


@pytest.mark.parametrize(("taken", "place"), [([], "model"), (["model"], "model-2"), (["model", "model-2"], "model-3")])
def test_the_only_copy_in_the_scratch_of_a_dead_process_is_put_back(tmp_path, caplog, taken, place):
    scratch = tmp_path / scratch_name("model", dead_process())
    for part in (".old/mine", "model/half"):
        (scratch / part).mkdir(parents=True)
    for name in taken:
        (tmp_path / name).mkdir()
    other = tmp_path / scratch_name("other", dead_process(), ".json")
    other.touch()
    output_folders.remove_leftovers(tmp_path)
    assert names(tmp_path) == [*taken, place]
    assert names(tmp_path / place) == ["mine"]
    told = f"A stopped command had moved a folder away. It is put back as {tmp_path / place}."
    assert caplog.messages == ([told] if taken else [])


def test_a_leftover_that_cannot_be_put_back_stays_and_others_go(tmp_path, monkeypatch):
    scratch = tmp_path / scratch_name("a", dead_process())
    for part in (".old/mine", "a/half"):
        (scratch / part).mkdir(parents=True)
    (tmp_path / scratch_name("b", dead_process(), ".json")).touch()
    fail_to_rename_to(tmp_path / "a", monkeypatch)
    output_folders.remove_leftovers(tmp_path)
    assert names(tmp_path) == [scratch.name]
    assert names(scratch / ".old") == ["mine"]


def scratch_name(
    name: str, process: int, suffix: str = "", start: str | None = None, machine: str | None = None
) -> str:
    start = start or output_folders._start_of(process) or "77"
    return f".{name}.{machine or output_folders.machine_mark()}-{process}-{start}.partial{suffix}"


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    dead = dead_process()
    left = [tmp_path / scratch_name(name, dead, ".json") for name in ("results", "others")]
    left.append(tmp_path / scratch_name("same number", os.getppid(), start="1"))  # another process has this number now
    left.append(tmp_path / scratch_name("same number as mine", os.getpid(), start="1"))
    kept = [
        tmp_path / scratch_name("results", os.getppid(), ".json"),
        tmp_path / scratch_name("mine", os.getpid(), ".json"),
        tmp_path / scratch_name("not to be looked at", os.getppid(), start="0"),
        tmp_path / scratch_name("results", dead, ".json", machine="elsewhere"),
        tmp_path / f".results.mine-{dead}.json",
        tmp_path / "results.json",
    ]
    for path in (*left, *kept):
        path.touch()
    with replace_file(tmp_path / "results.json") as scratch:
        scratch.write_text("new")
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)


def test_new_scratch_is_private_and_a_leftover_once_its_process_has_ended(tmp_path):
    first, second = (new_scratch(tmp_path / "stream") for _ in range(2))
    assert first != second
    assert first.stat().st_mode & 0o077 == 0
    assert not is_leftover(first)
    dead = tmp_path / first.name.replace(f"-{os.getpid()}-", f"-{dead_process()}-")
    first.rename(dead)
    output_folders.remove_leftovers(tmp_path)
    assert names(tmp_path) == [second.name]


def test_scratch_of_another_machine_or_container_is_a_leftover_by_its_age(tmp_path):
    foreign = tmp_path / scratch_name("a", 1, start="5", machine="elsewhere")
    foreign.touch()
    for age, expected in ((23 * 3600, False), (25 * 3600, True)):
        os.utime(foreign, (time.time() - age,) * 2)
        assert is_leftover(foreign) == expected


def test_containers_of_one_name_and_a_machine_after_its_restart_differ(tmp_path, monkeypatch):
    own = output_folders.machine_mark()
    real = Path.read_text

    def read_text(path, *arguments, **settings):
        return "another boot\n" if path.name == "boot_id" else real(path, *arguments, **settings)

    monkeypatch.setattr(Path, "read_text", read_text)
    output_folders.machine_mark.cache_clear()
    try:
        other = output_folders.machine_mark()
    finally:
        output_folders.machine_mark.cache_clear()
    assert other.rpartition("-")[0] == own.rpartition("-")[0]
    assert (other != own) or not Path("/proc/sys/kernel/random/boot_id").exists()


def test_a_process_that_is_not_in_proc_is_found_by_its_time(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert output_folders._start_of(os.getpid()).isdecimal()
    assert output_folders._start_of(dead_process()) is None


@pytest.mark.parametrize("name", ["x" * 250 + ".json", "é" * 120 + ".jpg", "a." + "y" * 200])
def test_the_longest_names_are_written(tmp_path, name):
    with replace_file(tmp_path / name) as scratch:
        scratch.write_text("new")
        assert scratch.name != name
    assert names(tmp_path) == [name]


def test_a_folder_of_a_killed_process_is_deleted(tmp_path):
    left = tmp_path / scratch_name("model", dead_process())
    (left / "model").mkdir(parents=True)
    with replace_folder(tmp_path / "model") as scratch:
        (scratch / "a").touch()
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize(
    "content", ["", "[]", "[" * 10**5, '{"command": "x"}', '{"command": "x", "files": [1]}', "\x00"]
)
def test_a_manifest_that_is_none_names_nothing(tmp_path, content):
    (tmp_path / output_folders.MANIFEST).write_text(content)
    assert read_manifest(tmp_path, "x") is None


def test_a_manifest_names_what_its_command_wrote(tmp_path):
    assert read_manifest(tmp_path, "doctor") is None
    write_manifest(tmp_path, "doctor", ["b.png", "a.png"])
    assert read_manifest(tmp_path, "doctor") == ["a.png", "b.png"]
    assert read_manifest(tmp_path, "augment") is None
