"""What `DinoDetrTrainer` adds to the stock Trainer: the recipe, the average of the weights, the window, steps without numbers,
checkpoints that are whole. See test_resume.py for runs that are killed and test_trainer.py for the stock Trainer."""

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoImageProcessor, AutoModelForObjectDetection, TrainerCallback, set_seed

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common.scenes import make_scenes
from dino_hf.model.matcher import NonFinitePredictionsError
from dino_hf.runtime.weights_digest import weights_digest
from dino_hf.training import load_coco, record_training
from dino_hf.training.augmentation import Augmentation
from dino_hf.training.lora import add_lora
from dino_hf.training.losses import HeldOutLoss, num_own_images
from dino_hf.training.recipes import get_recipe
from dino_hf.training.steps import StepCallback
from dino_hf.training.trainer import DinoDetrTrainer
from dino_hf.training.training_record import recorded_images
from helpers import QUIET, tiny_config
from processes import run_processes

pytestmark = pytest.mark.usefixtures("_no_waiting_for_disks")
PROCESSOR = DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64})
AUGMENTATION = Augmentation(short_sides=(40, 48), longest_side=72, crop_short_sides=(48,), crop_sizes=(32, 44))
AS_THEY_ARE = Augmentation(horizontal_flip=0.0, short_sides=(40,), longest_side=60, crop=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Scenes to train on and held out, and four images of one size, which make batches without padding; two have no boxes."""
    folder = tmp_path_factory.mktemp("data")
    make_scenes(folder / "train", 7, seed=0)
    make_scenes(folder / "eval", 5, seed=1)
    make_uneven(folder / "uneven")
    return folder


def make_uneven(folder: Path) -> None:
    folder.mkdir()
    # No edge or centre is that of an anchor: there, the derivative of an absolute value jumps with the last bit.
    boxes = {1: [[4.3, 6.1, 19.7, 12.9], [30.7, 9.6, 14.2, 25.3], [1.9, 2.3, 51.1, 29.7]], 2: [[10.2, 5.4, 8.7, 29.9]]}
    boxes |= {3: [], 4: []}
    for image_id in boxes:
        pixels = torch.randint(256, (40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(image_id))
        Image.fromarray(pixels.numpy()).save(folder / f"{image_id}.png")
    content = {
        "images": [{"id": image_id, "file_name": f"{image_id}.png", "width": 60, "height": 40} for image_id in boxes],
        "categories": [{"id": 1, "name": "disc"}, {"id": 2, "name": "box"}],
        "annotations": [
            {
                "id": 10 * image_id + n,
                "image_id": image_id,
                "category_id": 1 + n % 2,
                "bbox": box,
                "area": box[2] * box[3],
            }
            for image_id, image_boxes in boxes.items()
            for n, box in enumerate(image_boxes)
        ],
    }
    (folder / "annotations.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def data(folder):
    train = load_coco(folder / "train/annotations.json", folder / "train")
    held_out = folder / "eval/annotations.json"
    return train, load_coco(held_out, held_out.parent, like=train)


@pytest.fixture
def _no_waiting_for_disks(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def make_recipe(**changes):
    settings = {
        "augmentation": AUGMENTATION,
        "ema_decay": 0.8,
        "ema_warmup_steps": 0,
        "early_stopping_patience": None,
        "model_settings": {"num_denoising": 10},
        "learning_rate": 1e-3,
    }
    return get_recipe("finetune", **settings | changes)


SAVING = {"save_strategy": "steps", "save_steps": 2}


def make_trainer(
    data, folder, recipe=None, model=None, held_out=True, max_detections=None, **changes
) -> DinoDetrTrainer:
    train = data[0]
    recipe = recipe or make_recipe()
    set_seed(0)
    model = model or DinoDetrForObjectDetection(tiny_config(num_denoising=10, id2label=train.id2label))
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 3,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
    }
    args = recipe.training_arguments(folder, **QUIET | settings | changes)
    return DinoDetrTrainer(
        *(model, args),
        recipe=recipe,
        train=train,
        held_out=data[1] if held_out else None,
        image_processor=PROCESSOR,
        max_detections=max_detections,
    )


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(first: dict, second: dict) -> None:
    assert set(first) == set(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def history(trainer, name) -> list:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


class At(TrainerCallback):
    """Calls a function at an event: `At(on_step_end=...)`, with the state of the run."""

    def __init__(self, **functions):
        for event, function in functions.items():
            setattr(self, event, lambda args, state, control, function=function, **kwargs: function(state))


# The recipe


def test_the_recipe_is_what_trains(data, tmp_path):
    recipe = make_recipe(
        learning_rate=2e-4,
        backbone_learning_rate=3e-5,
        lr_scheduler="step",
        lr_drop_epochs=(1,),
        warmup_steps=0,
        model_settings={"num_denoising": 5, "class_cost": 3.0, "focal_alpha": 0.3},
    )
    trainer = make_trainer(data, tmp_path, recipe, max_steps=5, weight_decay=0.02)
    trainer.train()
    assert trainer.model.config.num_denoising == trainer.model.model.denoising.num_denoising == 5
    assert trainer.model.criterion.cost.classes == 3.0
    assert trainer.model.criterion.alpha == 0.3
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {2e-4, 3e-5}
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.02}
    assert isinstance(
        trainer.lr_scheduler.scheduler if hasattr(trainer.lr_scheduler, "scheduler") else trainer.lr_scheduler, LambdaLR
    )
    # 7 images in batches of 3: three steps in an epoch
    assert history(trainer, "learning_rate") == pytest.approx([2e-4, 2e-4, 2e-4, 2e-5, 2e-5])


def test_more_detections_count_on_request(data, tmp_path):
    trainer = make_trainer(data, tmp_path, max_detections=150)
    assert (trainer.evaluator.max_detections, trainer.evaluator.top_k) == (150, 450)
    scores = trainer.evaluate()
    assert {"eval_AP", "eval_AR_100", "eval_AR_150"} <= set(scores)
    with pytest.raises(ValueError, match="max_detections=10 must be at least 100"):
        make_trainer(data, tmp_path, max_detections=10)


def test_departures_are_logged_once_and_kept_with_the_recipe(data, tmp_path, caplog):
    recipe = make_recipe(ema_decay=0.7)
    trainer = make_trainer(data, tmp_path, recipe)
    trainer.train()
    assert caplog.text.count("Departs from the recipe finetune: ema_decay 0.7") == 1
    assert "images per step 3, the recipe has 8" in caplog.text
    content = json.loads((tmp_path / "recipe.json").read_text())
    assert content["recipe"] == recipe.as_dict()
    assert content["departures"] == trainer.departures
    recorded = trainer.model.config.provenance["training"]["recipe"]
    assert (recorded["recipe"], recorded["schedule"]) == ("finetune", "cosine")
    assert "ema_decay 0.7" in recorded["departures_from_the_recipe"]


def test_record_training_may_be_called_to_say_more(data, tmp_path):
    trainer = make_trainer(data, tmp_path, max_steps=1)
    record_training(trainer, *data, license="apache-2.0")
    trainer.train()
    provenance = trainer.model.config.provenance
    assert provenance["license"] == "apache-2.0"
    assert (provenance["training"]["recipe"]["recipe"], provenance["training"]["steps"]) == ("finetune", 1)


def test_training_images_are_augmented_anew_in_each_epoch_and_held_out_ones_are_not(data, tmp_path):
    trainer = make_trainer(data, tmp_path, max_steps=7)
    seen = {0: [], 1: [], 2: []}
    trainer.add_callback(
        At(on_step_begin=lambda state: seen[state.global_step // 3].append(trainer.train_dataset[0]["pixel_values"]))
    )
    trainer.train()
    assert [len(images) for images in seen.values()] == [3, 3, 1]
    for images in seen.values():
        assert all(torch.equal(image, images[0]) for image in images)
    first, second, third = (images[0] for images in seen.values())
    assert not any(
        a.shape == b.shape and torch.equal(a, b) for a, b in ((first, second), (second, third), (first, third))
    )
    image = data[1].dataset[0]["image"]
    expected = PROCESSOR(images=[image], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(trainer.eval_dataset[0]["pixel_values"], expected)


# The window


@pytest.fixture(scope="module")
def uneven(folder):
    return load_coco(folder / "uneven/annotations.json", folder / "uneven"), None


def gradients_of_a_step(data, folder, recipe, **settings) -> tuple[float, dict[str, torch.Tensor]]:
    gradients = {}

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    set_seed(0)
    model = DinoDetrForObjectDetection(tiny_config(num_denoising=0, num_labels=2, id2label=data[0].id2label))
    trainer = make_trainer(
        data,
        folder,
        recipe,
        model,
        held_out=False,
        max_steps=1,
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        **settings,
    )
    trainer.optimizer = Spy(model.parameters(), lr=0.0)
    trainer.train()
    return history(trainer, "loss")[0], gradients


def test_a_window_is_one_large_batch(uneven, tmp_path):
    """Two batches, with four boxes and with none, against all four images at once."""
    recipe = make_recipe(augmentation=AS_THEY_ARE, ema_decay=None, model_settings={"num_denoising": 0})
    window = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    loss, expected = gradients_of_a_step(uneven, tmp_path / "once", recipe, per_device_train_batch_size=4)
    window_loss, gradients = gradients_of_a_step(uneven, tmp_path / "window", recipe, **window)
    assert window_loss == pytest.approx(loss, rel=1e-5)  # float32, and sums in another order
    assert set(gradients) == set(expected)
    # float32 again; the gradient of a key's bias is zero, and what is left of it is rounding of the others
    rounding = 1e-6 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=rounding, msg=name)

    plain = make_recipe(
        augmentation=AS_THEY_ARE, ema_decay=None, model_settings={"num_denoising": 0}, normalize_over_window=False
    )
    plain_loss, _ = gradients_of_a_step(uneven, tmp_path / "plain", plain, **window)
    # The mean of two losses, of which one is divided by its four boxes and the other by 1.
    assert not math.isclose(plain_loss, loss, rel_tol=0.05)


# The average of the weights


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_both_weights_are_evaluated_and_nothing_is_moved(precision, data, tmp_path):
    trainer = make_trainer(data, tmp_path, **precision)
    trainer.train()
    own, averaged = state(trainer.model), state(trainer.ema.module)
    assert trainer.ema.num_updates == 3
    assert any(not torch.equal(own[name], averaged[name]) for name in own)
    metrics = trainer.evaluate()
    assert_same(state(trainer.model), own)
    assert_same(state(trainer.ema.module), averaged)
    assert metrics["eval_loss"] != metrics["eval_ema_loss"]
    scores = {name.removeprefix("eval_ema_") for name in metrics if name.startswith("eval_ema_")}
    assert {"AP", "AP50", "AR_100", "AP_class_disc", "loss"} <= scores
    assert scores <= {name.removeprefix("eval_") for name in metrics}
    # a run of the averaged model as the model gives the same
    plain = make_trainer(data, tmp_path / "plain", make_recipe(ema_decay=None), **precision)
    for prefix, weights in (("eval_", own), ("eval_ema_", averaged)):
        plain.model.load_state_dict(weights)
        found = plain.evaluate()
        assert not [name for name in found if "ema" in name]
        assert metrics[f"{prefix}loss"] == found["eval_loss"]
        assert metrics[f"{prefix}AP50"] == found["eval_AP50"]
        assert metrics[f"{prefix}AR_100"] == found["eval_AR_100"]


def summed_loss(trainer) -> tuple[float, int]:
    """Losses of the held-out images, each alone and not divided by boxes, and their boxes."""
    total, num_boxes = 0.0, 0
    for index in range(len(trainer.eval_dataset)):
        batch = trainer.data_collator([trainer.eval_dataset[index]])
        with torch.no_grad():
            total += trainer.model.eval()(**batch, num_items_in_batch=1).loss.item()
        num_boxes += int((batch["labels"]["class_labels"] >= 0).sum())
    return total, num_boxes


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_held_out_loss_does_not_depend_on_the_batches(batch_size, uneven, tmp_path):
    """Four images of one size; two have no boxes."""
    both = uneven[0], uneven[0]
    model = DinoDetrForObjectDetection(tiny_config(num_labels=2, id2label=both[0].id2label))
    recipe = make_recipe(ema_decay=None)
    trainer = make_trainer(both, tmp_path, recipe, model, per_device_eval_batch_size=batch_size)
    total, num_boxes = summed_loss(trainer)
    assert num_boxes == 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / num_boxes, rel=1e-5)  # float32


def test_accelerate_fills_up_last_batches_and_what_it_repeats_does_not_count():
    state = SimpleNamespace(end_of_dataloader=True, remainder=5)
    shares = [
        num_own_images(SimpleNamespace(num_processes=3, process_index=rank, gradient_state=state), 3)
        for rank in range(3)
    ]
    assert shares == [3, 2, 0]
    assert num_own_images(SimpleNamespace(num_processes=1, process_index=0, gradient_state=state), 3) == 3
    state.end_of_dataloader = False
    assert num_own_images(SimpleNamespace(num_processes=3, process_index=2, gradient_state=state), 3) == 3


@pytest.mark.parametrize("keeps", [False, True])
def test_a_held_out_loss_that_is_nan_is_left_out_or_spoils_all(keeps):
    loss = HeldOutLoss(keeps_non_finite=keeps)
    for value, num_boxes in ((6.0, 2), (math.nan, 1), (9.0, 3)):
        loss.add(torch.tensor([0.1, 0.2, 0.3, value]), torch.tensor(num_boxes))
    alone = SimpleNamespace(device=torch.device("cpu"), reduce=lambda sums, how: sums)
    mean = loss.means(alone)["loss"]
    assert math.isnan(mean) if keeps else mean == 3.0
    assert set(HeldOutLoss(False).means(alone).values()) == {0.0}


PARTS = ("loss_ce", "loss_bbox", "loss_giou")


def test_the_parts_of_the_loss_are_logged_by_the_originals_names(data, tmp_path):
    """The model's own loss_dict of each batch, weighted and summed by hand."""
    trainer = make_trainer(
        data, tmp_path, make_recipe(ema_decay=None), max_steps=4, logging_steps=2, gradient_accumulation_steps=2
    )
    weights = trainer.model.criterion.weights
    seen = {"train": [], "eval": []}

    def look(module, args, kwargs, outputs):
        count = (kwargs["labels"]["class_labels"] != -100).sum()
        seen["train" if module.training else "eval"].append((trainer.state.global_step // 2, count, outputs.loss_dict))

    trainer.model.register_forward_hook(look, with_kwargs=True)
    trainer.train()
    for name in PARTS:
        expected = [
            sum(weights[name] * losses[name].item() for number, _, losses in seen["train"] if number == log) / 2
            for log in (0, 1)
        ]
        assert history(trainer, name) == pytest.approx(expected, rel=1e-5)
    assert all(
        sum(entry[name] for name in PARTS) < entry["loss"] for entry in trainer.state.log_history if "loss" in entry
    )

    metrics = trainer.evaluate()
    boxes = sum(count for _, count, _ in seen["eval"])
    for name in PARTS:
        expected = sum(weights[name] * losses[name] for _, _, losses in seen["eval"]) / boxes
        assert metrics[f"eval_{name}"] == pytest.approx(expected.item(), rel=1e-5)


def test_losses_of_an_evaluation_do_not_depend_on_its_batches(uneven, tmp_path):
    """Four images of one size with 3, 1, 0 and 0 boxes: padding would change the predictions."""
    data, results = (uneven[0], uneven[0]), []
    for size in (1, 3, 4):
        set_seed(0)
        model = DinoDetrForObjectDetection(tiny_config(num_labels=2, id2label=data[0].id2label, category_ids=[1, 2]))
        trainer = make_trainer(data, tmp_path, model=model, per_device_eval_batch_size=size)
        results.append(trainer.evaluate())
    for prefix in ("eval_", "eval_ema_"):
        for name in ("loss", *PARTS):
            values = [metrics[prefix + name] for metrics in results]
            assert values == pytest.approx([values[-1]] * 3, rel=1e-4)
    assert [result["eval_AP"] for result in results] == [results[0]["eval_AP"]] * 3


def test_several_held_out_sets_are_measured_each_by_its_own(data, tmp_path):
    train, held_out = data
    other = held_out._replace(dataset=held_out.dataset.select([0, 3, 4]), name="others")
    alone = [make_trainer((train, one), tmp_path / "alone").evaluate() for one in (other, held_out)]
    settings = {"eval_strategy": "steps", "eval_steps": 2, **SAVING, "metric_for_best_model": "new_AP"}
    trainer = make_trainer((train, {"new": other, "old": held_out}), tmp_path, max_steps=2, **settings)
    together = trainer.evaluate()
    for name, expected in zip(("new", "old"), alone, strict=True):
        for metric in ("AP", "AP50", "loss", "loss_ce", "ema_AP"):
            assert together[f"eval_{name}_{metric}"] == pytest.approx(expected[f"eval_{metric}"], rel=1e-5)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "eval_old_AP" in entry)
    assert trainer.state.best_metric == next(
        entry["eval_new_AP"] for entry in trainer.state.log_history if "eval_new_AP" in entry
    )
    assert entry["step"] == 2
    record = trainer.model.config.provenance["training"]["evaluation"]  # the first set is that of the card
    assert (record["dataset"], record["num_images"], record["step"]) == ("others", 3, 2)
    assert trainer.compute_metrics is trainer.evaluator


@pytest.mark.parametrize(
    ("name", "metric", "message"),
    [
        ("ema", None, "A held-out data set is called 'ema'"),
        ("a b", None, "A held-out data set is called 'a b'"),
        ("new", "AP", "metric_for_best_model='AP' is not a metric of any held-out data set"),
    ],
)
def test_names_of_held_out_sets_are_checked(data, tmp_path, name, metric, message):
    with pytest.raises(ValueError, match=message):
        make_trainer((data[0], {name: data[1]}), tmp_path, metric_for_best_model=metric)


def test_predictions_are_those_of_the_models_own_weights_unless_the_average_is_applied(data, tmp_path):
    trainer = make_trainer(data, tmp_path)
    trainer.train()
    own = trainer.predict(trainer.eval_dataset)
    assert not [name for name in own.metrics if "ema" in name]
    with trainer.ema.applied():
        averaged = trainer.predict(trainer.eval_dataset)
    metrics = trainer.evaluate()
    assert (own.metrics["test_loss"], averaged.metrics["test_loss"]) == (
        metrics["eval_loss"],
        metrics["eval_ema_loss"],
    )


def test_before_the_first_step_the_average_is_the_model(data, tmp_path):
    metrics = make_trainer(data, tmp_path).evaluate()
    assert metrics["eval_ema_loss"] == metrics["eval_loss"]
    assert metrics["eval_ema_AP"] == metrics["eval_AP"]


def test_steps_that_did_not_happen_do_not_count(data, tmp_path):
    """In float16, accelerate tells that its scaler left out a step; here it tells so of the second."""
    trainer = make_trainer(data, tmp_path)

    def overflow(state):
        trainer.optimizer._is_overflow = state.global_step == 1

    trainer.add_callback(At(on_pre_optimizer_step=overflow))
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.ema.num_updates == 2


def test_a_second_run_begins_a_new_average(data, tmp_path):
    trainer = make_trainer(data, tmp_path)
    trainer.train()
    trainer.train()
    assert trainer.ema.num_updates == 3


def test_the_average_is_saved_as_a_model_with_its_own_scores(data, tmp_path):
    trainer = make_trainer(
        data, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2
    )
    trainer.train()
    trainer.save_model(tmp_path / "model")
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "eval_ema_AP50" in entry}
    for folder, step in ((tmp_path / "checkpoint-2", 2), (tmp_path / "checkpoint-4", 4), (tmp_path / "model", 4)):
        averaged = AutoModelForObjectDetection.from_pretrained(folder / "ema")
        assert AutoImageProcessor.from_pretrained(folder / "ema").size == PROCESSOR.size
        provenance = averaged.config.provenance["training"]
        assert provenance["recipe"]["average_of_weights"] == "exponential, decay 0.8, 0 warm-up steps"
        evaluation = provenance["evaluation"]
        assert (evaluation["step"], evaluation["num_images"]) == (step, 5)
        assert evaluation["metrics"]["AP50"] == logged[step]["eval_ema_AP50"]
        assert evaluation["weights"] == weights_digest(averaged)
        assert "AP at IoU 0.50" in (folder / "ema/README.md").read_text()
        own = AutoModelForObjectDetection.from_pretrained(folder)
        assert own.config.provenance["training"]["evaluation"]["weights"] == weights_digest(own)
        assert "average_of_weights" not in own.config.provenance["training"]["recipe"]
    assert_same(state(averaged), state(trainer.ema.module))


def test_the_best_average_comes_with_the_best_weights(data, tmp_path, monkeypatch):
    """Ranked by what is measured with the average; here the first is best."""
    deleted, delete = [], shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda folder, **kwargs: deleted.append(Path(folder).name) or delete(folder, **kwargs)
    )
    trainer = make_trainer(
        data,
        tmp_path,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="ema_rank",
        greater_is_better=False,
    )
    kept = {}

    def rank(state):
        kept[state.global_step] = checkpoints(tmp_path)

    class Rank(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_ema_rank"] = state.global_step

    trainer.add_callback(Rank())
    trainer.add_callback(At(on_save=rank))
    trainer.train()
    assert kept == {
        2: ["checkpoint-2"],
        4: ["checkpoint-2", "checkpoint-4"],  # the best and the newest
        6: ["checkpoint-2", "checkpoint-6"],
    }
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert not (tmp_path / "_unfinished").exists()
    assert {"discarded-checkpoint-4", "discarded-checkpoint-6"} <= set(deleted)
    assert not [name for name in deleted if name.startswith("checkpoint")]  # half of one would look whole
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "checkpoint-2"
    saved = json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text())
    assert Path(saved["best_model_checkpoint"]) == tmp_path / "checkpoint-2"
    assert trainer.ema.num_updates == 2
    assert_same(state(trainer.model), state(AutoModelForObjectDetection.from_pretrained(tmp_path / "checkpoint-2")))
    averaged = AutoModelForObjectDetection.from_pretrained(tmp_path / "checkpoint-2/ema")
    assert_same(state(trainer.ema.module), state(averaged))
    for name in ("best", "evaluated"):
        trainer.save_model(tmp_path / name)
        evaluation = AutoModelForObjectDetection.from_pretrained(tmp_path / name / "ema").config.provenance["training"][
            "evaluation"
        ]
        assert (evaluation["step"], evaluation["weights"]) == (2, weights_digest(averaged))
        trainer.evaluate()


