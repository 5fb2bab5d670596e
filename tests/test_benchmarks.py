"""The benchmarks run, at toy size: their figures are for docs/speed.md and docs/log.md."""

import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

import ablation
import bf16_accuracy
import ceilings
import coco_evaluation
import detectors
import gpu_check
import host_syncs
import image_processing
import inference
import loss as loss_benchmark
import new_classes
import pipeline as pipeline_benchmark
import rare_classes
import report
import scaling
import training_step
from common import Timed, parse_size
from dino_hf import DinoDetrImageProcessor
from dino_hf.common.scenes import CATEGORIES, draw_data
from dino_hf.model.quality_losses import CLASS_LOSSES
from dino_hf.training import get_recipe, load_coco
from helpers import tiny_config


def run(module, monkeypatch, folder: Path, *options: str) -> list[dict]:
    """What a script keeps, at toy size."""
    toy = ["--quick"] if module is not bf16_accuracy else []  # its size is that of the model and the data
    monkeypatch.setattr(sys, "argv", [module.__name__, *toy, "--output_dir", str(folder), *options])
    module.main()
    lines = (folder / f"{module.__name__}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def check_ratios(rows: list[dict]) -> None:
    """Of candidates that ran side by side: each is as much faster than another as that is slower."""
    for row in rows:
        assert row["milliseconds_min"] <= row["milliseconds"] <= row["milliseconds_max"]
        others = [other for other in rows if other["candidate"] != row["candidate"]]
        assert set(row["times_faster_than"]) == {other["candidate"] for other in others}
        for other in others:
            _, lowest, highest = row["times_faster_than"][other["candidate"]]
            _, inverse_lowest, inverse_highest = other["times_faster_than"][row["candidate"]]
            assert (1 / highest, 1 / lowest) == pytest.approx((inverse_lowest, inverse_highest), rel=2e-3)  # 4 digits


def test_inference_measures_all_detectors_in_both_dtypes(tmp_path, monkeypatch, capsys):
    rows = run(inference, monkeypatch, tmp_path, "--ceilings", "True")
    check_ratios(rows)
    assert {(row["detector"], row["dtype"]) for row in rows} == {
        (detector, dtype) for detector in detectors.DETECTORS for dtype in ("float32", "bfloat16")
    }
    assert all(row["arithmetic_share"] > 0 and row["bandwidth_share"] > 0 for row in rows)
    assert rows[0]["case"] == {"model": "toy", "size": "64x104", "batch_size": 2}
    assert rows[0].keys() >= {"torch", "transformers", "device", "threads", "date", "temporary_MiB"}
    assert "DINO with reference attention, bfloat16, eager" in capsys.readouterr().out


def test_a_candidate_that_fails_is_left_out_and_its_row_says_why(tmp_path, monkeypatch, capsys):
    original = inference.detection

    def detection(detector, model, *rest):
        if detector == detectors.DEFORMABLE:
            raise_error = torch.OutOfMemoryError("no memory left")

            def fail():
                raise raise_error

            return fail
        return original(detector, model, *rest)

    monkeypatch.setattr(inference, "detection", detection)
    rows = run(inference, monkeypatch, tmp_path, "--models", "toy", "--sizes", "64x104", "--batch_sizes", "2")
    assert [row["candidate"] for row in rows if "error" not in row] == [
        "DINO, float32, eager",
        "DINO with reference attention, float32, eager",
    ]
    assert rows[-1]["error"] == "OutOfMemoryError: no memory left"
    assert "Deformable DETR, float32, eager is left out" in capsys.readouterr().out


def test_the_grid_is_everything_with_everything_that_was_named():
    cases = inference.cases_of(
        inference.InferenceArguments(models=["swin-t", "toy"], batch_sizes=[1, 4], modes=["eager", "compiled"])
    )
    assert [case[:3] for case in cases] == [
        (model, "800x1333", batch_size) for model in ("swin-t", "toy") for batch_size in (1, 4)
    ]
    assert [str(one) for one in cases[0].candidates] == [
        "DINO, float32, eager",
        "DINO, float32, compiled",
        "DINO with reference attention, float32, eager",
        "Deformable DETR, float32, eager",
        "Deformable DETR, float32, compiled",
    ]
    assert len(inference.cases_of(inference.InferenceArguments(full=True))) == 3 * 2 * 2
    headline = inference.cases_of(inference.InferenceArguments())[0]
    assert headline[:4] == ("r50-4scale", "800x1333", 1, 5)


@pytest.mark.parametrize("model", ["r50-4scale", "r50-5scale", "swin-t"])
def test_both_detectors_have_the_same_sizes(model):
    ours, theirs = detectors.our_config(model), detectors.their_config(model)
    for name in (
        *("num_feature_levels", "d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim"),
        *("encoder_attention_heads", "decoder_attention_heads", "encoder_n_points", "decoder_n_points", "num_labels"),
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.num_queries == theirs.two_stage_num_proposals == theirs.num_queries == 900
    assert ours.backbone_config.to_dict() == theirs.backbone_config.to_dict()


def test_both_detectors_train_the_same_part_of_the_backbone():
    ours, theirs = (detectors.build(one, "toy") for one in (detectors.DINO, detectors.DEFORMABLE))

    def trained(model):
        return {name for name, one in model.named_parameters() if one.requires_grad}

    of_ours, of_theirs = (
        {name.partition("encoder.stages.")[2] for name in trained(model) if "encoder.stages." in name}
        for model in (ours, theirs)
    )
    assert {name[0] for name in of_ours} == {"1", "2", "3"}
    assert of_ours == of_theirs
    assert not any("embedder" in name for name in trained(ours) | trained(theirs))


def test_a_training_step_is_measured_with_its_loss_and_its_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        training_step, "peak_in_own_process", lambda detector, arguments: training_step.peak_of(detector, arguments)
    )
    rows = run(training_step, monkeypatch, tmp_path)
    check_ratios(rows)
    assert [row["candidate"] for row in rows] == [*detectors.DETECTORS, training_step.LOSS]
    share, lowest, highest = rows[-1]["share_of_step"]
    assert 0 < lowest <= share <= highest < 1
    assert all(row["peak_MiB"] > 0 for row in rows[:3])
    assert "% (" in capsys.readouterr().out


def test_a_peak_is_measured_in_a_process_of_its_own(monkeypatch, tmp_path, capfd):
    asked = []
    monkeypatch.setattr(
        training_step.subprocess,
        "run",
        lambda command, **more: (
            asked.append(command) or training_step.subprocess.CompletedProcess(command, 0, "12.5\n")
        ),
    )
    arguments = training_step.TrainingArguments(quick=True, num_boxes=3)
    assert training_step.peak_in_own_process(detectors.REFERENCE, arguments) == 12.5
    monkeypatch.setattr(sys, "argv", asked[0][1:])
    training_step.main()  # what that process does
    assert float(capfd.readouterr().out.split()[-1]) > 0


def test_a_step_changes_what_is_trained_and_the_loss_is_that_of_its_predictions():
    arguments = training_step.TrainingArguments(quick=True)
    model, step = training_step.step_of(detectors.DINO, arguments)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    criterion = model.criterion
    model.criterion = recording = training_step.RecordingLoss(criterion)
    step()
    changed = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    assert changed == {name for name, one in model.named_parameters() if one.requires_grad}
    gradients = recording.forward_and_backward()
    logits, boxes, _, denoising, _ = recording.last
    assert [one.shape for one in gradients] == [one.shape for one in (logits, boxes, denoising.logits, denoising.boxes)]
    assert all(one.abs().sum() > 0 for one in gradients)


@pytest.mark.parametrize("num_boxes", [20, 3])
def test_both_losses_of_the_benchmark_are_equal(num_boxes, tmp_path, monkeypatch, capsys):
    check_ratios(run(loss_benchmark, monkeypatch, tmp_path, "--num_boxes", str(num_boxes)))
    printed = capsys.readouterr().out
    assert float(printed.split("relative difference ")[1].split()[0]) < 1e-6
    assert "times as fast" in printed


def test_image_processors_and_pipelines_are_measured_side_by_side(tmp_path, monkeypatch):
    rows = run(image_processing, monkeypatch, tmp_path)
    assert [row["case"]["inputs"] for row in rows] == ["image"] * 4 + ["image and boxes"] * 4
    check_ratios(rows[:4])
    rows = run(pipeline_benchmark, monkeypatch, tmp_path, "--num_images", "3", "--batch_sizes", "2")
    check_ratios(rows)
    assert [row["candidate"] for row in rows] == [detectors.DINO, detectors.DEFORMABLE]


def test_both_evaluations_give_the_same_numbers(tmp_path, monkeypatch, capsys):
    rows = run(coco_evaluation, monkeypatch, tmp_path)
    check_ratios(rows)
    assert rows[0]["AP"] == rows[1]["AP"] > 0
    assert "all twelve numbers equal: True" in capsys.readouterr().out


def test_cost_is_measured_over_pixels_queries_and_boxes(tmp_path, monkeypatch):
    rows = run(scaling, monkeypatch, tmp_path)
    by_case = {over: [row for row in rows if row["case"]["over"] == over] for over in ("pixels", "queries", "boxes")}
    for part in by_case.values():
        check_ratios(part)
    assert [row["pixels"] for row in by_case["pixels"]] == 2 * [64 * 104, 96 * 160]
    assert [row["num_queries"] for row in by_case["queries"]] == [5, 20]
    assert [(row["part"], row["num_boxes"]) for row in by_case["boxes"]] == [
        (part, number) for part in ("step", "loss") for number in (1, 12)
    ]


def test_ap_in_bfloat16_is_compared_with_that_in_float32(tmp_path, monkeypatch, capsys):
    draw_data(tmp_path / "scenes", num_train=1, num_validation=3)
    config = tiny_config(id2label={index: f"{index}" for index in range(5)})
    source = json.loads((tmp_path / "scenes" / "untrained" / "config.json").read_text())
    config.set_classes({int(key): name for key, name in source["id2label"].items()}, source["category_ids"])
    detectors.DinoDetrForObjectDetection(config).save_pretrained(tmp_path / "model")
    DinoDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 80}).save_pretrained(tmp_path / "model")
    folders = ("--model", str(tmp_path / "model"), "--data", str(tmp_path / "scenes"))
    rows = run(bf16_accuracy, monkeypatch, tmp_path, *folders, "--num_bootstrap", "40")
    assert [row["candidate"] for row in rows] == ["float32", "bfloat16"]
    assert rows[1]["difference"] == pytest.approx(rows[1]["AP"] - rows[0]["AP"])
    assert rows[0]["case"]["images"] == 3
    assert "difference" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^error: There is no folder .*nothing"):
        run(bf16_accuracy, monkeypatch, tmp_path, *folders[2:], "--model", str(tmp_path / "nothing"))


