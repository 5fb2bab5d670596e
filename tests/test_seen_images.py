"""What a run held out is what its model is evaluated on."""

import contextlib
import copy
import io
import json
import shutil
from types import SimpleNamespace

import pytest
import typer
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as HubImage
from PIL import Image
from typer.testing import CliRunner

import dino_hf
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.cli import eval as cli_eval
from dino_hf.common.scenes import make_scenes
from dino_hf.data import load_data, recognise
from dino_hf.data.image_digests import image_digests, pack
from dino_hf.evaluation import evaluate_model, load_split
from dino_hf.evaluation import seen_images as seen_module
from dino_hf.evaluation.seen_images import seen_images
from dino_hf.inference import Predictor
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
        assert seen_images(model) == (set(), set(), set(), set())
    part, _ = load_split(folder / "data", models=[model, None])
    assert part.dataset["file_name"] == load_data(folder / "data").validation.dataset["file_name"]


def test_other_data_are_split_as_ever(trained, tmp_path):
    make_scenes(tmp_path / "train", 10, seed=8)
    part, _ = load_split(tmp_path, models=[trained[1].trainer.model])
    assert len(part.dataset) == 2
    assert not set(image_digests(part)) & seen_images(trained[1].trainer.model).trained
    assert len(pack(image_digests(part))) == 16  # 10 bytes


def held_out_names(run) -> list[str]:
    return sorted(run.trainer._held_out[""].dataset.with_format(None)["file_name"])


def change_files(folder, change):
    """Replace each image of a folder by `change(file)`, which returns the new file."""
    path = folder / "train/annotations.json"
    content = json.loads(path.read_text())
    for entry in content["images"]:
        entry["file_name"] = change(path.parent / entry["file_name"]).name
    path.write_text(json.dumps(content))


def as_jpeg(file):
    with Image.open(file) as image:
        image.convert("RGB").save(file.with_suffix(".jpg"), quality=70)
    file.unlink()
    return file.with_suffix(".jpg")


@pytest.mark.parametrize("change", [lambda file: file.rename(file.with_name(f"x{file.name}")), as_jpeg])
def test_renamed_and_compressed_images_are_still_held_out(trained, tmp_path, change):
    folder, run = trained
    data = shutil.copytree(folder / "data", tmp_path / "data")
    change_files(data, change)
    part, notes = load_split(data, models=[run.trainer.model])
    assert sorted(name[-10:-4] for name in part.dataset["file_name"]) == [name[:-4] for name in held_out_names(run)]
    assert not any("not in the record" in note for note in notes)
    train, _ = load_split(data, "train", models=[run.trainer.model])
    assert len(train.dataset) == 10


def test_images_that_were_added_later_belong_to_no_part(trained, tmp_path):
    folder, run = trained
    data = shutil.copytree(folder / "data", tmp_path / "data")
    make_scenes(tmp_path / "more", 4, seed=77)
    content, more = (
        json.loads((place / "annotations.json").read_text()) for place in (data / "train", tmp_path / "more")
    )
    for entry in more["images"]:
        shutil.copy(tmp_path / "more" / entry["file_name"], data / "train" / f"new{entry['file_name']}")
        content["images"].append(entry | {"id": entry["id"] + 1000, "file_name": f"new{entry['file_name']}"})
    (data / "train/annotations.json").write_text(json.dumps(content))
    for split, count in (("validation", 5), ("train", 10)):
        part, notes = load_split(data, split, models=[run.trainer.model])
        assert len(part.dataset) == count
        assert any(note.startswith("4 of the 19 training images are not in the record of the run") for note in notes)


def rows_of(data):
    """The images as rows of the Hub, with bytes and no path."""
    rows = []
    for image in data.dataset.with_format("arrow")[:]["image"].to_pylist():
        with open(image["path"], "rb") as file:
            rows.append({"bytes": file.read(), "path": None})
    boxes = {"bbox": [[2.0, 3.0, 20.0, 15.0]], "category": [0]}
    features = Features(
        {
            "image": HubImage(),
            "objects": {"bbox": List(List(Value("float32"))), "category": List(ClassLabel(names=["disc"]))},
        }
    )
    return Dataset.from_dict({"image": rows, "objects": [boxes] * len(rows)}, features=features)


def test_all_forms_of_the_data_have_the_same_held_out_images(trained):
    folder, run = trained
    model, whole = run.trainer.model, load_data(folder / "data", validation_fraction=0)
    expected = set(image_digests(run.trainer._held_out[""]))
    for data in (folder / "data/train/annotations.json", folder / "data/train", rows_of(whole.train)):
        part, notes = load_split(data, models=[model], box_format="xywh" if isinstance(data, Dataset) else None)
        assert set(image_digests(part)) == expected
        assert any("the 5 of 15 training images that the training run held out" in note for note in notes)


