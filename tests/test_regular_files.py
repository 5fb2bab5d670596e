"""Files of other people: pipes, devices, links in circles, and texts that would fill the memory of their reader."""

import os
import sys
import time

import pytest

from dino_hf.common import regular_files
from dino_hf.common.regular_files import (
    is_below,
    is_folder,
    is_regular,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_lines,
    read_text,
    read_yaml,
    walk_files,
)

ODD_NAMES = ["a\0b.png", "a" * 300 + ".png", "\ud800.png"]


@pytest.fixture
def odd(tmp_path):
    """Name -> what is not a regular file."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    (tmp_path / "folder").mkdir()
    return {name: tmp_path / name for name in ("pipe", "link", "round", "folder")}


def test_only_regular_files_are_opened(odd, tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes(b"abc")
    assert is_regular(path)
    assert read_bytes(path) == b"abc"
    start = time.monotonic()
    for name, words in {"pipe": "a pipe", "link": "a device", "folder": "a folder", "round": "symbolic links"}.items():
        assert not is_regular(odd[name])
        with pytest.raises(OSError, match=words):
            open_regular(odd[name])
    assert time.monotonic() - start < 5
    assert is_folder(odd["folder"])
    assert not is_folder(odd["pipe"])


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_that_no_file_can_have(name, tmp_path):
    assert not is_regular(tmp_path / name)
    assert not is_folder(tmp_path / name)
    with pytest.raises(OSError, match="name"):
        open_regular(tmp_path / name)


def test_a_file_that_became_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    """Between the look at a path and its opening it may be replaced."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    status = os.stat(tmp_path / "file")
    monkeypatch.setattr(regular_files.os, "stat", lambda path: status)
    with pytest.raises(OSError, match="is a pipe, not a regular file"):
        open_regular(tmp_path / "pipe")