def test_the_work_of_a_call_is_counted():
    left, right = torch.randn(5, 7), torch.randn(7, 3)
    work = ceilings.work_of(lambda: (left @ right).T.relu())
    assert work.flops == 2 * 5 * 7 * 3
    assert work.traffic == 4 * ((5 * 7 + 7 * 3 + 5 * 3) + 2 * (5 * 3))  # the transposed view costs nothing
    with_gradient = left.clone().requires_grad_()
    assert ceilings.work_of(lambda: (with_gradient @ right).sum().backward()).flops == 2 * work.flops
    model, images = detectors.build(detectors.DINO, "toy"), detectors.random_images(2, 64, 104)
    detect = detectors.detection(detectors.DINO, model, images)
    with ceilings._Traffic() as traffic:
        detect()
    assert ceilings.work_of(detect).traffic == traffic.bytes  # with norms folded, as they are where nothing is counted
    assert ceilings.measure_arithmetic("cpu", "float32", size=64) > 1e6
    assert ceilings.measure_bandwidth("cpu", num_bytes=2**16) > 1e6
    row = ceilings.shares(ceilings.Work(flops=10**9, traffic=10**8), 100.0, arithmetic=1e11, bandwidth=1e10)
    assert row == {"GFLOP": 1.0, "traffic_GB": 0.1, "arithmetic_share": 0.1, "bandwidth_share": 0.1}


