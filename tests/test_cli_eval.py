"""`dino-hf eval` as a user calls it, with toy models in folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor
from typer.testing import CliRunner

import dino_hf
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.cli import eval as cli_eval
from dino_hf.common.scenes import CATEGORIES, make_scenes
from dino_hf.data import load_data
from dino_hf.evaluation.report import COMPARISON_FILES, FILES
from dino_hf.inference import score_thresholds
from evaluation_toys import annotate_with
from helpers import tiny_config

app = typer.Typer()
app.command("eval")(cli_eval.evaluate)
app.command("other")(lambda: None)  # with one command alone, typer would take its name for an argument


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A detector of ours, one of the library's, which knows the classes by name alone, and data with a validation part."""
    folder = tmp_path_factory.mktemp("eval")
    make_scenes(folder / "data" / "train", 3, seed=0)
    make_scenes(folder / "data" / "valid", 10, seed=7)
    torch.manual_seed(0)
    names = dict(enumerate(CATEGORIES.values()))
    config = tiny_config(num_denoising=0, id2label=names, category_ids=list(CATEGORIES))
    DinoDetrForObjectDetection(config).save_pretrained(folder / "a")
    DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 80}).save_pretrained(folder / "a")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = {index: name.upper() for index, name in enumerate(reversed(CATEGORIES.values()))}
    config = YolosConfig(**sizes, image_size=[48, 64], num_detection_tokens=12, id2label=names)
    YolosForObjectDetection(config).save_pretrained(folder / "b")
    YolosImageProcessor(size={"height": 48, "width": 64}).save_pretrained(folder / "b")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def pair(folder):
    """Two models compared."""
    out = folder / "out"
    arguments = [folder / "a", folder / "data", "--compare", folder / "b", "--output-dir", out]
    return out, run(*arguments, "--num-bootstrap", 40, "--batch-size", 3)


def test_it_prints_a_table_and_leaves_a_report(pair):
    out, result = pair
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {*FILES, *COMPARISON_FILES, "compared"}
    assert {path.name for path in (out / "compared").iterdir()} == set(FILES)
    content = json.loads((out / "results.json").read_text())
    assert content["counts"]["images"] == 10
    assert "in coco format" in content["notes"][0]
    for word in ("all", "AP50", *CATEGORIES.values(), "10 images", "20 files are in"):
        assert word in result.output


def test_two_models_are_compared_in_the_category_ids_of_the_data(pair):
    out, result = pair
    comparison = json.loads((out / "compare.json").read_text())
    assert comparison["verdict"] in result.output
    results = [json.loads((where / "results.json").read_text()) for where in (out, out / "compared")]
    assert [entry["counts"]["detections"] for entry in results] == [
        10 * 15 * 5,
        10 * 12,
    ]  # a softmax has one class a query
    assert [entry["metrics"]["AP"] for entry in results] == [comparison["differences"][0][model] for model in "ab"]
    for where in (out, out / "compared"):
        found = {entry["category_id"] for entry in json.loads((where / "detections.json").read_text())}
        assert found
        assert found <= set(CATEGORIES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "data", "--split", "test"], "has no test images, but train, validation; choose split validation."),
        (["a", "nowhere"], "nowhere"),
        (["nowhere", "data"], "nowhere"),
        (["a", "data", "--compare", "b", "--num-bootstrap", "0"], "--compare needs resamples"),
        (["a", "data", "--num-bootstrap", "1"], "num_bootstrap=1 is too low for 95 % intervals; choose 1000"),
        (
            ["a", "data", "--num-bootstrap", "1000000000"],
            "num_bootstrap=1000000000 is above 10000",
        ),
        (["a", "data", "--keep-threshold", "--split", "train"], "not possible with split train"),
        (["a", "data", "--keep-threshold", "--allow-trained"], "not possible with allow_trained"),
        (["owner/x", "data", "--keep-threshold"], "owner/x is no folder on this machine"),
        (["a", "data", "--device", "nonsense"], "device='nonsense' cannot be used here"),
        (["a", "data", "--compare", "nowhere"], "nowhere"),  # before the first one is evaluated
    ],
)
def test_errors_are_one_sentence(folder, tmp_path, arguments, message):
    paths = [folder / word if word in ("a", "b", "data", "nowhere") else word for word in arguments]
    result = run(*paths, "--output-dir", tmp_path / "out")
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line and not line.startswith("Loading weights")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_the_best_threshold_is_kept_on_request(folder, tmp_path):
    model = shutil.copytree(folder / "a", tmp_path / "model")
    arguments = [
        model,
        annotate_with(model, tmp_path / "data"),
        "--output-dir",
        tmp_path / "out",
        "--num-bootstrap",
        0,
        "--keep-threshold",
    ]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    threshold = json.loads((model / "config.json").read_text())["score_threshold"]
    assert f"The threshold {threshold:.3f} is kept in" in result.output
    assert json.loads((tmp_path / "out/results.json").read_text())["best_threshold"]["threshold"] == threshold