def test_sizes_are_bounded_to_the_byte(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    assert len(read_bytes(path, 1000)) == 1000
    with pytest.raises(OSError, match=r"has 1,000 bytes, more than the limit of 999"):
        read_bytes(path, 999)
    with path.open("wb") as file:
        file.truncate(2**40)  # no blocks of the disk are taken
    for read in (read_bytes, read_text, read_lines, read_json, read_yaml):
        with pytest.raises((OSError, ValueError), match=r"more than the|is not valid json: it starts with"):
            read(path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_files_of_the_system_do_not_tell_their_size():
    assert os.stat("/proc/self/status").st_size == 0
    assert read_bytes("/proc/self/status", 10**6)
    with pytest.raises(OSError, match="has more bytes than the limit of 20"):
        read_bytes("/proc/self/status", 20)


def test_walks_follow_links_once_and_know_where_they_were(tmp_path):
    for name in ("set/b.JPG", "set/a.jpg", "set/.c.jpg", "set/.d/d.jpg", "set/e.txt", "set/z/f.jpg", "far/deep/g.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folder = tmp_path / "set"
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "g.jpg").symlink_to(tmp_path / "far/deep/g.jpg")
    (folder / "0").symlink_to(folder / "z")  # its own name comes first, the folder itself is what counts
    (folder / "far").symlink_to(tmp_path / "far")
    (folder / "round").symlink_to(folder)
    (tmp_path / "far/back").symlink_to(folder)

    def walk(**settings):
        return [path.relative_to(folder).as_posix() for path in walk_files(folder, {".jpg"}, **settings)]

    assert walk() == ["a.jpg", "b.JPG", "g.jpg", "z/f.jpg", "far/deep/g.jpg"]
    outside = []
    assert walk(roots=(os.path.realpath(folder),), outside=outside) == ["a.jpg", "b.JPG", "z/f.jpg"]
    assert sorted(outside) == [str(folder / "far"), str(folder / "g.jpg")]
    assert len(list(walk_files(folder))) == 6
    with pytest.raises(FileNotFoundError, match="missing"):
        list(walk_files(tmp_path / "missing"))


def test_walks_end_where_links_multiply_and_folders_are_nested_a_thousand_times(tmp_path):
    for number in range(26):
        (tmp_path / f"d{number}").mkdir()
        (tmp_path / f"d{number}/{number}.txt").touch()
    for number in range(25):
        for name in "ab":
            (tmp_path / f"d{number}/{name}").symlink_to(tmp_path / f"d{number + 1}")
    assert len(list(walk_files(tmp_path))) == 26
    place = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("x", dir_fd=place)
        inner = os.open("x", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(os.open("last.txt", os.O_CREAT, dir_fd=place))
    os.close(place)
    assert len(list(walk_files(tmp_path))) == 27
    for number in range(1200, 0, -1):  # pytest's own way of removing folders is recursive
        folder = str(tmp_path) + "/x" * number
        for name in os.listdir(folder):
            os.unlink(f"{folder}/{name}")
        os.rmdir(folder)


def test_a_path_is_below_a_folder_with_all_its_links_followed(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "settings").mkdir()
    (tmp_path / "set/out").symlink_to(tmp_path / "settings")
    roots = (os.path.realpath(tmp_path / "set"),)
    assert is_below(tmp_path / "set/a/b.png", roots)
    assert is_below(tmp_path / "set/a/../b.png", roots)
    assert is_below(tmp_path / "set", roots)
    for path in ("settings/a.png", "set/../settings/a.png", "set/out/a.png", "set/a\0b"):
        assert not is_below(tmp_path / path, roots)
    assert is_below(tmp_path, ("/",))


def test_text_is_utf_8_with_or_without_a_mark(tmp_path):
    path = tmp_path / "names.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(" k\u00e4tzchen \r\n\r\ndog".encode(encoding))
        assert read_lines(path) == ["k\u00e4tzchen", "dog"]
    path.write_bytes("k\u00e4tzchen".encode("latin-1"))
    with pytest.raises(ValueError, match=r"names.txt is not text in UTF-8: .*; save it in that encoding"):
        read_text(path)


@pytest.mark.parametrize("text", ["[" * 10**5 + "]" * 10**5, '{"a":' * 10**5 + "1" + "}" * 10**5, "[" * 10**5])
def test_json_of_any_depth_is_one_sentence(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    for read in (lambda: parse_json(text, "a.json"), lambda: read_json(tmp_path / "a.json")):
        with pytest.raises(
            ValueError, match=r"a\.json is not usable json: its lists or objects are nested too deeply\.$"
        ):
            read()


def test_json_is_read_or_refused_in_words(tmp_path):
    path = tmp_path / "a.json"
    for text, value in {'\ufeff{"a": [1]}': {"a": [1]}, " \n[]": [], "null": None, '"x"': "x", "-2": -2}.items():
        path.write_text(text, encoding="utf-8")
        assert read_json(path) == value
    for text in ("{", "<html>", "9" * 5000, "\x00"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.json is not valid json: "):
            read_json(path)


def nested(depth):
    return f"x: {'[' * depth}{']' * depth}\n"


def test_empty_and_utf_16_json_are_named_as_such(tmp_path):
    path = tmp_path / "a.json"
    for content, message in (
        (b"", r"a\.json is empty; it should be a json"),
        (b" \n\t", r"a\.json is empty"),
        ('{"a": 1}'.encode("utf-16"), r"a\.json is in UTF-16; save it as UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_json(path)
    path.write_bytes(b" " * 4096 + b"[1]")  # border: blanks for all of the start that is looked at
    assert read_json(path) == [1]


def test_yaml_is_bounded_in_depth(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(nested(regular_files.DEEPEST_YAML - 1))  # the mapping is a level too
    read_yaml(path)
    for depth in (regular_files.DEEPEST_YAML, 5000):
        path.write_text(nested(depth))
        with pytest.raises(
            ValueError, match=r"a\.yaml is not valid yaml: lists or mappings are nested more than 50 deep"
        ):
            read_yaml(path)


def test_yaml_is_bounded_in_what_its_aliases_stand_for(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &names [no, 007]\nb: *names\n")
    assert read_yaml(path) == {"a": ["no", "007"], "b": ["no", "007"]}
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"it has more than 200,000 values, aliases included"):
        read_yaml(path)
    path.write_text("a: &a [*a]")
    with pytest.raises(ValueError, match=r"an alias contains itself"):
        read_yaml(path)


@pytest.mark.parametrize("text", ["{{ x }}: [", "? [a]\n: b", "a: b: c", "\x00"])
def test_broken_yaml_is_one_sentence(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml is not valid yaml: "):
        read_yaml(tmp_path / "a.yaml")


def test_nothing_in_a_yaml_is_run(tmp_path):
    (tmp_path / "a.yaml").write_text("!!python/object/apply:os.mkdir ['made']")
    assert read_yaml(tmp_path / "a.yaml") == ["made"]
    assert not os.path.exists("made")
