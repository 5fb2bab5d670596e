"""The doctor's figures against loops written out; that training does not notice it; and that its figures reach the logs."""

import copy
import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import generalized_box_iou
from transformers import Trainer, TrainerCallback, set_seed

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common.scenes import make_scenes
from dino_hf.model.box_ops import cxcywh_to_xyxy
from dino_hf.model.matcher import Matches
from dino_hf.training import DetectionCollator, DetectionTransform, diagnosis, load_coco
from dino_hf.training.diagnosis import (
    BoxPrediction,
    Match,
    MatchHistory,
    TrainingDoctor,
    average_largest,
    changes,
    find_box_predictions,
    find_dead_classes,
    find_detector,
    merge,
)
from helpers import small_trainer, tiny_config
from processes import run_processes
from scripts.training_doctor import logged_figures

PROCESSOR = DinoDetrImageProcessor(size={"shortest_edge": 72, "longest_edge": 112})
PARTS = {"backbone", "encoder", "query_selection", "denoising", "decoder"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder / "train", 7, seed=1)
    make_scenes(folder / "eval", 5, seed=9)  # one empty, one with a crowd; the last batch of 2 is not full
    return folder


@pytest.fixture(scope="module")
def data(folder):
    train = load_coco(folder / "train" / "annotations.json", folder / "train")
    held_out = load_coco(folder / "eval" / "annotations.json", folder / "eval", like=train)
    assert [] in [objects["bbox"] for objects in train.dataset["objects"]]
    return train, held_out


def make_trainer(data, folder, config=None, model=None, **changes) -> Trainer:
    set_seed(0)
    if model is None:
        model = DinoDetrForObjectDetection(config or tiny_config(num_denoising=10, id2label=data[0].id2label))
    settings = {"max_steps": 4, "per_device_eval_batch_size": 2, "logging_steps": 1}
    trainer = small_trainer(data, folder, model, PROCESSOR, **settings | changes)
    trainer.compute_metrics = None  # not what is tested here
    return trainer


def examined(trainer, **settings) -> TrainingDoctor:
    doctor = TrainingDoctor(trainer, **settings)
    trainer.add_callback(doctor)
    return doctor


def figures(trainer, name) -> list[float]:
    return [entry[f"doctor/{name}"] for entry in trainer.state.log_history if f"doctor/{name}" in entry]


def logged(trainer, name) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Recorder(TrainerCallback):
    """Raw loss terms of every training forward pass, and gradient norms of every step."""

    def __init__(self, model):
        self.loss_dicts, self.norms = [], []
        model.register_forward_hook(lambda model, args, outputs: self.loss_dicts.append(outputs.loss_dict))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        squares = dict.fromkeys(PARTS, 0.0)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[name.split(".")[1]] += parameter.grad.double().square().sum().item()
        self.norms.append({part: math.sqrt(square) for part, square in squares.items()})


def weigh(loss_dict, suffix):
    return sum(
        weight * loss_dict[name + suffix].item()
        for name, weight in (("loss_ce", 1), ("loss_bbox", 5), ("loss_giou", 2))
    )


def test_matching_and_denoising_loss_are_the_parts_of_the_logged_loss(data, tmp_path):
    trainer = make_trainer(
        data, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=1, logging_steps=2
    )
    examined(trainer)
    recorder = Recorder(trainer.model)
    trainer.train()
    assert len(recorder.loss_dicts) == 8 - 1  # 7 images an epoch: the last step of the first one has a batch less
    matching, denoising = figures(trainer, "loss_matching"), figures(trainer, "loss_denoising")
    # Trainer and doctor add float32 numbers in different orders.
    assert [a + b for a, b in zip(matching, denoising, strict=True)] == pytest.approx(logged(trainer, "loss"), rel=1e-5)
    first = recorder.loss_dicts[:4]  # two steps of two batches
    assert matching[0] == pytest.approx(
        sum(weigh(losses, suffix) for losses in first for suffix in ("_interm", "_0", "_1", "")) / 4, rel=1e-5
    )
    assert figures(trainer, "denoising_ratio")[0] == pytest.approx(
        sum(weigh(losses, "_dn") for losses in first) / sum(weigh(losses, "") for losses in first), rel=1e-5
    )


