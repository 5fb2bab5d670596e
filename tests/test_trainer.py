"""The stock Trainer trains, scores, saves and resumes the model; nothing of it is ours but data, collator and metric."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForObjectDetection, Trainer, TrainingArguments, pipeline, set_seed

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common.scenes import make_scenes
from dino_hf.training import CocoEvaluator, DetectionTransform, load_coco
from helpers import SWIN, small_trainer, tiny_config

PROCESSOR = DinoDetrImageProcessor(size={"shortest_edge": 72, "longest_edge": 112})
ARGUMENT_NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in ARGUMENT_NAMES else "gradient_checkpointing"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    train = make_scenes(folder / "train", 12, seed=0)
    held_out = make_scenes(folder / "eval", 5, seed=1)  # the last batch of 2 is not full
    train = load_coco(train, train.parent)
    return train, load_coco(held_out, held_out.parent, like=train)


def make_trainer(data, folder, config=None, **changes) -> Trainer:
    set_seed(0)
    model = DinoDetrForObjectDetection(config or tiny_config(num_denoising=10, id2label=data[0].id2label))
    settings = {"max_steps": 4, "per_device_eval_batch_size": 2, "logging_steps": 1}
    return small_trainer(data, folder, model, PROCESSOR, **settings | changes)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(first, second):
    assert set(first) == set(second)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different


def test_training_lowers_the_loss_and_moves_every_trainable_parameter(data, tmp_path):
    trainer = make_trainer(data, tmp_path, max_steps=30, learning_rate=3e-3)
    before, loss_before = weights(trainer), trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * loss_before
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained


def test_evaluation_gives_coco_scores_and_loss(data, tmp_path):
    trainer = make_trainer(data, tmp_path)
    scores = trainer.evaluate()
    assert {"eval_loss", "eval_AP", "eval_AP50", "eval_AR_100", "eval_AP_class_disc"} <= set(scores)
    assert 0 <= scores["eval_AP"] <= 1
    assert scores["eval_loss"] > 0


@pytest.mark.parametrize("flat", [False, True])
def test_an_evaluator_scores_its_own_data_only(data, tmp_path, flat):
    trainer = make_trainer(data, tmp_path, batch_eval_metrics=flat)
    others = trainer.train_dataset.select(range(5))  # their ids are among those of the held-out images
    with pytest.raises(ValueError, match=r"Image 1 is evaluated with .* its own evaluator"):
        trainer.evaluate(others)
    assert trainer.evaluate()["eval_AP"] >= 0
    trainer.compute_metrics = CocoEvaluator(data[0], PROCESSOR)
    assert trainer.evaluate(others)["eval_AP"] >= 0


def test_batches_that_are_not_joined_are_refused_by_the_evaluator(data, tmp_path):
    with pytest.raises(ValueError, match=r"are a list, but .* eval_do_concat_batches=True"):
        make_trainer(data, tmp_path, eval_do_concat_batches=False).evaluate()


def test_flat_memory_evaluation_gives_the_same_scores(data, tmp_path):
    whole = make_trainer(data, tmp_path).evaluate()
    flat = make_trainer(data, tmp_path, batch_eval_metrics=True).evaluate()
    names = [name for name in whole if name.startswith(("eval_AP", "eval_AR"))]
    assert [flat[name] for name in names] == [whole[name] for name in names]


def test_predictions_are_loss_parts_logits_and_boxes_only(data, tmp_path):
    predictions, label_ids, _ = make_trainer(data, tmp_path).predict(
        data[1].dataset.with_transform(DetectionTransform(PROCESSOR))
    )
    loss_dict, logits, boxes = predictions
    assert logits.shape == (5, 15, 5)
    assert boxes.shape == (5, 15, 4)
    assert "loss_ce" in loss_dict
    assert label_ids["image_id"].tolist() == [1, 2, 3, 4, 5]
    assert label_ids["class_labels"].shape[0] == 5


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(data, tmp_path):
    whole = make_trainer(data, tmp_path / "whole", max_steps=6)
    whole.train()

    first = make_trainer(data, tmp_path / "halves", max_steps=6, save_strategy="steps", save_steps=3)
    first.train()  # saves at step 3 as a run that is killed there would have
    second = make_trainer(data, tmp_path / "halves", max_steps=6)
    torch.rand(7)  # the state of the random numbers must come from the checkpoint
    second.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-3"))
    assert second.state.global_step == 6
    assert len(losses(second)) == 6
    assert_equal(weights(whole), weights(second))


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_the_best_model_is_loaded_at_the_end_without_losing_a_tensor(backbone, data, tmp_path):
    config = tiny_config(num_denoising=10) if backbone == "resnet" else tiny_config(backbone_config=SWIN)
    trainer = make_trainer(
        data,
        tmp_path,
        config,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    loaded = AutoModelForObjectDetection.from_pretrained(best)
    assert_equal(weights(trainer), loaded.state_dict())


def test_gradient_accumulation_takes_the_mean_of_its_batches(data, tmp_path):
    """Two batches of equal size and a plain gradient step: the step is the mean of the two gradients."""
    trainer = make_trainer(data, tmp_path, tiny_config(num_denoising=0), max_steps=1, gradient_accumulation_steps=2)
    before = weights(trainer)
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(2), strict=False)]
    model = DinoDetrForObjectDetection(trainer.model.config)
    model.load_state_dict(before)
    for batch in batches:
        (model(**batch).loss / 2).backward()

    gradients = {}

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    trainer = make_trainer(
        data, tmp_path, tiny_config(num_denoising=0), max_steps=1, gradient_accumulation_steps=2, max_grad_norm=0
    )
    trainer.optimizer = Spy(trainer.model.parameters(), lr=0.0)
    trainer.train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # float32, and a sum in another order
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("changes", [{"bf16": True}, {CHECKPOINTING: True}, {"bf16": True, CHECKPOINTING: True}])
def test_bfloat16_and_activation_checkpointing_train(changes, data, tmp_path):
    plain = make_trainer(data, tmp_path / "plain")
    plain.train()
    trainer = make_trainer(data, tmp_path / "changed", **changes)
    trainer.train()
    # bfloat16 has 8 bits and can choose other queries; checkpointing computes the same again
    tolerance = 0.1 if "bf16" in changes else 1e-4
    assert losses(trainer) == pytest.approx(losses(plain), rel=tolerance)


def test_the_saved_model_detects_through_a_pipeline(data, tmp_path, capfd):
    trainer = make_trainer(data, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    detector = pipeline("object-detection", model=str(tmp_path / "model"), device="cpu")
    row = data[1].dataset[0]
    path = tmp_path / "image.png"
    row["image"].save(path)
    found = detector(str(path), threshold=0.0)
    assert 0 < len(found) <= 15 * 5
    assert {entry["label"] for entry in found} <= set(data[0].id2label.values())
    assert [entry["score"] for entry in found] == sorted((entry["score"] for entry in found), reverse=True)
    assert set(found[0]["box"]) == {"xmin", "ymin", "xmax", "ymax"}
    assert detector([row["image"], str(path)], threshold=0.0)[1] == found
    assert "is not supported" not in capfd.readouterr().err