# Steps without numbers


def spoil(trainer, *steps, which="pixels") -> None:
    """NaN in the images or in a gradient of these steps, or one infinite logit, which no gradient tells of."""

    def pixels(model, args, kwargs):
        if model.training and trainer.state.global_step in steps:
            values = kwargs["pixel_values"].clone()
            values[1] = math.nan
            kwargs["pixel_values"] = values
        return args, kwargs

    def gradient(gradient):
        return gradient * math.nan if trainer.state.global_step in steps else gradient

    def logits(module, args, output):
        if module.training and trainer.state.global_step in steps:
            output = output.clone()
            output[0, -1, 2] = math.inf
        return output

    if which == "pixels":
        trainer.model.register_forward_pre_hook(pixels, with_kwargs=True)
    elif which == "logits":
        trainer.model.model.decoder.heads[0].class_head.register_forward_hook(logits)
    else:
        trainer.model.model.decoder.layers[0].self_attn_norm.weight.register_hook(gradient)


def test_predictions_that_are_not_finite_name_layer_image_and_epoch(data, tmp_path):
    trainer = make_trainer(data, tmp_path, max_steps=6)
    spoil(trainer, 4)
    batches = {}

    def remember(state):
        batches[state.global_step] = trainer._image_ids[0].tolist()

    trainer.add_callback(At(on_step_begin=remember))
    with pytest.raises(NonFinitePredictionsError, match=r"layer 0 for image 1 .* epoch 1.33") as caught:
        trainer.train()
    assert f"The image has the id {batches[4][1]}, in training after step 4, in epoch 1.33." in str(caught.value)
    assert (caught.value.layer, caught.value.image) == (0, 1)


