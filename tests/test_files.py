"""Files as they come from all sorts of computers: links, suffixes in upper case, byte order marks."""

import os

import pytest

from dino_hf.data.files import files_below, read_lines, read_text


def test_links_are_followed_once_and_hidden_files_passed_over(tmp_path):
    for name in ("set/b.JPG", "set/a.jpg", "set/.c.jpg", "set/.d/d.jpg", "set/e.txt", "far/deep/f.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folder = tmp_path / "set"
    for link, target in {"one": "far", "two": "far", "far/deep/back": "set", "set/round": "set"}.items():
        link = tmp_path / link if "/" in link else folder / link
        os.symlink(tmp_path / target, link)
    found = [path.relative_to(folder).as_posix() for path in files_below(folder, {".jpg"})]
    assert found == ["a.jpg", "b.JPG", "one/deep/f.jpg", "two/deep/f.jpg"]


def test_a_folder_that_is_none_is_an_error_and_not_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        list(files_below(tmp_path / "missing", {".jpg"}))


def test_text_is_utf_8_with_or_without_a_mark(tmp_path):
    path = tmp_path / "names.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(" k\u00e4tzchen \r\n\r\ndog".encode(encoding))
        assert read_lines(path) == ["k\u00e4tzchen", "dog"]
    path.write_bytes("k\u00e4tzchen".encode("latin-1"))
    with pytest.raises(ValueError, match=r"names.txt is not text in UTF-8: .*; save it in that encoding"):
        read_text(path)