def test_help_is_short_and_has_an_example():
    result = run("--help")
    assert result.exit_code == 0
    assert "dino-hf eval my-detector my-dataset" in result.output
    assert len(result.output.splitlines()) < 75


def test_without_a_folder_results_go_to_one_of_the_models_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = (folder / "b", folder / "data", "--num-bootstrap", 0)
    assert run(*arguments).exit_code == 0
    assert (tmp_path / "outputs" / "eval" / "b" / "results.json").is_file()
    result = run(*arguments)
    assert result.exit_code == 1
    assert (
        "outputs/eval/b has an evaluation in it; choose another folder, or replace it with --overwrite."
        in result.output
    )
    assert run(*arguments, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("model", "name"), [("owner/detr", "owner--detr"), ("detr", "detr"), ("../..", "model"), ("a b/c:d", "a_b--c_d")]
)
def test_the_folder_of_a_model_from_the_hub_has_its_id(model, name, monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert score_thresholds.report_folder(model) == Path("outputs/eval", name)


def test_the_table_of_many_classes_has_those_with_most_objects():
    rows = [{"name": str(number), "num_objects": number} for number in range(101)]
    assert cli_eval._shown_classes(rows[:100]) == (rows[:100], 0)
    assert cli_eval._shown_classes(rows) == (rows[1:], 1)


def test_a_canvas_and_soft_nms_are_evaluated_as_in_python(folder, tmp_path):
    """The report has the metrics of `dino_hf.evaluate`. `detections.json` has the detections of the image processor."""
    DinoDetrForObjectDetection.from_pretrained(folder / "a").save_pretrained(tmp_path / "model")
    nms = {"method": "soft", "iou_threshold": 0.5, "candidates": 60}
    canvas = {"size": {"shortest_edge": 72, "longest_edge": 72}, "canvas_value": 114}
    DinoDetrImageProcessor(**canvas, nms=nms).save_pretrained(tmp_path / "model")
    arguments = (tmp_path / "model", folder / "data", "--num-bootstrap", 0, "--batch-size", 3)
    result = run(*arguments, "--output-dir", tmp_path / "out")
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    evaluation = dino_hf.evaluate(tmp_path / "model", folder / "data", num_bootstrap=0, batch_size=1)
    measured_here = {name: None if value == -1 else value for name, value in evaluation.metrics.items()}
    assert metrics == pytest.approx(measured_here, abs=1e-3)

    model, processor = (
        kind.from_pretrained(tmp_path / "model") for kind in (DinoDetrForObjectDetection, DinoDetrImageProcessor)
    )
    data = load_data(folder / "data").validation
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    for row in data.dataset:
        outputs = model.eval()(**processor(images=row["image"], return_tensors="pt"))
        size = [(row["height"], row["width"])]
        (expected,) = processor.post_process_object_detection(outputs, 0.0, size, top_k=60)
        of_image = [entry for entry in found if entry["image_id"] == row["image_id"]]
        scores = sorted((entry["score"] for entry in of_image), reverse=True)
        assert len(scores) == len(expected["scores"]) <= 60
        assert scores == pytest.approx(expected["scores"].tolist(), abs=1e-4)
        for entry in of_image:
            x, y, width, height = entry["bbox"]
            assert min(x, y, width, height) >= -1e-3
            assert x + width <= row["width"] + 1e-2
            assert y + height <= row["height"] + 1e-2