def test_a_gradient_that_is_not_finite_names_the_images_and_spoils_nothing(data, tmp_path):
    trainer = make_trainer(data, tmp_path, gradient_accumulation_steps=2)
    spoil(trainer, 1, which="gradient")
    before = {}
    trainer.add_callback(At(on_step_begin=lambda _: before.update(state(trainer.model))))
    with pytest.raises(
        ValueError, match=r"gradient of the images \[\d+\] is NaN .* after step 1, in epoch 0.67. .*skip"
    ):
        trainer.train()  # the third batch of an epoch has one image
    assert_same(state(trainer.model), before)


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_on_a_device_the_host_asks_for_the_gradients_when_it_logs(data, tmp_path, monkeypatch, logging_steps):
    """Until then the optimizer leaves out what would spoil the weights."""
    monkeypatch.setattr("dino_hf.training.steps.waits_for_device", lambda gradients: True)
    trainer = make_trainer(data, tmp_path, max_steps=6, logging_steps=logging_steps)
    spoil(trainer, 3, which="gradient")
    weights = {}
    trainer.add_callback(At(on_step_begin=lambda run: weights.update({run.global_step: state(trainer.model)})))
    with pytest.raises(ValueError, match=r"gradient of the images \[.*\] is NaN .* after step 3, in epoch 1.00"):
        trainer.train()
    # Raised at the first log after it, or at the end of the epoch.
    assert max(weights) == (3 if logging_steps == 1 else 5)
    if logging_steps > 1:
        assert_same(weights[3], weights[4])
        assert any(not torch.equal(value, weights[5][name]) for name, value in weights[4].items())
    assert all(value.isfinite().all() for value in state(trainer.model).values())