def test_without_denoising_all_loss_is_of_matching(data, tmp_path):
    trainer = make_trainer(data, tmp_path, config=tiny_config(num_denoising=0), max_steps=2)
    examined(trainer)
    trainer.train()
    assert figures(trainer, "loss_matching") == pytest.approx(logged(trainer, "loss"), rel=1e-5)
    assert not figures(trainer, "loss_denoising")
    assert not figures(trainer, "denoising_ratio")
    assert not figures(trainer, "grad_norm_denoising")


def test_gradient_norms_are_those_before_clipping(data, tmp_path):
    def norms(max_grad_norm):
        trainer = make_trainer(data, tmp_path, max_steps=1, max_grad_norm=max_grad_norm)
        examined(trainer)
        recorder = Recorder(trainer.model)
        trainer.add_callback(recorder)
        trainer.train()
        [total] = logged(trainer, "grad_norm")
        return {part: figures(trainer, f"grad_norm_{part}")[0] for part in PARTS}, total, recorder.norms[0]

    found, total, clipped = norms(0.1)
    assert math.hypot(*clipped.values()) == pytest.approx(0.1, rel=1e-4)  # the library clips to a little less
    found_unclipped, _, unclipped = norms(0)
    assert min(unclipped.values()) > 0
    assert total > 1
    # The scale that undoes the clipping is known to float32.
    assert found == pytest.approx(unclipped, rel=1e-5)
    assert found_unclipped == pytest.approx(unclipped, rel=1e-5)


def test_a_frozen_part_has_no_gradient_norm(data, tmp_path):
    trainer = make_trainer(data, tmp_path, max_steps=1)
    trainer.model.model.encoder.requires_grad_(False)
    examined(trainer)
    trainer.train()
    reported = {name for entry in trainer.state.log_history for name in entry if name.startswith("doctor/grad_norm_")}
    assert reported == {f"doctor/grad_norm_{part}" for part in PARTS - {"encoder"}}


def match_by_hand(model, sample):
    """Query, anchor and score of each box of a held-out image, alone and matched for itself."""
    labels = {key: value[None] for key, value in sample["labels"].items()}
    with torch.no_grad():
        outputs = model.eval()(sample["pixel_values"][None], labels=[sample["labels"]])
    cost = torch.zeros(outputs.logits.shape[1], labels["boxes"].shape[1])
    for column, (label, box) in enumerate(zip(labels["class_labels"][0], labels["boxes"][0], strict=True)):
        p = outputs.logits[0, :, label].sigmoid()
        focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
        giou = generalized_box_iou(cxcywh_to_xyxy(outputs.pred_boxes[0]), cxcywh_to_xyxy(box[None]))[:, 0]
        cost[:, column] = 2 * focal + 5 * (outputs.pred_boxes[0] - box).abs().sum(-1) - 2 * giou
    queries, columns = linear_sum_assignment(cost)
    answers = {}
    for query, column in zip(queries, columns, strict=True):
        score = outputs.logits[0, query, labels["class_labels"][0, column]].sigmoid().item()
        answers[int(column)] = int(query), outputs.enc_topk_bboxes[0, query].tolist(), score
    return answers


