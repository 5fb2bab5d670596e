"""`dino-hf export` as a user calls it, with a toy model in a folder."""

from pathlib import Path

import onnx
import pytest
import typer
from typer.testing import CliRunner

import dino_hf.export
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.cli import export as cli_export
from dino_hf.common.scenes import make_scenes
from dino_hf.export import ExportReport
from dino_hf.export.comparison import Difference
from helpers import tiny_config
from inference_toys import CATEGORY_IDS, NAMES

app = typer.Typer()
app.command("export")(cli_export.export)
app.command("other")(lambda: None)  # with one command alone, typer would take its name for an argument


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.fixture
def calls(monkeypatch):
    """What `export_onnx` is called with; the model is not traced, which has tests of its own."""
    seen = []

    def export_onnx(model, output, *, say, **settings):
        seen.append((model, output, settings))
        say("Tracing the model.")
        ap = None if settings["data"] is None else (0.4567, 0.4566)
        difference = Difference(2.34e-5, 1.7e-6, 51, 4)
        return ExportReport(output, 3 * 2**19, settings["opset"], settings["dtype"], difference, 1e-3, ap)

    monkeypatch.setattr(dino_hf.export, "export_onnx", export_onnx)
    return seen


def test_without_options_the_file_is_named_like_the_model(calls, tmp_path):
    result = run(tmp_path / "some-model")
    assert result.exit_code == 0, result.output
    model, output, settings = calls[0]
    assert (model, output) == (str(tmp_path / "some-model"), Path("some-model.onnx"))
    assert (settings["opset"], settings["dtype"], settings["overwrite"]) == (18, "float32", False)
    assert [settings[name] for name in ("images", "data", "tolerance", "ap_tolerance", "box_format")] == [None] * 5
    for text in (
        "Tracing the model.",
        "51 detections in 4 images: scores differ by at most 2e-05, boxes by 2e-06 of an image's side (allowed: 0.001).",
        "some-model.onnx: 1.5 MiB, float32, opset 18.",
        "pixel_mask (batch, height, width) int64",
    ):
        assert text in result.output
    assert "AP" not in result.output


def test_the_id_of_a_model_on_the_hub_names_the_file_too(calls):
    run("somebody/their-detector")
    assert calls[0][:2] == ("somebody/their-detector", Path("their-detector.onnx"))


def test_options_arrive(calls):
    options = "--output a.onnx --opset 20 --dtype float16 --overwrite --images x.jpg --images y --tolerance 0.1"
    options += " --data scenes --split test --box-format coco --ap-tolerance 2 --allow-outside --trust-boxes"
    result = run("m", *options.split())
    assert result.exit_code == 0, result.output
    expected = {"opset": 20, "dtype": "float16", "overwrite": True, "images": ["x.jpg", "y"], "tolerance": 0.1}
    expected |= {"data": "scenes", "split": "test", "box_format": "coco", "ap_tolerance": 2.0}
    expected |= {"allow_outside": True, "trust_boxes": True}
    assert calls == [("m", Path("a.onnx"), expected)]
    assert "AP of the model 0.4567, of the file 0.4566." in result.output


def test_another_format_is_an_error_in_one_sentence(calls):
    result = run("m", "--format", "engine")
    assert result.exit_code == 1
    assert result.stderr == "error: --format engine is unknown; choose onnx.\n"
    assert not calls


def test_a_model_that_is_not_there_is_an_error_in_one_sentence():
    result = run("./nothing")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: There is no folder ./nothing")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_model_is_exported_and_a_second_time_only_if_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(
        num_feature_levels=3, encoder_layers=1, decoder_layers=1, id2label=NAMES, category_ids=CATEGORY_IDS
    )
    DinoDetrForObjectDetection(config).save_pretrained(tmp_path / "toy")
    DinoDetrImageProcessor(size={"shortest_edge": 72, "longest_edge": 120}).save_pretrained(tmp_path / "toy")
    make_scenes(tmp_path / "data" / "validation", 3, seed=0)
    make_scenes(tmp_path / "data" / "train", 2, seed=1)
    result = run("toy", "--data", "data")
    assert result.exit_code == 0, result.output
    assert "AP of the model" in result.stdout
    assert not result.stderr
    onnx.checker.check_model(tmp_path / "toy.onnx")
    result = run("toy")
    assert result.exit_code == 1
    assert "toy.onnx exists; choose another name" in result.stderr