@pytest.mark.parametrize("which", ["pixels", "gradient", "logits"])
def test_steps_without_numbers_are_skipped_on_request(which, data, tmp_path, caplog):
    trainer = make_trainer(data, tmp_path, make_recipe(on_non_finite="skip"), max_steps=5, logging_steps=2)
    spoil(trainer, 1, 3, which=which)
    weights, averages = {}, {}

    def remember(state_of_run):
        weights[state_of_run.global_step] = state(trainer.model)
        averages[state_of_run.global_step] = state(trainer.ema.module)

    trainer.add_callback(At(on_step_begin=remember, on_train_end=remember))
    trainer.train()
    for step in (1, 3):
        assert_same(weights[step], weights[step + 1])
        assert_same(averages[step], averages[step + 1])
    for step in (0, 2, 4):
        assert not torch.equal(
            weights[step]["model.decoder.layers.0.self_attn_norm.weight"],
            weights[step + 1]["model.decoder.layers.0.self_attn_norm.weight"],
        )
    assert all(value.isfinite().all() for value in weights[5].values())
    assert trainer.ema.num_updates == 3
    assert history(trainer, "skipped_steps") == [1, 1]
    assert "after step 3, in epoch 1.00: the step is skipped." in caplog.text


def test_no_more_steps_are_skipped_when_the_weights_are_broken(data, tmp_path, monkeypatch):
    monkeypatch.setattr("dino_hf.training.steps.MOST_SKIPPED_IN_A_ROW", 2)
    trainer = make_trainer(data, tmp_path, make_recipe(on_non_finite="skip", ema_decay=None), max_steps=9)
    spoil(trainer, 0, 1, 3, 4, 5, which="gradient")
    with pytest.raises(ValueError, match=r"3 steps in a row had a gradient that is NaN .* after step 5, in epoch 1.67"):
        trainer.train()


