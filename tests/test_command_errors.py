"""How commands end: exit codes, sentences, signals, and what they show of text of strangers."""

import errno
import logging
import os
import signal
import warnings

import pytest
import torch
import typer
from typer.testing import CliRunner

import dino_hf
from dino_hf.cli import command_errors
from dino_hf.cli.app import app
from dino_hf.cli.command_errors import one_sentence_errors
from dino_hf.model.attention_backends import ENVIRONMENT_VARIABLE


def end_with(error, debug=False):
    """Exit code and output of a command that ends with an error, or whose work is a function."""
    command = typer.Typer()

    @command.command()
    def work() -> None:
        with one_sentence_errors(debug):
            if callable(error):
                error()
            else:
                raise error

    result = CliRunner().invoke(command)
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("It is wrong."), "It is wrong."),
        (FileNotFoundError("There is no x."), "There is no x."),
        (
            OSError(errno.ENOSPC, "No space left", "out/a"),
            "out/a: the disk is full; make room, or choose another place.",
        ),
        (
            OSError(errno.EFBIG, "File too large", b"a"),
            "a: the file would be larger than this machine allows (ulimit -f).",
        ),
        (OSError(errno.ENOENT, "No such file", "gone"), "gone: it does not exist; was it moved or deleted meanwhile?"),
        (
            OSError(errno.ENOSPC, "No space left"),
            "No space left: the disk is full; make room, or choose another place.",
        ),
        (MemoryError(), "There is not enough memory; choose smaller batches or images. (MemoryError)"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nmore"),
            "There is not enough memory; choose smaller batches or images. ([enforce fail] DefaultCPUAllocator: can't "
            "allocate memory: you tried)",
        ),
        *(
            (RuntimeError(text), f"There is not enough memory; choose smaller batches or images. ({text})")
            for text in ("std::bad_alloc", "can't start new thread", "CUDA out of memory. Tried to allocate 2 GiB")
        ),
        (
            OSError(errno.ENOMEM, "Cannot allocate memory"),
            "Cannot allocate memory: there is not enough memory; choose smaller batches or images, or end other programs.",
        ),
    ],
)
def test_what_a_user_can_cure_is_one_sentence(error, sentence):
    assert end_with(error) == (1, f"error: {sentence}\n")


def test_debug_shows_the_traceback_before_the_sentence():
    code, output = end_with(ValueError("It is wrong."), debug=True)
    assert code == 1
    assert "Traceback (most recent call last)" in output
    assert output.endswith("error: It is wrong.\n")


def test_errors_of_ours_always_show_their_traceback():
    code, output = end_with(ZeroDivisionError("division"))
    assert code == 1
    assert "Traceback (most recent call last)" in output
    assert output.endswith("error: ZeroDivisionError: division\n")


@pytest.mark.parametrize("debug", [False, True])
def test_no_escape_sequence_of_a_name_reaches_the_terminal(debug):
    def work():
        warnings.warn_explicit("w\x1b[2J", UserWarning, "file", 1)
        logging.getLogger("dino_hf.some").warning("l\x1b[2J %s", "\x9b2J")
        error = ValueError("a \x1b]52;c;aGFja2Vk\x07 b" + "x" * 10**6)
        error.add_note("note \u202e")
        raise error

    code, output = end_with(work, debug)
    assert code == 1
    assert not set(output) & {"\x1b", "\x07", "\x9b", "\u202e"}
    assert "a \\x1b]52;c;aGFja2Vk\\x07 b" in output
    assert len(output) < 500_000


def test_ctrl_c_and_sigterm_have_codes_of_their_own():
    def stopped():
        raise KeyboardInterrupt

    assert end_with(stopped) == (130, "error: stopped.\n")
    if os.name != "nt" and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        cleaned = []

        def terminated():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            finally:
                cleaned.append(True)

        assert end_with(terminated) == (143, "error: stopped by a signal.\n")
        assert cleaned


def test_a_wrong_command_line_does_not_look_like_findings():
    """2 is the doctor's code for errors in the data, and click's own for a wrong command line."""
    for arguments in (
        ["doctor"],
        ["doctor", "x", "--no-such-option"],
        ["no-command"],
        ["eval", "m", "d", "--seed", "-1"],
    ):
        assert CliRunner().invoke(app, arguments).exit_code == 1


def test_a_folder_that_was_deleted_under_the_command_is_a_sentence(tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    result = CliRunner().invoke(app, ["doctor", "data"])
    assert result.exit_code == 1
    assert result.output.startswith("error: The folder that this command was started in has been deleted;")


STRANGE_PATHS = [
    ["doctor", "~no-such-user-here/x"],
    ["train", "~no-such-user-here/x"],
    ["eval", "~no-such-user-here/m", "~no-such-user-here/x"],
    ["predict", "~no-such-user-here/m", "x.png"],
    ["predict", "m", "x.png", "--save", "~no-such-user-here/x"],
    ["export", "~no-such-user-here/m"],
    ["export", "m", "--output", "~no-such-user-here/m.onnx"],
    ["augment", "~no-such-user-here/x"],
]


@pytest.mark.parametrize("arguments", STRANGE_PATHS, ids=" ".join)
def test_commands_say_that_there_is_no_such_user(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert result.output.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_backend_is_a_sentence_in_every_command(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "evil")
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 1
    assert "error: " in result.output
    assert "'evil'" in result.output
    assert "Traceback" not in result.output


def test_version_and_environment():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"dino-hf {dino_hf.__version__}\n")
    result = CliRunner().invoke(app, ["env", "--debug"])
    assert result.exit_code == 0
    assert torch.__version__ in result.output


def test_other_processes_leave_the_first_one_time_to_speak(monkeypatch):
    waited = []
    monkeypatch.setattr(command_errors.time, "sleep", waited.append)
    for rank, expected in (("0", []), ("1", [3.0])):
        monkeypatch.setenv("RANK", rank)
        waited.clear()
        assert end_with(ValueError("x")) == (1, "error: x\n")
        assert waited == expected