def test_figures_of_an_evaluation_are_those_of_a_loop_over_images_and_boxes(data, tmp_path):
    # One image a batch, so that the loop, which pads nothing, sees the same pixels.
    trainer = make_trainer(
        data, tmp_path, max_steps=6, per_device_eval_batch_size=1, eval_strategy="steps", eval_steps=3
    )
    doctor = examined(trainer, k=3)
    by_hand = []

    class Loop(TrainerCallback):
        def on_evaluate(self, args, state, control, model, **kwargs):
            rows = data[1].dataset.with_transform(DetectionTransform(PROCESSOR))
            by_hand.append({int(row["labels"]["image_id"]): match_by_hand(model, row) for row in rows})

    trainer.add_callback(Loop())
    trainer.train()

    distances, small, best = [], [], {}
    for row in data[1].dataset.remove_columns("image"):
        objects = row["objects"]
        real = [index for index, iscrowd in enumerate(objects["iscrowd"]) if not iscrowd]
        for place, index in enumerate(real):
            _, anchor, score = by_hand[1][row["image_id"]][place]
            x, y, w, h = objects["bbox"][index]
            box = [(x + w / 2) / row["width"], (y + h / 2) / row["height"], w / row["width"], h / row["height"]]
            distances.append(sum(abs(a - b) for a, b in zip(anchor, box, strict=True)))
            if w * h < 32 * 32:
                small.append(distances[-1])
            label = objects["category"][index]
            best[label] = max(best.get(label, 0), score)
    assert 3 < len(small) < len(distances)
    # The model's numbers are float32.
    assert figures(trainer, "atd_3")[1] == pytest.approx(sum(sorted(distances)[-3:]) / 3, rel=1e-4)
    assert figures(trainer, "atd_3_small")[1] == pytest.approx(sum(sorted(small)[-3:]) / 3, rel=1e-4)
    dead = [label for label, score in sorted(best.items()) if score <= 0.05]
    assert figures(trainer, "dead_classes")[1] == len(dead)
    assert doctor.dead_classes == [data[0].id2label[label] for label in dead]

    keys = [(image_id, place) for image_id, answers in by_hand[0].items() for place in answers]
    before, now = ([answers[image_id][place] for image_id, place in keys] for answers in by_hand)
    changed = [a[0] != b[0] for a, b in zip(before, now, strict=True)]
    overlaps = [
        generalized_box_iou(*(cxcywh_to_xyxy(torch.tensor([match[1]])) for match in pair)).item()
        for pair in zip(before, now, strict=True)
    ]
    assert 0 < sum(changed) < len(changed)
    assert min(abs(overlap - 0.5) for overlap in overlaps) > 1e-3  # none that rounding could tip
    assert figures(trainer, "match_changed") == [pytest.approx(sum(changed) / len(changed))]
    assert figures(trainer, "match_moved") == [
        pytest.approx(sum(overlap < 0.5 for overlap in overlaps) / len(overlaps))
    ]
    # After the training log of its step comes the doctor's, after the evaluation's the doctor's of that.
    kinds = [
        "doctor" if any(name.startswith("doctor/") for name in entry) else "eval" if "eval_loss" in entry else "loss"
        for entry in trainer.state.log_history[:-1]
    ]
    assert kinds == [*["loss", "doctor"] * 3, "eval", "doctor"] * 2
    assert not any(math.isnan(value) for entry in trainer.state.log_history for value in entry.values())


def answer(query=0, anchor=(0.5, 0.5, 0.2, 0.2), label=0, score=0.9, distance=0.1, is_small=False):
    return BoxPrediction(Match(query, list(anchor)), distance, is_small, label, score)


def test_changes_are_counted_over_the_boxes_of_both_evaluations():
    before = {
        (1, 0): Match(3, [0.5, 0.5, 0.2, 0.2]),
        (1, 1): Match(4, [0.5, 0.5, 0.2, 0.2]),
        (2, 0): Match(5, [0.5, 0.5, 0.2, 0.2]),
        (9, 0): Match(6, [0.5, 0.5, 0.2, 0.2]),
    }
    now = {
        (1, 0): Match(3, [0.5, 0.5, 0.2, 0.21]),
        (1, 1): Match(7, [0.5, 0.5, 0.2, 0.2]),  # another query at the same place
        (2, 0): Match(5, [0.5, 0.6, 0.2, 0.2]),  # the same query elsewhere: half of each box is shared, a third of both
        (3, 0): Match(6, [0.5, 0.5, 0.2, 0.2]),
    }
    assert changes(before, now) == {"match_changed": pytest.approx(1 / 3), "match_moved": pytest.approx(1 / 3)}
    assert changes({}, now) == {}
    assert changes(before, {(3, 0): now[3, 0]}) == {}


def test_the_largest_are_averaged_or_all_if_they_are_fewer():
    assert average_largest([1.0, 5.0, 2.0, 4.0], 2) == 4.5
    assert average_largest([1.0, 5.0], 100) == 3


def test_a_class_lives_by_its_best_score():
    answers = [
        answer(label=2, score=0.01),
        answer(label=2, score=0.2),
        answer(label=0, score=0.04),
        answer(label=7, score=0.05),
    ]
    assert find_dead_classes(answers) == [0, 7]


def test_an_image_that_two_processes_saw_counts_once():
    first = {(1, 0): answer(query=1), (3, 0): answer(query=2)}
    second = {(2, 0): answer(query=3), (1, 0): answer(query=4)}
    merged = merge([first, second])
    assert list(merged) == [(1, 0), (2, 0), (3, 0)]
    assert [entry.match.query for entry in merged.values()] == [1, 3, 2]