def test_the_21st_step_in_a_row_is_not_skipped():
    optimizer = SimpleNamespace(optimizer_step_was_skipped=True)
    trainer = SimpleNamespace(_num_skipped=0, ema=None, accelerator=optimizer, _when=lambda: "now")
    steps = StepCallback(trainer)
    for _ in range(20):
        steps.on_optimizer_step(None, None, None)
    with pytest.raises(ValueError, match=r"^21 steps in a row had a gradient that is NaN or infinite, now"):
        steps.on_optimizer_step(None, None, None)
    optimizer.optimizer_step_was_skipped = False
    steps.on_optimizer_step(None, None, None)
    assert (steps.num_skipped_in_a_row, trainer._num_skipped) == (0, 21)


@pytest.mark.parametrize(("count", "is_recorded"), [(20_000, True), (20_001, False)])
def test_digests_of_up_to_20_000_images_are_recorded(count, is_recorded, monkeypatch):
    monkeypatch.setattr("dino_hf.training.training_record.image_digests", lambda data: [b"12345"])
    monkeypatch.setattr("dino_hf.training.training_record.pack", lambda digests: len(list(digests)))
    data = SimpleNamespace(dataset=range(count))
    assert ("trained" in recorded_images(data, [])) == is_recorded


# Checkpoints


