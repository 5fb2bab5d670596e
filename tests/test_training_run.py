"""Training from end to end, on drawn scenes with a detector of toy size. Runs that are killed are in scripts/kill_train.py."""

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import DatasetDict, IterableDataset, concatenate_datasets
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection, TrainerState, pipeline

from dino_hf import DinoDetrImageProcessor
from dino_hf.common.scenes import CATEGORIES, make_scenes
from dino_hf.data import DetectionData, load_data
from dino_hf.evaluation import report
from dino_hf.inference import Predictor
from dino_hf.run import plan as plan_module
from dino_hf.run import results
from dino_hf.run.preparation import _processes_per_device
from dino_hf.run.results import _best
from dino_hf.run.training_run import train
from dino_hf.runtime.model_card import is_ours
from dino_hf.runtime.weights_digest import weights_digest
from dino_hf.training import get_recipe, run_lock
from dino_hf.training.trainer import DinoDetrTrainer
from helpers import tiny_config
from processes import environment_of_scripts, needs_fork, run_processes

QUICK = {"recipe": "finetune", "report_to": "none", "use_cpu": True, "num_denoising": 5, "learning_rate": 1e-3}


def run_quietly(*args, **settings):
    """The run, and what it printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        run = train(*args, **QUICK | settings)
    return run, output.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Scenes of three splits, and a small model without weights."""
    folder = tmp_path_factory.mktemp("run")
    for name, num_images, seed in (("train", 10, 0), ("validation", 5, 1), ("test", 3, 2)):
        make_scenes(folder / "data" / name, num_images, seed=seed)
    tiny_config(num_denoising=5).save_pretrained(folder / "untrained")
    DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}).save_pretrained(folder / "untrained")
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """A run of two epochs, and what it printed."""
    return run_quietly(
        folder / "data",
        model=folder / "untrained",
        output_dir=folder / "out",
        num_train_epochs=2,
        ema_decay=0.9,
        ema_warmup_steps=0,
    )


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished[0].output_dir, tmp_path / "out")


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_what_a_run_leaves_loads_and_is_complete(finished):
    run, printed = finished
    files = {path.name for path in run.output_dir.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
        "results.json",
        "results.csv",
        "detections.json",
        "curves.png",
        "precision_recall.png",
        "history.json",
        "history.csv",
        "preflight.json",
        "recipe.json",
        "run.json",
        "last",
        "test",
        "checkpoint-4",
    } <= files
    assert (run.output_dir / "test/results.json").is_file()
    assert read_json(run.output_dir / "run.json")["finished"] is True
    assert read_json(run.output_dir / "preflight.json") == json.loads(json.dumps(run.preflight.as_dict()))
    detector = pipeline("object-detection", model=str(run.output_dir), device="cpu")
    found = detector(Image.new("RGB", (90, 70)), threshold=0.0)
    assert {one["label"] for one in found} <= set(CATEGORIES.values())
    assert detector.model.config.category_ids == sorted(CATEGORIES)
    assert AutoModelForObjectDetection.from_pretrained(run.output_dir / "last").config.id2label[0] == "disc"
    assert "epoch 1 of 2: loss" in printed
    assert "epoch 2 of 2: loss" in printed
    assert "\r" not in printed  # no bar without a terminal