def test_a_folder_with_only_the_held_out_images_is_evaluated_wholly(trained, tmp_path):
    folder, run = trained
    data, kept = shutil.copytree(folder / "data", tmp_path / "data"), held_out_names(run)
    content = json.loads((data / "train/annotations.json").read_text())
    content["images"] = [entry for entry in content["images"] if entry["file_name"] in kept]
    ids = {entry["id"] for entry in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    (data / "train/annotations.json").write_text(json.dumps(content))
    part, _ = load_split(data, models=[run.trainer.model])
    assert sorted(part.dataset["file_name"]) == kept
    with pytest.raises(ValueError, match="has no train images, but validation"):
        load_split(data, "train", models=[run.trainer.model])


def run_from(folder, output_dir, **settings):
    """A run of one step from the first run, and what it printed."""
    output = io.StringIO()
    quick = {"max_steps": 1, "report_to": "none", "use_cpu": True, "num_denoising": 5}
    with contextlib.redirect_stdout(output):
        run = dino_hf.train(folder / "data", model=folder / "out", output_dir=output_dir, **quick | settings)
    return run, " ".join(output.getvalue().split())


def test_images_of_the_run_before_count_as_trained_on(trained, tmp_path):
    folder, first = trained
    run, text = run_from(folder, tmp_path / "second", seed=5, validation_fraction=0.4)
    before, after = seen_images(first.trainer.model), seen_images(run.trainer.model)
    shared = len(before.trained & after.held_out)
    assert 0 < shared < 6
    assert f"the start model was trained on {shared} of the 5 validation images" in text
    assert before.trained < after.trained
    assert before.trained_fingerprints < after.trained_fingerprints
    with pytest.raises(ValueError, match=f"^{shared} of the 5 validation images were trained on"):
        load_split(folder / "data", models=[run.trainer.model])
    part, _ = load_split(folder / "data", models=[first.trainer.model, run.trainer.model], allow_trained=True)
    assert len(part.dataset) == 5
    fair = before.held_out - after.trained
    if fair:  # images of both held-out parts
        part, notes = load_split(folder / "data", models=[first.trainer.model, run.trainer.model])
        assert set(image_digests(part)) == fair
        assert f"{5 - len(fair)} images that" in notes[-1]
    else:
        with pytest.raises(ValueError, match="another model was trained on all 5 images"):
            load_split(folder / "data", models=[first.trainer.model, run.trainer.model])
    record = tmp_path / "second/run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"finished": False}))
    resumed, _ = run_from(folder, tmp_path / "second", resume=True)
    assert seen_images(resumed.trainer.model) == after


def test_the_same_split_again_is_no_reason_to_warn(trained, tmp_path):
    folder, first = trained
    run, text = run_from(folder, tmp_path / "same", seed=3, validation_fraction=0.4)
    assert "the start model was trained on" not in text
    assert seen_images(run.trainer.model) == seen_images(first.trainer.model)


def test_two_models_of_different_splits_are_compared_on_images_that_both_held_out(trained):
    folder, run = trained
    digests = sorted(image_digests(load_data(folder / "data", validation_fraction=0).train))
    own = sorted(seen_images(run.trainer.model).held_out)

    def other(trained_on):
        images = {"trained": pack(trained_on), "held_out": pack(set(digests) - set(trained_on))}
        config = SimpleNamespace(provenance={"training": {"images": images}})
        return SimpleNamespace(config=config, name_or_path="the other")

    part, notes = load_split(folder / "data", models=[run.trainer.model, other(own[:2])])
    assert sorted(image_digests(part)) == own[2:]
    assert "2 images that" in notes[-1]
    with pytest.raises(ValueError, match="another model was trained on all 5 images"):
        load_split(folder / "data", models=[run.trainer.model, other(digests)])
    data = load_data(folder / "data", seed=3, validation_fraction=0.4)
    with pytest.raises(ValueError, match=r"^2 of the 5 validation images were trained on by the other, so"):
        load_split(data, models=[run.trainer.model, other(own[:2])])


def test_a_run_without_held_out_images_is_not_evaluated_on_its_own_images(trained, tmp_path):
    folder, _ = trained
    shutil.copytree(folder / "untrained", tmp_path / "untrained")
    with contextlib.redirect_stdout(io.StringIO()):
        run = dino_hf.train(
            folder / "data",
            model=tmp_path / "untrained",
            output_dir=tmp_path / "out",
            validation_fraction=0,
            max_steps=1,
            report_to="none",
            use_cpu=True,
            num_denoising=5,
        )
    assert seen_images(run.trainer.model).held_out == set()
    with pytest.raises(ValueError, match=r"^5 of the 5 validation images were trained on"):
        load_split(folder / "data", models=[run.trainer.model])


def test_evaluating_loaded_data_says_that_images_were_trained_on(trained, caplog):
    folder, _ = trained
    data = load_data(folder / "data", validation_fraction=0).train
    predictor = Predictor(folder / "out", device="cpu")
    evaluation = evaluate_model(predictor, data, num_bootstrap=0)
    expected = "10 of the 15 given images were trained on, so AP on them says little about other images."
    assert expected in evaluation.notes
    assert expected in caplog.text