def test_a_run_without_checkpoints_begins_and_one_with_them_goes_on(data, tmp_path, caplog):
    first = make_trainer(data, tmp_path, max_steps=5, **SAVING)
    first.train(resume_from_checkpoint=True)
    assert f"no checkpoint in {tmp_path} yet" in caplog.text
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    # what a killed run of the stock Trainer or a preempted one leaves
    shutil.rmtree(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5/model.safetensors").write_bytes(b"half")
    (tmp_path / "_unfinished/checkpoint-5").mkdir(parents=True)
    second = make_trainer(data, tmp_path, max_steps=5, **SAVING)
    steps = []
    second.add_callback(At(on_step_begin=lambda state: steps.append(state.global_step)))
    second.train(resume_from_checkpoint=True)
    assert steps == [4]
    assert_same(state(first.model), state(second.model))
    assert_same(state(first.ema.module), state(second.ema.module))
    assert AutoModelForObjectDetection.from_pretrained(tmp_path / "checkpoint-5")
    assert not (tmp_path / "_unfinished").exists()


def test_a_resumed_run_takes_up_the_rates_of_its_recipe_and_tells_of_the_other(data, tmp_path, caplog):
    make_trainer(data, tmp_path, max_steps=4, **SAVING).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    changes = {"learning_rate": 3e-3, "backbone_learning_rate": 2e-4, "weight_decay": 0.5}
    trainer = make_trainer(data, tmp_path, make_recipe(**changes), max_steps=4, **SAVING)
    found = {}

    def look(state):
        groups = trainer.optimizer.param_groups
        found[state.global_step] = [(group["lr"], group["weight_decay"]) for group in groups]

    trainer.add_callback(At(on_step_begin=look))
    trainer.train(resume_from_checkpoint=True)
    fresh = make_trainer(data, tmp_path / "fresh", make_recipe(**changes), max_steps=4)
    fresh.create_optimizer_and_scheduler(4)
    for step in range(4):
        if step >= 2:
            expected = [(group["lr"], group["weight_decay"]) for group in fresh.optimizer.param_groups]
            assert found[step] == expected
        fresh.optimizer.step()
        fresh.lr_scheduler.step()
    assert sorted(found) == [2, 3]
    assert "resumed run had another recipe: {'learning_rate': 0.001, " in caplog.text
    assert "It continues with {'learning_rate': 0.003, " in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "model.safetensors",
        "ema/ema.json",
        "ema/model.safetensors",
    ],
)
def test_a_damaged_checkpoint_is_named_with_what_to_do(name, data, tmp_path):
    make_trainer(data, tmp_path, max_steps=4, **SAVING).train()
    path = tmp_path / "checkpoint-4" / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    trainer = make_trainer(data, tmp_path, max_steps=6)
    message = rf"{path} is damaged .*Delete the folder .*checkpoint-4 and resume again .* from the newest of \['checkpoint-2'\]"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "checkpoint-4")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6


