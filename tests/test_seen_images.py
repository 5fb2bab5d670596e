"""What a run held out is what its model is evaluated on."""

import contextlib
import copy
import io
import json
import shutil
from types import SimpleNamespace

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import dino_hf
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.cli import eval as cli_eval
from dino_hf.common.scenes import make_scenes
from dino_hf.data import load_data, recognise
from dino_hf.data.image_digests import image_digests, pack
from dino_hf.evaluation import load_split
from dino_hf.evaluation import seen_images as seen_module
from dino_hf.evaluation.seen_images import seen_images
from helpers import tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on data without validation images, of another seed and fraction than the default."""
    folder = tmp_path_factory.mktemp("seen")
    make_scenes(folder / "data/train", 15, seed=0)
    tiny_config(num_denoising=5).save_pretrained(folder / "untrained")
    DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}).save_pretrained(folder / "untrained")
    with contextlib.redirect_stdout(io.StringIO()):
        run = dino_hf.train(
            folder / "data",
            model=folder / "untrained",
            output_dir=folder / "out",
            seed=3,
            validation_fraction=0.4,
            max_steps=1,
            report_to="none",
            use_cpu=True,
            num_denoising=5,
        )
    return folder, run


def test_the_validation_images_are_those_of_the_run(trained):
    folder, run = trained
    for place in (folder / "out", folder / "out/last", next((folder / "out").glob("checkpoint-*"))):
        evaluation = dino_hf.evaluate(place, folder / "data", num_bootstrap=0, device="cpu")
        assert evaluation.counts["images"] == run.evaluation.counts["images"] == 5
        assert any("the 5 of 15 training images that the training run held out" in note for note in evaluation.notes)
    evaluation = dino_hf.evaluate(folder / "out", folder / "data", num_bootstrap=0, device="cpu")
    assert evaluation.metrics["AP"] == run.evaluation.metrics["AP"]
    model = run.trainer.model
    part, _ = load_split(folder / "data", models=[model])
    expected = load_data(folder / "data", seed=3, validation_fraction=0.4).validation
    assert sorted(part.dataset["file_name"]) == sorted(expected.dataset["file_name"])


def test_images_that_were_trained_on_are_refused(trained, tmp_path):
    folder, run = trained
    model = run.trainer.model
    make_scenes(tmp_path / "test", 4, seed=9)
    trained_on = run.trainer._train_data.dataset.with_format("arrow")[:1]["image"].to_pylist()[0]["path"]
    shutil.copy(trained_on, sorted(tmp_path.rglob("*.png"))[1])
    with pytest.raises(ValueError, match=r"^1 of the 4 test images were trained on.*--allow-trained"):
        load_split(tmp_path, "test", models=[model])
    part, notes = load_split(tmp_path, "test", models=[model], allow_trained=True)
    assert len(part.dataset) == 4
    assert notes[-1].startswith("1 of the 4 test images were trained on")
    part, notes = load_split(folder / "data", "train", models=[model])
    assert len(part.dataset) == 10
    assert notes[-1].startswith("10 of the 10 train images")


def compressed_copy(run, folder, names):
    """A data set of training images as JPEG of quality 60, and as many new ones."""
    folder.mkdir()
    rows = run.trainer._train_data.dataset.with_format("arrow")[: len(names)]["image"].to_pylist()
    make_scenes(folder / "test", 2 * len(names), seed=11)
    file = folder / "test/annotations.json"
    content = json.loads(file.read_text())
    for entry, row in zip(content["images"], rows, strict=False):
        (folder / "test" / entry["file_name"]).unlink()
        with Image.open(row["path"]) as picture:
            entry |= {"file_name": names.pop(), "width": picture.width, "height": picture.height}
            picture.convert("RGB").save(folder / "test" / entry["file_name"], quality=60)
    changed = {entry["id"] for entry in content["images"][: len(rows)]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] not in changed]
    file.write_text(json.dumps(content))
    return folder


def test_images_that_were_compressed_again_are_noticed(trained, tmp_path, caplog):
    model = trained[1].trainer.model
    data = compressed_copy(trained[1], tmp_path / "again", ["a.jpg", "b.jpg", "c.jpg"])
    part, notes = load_split(data, "test", models=[model])
    expected = (
        "3 of the 6 test images were trained on (3 of them compressed again or scaled), so AP on them says little about other "
        "images."
    )
    assert len(part.dataset) == 6
    assert notes[-1] == expected
    assert expected in caplog.text
    record = model.config.provenance["training"]["images"]
    older = copy.deepcopy(model.config)
    older.provenance["training"]["images"] = {key: record[key] for key in ("trained", "held_out")}
    _, notes = load_split(data, "test", models=[SimpleNamespace(config=older)])
    assert not any("trained on" in note for note in notes)
    make_scenes(tmp_path / "new/test", 30, seed=12)
    _, notes = load_split(tmp_path / "new", "test", models=[model])
    assert not any("trained on" in note for note in notes)


def test_a_dry_run_reads_the_files_of_the_data_once(trained, tmp_path, monkeypatch):
    folder, _ = trained
    reads = []
    read = recognise.read_coco
    monkeypatch.setattr(recognise, "read_coco", lambda *given: reads.append(given) or read(*given))
    options = {"output_dir": tmp_path / "out", "dry_run": True, "report_to": "none", "use_cpu": True}
    with contextlib.redirect_stdout(io.StringIO()):
        dino_hf.train(folder / "data", model=folder / "untrained", num_denoising=5, **options)
    assert len(reads) == 1


def test_a_command_says_once_that_images_were_trained_on(trained, tmp_path, capfd):
    folder, _ = trained
    app = typer.Typer()
    app.command("eval")(cli_eval.evaluate)
    app.command("other")(lambda: None)
    arguments = ["--split", "train", "--num-bootstrap", 0, "--output-dir", tmp_path / "out", "--device", "cpu"]
    result = CliRunner().invoke(app, ["eval", *map(str, [folder / "out", folder / "data", *arguments])])
    assert result.exit_code == 0, result.output
    text = " ".join((result.output + "".join(capfd.readouterr())).split())
    assert text.count("train images were trained on") == 1


@pytest.mark.parametrize(("most", "is_noticed"), [(6, True), (5, False)])
def test_looks_are_compared_for_a_bounded_number_of_images(trained, tmp_path, monkeypatch, most, is_noticed):
    data = compressed_copy(trained[1], tmp_path / "again", ["a.jpg", "b.jpg", "c.jpg"])
    monkeypatch.setattr(seen_module, "MOST_DECODED", most)
    _, notes = load_split(data, "test", models=[trained[1].trainer.model])
    assert any("trained on" in note for note in notes) == is_noticed


def test_data_that_are_loaded_are_evaluated(trained):
    folder, run = trained
    data = load_data(folder / "data", seed=3, validation_fraction=0.4)
    evaluation = dino_hf.evaluate(run.trainer.model, data, num_bootstrap=0, device="cpu")
    assert evaluation.counts["images"] == 5
    with pytest.raises(ValueError, match="has no test images, but train, validation"):
        dino_hf.evaluate(run.trainer.model, data, split="test", num_bootstrap=0)


def test_odd_records_count_as_none(trained):
    folder, _ = trained
    model = DinoDetrForObjectDetection(tiny_config())
    for provenance in (
        None,
        {"training": 3},
        {"training": {"images": [1]}},
        {"training": {"images": {"trained": 7}}},
    ):
        model.config.provenance = provenance
        assert seen_images(model) == (set(), set(), set())
    part, _ = load_split(folder / "data", models=[model, None])
    assert part.dataset["file_name"] == load_data(folder / "data").validation.dataset["file_name"]


def test_other_data_are_split_as_ever(trained, tmp_path):
    make_scenes(tmp_path / "train", 10, seed=8)
    part, _ = load_split(tmp_path, models=[trained[1].trainer.model])
    assert len(part.dataset) == 2
    assert not set(image_digests(part)) & seen_images(trained[1].trainer.model).trained
    assert len(pack(image_digests(part))) == 16  # 10 bytes