def test_a_history_survives_its_file(tmp_path):
    history, again = MatchHistory(), MatchHistory()
    history.remember({(12, 0): Match(3, [0.123456, 0.5, 0.2, 1.0]), (12, 1): Match(0, [0.5, 0.5, 0.2, 0.2])})
    history.save(tmp_path)
    again.load(tmp_path)
    assert again.matches == {(12, 0): Match(3, [0.1235, 0.5, 0.2, 1.0]), (12, 1): Match(0, [0.5, 0.5, 0.2, 0.2])}
    again.load(None)
    assert again.matches == {}


@pytest.mark.parametrize(
    "content", ["{}x", "[[1, 2]]", "[[1, 0, 3, 0.5]]", "[" * 100_000, "3", '[["a", 0, 1, 0, 0, 0, 0]]']
)
def test_a_damaged_history_is_told_and_forgotten(tmp_path, caplog, content):
    (tmp_path / "training_doctor.json").write_text(content)
    history = MatchHistory()
    history.load(tmp_path)
    assert history.matches == {}
    assert "training_doctor.json cannot be read" in caplog.text
    assert len(caplog.text) < 500


def test_training_does_not_notice_the_doctor(data, tmp_path):
    def train(is_examined):
        trainer = make_trainer(data, tmp_path, eval_strategy="steps", eval_steps=2)
        if is_examined:
            examined(trainer)
        trainer.train()
        others = [
            {name: value for name, value in entry.items() if name in ("loss", "grad_norm", "eval_loss", "step")}
            for entry in trainer.state.log_history
            if not any(name.startswith("doctor/") for name in entry)
        ]
        return trainer.model.state_dict(), others, torch.rand(3)

    (plain, plain_log, plain_draw), (watched, watched_log, watched_draw) = train(False), train(True)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert plain_log == watched_log
    assert torch.equal(plain_draw, watched_draw)