def test_a_checkpoint_of_weights_alone_is_told_of(data, tmp_path, caplog):
    make_trainer(data, tmp_path, max_steps=2, save_only_model=True, **SAVING).train()
    make_trainer(data, tmp_path, max_steps=3).train(resume_from_checkpoint=True)
    assert (
        "checkpoint-2 has no optimizer.pt and scheduler.pt: training continues with their initial states" in caplog.text
    )


def test_the_average_of_an_earlier_run_does_not_pass_for_this_ones(data, tmp_path, caplog):
    first = make_trainer(data, tmp_path, max_steps=1)
    first.train()
    first.save_model()
    assert (tmp_path / "ema/model.safetensors").is_file()
    (tmp_path / "other/ema").mkdir(parents=True)
    (tmp_path / "other/ema/mine.txt").write_text("not an average")
    second = make_trainer(data, tmp_path, make_recipe(ema_decay=None), max_steps=1)
    second.train()
    second.save_model()
    assert not (tmp_path / "ema").exists()
    assert "ema contains the averaged weights of an earlier run. It is deleted" in caplog.text
    second.save_model(tmp_path / "other")
    assert (tmp_path / "other/ema/mine.txt").is_file()


def test_an_average_is_kept_where_the_best_checkpoint_has_none(data, tmp_path):
    """As after a resume from a run without one."""
    trainer = make_trainer(
        data,
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="rank",
        greater_is_better=False,
        **SAVING,
    )

    class Rank(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_rank"] = state.global_step

        def on_save(self, args, state, control, **kwargs):
            shutil.rmtree(tmp_path / "checkpoint-2/ema", ignore_errors=True)

    trainer.add_callback(Rank())
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    assert trainer.ema.num_updates == 4
    trainer.save_model()
    assert (tmp_path / "ema/model.safetensors").is_file()


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(data, tmp_path, monkeypatch):
    flushed = {}

    def fsync(descriptor):
        flushed[os.fstat(descriptor).st_ino] = (tmp_path / "checkpoint-2").exists()

    monkeypatch.setattr(os, "fsync", fsync)
    make_trainer(data, tmp_path, max_steps=2, **SAVING).train()
    checkpoint = tmp_path / "checkpoint-2"
    for path in (checkpoint, *checkpoint.rglob("*")):
        assert flushed[path.stat().st_ino] is False, path


def test_a_checkpoint_may_lack_what_the_recipe_now_has(data, tmp_path, caplog):
    make_trainer(data, tmp_path, make_recipe(ema_decay=None), max_steps=2, **SAVING).train()
    trainer = make_trainer(
        data,
        tmp_path,
        make_recipe(early_stopping_patience=1),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        **SAVING,
    )
    trainer.train(resume_from_checkpoint=True)
    assert "has no averaged weights" in caplog.text
    assert trainer.state.global_step == 4
    assert trainer.ema.num_updates == 2


def test_a_run_that_was_stopped_early_stays_stopped(data, tmp_path, caplog):
    """As it is, a resumed run would train until the next evaluation."""

    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_AP"] = -float(state.global_step)

    def run(patience=1, **settings):
        trainer = make_trainer(
            data,
            tmp_path,
            make_recipe(early_stopping_patience=patience),
            max_steps=8,
            eval_strategy="steps",
            eval_steps=2,
            **SAVING,
            **settings,
        )
        trainer.callback_handler.callbacks.insert(0, Worse())
        trainer.train(resume_from_checkpoint=True)
        return trainer

    first = run()
    assert first.state.global_step == 4
    again = run()
    assert again.state.global_step == 4
    assert "had been stopped early and is not continued" in caplog.text
    assert_same(state(first.model), state(again.model))
    assert again.ema.num_updates == 2  # of the best, at step 2, as in the first run
    assert run(restore_callback_states_from_checkpoint=False).state.global_step == 6  # by one more evaluation
    assert run(patience=5).state.global_step == 8


def test_pushes_wait_until_a_checkpoint_has_its_name_and_bring_the_average(data, tmp_path, monkeypatch):
    uploads = []

    class Hub:
        def upload_folder(self, folder_path, path_in_repo="", **kwargs):
            folder = Path(folder_path)
            files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
            uploads.append((folder.name, path_in_repo, files))

            class Done:
                def done(self):
                    return True

            return Done()

    trainer = make_trainer(data, tmp_path / "out", max_steps=2, **SAVING)
    trainer.args.push_to_hub, trainer.hub_model_id = True, "someone/birds"
    trainer.args.hub_strategy = "all_checkpoints"
    trainer.push_in_progress = None
    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr(
        "dino_hf.training.training_record._write", lambda *args: None
    )  # it would read the repository's card
    trainer.train()
    (_, _, final), (name, path_in_repo, checkpoint) = uploads
    assert {"model.safetensors", "ema/model.safetensors", "ema/config.json", "checkpoint-2/optimizer.pt"} <= final
    assert (name, path_in_repo) == ("checkpoint-2", "checkpoint-2")
    assert {"optimizer.pt", "trainer_state.json", "ema/model.safetensors"} <= checkpoint


# Wrapped models, several processes


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # what peft asks for
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_adapters_are_averaged_too_and_resumed_bit_by_bit(data, tmp_path):
    peft = pytest.importorskip("peft")

    def make():
        set_seed(0)
        model = DinoDetrForObjectDetection(tiny_config(num_denoising=10, id2label=data[0].id2label))
        return make_trainer(data, tmp_path, model=add_lora(model, r=2), max_steps=4, **SAVING)

    first = make()
    first.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    second = make()
    second.train(resume_from_checkpoint=True)
    assert_same(state(first.model), state(second.model))
    assert_same(state(first.ema.module), state(second.ema.module))
    assert len(second.model.peft_config) == 1  # Trainer did not take the average for another adapter
    set_seed(0)
    plain = DinoDetrForObjectDetection(tiny_config(num_denoising=10, id2label=data[0].id2label))
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "checkpoint-4/ema/adapter")
    assert_same(state(loaded), state(second.ema.module))
    assert not torch.equal(
        state(second.model)["base_model.model.model.encoder.layers.0.mlp.fc1.lora_B.default.weight"],
        state(loaded)["base_model.model.model.encoder.layers.0.mlp.fc1.lora_B.default.weight"],
    )