def test_the_threshold_of_the_best_weights_is_the_default_of_predict(finished, folder, copy, monkeypatch, tmp_path):
    best = finished[0].evaluation.best_threshold
    for name in ("", "last", *(checkpoint.name for checkpoint in copy.glob("checkpoint-*"))):
        config = read_json(copy / name / "config.json")
        assert config.get("score_threshold") == (None if name else best), name
        (copy / name / "results.json").unlink(missing_ok=True)
        assert Predictor(copy / name).thresholds.default == (0.5 if name or best is None else best)
    settings = read_json(copy / "config.json") | {"score_threshold": 0.3, "class_score_thresholds": {"disc": 0.2}}
    (copy / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(results, "best_thresholds", lambda evaluation: (0.7, {"box": 0.6}))
    run, _ = run_quietly(folder / "data", model=copy, output_dir=tmp_path / "further", max_steps=1)
    further = read_json(run.output_dir / "config.json")
    assert (further["score_threshold"], further["class_score_thresholds"]) == (0.7, {"box": 0.6})
    for name in ("last", "checkpoint-1"):
        assert (
            not {"score_threshold", "class_score_thresholds"} & read_json(run.output_dir / name / "config.json").keys()
        )


def test_the_weights_are_the_best_of_all_evaluations_and_the_last_ones(finished):
    run, printed = finished
    state = run.trainer.state
    scores = {
        (entry["step"], kind): entry[f"eval_{kind}AP"]
        for entry in state.log_history
        if "eval_AP" in entry
        for kind in ("", "ema_")
    }
    step, kind = max(scores, key=scores.get)
    source = run.output_dir / f"checkpoint-{step}" / ("ema" if kind else "") / "model.safetensors"
    assert_same(run.output_dir / "model.safetensors", source)
    assert_same(run.output_dir / "last/model.safetensors", run.output_dir / "checkpoint-4/model.safetensors")
    assert f"after step {step}" in printed


def assert_same(first: Path, second: Path) -> None:
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_may_be_the_average(tmp_path):
    for name in ("checkpoint-2", "checkpoint-4/ema", "checkpoint-6/ema"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "ema.json").write_text("{}")
    history = [
        {"step": 2, "eval_AP": 0.3, "eval_ema_AP": 0.1},
        {"step": 4, "eval_AP": 0.2, "eval_ema_AP": 0.5},
        {"step": 6, "eval_AP": 0.4, "eval_ema_AP": 0.3},
    ]
    newest = tmp_path / "checkpoint-6"

    def best(metric: str, step: int | None, log_history=history):
        args = get_recipe("finetune").training_arguments("o", metric_for_best_model=metric, report_to="none")
        state = TrainerState(best_global_step=step, global_step=6, log_history=log_history)
        return _best(state, args, newest)

    source, what = best("best_AP", 4)
    assert source == tmp_path / "checkpoint-4/ema"
    assert what == "the average of the weights after step 4, the best of 3 evaluations by AP"
    assert best("best_AP", 6)[0] == newest
    assert best("AP", 4) == (tmp_path / "checkpoint-4", "those after step 4, the best of 3 evaluations by AP")
    assert best("eval_ema_AP", 6)[0] == newest / "ema"
    assert best("best_AP", None, [])[0] == newest / "ema"  # nothing was held out


def test_the_card_states_the_ap_of_these_very_weights(finished, copy):
    run = finished[0]
    card, ap = (run.output_dir / "README.md").read_text(encoding="utf-8"), run.evaluation.metrics["AP"]
    assert is_ours(card)
    low, high = run.evaluation.intervals["AP"]
    assert f"| AP, mean over IoU 0.50 to 0.95 | {ap:.3f} | {low:.3f} to {high:.3f} |" in card
    assert f"**AP {run.test.metrics['AP']:.3f}**" in card
    assert f"value: {round(ap, 4)}" in card  # in the metadata
    assert "starting from random weights" in card
    assert "the best of 2 evaluations by AP" in card
    for name in ("curves.png", "confusion.png", "mistakes.png"):
        assert f"]({name})" in card
    assert f"**Best threshold: {run.evaluation.best.threshold:.2f}**" in card
    assert f"threshold={round(run.evaluation.best.threshold, 2)}" in card
    counts = {row["name"]: row["num_objects"] for row in run.evaluation.per_class}
    assert all(f"| {name} | {count} |" in card for name, count in counts.items())
    assert read_json(run.output_dir / "results.json")["metrics"]["AP"] == ap

    model = AutoModelForObjectDetection.from_pretrained(copy)
    evaluation = model.config.provenance["training"]["evaluation"]
    assert evaluation["weights"] == weights_digest(model)
    with torch.no_grad():
        model.model.level_embed.add_(1) if hasattr(model.model, "level_embed") else next(model.parameters()).add_(1)
    model.save_pretrained(copy)
    card = (copy / "README.md").read_text(encoding="utf-8")
    assert "AP was not measured with these weights" in card
    assert "curves.png" not in card


def test_history_is_a_table_with_a_row_for_each_step(finished):
    run = finished[0]
    with (run.output_dir / "history.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4"]
    last = next(entry for entry in reversed(run.trainer.state.log_history) if "eval_AP" in entry)
    assert float(rows[-1]["eval_ema_AP"]) == last["eval_ema_AP"]
    assert float(rows[0]["loss"]) > 0
    with Image.open(run.output_dir / "curves.png") as curves:
        assert curves.width > 2 * curves.height


def test_a_finished_run_is_reported_anew_and_not_trained(finished, folder, copy, caplog):
    before = (copy / "model.safetensors").read_bytes()
    (copy / "results.json").unlink()
    for checkpoint in copy.glob("checkpoint-*"):  # they take room
        shutil.rmtree(checkpoint)
    run, _ = run_quietly(folder / "data", output_dir=copy, resume=True, num_train_epochs=2)
    assert run.trainer is None
    assert "initial states" not in caplog.text  # nothing does
    assert run.evaluation.metrics == finished[0].evaluation.metrics
    assert read_json(copy / "results.json")["metrics"]["AP"] == finished[0].evaluation.metrics["AP"]
    assert (copy / "model.safetensors").read_bytes() == before
    assert "starting from random weights" in (copy / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"is finished, .*num_train_epochs 5; it was 2 before.*--model"):
        run_quietly(folder / "data", output_dir=copy, resume=True, num_train_epochs=5)


def test_an_unfinished_run_goes_on_with_its_own_settings(finished, folder, copy, monkeypatch):
    """As after a kill between the first checkpoint and the second; nothing is repeated but the data and the folder."""
    record = read_json(copy / "run.json")
    del record["finished"], record["weights"]
    (copy / "run.json").write_text(json.dumps(record))
    shutil.rmtree(copy / "checkpoint-4")
    for name in ("model.safetensors", "last"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr(report, "save_report", lambda *args: [])  # drawing takes seconds
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run = train(folder / "data", output_dir=copy, resume=True)
    assert run.trainer.state.global_step == 4
    assert "resumed after step 2" in printed.getvalue()
    assert_same(copy / "model.safetensors", finished[0].output_dir / "model.safetensors")
    assert_same(copy / "last/model.safetensors", finished[0].output_dir / "last/model.safetensors")
    assert "starting from random weights" in (copy / "README.md").read_text(encoding="utf-8")


def test_a_damaged_checkpoint_is_named(finished, folder, copy):
    record = read_json(copy / "run.json")
    (copy / "run.json").write_text(json.dumps(record | {"finished": False}))
    os.truncate(copy / "checkpoint-4/model.safetensors", 1000)
    with pytest.raises(ValueError, match=r"checkpoint-4/model.safetensors is damaged .*continues from the newest of"):
        train(folder / "data", output_dir=copy, resume=True)


def test_a_checkpoint_with_zeroed_blocks_is_named(finished, folder, copy):
    """As a damaged disk leaves it. The file still loads, so only its checksum tells."""
    record = read_json(copy / "run.json")
    (copy / "run.json").write_text(json.dumps(record | {"finished": False}))
    path = copy / "checkpoint-4/model.safetensors"
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(4096) + whole[middle + 4096 :])
    with pytest.raises(
        ValueError, match=r"model.safetensors is damaged \(its checksum .* the newest of \['checkpoint-2'\]"
    ):
        train(folder / "data", output_dir=copy, resume=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [("optimizer.pt", {"x": 1}), ("scheduler.pt", {"x": 1}), ("ema/ema.json", None)],
)
def test_what_is_whole_and_does_not_fit_is_named(finished, folder, copy, name, content):
    record = read_json(copy / "run.json")
    (copy / "run.json").write_text(json.dumps(record | {"finished": False}))
    newest = max(copy.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    (newest / "checksums.json").unlink()
    before = {path.name for path in copy.iterdir()}
    if content is None:
        (newest / name).write_text('{"decay": 0.5}')
    else:
        torch.save(content, newest / name)
    with pytest.raises(ValueError, match=r"is damaged \(it has no .*Delete the folder .*resume again"):
        run_quietly(folder / "data", output_dir=copy, resume=True)
    assert {path.name for path in copy.iterdir()} == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": 3}'])
def test_a_damaged_record_is_named(folder, copy, content):
    (copy / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run.json is damaged .*newest of them as --model"):
        train(folder / "data", output_dir=copy, resume=True)


def test_an_empty_recipe_stops_no_resume(finished, folder, copy, monkeypatch, caplog):
    record = read_json(copy / "run.json")
    (copy / "run.json").write_text(json.dumps(record | {"finished": False}))
    (copy / "recipe.json").write_text("")
    monkeypatch.setattr(report, "save_report", lambda *args: [])
    run_quietly(folder / "data", output_dir=copy, resume=True)
    assert "recipe.json is damaged" in caplog.text
    assert read_json(copy / "recipe.json") == read_json(finished[0].output_dir / "recipe.json")


def test_other_data_of_the_same_counts_are_noticed(folder, copy, tmp_path):
    replaced = shutil.copytree(folder / "data", tmp_path / "data")
    path = replaced / "train/annotations.json"
    content = read_json(path)
    content["annotations"][0]["bbox"][2] -= 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"The training images differ from the run in .*boxes"):
        train(replaced, output_dir=copy, resume=True)


def test_a_run_is_resumed_from_another_working_directory(folder, tmp_path, monkeypatch):
    """And with the data elsewhere."""

    def stop(self, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(DinoDetrTrainer, "train", stop)
    monkeypatch.chdir(folder)
    with pytest.raises(KeyboardInterrupt):
        run_quietly("data", model="untrained", output_dir=tmp_path / "out")
    shutil.copytree(folder / "data", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_quietly("moved", model=folder / "untrained", output_dir="out", resume=True)


def test_a_run_that_is_not_there_is_started_with_a_word(folder, tmp_path):
    _, printed = run_quietly(
        folder / "data", model=folder / "untrained", output_dir=tmp_path / "typo", resume=True, dry_run=True
    )
    assert f"there is no run in {tmp_path / 'typo'} to resume" in printed
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(("recipe", "is_warned"), [(None, False), ("finetune", True), ("scratch", False)])
def test_a_low_learning_rate_of_random_weights_is_warned_of(folder, tmp_path, recipe, is_warned):
    places = {"model": folder / "untrained", "output_dir": tmp_path / "o"}
    run = train(folder / "data", **places, recipe=recipe, report_to="none", use_cpu=True, dry_run=True)
    assert any("5e-05 is too low" in one and "--recipe scratch" in one for one in run.preflight.warnings) == is_warned
    assert run.preflight.plan["recipe"] == (recipe or "scratch")


def test_a_model_without_weights_is_to_be_trained_first(folder):
    with pytest.raises(FileNotFoundError, match=r"no weights; train it first with dino-hf train DATASET --model"):
        Predictor(folder / "untrained")


def test_trained_weights_are_not_warned_of(finished, folder, tmp_path):
    run, _ = run_quietly(folder / "data", model=finished[0].output_dir, output_dir=tmp_path / "o", dry_run=True)
    assert not any("random weights" in one for one in run.preflight.warnings)


def test_bad_images_are_counted_before_the_first_step(folder, tmp_path):
    data = shutil.copytree(folder / "data", tmp_path / "data")
    spoilt = sorted((data / "train").glob("*.png"))[2]
    spoilt.write_bytes(spoilt.read_bytes()[:-60])
    places = {"model": folder / "untrained", "output_dir": tmp_path / "out", "dry_run": True}
    run, printed = run_quietly(data, **places)
    assert run.preflight.data["images"]["train"] == 9
    assert "1 of 10 train images cannot be used" in printed
    with pytest.raises(ValueError, match="1 of 10 train images cannot be used"):
        run_quietly(data, on_bad_image="raise", **places)
    with pytest.raises(ValueError, match=r"on_bad_image='ignore' must be"):
        run_quietly(data, on_bad_image="ignore", **places)


def test_workers_are_counted_by_usable_cores(folder, monkeypatch):
    args = get_recipe("finetune").training_arguments("o", report_to="none", use_cpu=True)
    monkeypatch.setattr(plan_module.os, "sched_getaffinity", lambda process: {1, 5, 6, 7, 9}, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (plan_module._usable_cores(), plan_module.processes_here(args)) == (5, 2)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), world_size=2)
    assert (_processes_per_device(args), _processes_per_device(on_gpu)) == (2, 1)  # each process has its own GPU
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.delattr(plan_module.os, "sched_getaffinity")
    monkeypatch.setattr(plan_module.os, "cpu_count", lambda: None)
    assert (plan_module._usable_cores(), plan_module.processes_here(args)) == (1, 1)


def test_a_run_has_the_users_augmentation_and_is_resumed_only_with_it(folder, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "calls = []\n\n\ndef augmentation(sample):\n    calls.append(sample['image'].shape)\n    return sample\n"
    )
    settings = {"output_dir": tmp_path / "out", "max_steps": 2, "save_steps": 1, "dataloader_num_workers": 0}
    run, _ = run_quietly(folder / "data", model=folder / "untrained", augmentation=str(file), **settings)
    own = run.trainer._train_transform.own.pipeline
    assert len(own.__globals__["calls"]) >= 2
    record = read_json(run.output_dir / "run.json")
    assert record["augmentation"]["name"] == f"{file}:augmentation"
    (run.output_dir / "run.json").write_text(json.dumps(record | {"finished": False}))
    shutil.rmtree(run.output_dir / "checkpoint-2")
    with pytest.raises(ValueError, match="Name it again to resume"):
        run_quietly(folder / "data", output_dir=run.output_dir, resume=True)
    before = load_file(run.output_dir / "last/model.safetensors")
    run_quietly(folder / "data", output_dir=run.output_dir, resume=True, augmentation=str(file))
    after = load_file(run.output_dir / "last/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_runs_in_one_folder_are_refused(folder, tmp_path, monkeypatch):
    def start_another(self, **settings):
        monkeypatch.setattr(run_lock, "_held", set())  # as in another process
        run_quietly(folder / "data", output_dir=tmp_path / "out", resume=True)

    monkeypatch.setattr(DinoDetrTrainer, "train", start_another)
    with pytest.raises(ValueError, match=rf"Process {os.getpid()} on .* trains in "):
        run_quietly(folder / "data", model=folder / "untrained", output_dir=tmp_path / "out")


def test_a_folder_that_is_not_free_is_refused(finished, folder, copy, tmp_path):
    data = folder / "data"
    with pytest.raises(FileExistsError, match=r"has a run in it; choose another folder, or continue it by --resume"):
        train(data, output_dir=copy)
    with pytest.raises(ValueError, match=r"started with model .*untrained, not with other"):
        train(data, output_dir=copy, model="other", resume=True)
    message = "had 10 training images and 5 held-out images of 5 classes. These data have 5 and None, of 5 classes"
    with pytest.raises(ValueError, match=message):
        train(load_data(data).validation, output_dir=copy, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for resume in (True, False):
        with pytest.raises(
            FileExistsError, match=r"mine has files that are not of a run; choose a new or empty folder"
        ):
            train(data, output_dir=tmp_path / "mine", resume=resume)
    with pytest.raises(FileExistsError, match=r"thesis.txt is not a folder; choose another place"):
        train(data, output_dir=tmp_path / "mine/thesis.txt")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_dry_run_tells_and_leaves_nothing(finished, folder, tmp_path):
    run, printed = run_quietly(
        folder / "data", model=finished[0].output_dir, output_dir=tmp_path / "out", dry_run=True, batch_size=3
    )
    assert not (tmp_path / "out").exists()
    assert "Kept 5 of 5 classes: disc, box, triangle, star, ring" in printed
    assert run.preflight.plan["images_per_step"] == {
        "all": 9,
        "of_a_batch": 3,
        "processes": 1,
        "accumulated": 3,
        "of_the_recipe": 8,
    }
    assert any(line.startswith("images per step 9") for line in run.preflight.plan["departures"])
    assert run.evaluation is run.trainer is None


def test_a_dry_run_tells_what_is_done_for_rare_classes(folder, tmp_path):
    settings = {"model": folder / "untrained", "output_dir": tmp_path / "out", "dry_run": True, "batch_size": 3}
    options = {"repeat_threshold": 1.0, "class_weights": {"star": 2.5}}
    run, printed = run_quietly(folder / "data", **settings, **options)
    repeats = run.preflight.plan["repeats"]
    assert repeats["images"] == 10 < repeats["images_per_epoch"]
    assert run.preflight.plan["steps_per_epoch"] == -(-repeats["images_per_epoch"] // 9)
    assert f"{repeats['images_per_epoch']} images in an epoch instead of 10; images with " in " ".join(printed.split())
    assert "star 2.5, disc 1, box 1" in printed
    assert any(line.startswith("repeat_threshold 1, ") for line in run.preflight.plan["departures"])
    with pytest.raises(ValueError, match="no class 'sun'"):
        run_quietly(folder / "data", **settings, class_weights={"sun": 2.0})


def test_classes_are_carried_over_by_name(finished, folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder / "data/train", data / "train")
    path = data / "train/annotations.json"
    content = read_json(path)
    for category in content["categories"]:
        category["name"] = {"disc": "Disc", "star": "sheriff"}.get(category["name"], category["name"])
    path.write_text(json.dumps(content))
    run, _ = run_quietly(data, model=finished[0].output_dir, output_dir=tmp_path / "out", dry_run=True, seed=3)
    kept, new, dropped = run.preflight.model["notes"]
    assert kept.startswith("Kept 4 of 5 classes: Disc (was disc)")
    assert (new, dropped) == ("New: sheriff", "Dropped: star")
    assert any("held out" in note and "seed 3" in note for note in run.preflight.data["notes"])


def test_data_without_held_out_images_train_to_the_end(folder, tmp_path):
    data = load_data(folder / "data")
    run, printed = run_quietly(
        data.train._replace(name="scenes"),
        model=folder / "untrained",
        output_dir=tmp_path / "out",
        max_steps=1,
        ema_decay=None,
        report_to=None,  # TensorBoard is installed here
    )
    assert list((tmp_path / "out/runs").glob("*/events.*"))
    assert run.evaluation is run.test is None
    assert "step 1 of 1: loss" in printed
    assert "those after the last step, 1; there was no evaluation to choose by" in printed
    assert_same(tmp_path / "out/model.safetensors", tmp_path / "out/last/model.safetensors")
    assert "No AP of these weights was recorded" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "out/results.json").exists()
    pair, _ = run_quietly(
        (data.train, data.validation), model=folder / "untrained", output_dir=tmp_path / "new", dry_run=True
    )
    assert pair.preflight.data["images"] == {"train": 10, "validation": 5, "test": None}
    with pytest.raises(ValueError, match="has no images to train on"):
        train(DetectionData(None, data.validation, None, [], "here"), output_dir=tmp_path / "new")
    empty = data.train._replace(
        dataset=data.train.dataset.map(lambda row: {"objects": {n: [] for n in row["objects"]}})
    )
    for pair, what in (
        ((empty, data.validation), "10 images to train on"),
        ((data.train, empty), "10 images held out"),
    ):
        with pytest.raises(ValueError, match=f"None of the {what} in .* has a box, so"):
            train(pair, output_dir=tmp_path / "new")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": "x"}, "One of the settings .*'max_steps': 'x'.* has a value of a wrong type"),
        ({"batch_size": "many"}, "batch_size='many' must be a number of images, or \"auto\""),
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"recipe": "best"}, "There is no recipe 'best'"),
        ({"save_strategy": "no"}, "save_strategy='no': a run evaluates and saves at the same"),
        ({"eval_strategy": "no"}, "eval_strategy='no'"),
        ({"max_steps": 0}, "max_steps=0 trains nothing"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be at least 1"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1 must be at least 0"),
        ({"seed": 2**32}, "seed=4294967296 must be a whole number, at least 0 and less than 4,294,967,296"),
        ({"eval_steps": 2, "save_steps": 3}, "eval_steps=2, save_steps=3.* only eval_steps"),
        ({"eval_strategy": "epoch", "eval_steps": 2}, "eval_steps=2.* only eval_steps"),
        ({"warmup_ratio": 0.1}, "no setting 'warmup_ratio'"),
        ({"optim": "sgd"}, "optim is set by the recipe"),
    ],
)
def test_settings_that_cannot_be_meant(folder, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run_quietly(
            folder / "data", model=folder / "untrained", output_dir=tmp_path / "out", **{"dry_run": True} | settings
        )
    assert not (tmp_path / "out").exists()


def test_data_that_the_doctor_would_refuse_are_not_trained_on(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder / "data", broken)
    path = broken / "train/annotations.json"
    content = read_json(path)
    content["annotations"][0]["bbox"] = [500, 500, 20, 20]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"completely outside .* `dino-hf doctor "):
        train(broken, model=folder / "untrained", output_dir=tmp_path / "out")


def corners(split):
    """The boxes as (x0, y0, x1, y1), which are read as (x, y, width, height)."""

    def change(row):
        boxes = [[x, y, x + width, y + height] for x, y, width, height in row["objects"]["bbox"]]
        return {"objects": row["objects"] | {"bbox": boxes}}

    return split.map(change)


@pytest.mark.parametrize("way", ["DatasetDict", "stream", "pair", "DetectionData", "CocoData"])
def test_every_way_in_has_the_same_checks(folder, tmp_path, way):
    data = load_data(folder / "data")
    names = dict(enumerate(data.train.id2label.values()))
    train_rows, held_out_rows = corners(data.train.dataset), corners(data.validation.dataset)
    parts = [part._replace(dataset=rows) for part, rows in ((data.train, train_rows), (data.validation, held_out_rows))]
    given = {
        "DatasetDict": DatasetDict({"train": train_rows, "validation": held_out_rows}),
        "stream": {"train": train_rows.to_iterable_dataset(), "validation": held_out_rows.to_iterable_dataset()},
        "pair": tuple(parts),
        "DetectionData": data._replace(train=parts[0], validation=parts[1]),
        "CocoData": parts[0],
    }[way]
    settings = {"model": folder / "untrained", "output_dir": tmp_path / "out", "dry_run": True}
    with pytest.raises(ValueError, match=r"corners|x0"):
        run_quietly(given, **settings)
    assert not (tmp_path / "out").exists()
    run, _ = run_quietly(given, **settings, trust_boxes=True)
    if way not in ("DatasetDict", "stream"):  # whose classes have no names
        assert set(run.preflight.data["classes"]) == set(names.values())


def test_findings_of_objects_name_classes_and_what_to_do(folder, tmp_path):
    data = load_data(folder / "data")
    counts = [len(objects["bbox"]) for objects in data.validation.dataset["objects"]]
    few = data.validation.dataset.select([counts.index(max(counts))])
    data = data._replace(validation=data.validation._replace(dataset=few))
    run, _ = run_quietly(data, model=folder / "untrained", output_dir=tmp_path / "out", dry_run=True)
    assert any("dino_hf.doctor.inspect(dino_hf.data.read_raw(data))" in warning for warning in run.preflight.warnings)


def test_copies_of_training_images_among_those_measured_on_are_told(folder, tmp_path):
    data = load_data(folder / "data")
    settings = {"model": folder / "untrained", "output_dir": tmp_path / "out", "dry_run": True}
    apart, _ = run_quietly(data, **settings)
    assert not any("copies of training images" in warning for warning in apart.preflight.warnings)
    mixed = data.validation._replace(
        dataset=concatenate_datasets([data.validation.dataset, data.train.dataset.take(2)])
    )
    run, _ = run_quietly(data._replace(validation=mixed), **settings)
    told = [warning for warning in run.preflight.warnings if "copies of training images" in warning]
    assert len(told) == 1
    assert told[0].startswith("2 of 7 validation images are copies of training images")


def test_a_stream_is_read_once(folder, tmp_path):
    rows, calls = load_data(folder / "data").train.dataset, []

    def read():
        calls.append(1)
        yield from rows.with_format(None)

    stream = IterableDataset.from_generator(read, features=rows.features)
    run, _ = run_quietly(stream, model=folder / "untrained", output_dir=tmp_path / "out", dry_run=True)
    assert len(calls) == 1
    images = run.preflight.data["images"]
    assert images["train"] + images["validation"] == len(rows)


def test_one_process_reads_a_stream_for_all(tmp_path):
    run_processes("shared_stream", 2, tmp_path)


def test_without_the_training_doctor_its_figures_are_not_there(folder, tmp_path):
    settings = {"model": folder / "untrained", "output_dir": tmp_path / "out", "max_steps": 1}
    run, _ = run_quietly(folder / "data", **settings, training_doctor=False)
    assert not any(name.startswith("doctor/") for entry in run.trainer.state.log_history for name in entry)
    assert not list(run.output_dir.rglob("training_doctor.json"))
    assert read_json(run.output_dir / "run.json")["training_doctor"] is False


@pytest.mark.parametrize(("batch_size", "cure"), [(4, "--resume and --batch-size 2, or"), (1, "and smaller images")])
def test_memory_that_runs_out_has_a_cure(folder, tmp_path, monkeypatch, batch_size, cure):
    def run_out(self, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DinoDetrTrainer, "train", run_out)
    with pytest.raises(ValueError, match=f"Batches of {batch_size} do not fit into the memory of cpu.*{cure}"):
        run_quietly(folder / "data", model=folder / "untrained", output_dir=tmp_path / "out", batch_size=batch_size)


def test_a_run_that_is_stopped_says_how_to_go_on(folder, tmp_path, monkeypatch):
    def stop(self, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(DinoDetrTrainer, "train", stop)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_quietly(folder / "data", model=folder / "untrained", output_dir=tmp_path / "out")
    assert stopped.value.__notes__ == ["0 steps are done; --resume continues from the newest checkpoint."]


def test_an_evaluation_that_is_stopped_says_how_to_go_on(finished, folder, copy, monkeypatch):
    def stop(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "evaluate_model", stop)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_quietly(folder / "data", output_dir=copy, resume=True)
    assert stopped.value.__notes__ == ["All steps are done; --resume continues with the evaluation."]


def test_evaluation_within_epochs(folder, tmp_path):
    run, _ = run_quietly(
        folder / "data", model=folder / "untrained", output_dir=tmp_path / "o", dry_run=True, eval_steps=1, max_steps=3
    )
    assert (run.preflight.plan["steps"], run.preflight.plan["evaluations"]) == (3, 3)


@pytest.mark.slow
def test_two_processes_share_a_run_without_being_told_of_the_cpu(folder, tmp_path):
    """Alone, each would write into the folder of the other."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    words = ["--recipe", "finetune", "--max-steps", "2", "--report-to", "none", "--num-denoising", "5"]
    places = ["--model", folder / "untrained", "--output-dir", tmp_path / "out"]
    done = subprocess.run(
        [*launch, "dino_hf.cli.app", "train", folder / "data", *places, *words],
        env=environment_of_scripts(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("has the best weights") == 1
    per_step = read_json(tmp_path / "out/preflight.json")["plan"]["images_per_step"]
    assert (per_step["processes"], per_step["all"]) == (2, 8)
    assert read_json(tmp_path / "out/results.json")["metrics"].keys() >= {"AP"}


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, "co-dino", "align-detr", "stable-dino"])
def test_a_run_that_was_killed_several_times_ends_with_the_same_weights(folder, tmp_path, recipe):
    """In the first epoch, in the second, in the third, while the best weights are saved, in the evaluation at the end."""
    shutil.copytree(folder / "untrained", tmp_path / "untrained")
    architecture = {} if recipe is None else get_recipe(recipe).architecture
    tiny_config(num_denoising=5, **architecture).save_pretrained(tmp_path / "untrained")
    for name, num_images, seed in (("train", 14, 0), ("validation", 5, 1)):
        make_scenes(tmp_path / "data" / name, num_images, seed=seed)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / "scripts/kill_train.py"), str(tmp_path), *filter(None, [recipe])],
        env=environment_of_scripts(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("model.safetensors", "last/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    results = [read_json(tmp_path / name / "results.json") for name in ("killed", "whole")]
    assert results[0]["metrics"] == results[1]["metrics"]
    if recipe is not None:
        config = AutoModelForObjectDetection.from_pretrained(tmp_path / "killed").config
        settings = get_recipe(recipe).model_settings | architecture
        names = ("class_loss", "queries_per_box", "cls_loss_coefficient", "negative_noise_start", *architecture)
        assert {name: getattr(config, name) for name in names} == {name: settings[name] for name in names}
        assert read_json(tmp_path / "killed/preprocessor_config.json").get("nms") == get_recipe(recipe).nms