def test_synchronisations_are_counted_with_the_lines_that_cause_them():
    def wait():
        warnings.warn("called a synchronizing CUDA operation (at x.cpp:1)", UserWarning, stacklevel=1)

    def step():
        wait()
        wait()
        warnings.warn("another", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="another"):
        found = host_syncs.stacks_of_syncs(step)
    assert sorted(found.values()) == [1, 1]
    for stack in found:
        assert [line.split()[-1] for line in stack[-2:]] == ["step", "wait"]
        assert all(Path(__file__).name in line for line in stack[-2:])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Timed(rounds=0), "rounds=0 must be at least 1"),
        (lambda: inference.InferenceArguments(batch_sizes=[2, 0]), "batch_sizes=0 must be at least 1"),
        (lambda: inference.InferenceArguments(sizes=["640x640", "800"]), "'800' is not a size; write height x width"),
        (lambda: scaling.ScalingArguments(boxes_size="x"), "'x' is not a size"),
        (lambda: scaling.ScalingArguments(dtype="tf32"), "dtype='tf32' needs --device cuda"),
        (lambda: inference.InferenceArguments(quick=True, full=True), "--quick and --full exclude each other"),
        (lambda: inference.InferenceArguments(models=["r101"]), "models='r101' must be one of r50-4scale, "),
        (lambda: inference.InferenceArguments(modes=["graphs"]), "modes='graphs' needs --device cuda"),
        (lambda: training_step.TrainingArguments(dtype="tf32"), "dtype='tf32' needs --device cuda"),
        (lambda: training_step.TrainingArguments(peak_of="DETR"), "peak_of='DETR' must be one of DINO, "),
        (lambda: coco_evaluation.EvaluationArguments(device="cuda"), "runs on the cpu only"),
        (lambda: parse_size("0x40"), "'0x40' is not a size"),
    ],
)
def test_settings_that_measure_nothing_are_refused(make, match):
    with pytest.raises(SystemExit, match=match):
        make()


