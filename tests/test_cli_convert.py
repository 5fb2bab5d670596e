"""`dino-hf convert`: where the result goes. The conversion itself is tested in test_convert_checkpoint.py."""

import json

import pytest
import torch
from typer.testing import CliRunner

from dino_hf.cli.app import app
from toy_checkpoints import original_tensors, settings


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": original_tensors(), "args": settings()}, "toy.pth")
    return "toy.pth"


def run(*arguments):
    result = CliRunner().invoke(app, ["convert", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("output", [["--output", "new/out"], ["new/out"]])
def test_the_folder_is_named_by_the_option_or_by_its_place(output, file, tmp_path):
    code, said, _ = run(file, *output)
    assert code == 0
    assert "written to new/out" in said
    assert json.loads((tmp_path / "new" / "out" / "config.json").read_text())["model_type"] == "dino_detr"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name the output: dino-hf convert FILE --output FOLDER"),
        (["--published", "none"], "Name the output"),
        (["--published", "original/r50_4scale_12ep", "--ema"], "Name the output"),
        (["one", "--output", "two"], "There are two outputs, two and one"),
        (["--output", "out", "--published", "original/r50_4scale_36"], "Did you mean original/r50_4scale_36ep"),
        (["--output", "toy.pth"], "choose another output"),
    ],
)
def test_wrong_outputs_and_names_are_one_sentence(arguments, message, file, tmp_path):
    code, _, error = run(file, *arguments)
    assert code == 1
    assert message in error
    assert error.startswith("error: ")
    assert [entry.name for entry in tmp_path.iterdir()] == ["toy.pth"]
