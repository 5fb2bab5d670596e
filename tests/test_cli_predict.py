"""`dino-hf predict` and `predict` in Python, as users call them: on folders, videos, in tiles; killed, resumed, refused."""

import gc
import inspect
import itertools
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from transformers import AutoModelForObjectDetection
from typer.testing import CliRunner

import dino_hf
from dino_hf import DinoDetrImageProcessor
from dino_hf.cli import predict as cli_predict
from dino_hf.common.scenes import make_scenes
from dino_hf.common.values import numbers_by_name
from dino_hf.inference import Prediction, Predictor, predict, sources
from dino_hf.inference.predict import find_classes
from dino_hf.inference.videos import read_frames
from dino_hf.model.package_warning import DinoDetrWarning
from inference_toys import CATEGORY_IDS, NAMES, noise, save_toy_detector
from test_predictor import PEERS
from test_sources import write_video

THRESHOLD = 0.03  # of a detector that was never trained

app = typer.Typer()
app.command()(cli_predict.predict)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_toy_detector(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def predictor(model):
    return Predictor(model)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of different sizes in two folders, a broken one, a video."""
    root = tmp_path_factory.mktemp("photos")
    for number, (name, size) in enumerate({"1": (90, 60), "2": (60, 90), "10": (90, 61), "sub/1": (130, 70)}.items()):
        (root / name).parent.mkdir(exist_ok=True)
        noise(*size, number).save(root / f"{name}.png")
    (root / "5.png").write_bytes(b"junk")
    write_video(root / "clip.mp4", 5)
    return root


def run(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def journal(folder) -> list[dict]:
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines[1:]) if "end" not in record]


def test_the_command_predicts_a_folder_and_names_what_it_skips(model, photos, tmp_path):
    exit_code, output, errors = run(model, photos, "--save", tmp_path / "found", "--threshold", THRESHOLD)
    assert exit_code == 3
    assert errors.startswith("skipped 5.png: It is not an image of a known format (AVIF,")
    assert errors.endswith("), or its beginning is damaged.\n1 source was skipped.\n")
    records = journal(tmp_path / "found")
    names = ["1.png", "2.png", "10.png", *["clip.mp4"] * 5, "sub/1.png"]
    assert [record["file"] for record in records] == names
    counts = [sum(one["label"] == name for record in records for one in record["objects"]) for name in NAMES.values()]
    table = dict(re.findall(r"^(\w+) +(\d+) +\d+$", output, flags=re.MULTILINE))
    assert table == {name: str(count) for name, count in zip(NAMES.values(), counts, strict=True) if count} | {
        "all": str(sum(counts))
    }
    assert sum(counts) > 20
    assert f"Results are in {tmp_path / 'found'}." in output
    for name in (
        "images/1.png",
        "images/sub/1.png",
        "videos/clip.mp4",
        "labels/10.txt",
        "predictions.json",
        "predictions.csv",
    ):
        assert (tmp_path / "found" / name).is_file()
    assert len(list(read_frames(tmp_path / "found" / "videos" / "clip.mp4"))) == 5
    assert {one["category_id"] for record in records for one in record["objects"]} <= set(CATEGORY_IDS)


def test_python_gives_what_the_command_saves(model, predictor, photos, tmp_path):
    run(model, photos / "sub", photos / "1.png", "--save", tmp_path, "--threshold", THRESHOLD, "--batch-size", 1)
    found = predict(predictor, [photos / "sub", photos / "1.png"], threshold=THRESHOLD)
    assert [one.name for one in found] == ["sub/1.png", "1.png"]
    assert [one.image_size for one in found] == [(130, 70), (90, 60)]
    for one, record in zip(found, journal(tmp_path), strict=True):
        assert one.names == [each["label"] for each in record["objects"]]
        assert one.category_ids == [each["category_id"] for each in record["objects"]]
        assert one.category_ids == [CATEGORY_IDS[label] for label in one.labels]
        # batches of other sizes round differently, and the file has thousandths
        np.testing.assert_allclose(one.boxes, [each["box"] for each in record["objects"]], atol=0.01)
        np.testing.assert_allclose(one.scores, [each["score"] for each in record["objects"]], atol=1e-5)
        assert one.scores.min() > THRESHOLD
        assert one.boxes.min() >= 0
        assert (one.boxes <= [*one.image_size] * 2).all()


def test_images_in_memory_and_files_together(predictor, photos):
    image = noise(90, 60, 0)
    found = predict(predictor, [image, photos / "1.png", np.asarray(image)], threshold=THRESHOLD)
    assert [one.name for one in found] == ["image-1", "1.png", "image-3"]
    assert isinstance(found[0], Prediction)
    assert found[0].origin is image
    for one in found[1:]:  # the file has the same pixels
        np.testing.assert_allclose(one.boxes, found[0].boxes, atol=0.01)
    assert len(predict(predictor, image, threshold=THRESHOLD)) == 1


def test_streamed_predictions_come_as_they_are_made(predictor, tmp_path):
    write_video(tmp_path / "long.mp4", 15)
    stream = predict(
        predictor, tmp_path / "long.mp4", threshold=THRESHOLD, stream=True, save=tmp_path / "out", batch_size=1
    )
    assert not (tmp_path / "out").exists()
    found = list(itertools.islice(stream, 4))
    assert [one.frame for one in found] == [0, 1, 2, 3]
    np.testing.assert_allclose([one.time for one in found], np.arange(4) * 1001 / 30000, atol=1e-4)
    assert len(journal(tmp_path / "out")) == 4
    stream.close()  # as a user who has seen enough
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]) == 4
    assert [one.frame for one in predict(predictor, tmp_path / "long.mp4", every=4, max_frames=3)] == [0, 4, 8]


def test_classes_are_wanted_by_name_or_original_id(predictor, photos):
    everything = predict(predictor, photos / "1.png", threshold=0.0)[0]
    assert len(set(everything.names)) == 5
    for wanted in (["Ring", 3], ["40", "disc"]):
        some = predict(predictor, photos / "1.png", threshold=0.0, classes=wanted)[0]
        assert set(some.names) == {"ring", "disc"}
        np.testing.assert_allclose(some.scores, everything.scores[np.isin(everything.labels, [0, 4])], atol=1e-6)
    categories = {0: (0, "traffic light"), 1: (5, "dog"), 2: (7, "dog")}
    assert find_classes("dog", categories) == [1, 2]
    assert find_classes([0, "7"], categories) == [0, 2]
    with pytest.raises(ValueError, match="The model has no class 'trafic light'; the closest are traffic light"):
        find_classes(["dog", "trafic light"], categories)
    with pytest.raises(ValueError, match="The model has no class '1'; it has traffic light, dog"):
        find_classes([1], categories)
    with pytest.raises(ValueError, match="classes is empty"):
        find_classes([], categories)


def test_a_run_that_was_stopped_is_resumed(model, photos, tmp_path, monkeypatch):
    arguments = (model, photos, "--save", tmp_path / "found", "--threshold", THRESHOLD, "--batch-size", 1)

    calls = 0
    forward = Predictor._detect

    def interrupted(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    monkeypatch.setattr(Predictor, "_detect", interrupted)
    exit_code, _, errors = run(*arguments)
    assert exit_code == 130
    assert errors.endswith("error: stopped.\n")
    assert [record["file"] for record in journal(tmp_path / "found")] == ["1.png", "2.png"]
    assert len(json.loads((tmp_path / "found" / "predictions.json").read_text())["images"]) == 2
    monkeypatch.setattr(Predictor, "_detect", forward)

    exit_code, _, errors = run(*arguments)
    assert exit_code == 1
    assert "has an earlier prediction in it; choose another folder, or replace it with --overwrite" in errors
    exit_code, output, errors = run(*arguments, "--resume")
    assert exit_code == 3
    whole = [record["file"] for record in journal(tmp_path / "found")]
    assert whole == ["1.png", "2.png", "10.png", *["clip.mp4"] * 5, "sub/1.png"]
    assert re.search(r"^all +\d+ +7$", output, flags=re.MULTILINE)
    assert run(*arguments, "--resume")[0] == 3  # nothing is left but what cannot be read
    exit_code, _, errors = run(*arguments, "--resume", "--tta")
    assert exit_code == 1
    assert "was predicted with tta=False, not True" in errors
    assert run(*arguments, "--overwrite")[0] == 3
    assert [record["file"] for record in journal(tmp_path / "found")] == whole


def test_tiles_and_augmentation_see_all_of_the_image(predictor, model, photos, tmp_path):
    whole, tiled, augmented = (
        predict(predictor, photos / "sub" / "1.png", threshold=0.01, **settings)[0]
        for settings in ({}, {"tiles": 64, "tile_overlap": 0.3}, {"tta": True})
    )
    assert len(tiled.scores) > len(whole.scores)
    assert len(augmented.scores) > 0
    assert (np.diff(tiled.scores) <= 0).all()
    arguments = (model, photos / "sub", "--save", tmp_path / "out", "--threshold", 0.01)
    limit = Image.MAX_IMAGE_PIXELS
    try:
        assert run(*arguments, "--tiles", "64", "--tile-overlap", 0.3, "--formats", "csv")[0] == 0
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    assert len(journal(tmp_path / "out")[0]["objects"]) == len(tiled.scores)
    assert not (tmp_path / "out" / "images").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{photos}/none.png",), "There is no file or folder {photos}/none.png."),
        (("{photos}/5.png",), "Nothing could be read. The first source was 5.png: It is not an image"),
        (("{photos}", "--threshold", "1.5"), "threshold=1.5 must be in [0, 1], as scores are."),
        (("{photos}", "--batch-size", "0"), "batch_size=0 must be at least 1."),
        (("{photos}", "--every", "0"), "every=0 must be at least 1."),
        (("{photos}", "--max-frames", "0"), "max_frames=0 must be at least 1."),
        (("{photos}", "--tiles", "big"), "tiles='big' must be a side, or width x height"),
        (("{photos}", "--tiles", "64", "--tile-overlap", "1"), "tile_overlap=1.0 must be in [0, 0.9]"),
        (("{photos}", "--classes", "disk,ring"), "The model has no class 'disk'; the closest are disc."),
        (("{photos}", "--device", "tpu"), "device='tpu' cannot be used here"),
        (("{photos}", "--dtype", "int4"), "dtype='int4' must be one of float32, bfloat16, float16."),
        (("{photos}", "--save", "{photos}"), "{photos} has files that are not of an earlier prediction"),
        (("{photos}", "--save", "{out}", "--formats", "xml"), "There are no formats ['xml']"),
        (("{photos}", "--formats", "xml"), "There are no formats ['xml']"),
        (("{photos}", "--tile-overlap", "2"), "tile_overlap=2.0 must be in [0, 0.9]"),
        (
            ("{photos}", "--resume"),
            "--resume (in Python, resume=True) needs a folder of results: name it with --save (in",
        ),
        (("",), "Source 1 is empty; give a path"),
        (
            ("{photos}", "--save", "{out}", "--overwrite", "--resume"),
            "overwrite deletes the results that resume would keep",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(model, photos, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    places = {"photos": photos, "out": tmp_path / "out"}
    exit_code, output, errors = run(model, *(argument.format(**places) for argument in arguments))
    assert exit_code == 1
    assert errors.splitlines()[-1].startswith("error: " + message.format(**places))
    assert errors.count("error: ") == 1
    assert output == ""
    assert not (tmp_path / "out").exists()


def test_images_in_memory_are_predicted_again_for_nobody_knows_them(predictor, photos, tmp_path):
    predict(predictor, [noise(90, 60), photos / "1.png"], save=tmp_path / "out")
    again = predict(predictor, [noise(80, 70), photos / "1.png"], save=tmp_path / "out", resume=True)
    assert [(one.name, one.image_size) for one in again] == [("image-1", (80, 70))]
    assert sorted(record["file"] for record in journal(tmp_path / "out")) == ["1.png", "image-1"]


def test_results_do_not_go_among_the_sources(predictor, photos, tmp_path):
    found = tmp_path / "found"
    predict(predictor, photos / "1.png", save=found)
    with pytest.raises(
        ValueError, match=r"images/1.png is in .*found, where the results are saved; choose another folder"
    ):
        predict(predictor, found / "images" / "1.png", save=found, overwrite=True)
    noise(80, 50).save(tmp_path / "new.png")
    again = predict(predictor, tmp_path, save=found, overwrite=True)  # the results are in the folder of the sources
    assert [one.name for one in again] == ["new.png"]


def test_without_a_callback_what_is_left_out_is_warned_of(predictor, photos):
    with pytest.warns(UserWarning, match="5.png was left out. It is not an image of a known format"):
        assert len(predict(predictor, [photos / "5.png", photos / "1.png"])) == 1


def test_a_model_in_memory_and_one_of_others(predictor, photos):
    same = predict(predictor.model, photos / "1.png", image_processor=predictor.image_processor, threshold=THRESHOLD)
    assert len(same[0].scores) > 0
    config, image_processor = PEERS["yolos"]()
    torch.manual_seed(0)
    peer = AutoModelForObjectDetection.from_config(config)
    (one,) = predict(peer, photos / "1.png", image_processor=image_processor, threshold=0.0)
    assert one.category_ids == one.labels.tolist()
    assert set(one.names) <= {f"LABEL_{index}" for index in range(4)}


def test_commands_are_functions_of_the_package():
    """Two have the name of a module too."""
    for name in ("train", "evaluate", "predict"):
        assert inspect.isfunction(getattr(dino_hf, name))
        assert name in dir(dino_hf)
    assert dino_hf.predict is predict


def test_help_is_short_and_ends_with_an_example():
    exit_code, output, _ = run("--help")
    assert exit_code == 0
    assert "dino-hf predict outputs/train photos/ clip.mp4 --save found" in output
    assert len(output.splitlines()) < 88


def test_a_resumed_prediction_with_nothing_left_says_so(model, photos, tmp_path):
    arguments = (model, photos / "1.png", "--save", tmp_path / "out")
    run(*arguments)
    exit_code, output, _ = run(*arguments, "--resume")
    assert exit_code == 0
    assert output.startswith(
        "Nothing is left to predict: the earlier prediction has all these sources.\nResults are in"
    )


@pytest.mark.parametrize(
    ("best", "named", "is_told"),
    [(0.347, "{model}", True), (0.347, "another", False), (0.519, "{model}", False), (0.521, "{model}", True)],
)
def test_the_threshold_that_was_measured_is_told(model, photos, tmp_path, monkeypatch, best, named, is_told):
    monkeypatch.chdir(tmp_path)
    report = tmp_path / "outputs" / "eval" / model.name / "results.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps({"model": named.format(model=model), "best_threshold": {"threshold": best}}))
    _, output, _ = run(model, photos / "1.png")
    assert (f"The best threshold of this model is {best}," in output) == is_told
    assert "measured" not in run(model, photos / "1.png", "--threshold", 0.5)[1]
    kept = shutil.copytree(model, tmp_path / "kept" / model.name)
    settings = json.loads((kept / "config.json").read_text())
    (kept / "config.json").write_text(json.dumps(settings | {"score_threshold": 0.27}))
    _, output, _ = run(kept, photos / "1.png")
    assert output.startswith("Score threshold 0.270, from the model's configuration; --threshold replaces it.")
    assert "measured" not in output
    for damaged in ("", "[]", '{"model": "x", "best_threshold": null}', "[" * 10**5):
        report.write_text(damaged)
        assert run(model, photos / "1.png")[0] == 0


def test_thresholds_of_single_classes(predictor, photos):
    everything = predict(predictor, photos / "1.png", threshold=0.0)[0]
    name = everything.names[0]
    middle = float(np.median(everything.scores))
    found = predict(predictor, photos / "1.png", threshold=middle, class_thresholds={name: 0.0})[0]
    kept = [score > middle or own == name for score, own in zip(everything.scores, everything.names, strict=True)]
    assert len(found.scores) == sum(kept) > (everything.scores > middle).sum()
    with pytest.raises(ValueError, match=rf"^class_thresholds: {name}=2 must be in \[0, 1\]"):
        predict("a model that is not looked for", photos / "1.png", class_thresholds={"other": 0.2, name: 2})
    with pytest.raises(ValueError, match="The model has no class 'disk'; the closest are disc"):
        predict(predictor, photos / "1.png", class_thresholds={"disk": 0.3})
    assert numbers_by_name("person=0.3, a=b=1", *cli_predict._CLASS_THRESHOLDS) == {"person": 0.3, "a=b": 1.0}
    for text in ("person", "=0.3", "person=high", ""):
        with pytest.raises(ValueError, match=r"must be like person=0\.3,dog=0\.6"):
            numbers_by_name(text, *cli_predict._CLASS_THRESHOLDS)
    with pytest.raises(ValueError, match="--class-thresholds names 'disc' twice"):
        numbers_by_name("disc=0.3,box=0.2, disc=0.6", *cli_predict._CLASS_THRESHOLDS)


def test_a_percentage_for_a_class_names_the_class(model, photos):
    code, _, errors = run(model, photos / "1.png", "--class-thresholds", "box=0.3,disc=50")
    assert code == 1
    assert errors == ("error: class_thresholds: disc=50.0 must be in [0, 1], as scores are. For 50 %, write 0.5.\n")


@pytest.mark.filterwarnings("always::dino_hf.model.package_warning.DinoDetrWarning")
def test_a_word_is_said_where_detections_were_cut_off(predictor, model, photos):
    with pytest.warns(UserWarning, match="In 1 image, 3 detections or more have a score above the threshold"):
        (found,) = predict(predictor, photos / "1.png", threshold=0.0, max_detections=3)
    assert len(found.scores) <= 3
    errors = run(model, photos / "1.png", "--threshold", 0, "--max-detections", 3)[2]
    assert "note: In 1 image, 3 detections or more" in errors


def test_queries_and_all_scores_are_saved_where_asked_for(predictor, photos, tmp_path):
    (found,) = predict(predictor, photos / "1.png", threshold=0.0, all_scores=True, save=tmp_path / "out", formats=[])
    (record,) = journal(tmp_path / "out")
    assert found.class_scores.shape == (len(found.scores), 5)
    assert [entry["query"] for entry in record["objects"]] == found.queries.tolist()
    np.testing.assert_allclose([entry["scores"] for entry in record["objects"]], found.class_scores, atol=1e-6)
    assert repr(found).startswith("Prediction('1.png', 90 x 60: ")
    assert len(repr(found)) < 300
    with pytest.raises(ValueError, match="all_scores cannot be used with tiles or tta"):
        predict(predictor, photos / "1.png", all_scores=True, tta=True)


def test_without_pyav_a_video_is_skipped_with_what_to_install(model, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    code, out, err = run(model, photos / "1.png", photos / "clip.mp4", photos / "2.png", "--save", tmp_path / "out")
    assert code == 3, out + err
    assert re.search(
        r"skipped clip\.mp4: av is not installed, but videos and cameras need it: pip install .*\[video\]", err
    )
    assert "Traceback" not in out + err
    assert [record["file"] for record in journal(tmp_path / "out")] == ["1.png", "2.png"]


@pytest.mark.parametrize("settings", [{}, {"tta": True}, {"tiles": 64}])
def test_of_large_images_one_is_held_at_a_time(predictor, tmp_path, monkeypatch, settings):
    """Each of these is larger than all budgets. What is decoded must be alone, but for its own parts and copies."""
    monkeypatch.setattr(sources, "_AHEAD_BYTES", 1)
    monkeypatch.setattr(predictor, "_window_bytes", 1)
    monkeypatch.setattr(predictor, "_ahead_bytes", 1)
    for number in range(3):
        noise(301 + number, 200, number).save(tmp_path / f"{number}.png")
    held, read = [], sources.read_image

    def count(origin):
        gc.collect()
        held.append([o.size for o in gc.get_objects() if type(o) is Image.Image and o.width > 300])
        return read(origin)

    monkeypatch.setattr(sources, "read_image", count)
    found = list(predict(predictor, tmp_path, threshold=0.0, save=tmp_path / "out", stream=True, **settings))
    assert len(found) == 3
    assert held == [[]] * 3


def test_a_folder_of_results_that_was_deleted_meanwhile_is_no_success(predictor, photos, tmp_path):
    stream = predict(predictor, [photos / "1.png", photos / "2.png"], save=tmp_path / "out", stream=True)
    next(stream)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="out was deleted or moved while"):
        list(stream)
    assert not (tmp_path / "out").exists()


def test_a_name_with_line_feeds_fakes_no_message(model, photos, tmp_path):
    (tmp_path / "a\nerror: all is lost\x1b[2K.png").write_bytes(b"junk")
    shutil.copy(photos / "1.png", tmp_path / "b.png")
    code, _, err = run(model, tmp_path)
    assert code == 3
    assert err.startswith(r"skipped a\nerror: all is lost\x1b[2K.png: It is not an image of a known format")
    assert len(err.splitlines()) == 2


def test_eval_and_predict_give_an_image_the_same_scores(predictor, tmp_path):
    """Also where the file has transparency, 16 bits, or a shape of its own."""
    grey = Image.fromarray((np.asarray(noise(61, 90, 3).convert("L")).astype(np.uint16)) * 257)
    pictures = {"a.png": noise(90, 60, 1), "b.png": noise(130, 40, 2).convert("RGBA"), "c.png": grey}
    pictures["b.png"].putalpha(90)
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [
        {"id": number, "name": name} for number, name in zip(CATEGORY_IDS, NAMES.values(), strict=True)
    ]
    for number, (name, image) in enumerate(pictures.items(), start=1):
        (tmp_path / "test").mkdir(exist_ok=True)
        image.save(tmp_path / "test" / name)
        content["images"].append({"id": number, "file_name": name, "width": image.width, "height": image.height})
        entry = {"id": number, "image_id": number, "category_id": 3, "bbox": [3, 4, 20, 15], "area": 300, "iscrowd": 0}
        content["annotations"].append(entry)
    (tmp_path / "test/annotations.json").write_text(json.dumps(content))
    evaluation = dino_hf.evaluate(predictor, tmp_path, split="test", num_bootstrap=0)
    assert len(evaluation.image_ids) == 3
    predicted = predict(predictor, tmp_path / "test", threshold=0.0)
    assert len(predicted) == 3
    for image_id, one in zip(evaluation.image_ids, predicted, strict=True):
        scores = np.sort(evaluation.found["scores"][evaluation.found["image_id"] == image_id])[::-1]
        assert len(scores) > 20
        np.testing.assert_allclose(scores, one.scores[: len(scores)], rtol=0, atol=1e-6)


CANVAS = {"size": {"shortest_edge": 64, "longest_edge": 64}, "canvas_value": 114}
SOFT_NMS = {"method": "soft", "iou_threshold": 0.6, "candidates": 40}


@pytest.fixture(scope="module")
def lsj_model(tmp_path_factory):
    """A detector whose image processor has a canvas and soft NMS, as models trained with large-scale jitter have."""
    folder = save_toy_detector(tmp_path_factory.mktemp("lsj_model"))
    DinoDetrImageProcessor(**CANVAS, nms=SOFT_NMS).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {}),
        (["--tta"], {"tta": True}),
        (["--tiles", "48x40"], {"tiles": (48, 40)}),
        (["--tiles", "48", "--tta"], {"tiles": 48, "tta": True}),
    ],
    ids=str,
)
def test_a_canvas_and_soft_nms_give_in_python_what_the_command_saves(lsj_model, options, settings, tmp_path):
    make_scenes(tmp_path / "scenes", 3, seed=5)
    threshold = 0.005 if "tta" in settings else THRESHOLD  # fused scores are means over views
    scenes = sorted((tmp_path / "scenes").rglob("*.png"))
    arguments = (lsj_model, *scenes, "--save", tmp_path / "out", "--formats", "coco", "--threshold", threshold)
    exit_code, _, errors = run(*arguments, *options)
    assert (exit_code, errors) == (0, "")
    found = predict(lsj_model, scenes, threshold=threshold, **settings)
    assert sum(len(one.scores) for one in found) > 4
    for one, record in zip(found, journal(tmp_path / "out"), strict=True):
        assert one.names == [each["label"] for each in record["objects"]]
        np.testing.assert_allclose(one.boxes, [each["box"] for each in record["objects"]], atol=0.01)
        np.testing.assert_allclose(one.scores, [each["score"] for each in record["objects"]], atol=1e-5)
        assert one.boxes.min() >= 0
        assert (one.boxes <= [*one.image_size] * 2).all()
        assert (one.boxes[:, 2:] > one.boxes[:, :2]).all()


@pytest.mark.parametrize("scale", [1.0, 0.8, 1.25])
def test_a_scaled_predictor_scales_the_canvas(lsj_model, scale):
    """Views of test-time augmentation have canvases of other sizes, and boxes relative to them."""
    image, predictor = noise(90, 60), Predictor(lsj_model)
    side = round(64 * scale)
    processor = DinoDetrImageProcessor(
        size={"shortest_edge": side, "longest_edge": side}, canvas_value=114, nms=SOFT_NMS
    )
    with torch.no_grad():
        outputs = predictor.model(**processor(images=image, return_tensors="pt"))
    (expected,) = processor.post_process_object_detection(outputs, 0.0, [(60, 90)], top_k=40)
    (found,) = predictor.at_scale(scale)([image])
    np.testing.assert_allclose(found.boxes, expected["boxes"], atol=1e-3)
    np.testing.assert_allclose(found.scores, expected["scores"], atol=1e-5)
    np.testing.assert_array_equal(found.labels, expected["labels"])


@pytest.mark.parametrize("settings", [{"tta": True}, {"tiles": 48}, {"tiles": 48, "tta": True}], ids=str)
def test_the_limit_of_detections_is_that_of_the_image_and_not_of_its_tiles_or_views(predictor, settings):
    with pytest.warns(DinoDetrWarning, match=r"In \d+ image.* 3 detections or more"):
        (found,) = predict(predictor, noise(110, 90), threshold=0.001, max_detections=3, **settings)
    assert len(found.scores) == 3
    assert (np.diff(found.scores) <= 0).all()
