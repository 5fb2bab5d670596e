"""Paths of home folders and below a folder: never through a link."""

import pytest
from typer.testing import CliRunner

from dino_hf.cli.app import app
from dino_hf.common.paths import NoCacheFolder, cache_dir, expand_home, path_below, remove_files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_unknown_home_folders_are_a_sentence(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(expand_home("~/x")) == "/home/me/x"
    assert str(expand_home("a/~b")) == "a/~b"
    with pytest.raises(ValueError, match="~no-such-user-here is not a home folder of this machine"):
        expand_home("~no-such-user-here/x")


@pytest.mark.parametrize("variable", ["DINO_HF_CACHE", "XDG_CACHE_HOME"])
def test_a_cache_below_an_unknown_home_is_a_sentence(variable, monkeypatch):
    monkeypatch.delenv("DINO_HF_CACHE", raising=False)
    monkeypatch.setenv(variable, "~no-such-user-here/x")
    with pytest.raises(NoCacheFolder, match=r"~no-such-user-here/x .* set DINO_HF_CACHE to a folder"):
        cache_dir()
    shown = CliRunner().invoke(app, ["env"])
    assert shown.exit_code == 0, shown.output
    assert "cache         none: ~no-such-user-here/x" in shown.output


@pytest.mark.parametrize("name", ["../a", "/etc/a", "b/../../a", "", ".", "a\0b"])
def test_names_do_not_lead_out(tmp_path, name):
    with pytest.raises(ValueError, match="is not the name of a file below"):
        path_below(tmp_path, name)
    remove_files(tmp_path, [name])


def test_nothing_is_removed_through_links(tmp_path):
    mine, out = tmp_path / "mine", tmp_path / "out"
    (mine / "deep").mkdir(parents=True)
    for path in (mine / "a.jpg", mine / "deep" / "b.jpg"):
        path.write_text("mine")
    (out / "real" / "deep").mkdir(parents=True)
    (out / "real" / "deep" / "c.jpg").touch()
    (out / "images").symlink_to(mine)
    (out / "link.jpg").symlink_to(mine / "a.jpg")
    remove_files(out, ["images/a.jpg", "images/deep/b.jpg", "link.jpg", "real/deep/c.jpg", "gone", "real"])
    assert names(mine) == ["a.jpg", "deep"]
    assert (mine / "deep" / "b.jpg").read_text() == "mine"
    assert names(out) == ["images", "link.jpg"]
    with pytest.raises(ValueError, match="images is a link, and nothing is written through links; remove it"):
        path_below(out, "images/new.jpg")
    assert path_below(out, "deep/new.jpg") == out / "deep" / "new.jpg"