@pytest.mark.slow
def test_several_processes_train_as_one_and_are_resumed(folder, tmp_path):
    run_processes("training_run", 2, folder, tmp_path)


# Errors


def test_classes_of_model_and_data_must_agree(data, tmp_path):
    others = {0: "cat", 1: "dog"}
    model = DinoDetrForObjectDetection(tiny_config(num_labels=2, id2label=others))
    with pytest.raises(
        ValueError, match=r"model has 2 classes \(cat, dog\), but the training data have 5 classes .*transfer_classes"
    ):
        make_trainer(data, tmp_path, model=model)
    with pytest.raises(ValueError, match=r"held-out data have 2 classes .*like=train"):
        make_trainer((data[0], data[1]._replace(id2label=others)), tmp_path)
    model = DinoDetrForObjectDetection(tiny_config(id2label=data[0].id2label, category_ids=[5, 6, 7, 8, 9]))
    with pytest.raises(
        ValueError, match=r"category ids \[5, 6, 7, 8, 9\], .* data .* \[3, 7, 12, 21, 40\] .*transfer_classes"
    ):
        make_trainer(data, tmp_path, model=model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remove_unused_columns": True}, "removes the images"),
        ({"dataloader_drop_last": True}, "would also leave out held-out images"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0.1, .* softmax losses"),
        ({"prediction_loss_only": True}, r"prediction_loss_only=True: leave both out"),
        (
            {"recipe": make_recipe(early_stopping_patience=2), "eval_strategy": "epoch", "save_strategy": "steps"},
            r"eval_strategy='epoch', save_strategy='steps' .* Make the strategies equal",
        ),
        ({"held_out": False, "eval_strategy": "epoch"}, r"eval_strategy='epoch' needs held_out data"),
        ({"recipe": make_recipe(early_stopping_patience=2)}, r"early_stopping_patience=2 needs evaluations"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(changes, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(data, tmp_path, **changes)


def test_a_file_is_no_output_folder(data, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match=r"output_dir='.*out' is a file; name a folder"):
        make_trainer(data, tmp_path / "out")
