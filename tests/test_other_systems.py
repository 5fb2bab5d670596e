"""Other systems than the one that the tests run on: consoles of old encodings, and a Python without what only Unix has."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_layouts import draw_splits, write_layout
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.cli.app import app
from helpers import tiny_config
from processes import SCRIPTS, environment_of_scripts

NAMES = ["犬", "naïve café", "🦜 \N{RIGHT-TO-LEFT OVERRIDE}x", "-ß²", "→ '"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A data set and a detector whose classes, files and folders have names that old encodings lack."""
    folder = tmp_path_factory.mktemp("Ж")
    splits = draw_splits(folder / "drawn", train=6, validation=4, test=3)
    data = write_layout("coco", splits, folder / "данные 数据")
    for path in data.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        for old, new in zip(("disc", "box", "triangle", "star", "ring"), NAMES, strict=True):
            text = text.replace(f'"{old}"', f'"{new}"')
        path.write_text(text, encoding="utf-8")
    model = folder / "模型"
    config = tiny_config(id2label=dict(enumerate(NAMES)), category_ids=[3, 7, 12, 21, 40])
    DinoDetrForObjectDetection(config).save_pretrained(model)
    DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 72}).save_pretrained(model)
    return data, model, folder


def call(encoding: str, *arguments, exit_codes=(0,)) -> str:
    """With output that goes to a file of this encoding."""
    result = CliRunner(charset=encoding).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code in exit_codes, (result.stderr, result.exception)
    assert "Traceback" not in result.stderr
    # Click takes ASCII for a mistake in the settings and writes its own messages in UTF-8.
    expected = "utf-8" if encoding == "ascii" else encoding
    result.stderr_bytes.decode(expected)
    return result.stdout_bytes.decode(expected)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "gbk"])
def test_help_version_and_errors_fit_any_encoding(encoding):
    for command in ("doctor", "augment", "scenes", "train", "eval", "predict", "export", "env"):
        assert "--debug" in call(encoding, command, "--help")
        call(encoding, command, "--ñ犬", exit_codes=(1,))
    assert "dino-hf" in call(encoding, "--version")
    call(encoding, "doctor", "犬/🦜", exit_codes=(1,))


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_doctor_augment_and_scenes_fit_any_encoding(encoding, work, tmp_path):
    data, _, _ = work
    text = call(
        encoding, "doctor", data, "--pictures", tmp_path / "图", "--json", tmp_path / "é.json", exit_codes=(0, 2)
    )
    assert "naïve café" in text or "na\\xefve caf\\xe9" in text
    assert "犬" in text or "\\u72ac" in text
    call(encoding, "augment", data, "--output", tmp_path / "犬.png", "--num-images", 2, "--num-samples", 1)
    call(encoding, "scenes", tmp_path / "犬 scenes", "--num-train", 2, "--num-validation", 2)


@pytest.mark.parametrize("encoding", ["cp1252"])
def test_train_eval_and_predict_fit_any_encoding(encoding, work, tmp_path):
    data, model, _ = work
    call(
        encoding,
        "train",
        data,
        "--model",
        model,
        "--output-dir",
        tmp_path / "ä犬",
        "--dry-run",
        "--report-to",
        "none",
        "--use-cpu",
    )
    evaluated = "--split", "test", "--num-bootstrap", "40", "--device", "cpu", "--output-dir", tmp_path / "评"
    text = call(encoding, "eval", model, data, *evaluated)
    assert "犬" in text or "\\u72ac" in text
    found = call(encoding, "predict", model, data, "--save", tmp_path / "数", "--threshold", 0, "--device", "cpu")
    assert "Traceback" not in found


def test_without_the_parts_of_python_that_only_unix_has(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "another_system.py"), str(tmp_path)],
        env=environment_of_scripts() | {"DINO_HF_MS_DEFORM_ATTN": "torch", "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (Path(tmp_path) / "fixed").is_dir()