@pytest.mark.parametrize("module", [loss_benchmark, ablation, report])
def test_an_option_that_there_is_not_is_one_sentence(module, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--number_of_boxes", "3"])
    with pytest.raises(SystemExit, match="error: there is no option '--number_of_boxes'; --help lists"):
        module.main()


def test_a_folder_that_cannot_be_is_told_before_anything_is_measured(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(loss_benchmark, "random_case", lambda *settings: pytest.fail("measured"))
    with pytest.raises(SystemExit, match=r"error: results cannot be saved, choose another --output_dir: .*file"):
        run(loss_benchmark, monkeypatch, tmp_path / "file" / "results")


def test_toys_are_those_detectors_and_rounds_that_were_named():
    arguments = inference.InferenceArguments(quick=True, rounds=1, detectors=[detectors.DINO])
    (case,) = inference.cases_of(arguments)
    assert case.rounds == 1
    assert [str(one) for one in case.candidates] == ["DINO, float32, eager", "DINO, bfloat16, eager"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_one_sentence():
    with pytest.raises(SystemExit, match="torch finds no CUDA device; use cpu"):
        host_syncs.SyncArguments()


def test_the_ablation_trains_every_variant_once_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    settings = {"num_train_images": 6, "num_eval_images": 4, "steps": 2, "batch_size": 2, "learning_rate": 1e-3}
    options = (x for name, value in settings.items() for x in (f"--{name}", str(value)))
    monkeypatch.setattr(
        "sys.argv", ["ablation", "--output_dir", str(tmp_path), "--seeds", "2", "--only", "ideas", *options]
    )
    scores = {"seed": 0, "AP": 0.25, "AP50": 0.5}
    done = [{"variant": name, "settings": settings, **scores} for name in list(ablation.IDEAS)[:3]]
    others = [{"variant": "DINO", "settings": settings | {"steps": 9}, **scores}]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in done + others))
    ablation.main()
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    pairs = [(one["variant"], one["seed"]) for one in runs if one["settings"] == settings]
    assert sorted(pairs) == sorted((name, seed) for name in ablation.IDEAS for seed in range(2))
    table = capsys.readouterr().out.strip().splitlines()[-6:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == list(ablation.IDEAS)


def test_the_losses_of_the_ablation_are_those_of_the_recipes():
    configs = {name: ablation.configure(name) for name in ablation.LOSSES}
    assert {config.class_loss for config in configs.values()} == set(CLASS_LOSSES) - {"focal"}
    for name, recipe in (("Align-DETR", "align-detr"), ("Stable-DINO", "stable-dino")):
        published, plain = get_recipe(recipe), get_recipe("paper-12ep").model_settings
        changed = {key: value for key, value in published.model_settings.items() if value != plain[key]}
        for key, value in (changed | published.architecture).items():
            factor = ablation.WEIGHT if key.endswith("coefficient") else 1
            assert getattr(configs[name], key) == factor * value, key


def test_the_table_of_the_ablation_compares_runs_of_one_seed():
    runs = [
        {"variant": variant, "seed": seed, "AP": ap, "AP50": 2 * ap}
        for variant, scores in {"DINO": (0.30, 0.40), "without denoising": (0.25, 0.33)}.items()
        for seed, ap in enumerate(scores)
    ]
    rows = ablation.table(runs).splitlines()[2:]
    assert rows[0] == "| DINO | 35.0 (30.0 to 40.0) | 70.0 |  |"
    assert rows[1] == "| without denoising | 29.0 (25.0 to 33.0) | 58.0 | -6.0 ± 1.0 |"


def test_the_table_of_rare_classes_compares_runs_of_one_seed():
    def one(variant, seed, ap):
        return {"variant": variant, "seed": seed, "AP": ap} | dict.fromkeys(CATEGORIES.values(), ap / 2)

    runs = [
        one("neither", 0, 0.3),
        one("neither", 1, 0.4),
        one("class_weights", 0, 0.32),
        one("class_weights", 1, 0.46),
    ]
    rows = rare_classes.table(runs).splitlines()[2:]
    assert rows[0] == "| neither | 35.0 | " + " | ".join(["17.5"] * 5) + " |"
    assert rows[1].startswith("| class_weights | 39.0 | 19.5 |")
    assert rows[2] == "| difference | +4.0 ± 2.0 | " + " | ".join(["+2.0 ± 1.0"] * 5) + " |"


@pytest.mark.slow
def test_rare_classes_are_measured_and_a_stopped_measurement_goes_on(tmp_path, monkeypatch, capsys):
    numbers = {"num_train_images": 8, "num_eval_images": 4, "steps_before": 1, "steps": 1, "seeds": 1}
    options = [text for name, number in numbers.items() for text in (f"--{name}", str(number))]
    monkeypatch.setattr("sys.argv", ["rare_classes", "--output_dir", str(tmp_path), *options])
    rare_classes.main()
    runs = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["variant"] for line in runs] == ["neither", "repeat_threshold", "class_weights"]
    (tmp_path / "runs.jsonl").write_text("\n".join(runs[:2]) + "\n")
    monkeypatch.setattr(rare_classes, "load_start", lambda *arguments: next(tmp_path.glob("start_*")))
    rare_classes.main()
    again = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert again[:2] == runs[:2]
    assert json.loads(again[2]) == json.loads(runs[2])


def test_the_table_of_new_classes_has_the_mean_and_the_seeds():
    runs = [{"variant": "before training", "seed": 0, "AP of old": 0.5, "disc": 0.5, "box": 0.4, "triangle": 0.6}]
    for seed, ap in enumerate((0.2, 0.3)):
        scores = dict.fromkeys(("AP of old", "AP of new", *CATEGORIES.values()), ap)
        runs.append({"variant": "neither", "seed": seed, "added boxes": 7} | scores)
    rows = new_classes.table(runs).splitlines()[2:]
    assert rows[0] == "| before training | 0.500 |  | 0.500 | 0.400 | 0.600 |  |  |  |"
    assert rows[1].startswith("| neither | 0.250 (0.200, 0.300) | 0.250 (0.200, 0.300) | 0.250 |")
    assert rows[1].endswith("| 0.250 | 7 |")


def test_boxes_of_old_classes_are_counted_as_right_once(tmp_path):
    scenes = new_classes.draw(tmp_path / "scenes", 6, seed=2)
    truth = load_coco(scenes / "old.json", scenes).dataset
    boxes, num_objects = {}, 0
    for row in truth:
        objects = [
            (label, box)
            for label, box, iscrowd in zip(
                *(row["objects"][name] for name in ("category", "bbox", "iscrowd")), strict=True
            )
            if not iscrowd
        ]
        num_objects += len(objects)
        boxes[row["image_id"]] = [(label, box, 0.9) for label, box in objects * 2]
    assert num_objects > 3
    assert new_classes.quality_of_boxes(scenes, boxes) == (0.5, 1.0)
    moved = {
        image_id: [((label + 1) % 3, box, score) for label, box, score in added] for image_id, added in boxes.items()
    }
    assert new_classes.quality_of_boxes(scenes, moved)[0] < 0.3  # the class is wrong


@pytest.mark.slow
def test_new_classes_are_measured_with_frozen_rows(tmp_path, monkeypatch):
    numbers = {
        "num_old_images": 8,
        "num_new_images": 8,
        "num_eval_images": 5,
        "steps_before": 1,
        "steps": 2,
        "seeds": 1,
    }
    options = [text for name, number in numbers.items() for text in (f"--{name}", str(number))]
    trained = []
    scores_of = new_classes.scores_of
    monkeypatch.setattr(
        new_classes, "scores_of", lambda trainer, names: trained.append(trainer) or scores_of(trainer, names)
    )
    variants = ("--variants", "neither", "rows frozen")
    monkeypatch.setattr("sys.argv", ["new_classes", "--output_dir", str(tmp_path), *options, *variants])
    new_classes.main()
    heads = [trainer.model.model.decoder.heads[0].class_head.weight for trainer in trained]
    assert torch.equal(heads[2][:3], heads[0])  # before training
    assert not torch.equal(heads[1][:3], heads[0])
    assert not torch.equal(heads[2][3:], heads[1][3:])


@pytest.mark.slow
def test_compiled_code_is_measured_beside_eager(tmp_path, monkeypatch):
    options = ("--models", "toy", "--sizes", "64x104", "--batch_sizes", "2", "--modes", "eager", "compiled", "dynamic")
    rows = run(inference, monkeypatch, tmp_path, *options, "--detectors", "DINO")
    check_ratios(rows)
    assert [row["mode"] for row in rows] == ["eager", "compiled", "dynamic"]


def test_the_scripts_that_make_and_the_gpu_check_run_exist(tmp_path):
    root = Path(__file__).parents[1]
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    listed = re.search(r"^BENCHMARKS := (.+)$", makefile, re.MULTILINE)[1].replace("findstring cuda", "")
    names = re.findall(r"benchmarks/(\w+)\.py", makefile) + re.findall(r"[a-z_]{4,}", listed)
    names += [Path(part.command[0]).stem for part in gpu_check.parts(tmp_path) if part.command[0].endswith(".py")]
    assert {"kernel_benchmark", "loss", "training_step", "gpu_check", "host_syncs"} <= set(names)
    assert [name for name in names if not (root / "benchmarks" / f"{name}.py").is_file()] == []