def test_figures_reach_tensorboard(data, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer = make_trainer(data, tmp_path, report_to="tensorboard", max_steps=2, eval_strategy="steps", eval_steps=1)
    examined(trainer)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    tags = {tag for tag in events.Tags()["scalars"] if "doctor" in tag}
    names = {"loss_matching", "loss_denoising", "denoising_ratio", *(f"grad_norm_{part}" for part in PARTS)}
    names |= {"match_changed", "match_moved", "atd_100", "atd_100_small", "dead_classes"}
    assert tags == {f"train/doctor/{name}" for name in names}
    for name in names:
        scalars = events.Scalars(f"train/doctor/{name}")
        assert [scalar.step for scalar in scalars] == ([2] if name.startswith("match_") else [1, 2])
        assert [scalar.value for scalar in scalars] == pytest.approx(figures(trainer, name), rel=1e-6)  # float32


def test_a_resumed_run_goes_on_comparing(data, tmp_path):
    def make(**changes):
        settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(data, tmp_path, **settings | changes)
        return trainer, examined(trainer)

    whole, _ = make()
    whole.train()
    for restore in (True, False):
        resumed, doctor = make(save_strategy="no", restore_callback_states_from_checkpoint=restore)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert doctor in resumed.callback_handler.callbacks
        assert len(figures(resumed, "match_changed")) == 1
        for name in ("match_changed", "match_moved", "atd_100", "loss_matching", "grad_norm_decoder"):
            assert figures(whole, name) == figures(resumed, name)


def test_a_run_that_had_no_doctor_can_go_on_with_one(data, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    make_trainer(data, tmp_path, **settings).train()
    trainer = make_trainer(data, tmp_path, **settings)
    examined(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(figures(trainer, "atd_100")) == 2
    assert len(figures(trainer, "match_changed")) == 1
    rows = json.loads((tmp_path / "checkpoint-4" / "training_doctor.json").read_text())
    state = (tmp_path / "checkpoint-4" / "trainer_state.json").read_text()
    assert "MatchHistory" not in state
    assert not (tmp_path / "checkpoint-2" / "training_doctor.json").exists()
    assert len(rows) == sum(objects["iscrowd"].count(0) for objects in data[1].dataset["objects"])


def test_other_evaluations_are_not_looked_at(data, tmp_path):
    # Without denoising, which would draw other noise after other evaluations.
    config = tiny_config(num_denoising=0, id2label=data[0].id2label)
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(data, tmp_path, config, **settings)
    doctor = examined(trainer)
    collate = DetectionCollator()

    class Others(TrainerCallback):
        """Behind the doctor, evaluates other weights and other data, predicts, and looks at images itself."""

        is_busy = False

        def on_step_end(self, args, state, control, **kwargs):
            trainer.predict(trainer.train_dataset)

        def on_evaluate(self, args, state, control, model, **kwargs):
            if self.is_busy:
                return
            self.is_busy = True
            backup = copy.deepcopy(model.state_dict())
            with doctor.paused(), torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.5)
                trainer.evaluate()
            trainer.evaluate(trainer.train_dataset, metric_key_prefix="test")
            with torch.no_grad():
                model(**collate([trainer.eval_dataset[0], trainer.eval_dataset[2]]))
            model.load_state_dict(backup)
            self.is_busy = False

    trainer.add_callback(Others())
    trainer.train()

    plain = make_trainer(data, tmp_path, config, **settings)
    examined(plain)
    plain.train()
    for name, count in (("match_changed", 1), ("match_moved", 1), ("atd_100", 2), ("atd_100_small", 2)):
        assert figures(trainer, name) == figures(plain, name)
        assert len(figures(plain, name)) == count


def test_in_several_folders_data_sets_the_first_is_examined(data, tmp_path):
    def train(*names):
        trainer = make_trainer(data, tmp_path, max_steps=1, eval_strategy="steps")
        sets = {"held_out": trainer.eval_dataset, "seen": trainer.train_dataset}
        trainer.eval_dataset = {name: sets[name] for name in names}
        examined(trainer)
        trainer.train()
        return figures(trainer, "atd_100")

    assert train("held_out", "seen") == train("held_out") != train("seen")


def test_a_copy_of_the_model_is_not_watched(data, tmp_path):
    trainer = make_trainer(data, tmp_path, max_steps=1)
    doctor = examined(trainer)
    seen = []

    class Copy(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            before = doctor._losses.clone()
            copied = copy.deepcopy(model)
            sample = DetectionCollator()([trainer.train_dataset[0], trainer.train_dataset[1]])
            with torch.no_grad():
                copied(**sample)
            seen.append(torch.equal(doctor._losses, before))

    trainer.add_callback(Copy())
    trainer.train()
    assert seen == [True]
    assert not trainer.model._forward_hooks


def test_a_run_that_was_broken_off_leaves_nothing_behind(data, tmp_path):
    trainer = make_trainer(data, tmp_path, max_steps=1)
    examined(trainer)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer.add_callback(Break())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Break)
    trainer.train()
    assert figures(trainer, "loss_matching")
    assert not trainer.model._forward_hooks


# peft asks transformers by the name before last
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_model_with_adapters_is_watched(data, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = DinoDetrForObjectDetection(tiny_config(num_denoising=10, id2label=data[0].id2label))
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    trainer = make_trainer(
        data, tmp_path, model=model, max_steps=2, eval_strategy="steps", eval_steps=1, label_names=["labels"]
    )
    examined(trainer)
    trainer.train()
    assert len(figures(trainer, "loss_matching")) == 2
    assert len(figures(trainer, "atd_100")) == 2
    assert figures(trainer, "grad_norm_decoder") == pytest.approx(logged(trainer, "grad_norm"))
    assert not figures(trainer, "grad_norm_encoder")


@pytest.mark.slow
# torch looks at the gradient of a tensor that has none, while it compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_is_watched(data, tmp_path):
    def train(**settings):
        trainer = make_trainer(data, tmp_path, max_steps=1, eval_strategy="steps", **settings)
        examined(trainer)
        trainer.train()
        return [figures(trainer, name)[0] for name in ("loss_matching", "atd_100", "grad_norm_encoder")]

    compiled = train(torch_compile=True, torch_compile_backend="eager")
    assert compiled == pytest.approx(train(), rel=1e-4)  # float32, other orders of addition


def test_labels_without_image_ids_are_told(data, tmp_path, caplog):
    trainer = make_trainer(data, tmp_path, max_steps=1, eval_strategy="steps")
    examined(trainer)
    collate = DetectionCollator()

    def anonymous(samples):
        batch = collate(samples)
        del batch["labels"]["image_id"]
        return batch

    trainer.data_collator = anonymous
    trainer.train()
    assert "TrainingDoctor saw no boxes in this evaluation" in caplog.text
    assert not figures(trainer, "atd_100")


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="a Linear, has no DinoDetrForObjectDetection"):
        find_detector(torch.nn.Linear(2, 3))


def test_dead_classes_are_named_in_the_log(data, tmp_path, caplog):
    trainer = make_trainer(data, tmp_path, max_steps=1, eval_strategy="steps", learning_rate=0.0)
    for head in trainer.model.model.decoder.heads:
        torch.nn.init.zeros_(head.class_head.weight)
        torch.nn.init.constant_(head.class_head.bias, -4.0)  # a score of 0.018
        torch.nn.init.constant_(head.class_head.bias[1:2], 0.0)
    doctor = examined(trainer)
    with caplog.at_level(logging.INFO, logger="dino_hf"):
        trainer.train()
    labels = {label for objects in data[1].dataset["objects"] for label in objects["category"]}
    assert doctor.dead_classes == [data[0].id2label[label] for label in sorted(labels - {1})]
    assert figures(trainer, "dead_classes") == [len(doctor.dead_classes)]
    assert f"Dead classes: {doctor.dead_classes}" in caplog.text


def test_two_processes_report_what_one_does(tmp_path):
    folder = tmp_path / "scenes"
    # Each pair has two boxes or more: with fewer, losses are normalised by one box a process, as in the release.
    make_scenes(folder / "train", 8, seed=4)
    make_scenes(folder / "eval", 5, seed=9)
    one = logged_figures(folder, num_processes=1)
    run_processes("training_doctor", 2, folder, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert [set(entry) for entry in first] == [set(entry) for entry in one]
    for found, expected in zip(first, one, strict=True):
        random = {name for name in expected if "denoising" in name or "grad_norm" in name}  # of its noise
        # Batches of other sizes are added in other orders.
        assert {name: found[name] for name in expected.keys() - random} == pytest.approx(
            {name: expected[name] for name in expected.keys() - random}, rel=1e-4
        )


def test_the_borders_of_what_the_doctor_counts():
    before = {(1, 0): Match(3, [0.5, 0.5, 0.3, 0.2])}
    for shift, share in ((0.0999, 0.0), (0.1001, 1.0)):  # of a box of 0.3: GIoU 0.5
        now = {(1, 0): Match(3, [0.5 + shift, 0.5, 0.3, 0.2])}
        assert changes(before, now) == {"match_changed": 0.0, "match_moved": share}
    assert find_dead_classes([answer(label=1, score=0.05), answer(label=2, score=0.0501)]) == [1]


CANVAS = {"size": {"shortest_edge": 96, "longest_edge": 96}, "canvas_value": 114}


def small_boxes(data, folder, processor):
    """Key of each held-out box -> whether it counts as small."""
    trainer = make_trainer(data, folder, max_steps=1, eval_strategy="steps")
    trainer.processing_class = processor
    trainer.eval_dataset = data[1].dataset.with_transform(DetectionTransform(processor))
    doctor, seen = examined(trainer), {}

    class Seen(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            seen.update(doctor._box_predictions)

    trainer.add_callback(Seen())
    trainer.train()
    return {key: prediction.is_small for key, prediction in seen.items()}


def test_small_objects_are_the_same_on_a_canvas(data, tmp_path, monkeypatch):
    """Boxes of labels are relative to the canvas, and areas count in the original image."""
    areas = [width * height for objects in data[1].dataset["objects"] for *_, width, height in objects["bbox"]]
    monkeypatch.setattr(diagnosis, "_SMALL_AREA", 0.97 * max(areas))
    on_canvas = small_boxes(data, tmp_path, DinoDetrImageProcessor(**CANVAS))
    assert set(on_canvas.values()) == {False, True}
    assert on_canvas == small_boxes(data, tmp_path, PROCESSOR)


@pytest.mark.parametrize(("height", "is_small"), [(31.9, True), (32.0, False)])
def test_objects_below_32_x_32_pixels_are_small(height, is_small):
    box = torch.tensor([[[0.5, 0.5, 0.5, height / 128]]])  # of 64 x 128 pixels, width and height
    labels = {
        "class_labels": torch.zeros(1, 1, dtype=torch.int64),
        "boxes": box,
        "orig_size": torch.tensor([[128, 64]]),
        "image_id": torch.tensor([5]),
    }
    outputs = SimpleNamespace(
        intermediate_logits=torch.zeros(1, 2, 1, 1), enc_topk_bboxes=box, logits=torch.zeros(1, 1, 1)
    )
    zero = torch.zeros(1, dtype=torch.int64)
    found = find_box_predictions(labels, outputs, Matches(zero, zero, zero, zero), labels["orig_size"])
    assert found[5, 0].is_small == is_small
