"""Converter, export and evaluation that are killed: SIGTERM leaves nothing, and what SIGKILL left goes at the next start."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.cli.command_errors import script_errors
from dino_hf.common import output_folders
from dino_hf.common.output_folders import is_leftover, replace_file, replace_folder, scratch_folder
from dino_hf.conversion import convert_checkpoint, verify_conversion
from dino_hf.conversion.checkpoint_files import save_checkpoint
from dino_hf.conversion.convert_back import convert_back
from dino_hf.conversion.convert_checkpoint import convert
from dino_hf.export import export_onnx, onnx_export
from helpers import tiny_config
from toy_checkpoints import original_tensors, settings

needs_signals = pytest.mark.skipif(os.name == "nt", reason="signals of other systems")


@pytest.fixture(autouse=True)
def default_handlers():
    """Whatever runs the tests may have handlers of its own."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM,)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def dead() -> str:
    """The end of a scratch name of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return f"{output_folders.machine_mark()}-{process.pid}-77.partial"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    torch.save({"model": original_tensors(), "args": settings()}, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


def kill_in(monkeypatch, owner, name: str) -> None:
    """SIGTERM arrives when a function has done its work."""
    function = getattr(owner, name)

    def killed(*arguments, **options):
        function(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    monkeypatch.setattr(owner, name, killed)


def run_script(main, *arguments) -> object:
    with pytest.raises(SystemExit) as ended, script_errors():
        main([str(argument) for argument in arguments])
    return ended.value.code


@needs_signals
def test_a_converter_that_is_told_to_end_leaves_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        kill_in(patch, DinoDetrForObjectDetection, "save_pretrained")
        assert run_script(convert_checkpoint.main, "--checkpoint", checkpoint, "--output", out) == 143
    assert "error: stopped by a signal." in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth"]
    convert(checkpoint, out)
    kill_in(monkeypatch, torch, "save")
    back = "--checkpoint", out, "--to", "original", "--output", tmp_path / "back.pth"
    assert run_script(convert_checkpoint.main, *back) == 143
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth", "out"]


@needs_signals
def test_a_comparison_of_two_models_ends_by_signals_as_commands_do(checkpoint, monkeypatch, capsys):
    kill_in(monkeypatch, verify_conversion, "open_picture")
    assert run_script(verify_conversion.main, checkpoint, checkpoint) == 143
    assert "error: stopped by a signal." in capsys.readouterr().err


def test_what_a_killed_converter_left_goes_at_the_next_start(checkpoint, tmp_path, dead):
    # Names with dots, hyphens and spaces, as models have them.
    out, back = tmp_path / "dino-r50.v1-4 scale", tmp_path / "back.v2-b.pth"
    left = [tmp_path / f".dino-r50.{dead}.v1-4 scale", tmp_path / f".back.v2-b.{dead}.pth"]
    (left[0] / out.name).mkdir(parents=True)
    left[1].write_text("half")
    assert all(map(is_leftover, left))
    convert(checkpoint, out)
    convert_back(out, "original", back)
    assert not any(path.exists() for path in left)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([checkpoint.name, out.name, back.name])


def test_names_of_scratch_are_found_again_whatever_the_name(tmp_path, monkeypatch):
    """A leftover that is not recognised stays for ever."""
    monkeypatch.setattr(output_folders, "_start_of", lambda process: None)  # no process has this number
    for name in ("a", "a.b", ".a", "a.b-c d", "a..b", "ä.ö", "a.partial", "a\nb.c", "x.tar.gz", "-.-"):
        with replace_file(tmp_path / name) as scratch:
            scratch.touch()
            assert is_leftover(scratch), name
        (tmp_path / name).unlink()
        with replace_folder(tmp_path / name) as scratch:
            assert is_leftover(scratch.parent), name


@needs_signals
def test_an_export_that_is_told_to_end_leaves_nothing(tmp_path, monkeypatch, dead):
    config = tiny_config(num_feature_levels=3, encoder_layers=1, decoder_layers=1)
    DinoDetrForObjectDetection(config).save_pretrained(tmp_path / "toy")
    DinoDetrImageProcessor().save_pretrained(tmp_path / "toy")
    (tmp_path / f".toy.{dead}.onnx").mkdir()
    (tmp_path / f".toy.{dead}.onnx" / "toy.onnx").write_text("half")
    monkeypatch.setattr(onnx_export, "export_program", lambda model: None)
    monkeypatch.setattr(onnx_export, "write_onnx", lambda program, path, opset, metadata: path.write_text("graph"))
    kill_in(monkeypatch, onnx_export, "write_onnx")
    with pytest.raises(SystemExit) as ended, script_errors():
        export_onnx(tmp_path / "toy", tmp_path / "toy.onnx")
    assert ended.value.code == 143
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_a_folder_that_was_moved_away_by_a_killed_process_comes_back(tmp_path, dead):
    """SIGKILL between the two renames leaves the only copy of the old folder in the scratch folder."""
    scratch = tmp_path / f".out.{dead}"
    for name, content in ((".old", "mine"), ("out", "new")):
        (scratch / name).mkdir(parents=True)
        (scratch / name / "config.json").write_text(content)
    with scratch_folder(tmp_path / "other"):
        pass
    assert (tmp_path / "out" / "config.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # Without the new folder in the scratch folder, the new one took its place: the old one was replaced on purpose.
    (scratch / ".old").mkdir(parents=True)
    with scratch_folder(tmp_path / "other"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # Another command has taken the place since: the old folder is kept under a free name.
    for name, content in ((".old", "old"), ("out", "new")):
        (scratch / name).mkdir(parents=True)
        (scratch / name / "config.json").write_text(content)
    with scratch_folder(tmp_path / "other"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-2"]
    assert (tmp_path / "out" / "config.json").read_text() == "mine"
    assert (tmp_path / "out-2" / "config.json").read_text() == "old"


def test_a_checkpoint_of_two_writers_is_whole(tmp_path):
    """A second process of the same output has a scratch file of its own."""
    ours = replace_file(tmp_path / "a.pth")
    with ours as scratch:
        assert str(os.getpid()) in scratch.name
        scratch.write_text("ours")
    save_checkpoint({"model": {"w": torch.ones(2)}}, tmp_path / "b.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.pth"]
