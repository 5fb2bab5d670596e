"""Recipes are data: what they say, what they build of it, and how a run tells that it departs."""

import copy
import dataclasses
import itertools
import json
import math
import re

import pytest
import torch
from transformers import Trainer, TrainingArguments, set_seed

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor, DinoDetrModel
from dino_hf.common.scenes import make_scenes
from dino_hf.model.criterion import DinoDetrLoss
from dino_hf.model.denoising import DinoDetrDenoising
from dino_hf.training import DetectionCollator, DetectionTransform, load_coco
from dino_hf.training.augmentation import Augmentation
from dino_hf.training.departures import find_departures
from dino_hf.training.optimizer import images_per_step, planned_steps
from dino_hf.training.recipe import Recipe
from dino_hf.training.recipes import RECIPES, get_recipe
from helpers import tiny_config, tiny_images, tiny_labels

PROCESSOR = DinoDetrImageProcessor(size={"shortest_edge": 72, "longest_edge": 112})
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
ARGUMENT_NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in ARGUMENT_NAMES else "gradient_checkpointing"
PAPER = ["paper-12ep", "paper-24ep", "paper-36ep"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    annotations = make_scenes(tmp_path_factory.mktemp("scenes") / "train", 7, seed=0)
    return load_coco(annotations, annotations.parent)


def make_arguments(recipe, folder, **arguments) -> TrainingArguments:
    return recipe.training_arguments(folder, **QUIET | arguments)


def multipliers(recipe, num_training_steps, steps_per_epoch) -> list[float]:
    """Of the learning rate, for each step of a run."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    scheduler = recipe.make_scheduler(optimizer, num_training_steps, steps_per_epoch)
    found = []
    for _ in range(num_training_steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


# What recipes say


def test_the_paper_trains_by_the_numbers_of_the_launch_scripts():
    for name, epochs, drop in (("paper-12ep", 12, 11), ("paper-24ep", 24, 20), ("paper-36ep", 36, 30)):
        recipe = get_recipe(name)
        assert (recipe.num_train_epochs, recipe.lr_scheduler, recipe.lr_drop_epochs) == (epochs, "step", (drop,))
        assert (recipe.learning_rate, recipe.backbone_learning_rate) == (1e-4, 1e-5)
        assert (recipe.weight_decay, recipe.max_grad_norm, recipe.total_batch_size) == (1e-4, 0.1, 16)
        assert recipe.model_settings["box_noise_scale"] == 1.0
        assert recipe.augmentation == Augmentation()
        assert (recipe.warmup_steps, recipe.ema_decay, recipe.early_stopping_patience) == (0, None, None)


def test_the_paper_sets_on_the_model_what_a_fresh_configuration_has():
    config = DinoDetrConfig()
    assert {name: getattr(config, name) for name in get_recipe("paper-12ep").model_settings} == get_recipe(
        "paper-12ep"
    ).model_settings


def test_better_hyper_differs_from_the_paper_in_the_four_numbers_of_detrex():
    ours, paper = get_recipe("better-hyper").as_dict(), get_recipe("paper-12ep").as_dict()
    ours |= ours.pop("model_settings")
    paper |= paper.pop("model_settings")
    assert {name: ours[name] for name in ours if ours[name] != paper[name]} == {
        "name": "better-hyper",
        "backbone_learning_rate": 2e-5,
        "cls_loss_coefficient": 2.0,
        "denoising_cls_loss_coefficient": 1.0,
        "num_denoising": 300,
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "co-dino",
            {
                "class_loss": "quality_focal",
                "learning_rate": 2e-4,
                "backbone_learning_rate": 2e-5,
                "nms": {"method": "soft", "iou_threshold": 0.8},
            },
        ),
        ("align-detr", {"class_loss": "align_detr", "queries_per_box": 2}),
        (
            "stable-dino",
            {
                "class_loss": "stable_dino",
                "cls_loss_coefficient": 6.0,
                "denoising_cls_loss_coefficient": 1.0,
                "negative_noise_start": 0.0,
                "architecture": {"encoder_fusion": True},
                "nms": {"method": "hard", "iou_threshold": 0.8},
            },
        ),
    ],
)
def test_other_members_of_the_family_differ_from_the_paper_by_their_published_settings(name, expected):
    ours, paper = get_recipe(name).as_dict(), get_recipe("paper-12ep").as_dict()
    ours |= ours.pop("model_settings")
    paper |= paper.pop("model_settings")
    assert {key: value for key, value in ours.items() if value != paper[key]} == {"name": name} | expected
    model = DinoDetrForObjectDetection(tiny_config())
    get_recipe(name).configure(model)
    assert model.config.class_loss == expected["class_loss"]
    assert find_departures(get_recipe(name), make_arguments(get_recipe(name), "out"), model.config) == [
        "images per step 2, the recipe has 16; no scaling of learning rates, linear scaling would give "
        f"{get_recipe(name).learning_rate / 8:g}"
    ]
    get_recipe("paper-12ep").configure(model)  # another recipe sets all of it back
    assert model.config.class_loss == "focal"
    assert model.config.negative_noise_start == 1.0


def test_a_class_loss_or_nms_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="class_loss"):
        get_recipe("finetune", model_settings={"class_loss": "dice"}).configure(
            DinoDetrForObjectDetection(tiny_config())
        )
    with pytest.raises(ValueError, match='it must be "soft" or "hard"'):
        get_recipe("co-dino", nms={"method": "medium"})


def test_finetune_warms_up_averages_stops_early_and_scales_the_paper_to_its_batch():
    recipe, paper = get_recipe("finetune"), get_recipe("paper-12ep")
    assert recipe.lr_scheduler == "cosine"
    assert recipe.warmup_steps > 0
    assert recipe.ema_decay
    assert recipe.early_stopping_patience
    share = recipe.total_batch_size / paper.total_batch_size
    assert recipe.learning_rate == paper.learning_rate * share
    assert recipe.backbone_learning_rate == paper.backbone_learning_rate * share


def test_each_number_of_the_recipes_of_our_own():
    def differing(name: str) -> dict:
        paper = get_recipe("paper-12ep").as_dict()
        return {field: value for field, value in get_recipe(name).as_dict().items() if value != paper[field]}

    of_variants = {
        "class_loss",
        "queries_per_box",
        "denoising_cls_loss_coefficient",
        "negative_noise_start",
    }  # stay the model's
    settings = {
        name: value for name, value in get_recipe("paper-12ep").model_settings.items() if name not in of_variants
    }
    augmentation = dataclasses.asdict(Augmentation())
    assert differing("finetune") == {
        "name": "finetune",
        "model_settings": settings,
        "num_train_epochs": 50,
        "lr_scheduler": "cosine",
        "lr_drop_epochs": [],
        "warmup_steps": 0.05,
        "learning_rate": 5e-5,
        "backbone_learning_rate": 5e-6,
        "total_batch_size": 8,
        "ema_decay": 0.998,
        "ema_warmup_steps": 100,
        "early_stopping_patience": 10,
    }
    assert differing("from-backbone") == {
        "name": "from-backbone",
        "model_settings": settings,
        "num_train_epochs": 50,
        "lr_scheduler": "cosine",
        "lr_drop_epochs": [],
        "warmup_steps": 0.05,
        "learning_rate": 4e-4,
        "backbone_learning_rate": 4e-5,
        "total_batch_size": 4,
        "early_stopping_patience": 10,
    }
    assert differing("scratch") == {
        "name": "scratch",
        "num_train_epochs": 3,
        "lr_scheduler": "cosine",
        "lr_drop_epochs": [],
        "warmup_steps": 0.02,
        "learning_rate": 7e-4,
        "backbone_learning_rate": 7e-4,
        "max_grad_norm": 5.0,
        "total_batch_size": 4,
        "model_settings": settings | {"num_denoising": 50, "box_noise_scale": 0.4, "cls_loss_coefficient": 3.0},
        "augmentation": json.loads(json.dumps(augmentation | {"short_sides": [800], "crop": 0.0})),
    }


def test_a_recipe_is_json_and_back():
    for recipe in RECIPES.values():
        saved = json.loads(json.dumps(recipe.as_dict()))
        assert saved == recipe.as_dict()
        augmentation = {
            name: tuple(value) if isinstance(value, list) else value for name, value in saved["augmentation"].items()
        }
        assert Recipe(**saved | {"augmentation": Augmentation(**augmentation)}) == recipe


# Changes


def test_any_field_can_be_changed_and_the_recipe_stays():
    before = copy.deepcopy(RECIPES)
    recipe = get_recipe("paper-12ep", num_train_epochs=6, lr_drop_epochs=[4, 5.5], model_settings={"num_denoising": 50})
    assert (recipe.num_train_epochs, recipe.lr_drop_epochs) == (6, (4, 5.5))
    assert recipe.model_settings == before["paper-12ep"].model_settings | {"num_denoising": 50}
    recipe.model_settings["focal_alpha"] = 0.5
    get_recipe("paper-24ep").model_settings["focal_alpha"] = 0.5
    assert before == RECIPES
    cosine = get_recipe("paper-12ep", lr_scheduler="cosine")
    assert cosine.lr_drop_epochs == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, r"A recipe has no \['epochs'\]; it has \['name', 'num_train_epochs'"),
        ({"box_noise_scale": 0.4}, r"; model_settings=\{'box_noise_scale': 0\.4\} sets what belongs to the model"),
        ({"model_settings": {"num_queries": 300}}, r"model_settings has \['num_queries'\], .*'num_denoising'"),
        ({"lr_scheduler": "linear"}, r"lr_scheduler='linear' is unknown; use one of \('step', 'cosine', 'constant'\)"),
        ({"scale_learning_rate": "root"}, r"scale_learning_rate='root' is unknown; use one of \(None, 'linear'"),
        ({"on_non_finite": "ignore"}, r"on_non_finite='ignore' is unknown"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0 must be positive.*freeze it"),
        ({"num_train_epochs": -1}, r"num_train_epochs=-1 must be positive"),
        ({"warmup_steps": -1}, r"warmup_steps=-1 must not be negative"),
        ({"lr_drop_epochs": ()}, r"a step schedule drops at least once, e\.g\. lr_drop_epochs=\(11,\)"),
        (
            {"lr_scheduler": "cosine", "lr_drop_epochs": (3,)},
            r"lr_drop_epochs=\(3,\) do not go with lr_scheduler='cosine'",
        ),
        ({"early_stopping_patience": 0}, r"early_stopping_patience=0 must be at least 1; None trains to the end"),
        ({"ema_decay": 1.0}, r"ema_decay=1\.0 must lie between 0 and 1"),
        ({"sampling_offsets_learning_rate": 0}, r"sampling_offsets_learning_rate=0 must be positive"),
        ({"name": None}, r"name=None must be a string\."),
        ({"normalize_over_window": 1}, r"normalize_over_window=1 must be True or False\."),
        ({"model_settings": None}, r"model_settings=None must be a dict, such as \{'num_denoising': 50\}\."),
        ({"model_settings": [("num_denoising", 50)]}, r"model_settings=\[.*\] must be a dict"),
        ({"model_settings": {3: 4, "queries": 5}}, r"model_settings has \[3, 'queries'\], which"),
        ({"augmentation": {"crop": 0.5}}, r"augmentation=\{'crop': 0\.5\} must be an Augmentation\(\.\.\.\)\."),
        ({"lr_drop_epochs": 11}, r"lr_drop_epochs=11 must be a tuple of epochs .*; write \(11,\)\."),
        ({"lr_drop_epochs": "11"}, r"lr_drop_epochs='11' must be a tuple of epochs .* such as \(27, 33\)\."),
        ({"lr_drop_epochs": None}, r"lr_drop_epochs=None must be a tuple of epochs"),
        ({"lr_drop_epochs": (11, 8)}, r"lr_drop_epochs=\(11, 8\) must be .* each after the one before it"),
        ({"lr_drop_epochs": (0, 8)}, r"lr_drop_epochs=\(0, 8\) must be a tuple of epochs above 0"),
        ({"lr_drop_epochs": ["8"]}, r"lr_drop_epochs=\['8'\] must be a tuple of epochs"),
    ],
)
def test_what_nothing_can_be_trained_with_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        get_recipe("paper-12ep", **changes)


@pytest.mark.parametrize("value", ["1e-4", True, math.nan, math.inf, (1,)])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("num_train_epochs", r"a finite number\."),
        ("learning_rate", r"a finite number\."),
        ("backbone_learning_rate", r"a finite number\."),
        ("sampling_offsets_learning_rate", r"a finite number or None\."),
        ("warmup_steps", r"a finite number\."),
        ("weight_decay", r"a finite number\."),
        ("max_grad_norm", r"a finite number\."),
        ("ema_decay", r"a finite number or None\."),
        ("total_batch_size", r"an int\."),
        ("ema_warmup_steps", r"an int\."),
        ("early_stopping_patience", r"an int or None\."),
    ],
)
def test_what_is_no_number_is_refused(name, kind, value):
    with pytest.raises(ValueError, match=f"^{name}={re.escape(repr(value))} must be {kind}$"):
        get_recipe("paper-12ep", **{name: value})


@pytest.mark.parametrize("name", ["total_batch_size", "ema_warmup_steps", "early_stopping_patience"])
def test_what_is_counted_is_whole(name):
    with pytest.raises(ValueError, match=rf"^{name}=2\.5 must be an int( or None)?\.$"):
        get_recipe("paper-12ep", **{name: 2.5})


def test_an_unknown_recipe_is_refused_with_those_that_there_are():
    for name in ("paper", ["finetune"], None):
        known = r"; there are \[.*'better-hyper', 'co-dino', 'finetune', 'from-backbone', 'paper-12ep'"
        with pytest.raises(ValueError, match=f"no recipe {re.escape(repr(name))}{known}"):
            get_recipe(name)


# Arguments


def test_arguments_are_those_of_the_recipe_and_what_is_given_goes_first(tmp_path):
    args = make_arguments(get_recipe("paper-24ep"), tmp_path)
    assert (args.num_train_epochs, args.learning_rate, args.weight_decay, args.max_grad_norm) == (24, 1e-4, 1e-4, 0.1)
    assert (args.eval_strategy, args.save_strategy) == ("epoch", "epoch")
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert not args.remove_unused_columns
    assert args.batch_eval_metrics
    assert args.restore_callback_states_from_checkpoint
    assert args.gradient_accumulation_steps == 1  # never silently
    assert not args.load_best_model_at_end
    given = {"num_train_epochs": 3, "weight_decay": 0.1, "per_device_train_batch_size": 5, "seed": 7, "bf16": True}
    args = make_arguments(get_recipe("paper-24ep"), tmp_path, **given)
    assert {name: getattr(args, name) for name in given} == given


def test_early_stopping_asks_for_the_best_model_by_ap_if_there_is_evaluation(tmp_path):
    recipe = get_recipe("finetune")
    args = make_arguments(recipe, tmp_path)
    assert (args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better) == (True, "AP", True)
    assert not make_arguments(recipe, tmp_path, eval_strategy="no").load_best_model_at_end
    assert not make_arguments(recipe, tmp_path, load_best_model_at_end=False).load_best_model_at_end


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_has_two_names_in_every_version(name, tmp_path):
    arguments = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    args = make_arguments(get_recipe("paper-12ep"), tmp_path, **arguments)
    assert getattr(args, CHECKPOINTING) is True
    assert getattr(args, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"train_batch_size": 4},
            r"no training argument 'train_batch_size'; did you mean .*per_device_train_batch_size",
        ),
        ({"xyzzy": 4}, r"no training argument 'xyzzy'; see transformers\.TrainingArguments"),
        ({"warmup_steps": 4}, r"warmup_steps is set by the recipe, .* schedule by get_recipe\('paper-12ep', "),
        (
            {"optim": "sgd"},
            r"optim is set by the recipe, which trains with AdamW: .* use the stock Trainer",
        ),
        ({"lr_scheduler_type": "linear"}, r"lr_scheduler_type is set by the recipe"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_arguments(get_recipe("paper-12ep"), tmp_path, **arguments)


def test_accumulation_reaches_the_images_per_step_of_the_recipe(tmp_path):
    recipe = get_recipe("paper-12ep")
    assert recipe.accumulation_for(2) == 8
    assert recipe.accumulation_for(2, world_size=4) == 2
    with pytest.raises(
        ValueError, match=r"16 images per step, which is not a multiple of 6 \(3 images in each of 2 processes\)"
    ):
        recipe.accumulation_for(3, world_size=2)
    args = make_arguments(
        recipe, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=recipe.accumulation_for(4)
    )
    assert images_per_step(args) == 16


# Learning rates


def test_groups_have_the_learning_rates_of_the_recipe_and_one_that_is_given_moves_all(tmp_path):
    model = DinoDetrForObjectDetection(tiny_config())
    recipe = get_recipe("better-hyper")
    expected = {"transformer": 1e-4, "backbone": 2e-5}
    assert {group["name"]: group["lr"] for group in recipe.make_optimizer(model).param_groups} == expected
    args = make_arguments(recipe, tmp_path)
    assert {group["name"]: group["lr"] for group in recipe.make_optimizer(model, args).param_groups} == expected
    recipe = get_recipe("better-hyper", sampling_offsets_learning_rate=1e-5)
    args = make_arguments(recipe, tmp_path, learning_rate=2e-4, weight_decay=0.3, adam_beta1=0.5, adam_epsilon=1e-6)
    optimizer = recipe.make_optimizer(model, args)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(
        {"transformer": 2e-4, "backbone": 4e-5, "sampling_offsets": 2e-5}, rel=1e-12
    )
    found = {(group["weight_decay"], group["betas"], group["eps"]) for group in optimizer.param_groups}
    assert found == {(0.3, (0.5, 0.999), 1e-6)}
    trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(trained) == sorted(id(p) for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize(("scale", "factor"), [("linear", 0.375), ("sqrt", math.sqrt(0.375))])
def test_learning_rates_are_scaled_on_request_only(scale, factor, tmp_path):
    model = DinoDetrForObjectDetection(tiny_config())
    arguments = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}  # 6 images per step instead of 16
    assert make_arguments(get_recipe("paper-12ep"), tmp_path, **arguments).learning_rate == 1e-4
    recipe = get_recipe("paper-12ep", scale_learning_rate=scale)
    args = make_arguments(recipe, tmp_path, **arguments)
    assert args.learning_rate == pytest.approx(1e-4 * factor, rel=1e-12)
    rates = {group["name"]: group["lr"] for group in recipe.make_optimizer(model, args).param_groups}
    assert rates == pytest.approx({"transformer": 1e-4 * factor, "backbone": 1e-5 * factor}, rel=1e-12)
    with pytest.raises(
        ValueError, match=rf"learning_rate=0\.1 is given and scale_learning_rate='{scale}' would change"
    ):
        make_arguments(recipe, tmp_path, learning_rate=0.1)
    with pytest.raises(ValueError, match=rf"scale_learning_rate='{scale}' needs the images per step"):
        recipe.make_optimizer(model)


# Schedules


def test_the_step_schedule_falls_to_a_tenth_where_its_epoch_begins():
    found = multipliers(get_recipe("paper-12ep"), 12 * 5, 5)
    assert found == [1.0] * 55 + [0.1] * 5


def test_drops_may_be_several_and_within_an_epoch():
    recipe = get_recipe("paper-12ep", num_train_epochs=4, lr_drop_epochs=(1.5, 3))
    found = multipliers(recipe, 4 * 4, 4)
    assert found == pytest.approx([1.0] * 6 + [0.1] * 6 + [0.01] * 4, rel=1e-12)


def test_a_run_that_ends_by_steps_keeps_the_epochs_of_its_schedule():
    assert multipliers(get_recipe("paper-12ep"), 58, 5) == [1.0] * 55 + [0.1] * 3
    assert multipliers(get_recipe("paper-12ep"), 7, 5) == [1.0] * 7


@pytest.mark.parametrize("warmup", [4, 0.1])
def test_warm_up_rises_evenly_and_the_cosine_ends_at_zero(warmup):
    found = multipliers(get_recipe("finetune", warmup_steps=warmup), 40, 10)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], rel=1e-12)
    assert found[4 + 18] == pytest.approx(0.5, rel=1e-12)  # half of what is left
    assert all(later < earlier for earlier, later in itertools.pairwise(found[4:]))
    assert 0 < found[-1] < 0.005


def test_warm_up_goes_before_the_other_schedules_too():
    found = multipliers(get_recipe("paper-12ep", warmup_steps=2), 12 * 2, 2)
    assert found == pytest.approx([1 / 3, 2 / 3] + [1.0] * 20 + [0.1] * 2, rel=1e-12)
    assert multipliers(get_recipe("finetune", lr_scheduler="constant", warmup_steps=1), 4, 2) == [0.5, 1.0, 1.0, 1.0]


def test_a_schedule_goes_on_where_it_was_saved():
    recipe = get_recipe("paper-12ep", num_train_epochs=3, lr_drop_epochs=(2,), warmup_steps=2)
    expected = multipliers(recipe, 12, 4)

    def start():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
        return optimizer, recipe.make_scheduler(optimizer, 12, 4)

    optimizer, scheduler = start()
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    optimizer, scheduler = start()
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    found = []
    for _ in range(6):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found == expected[6:]


# With the stock Trainer


def recipe_trainer(data, folder, recipe, **arguments) -> Trainer:
    set_seed(0)
    model = DinoDetrForObjectDetection(tiny_config(num_denoising=50, id2label=data.id2label))
    recipe.configure(model)
    settings = {"per_device_train_batch_size": 2, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    args = recipe.training_arguments(folder, **QUIET | settings | {"dataloader_pin_memory": False} | arguments)
    transform = DetectionTransform(PROCESSOR)
    return Trainer(
        model=model,
        args=args,
        train_dataset=data.dataset.with_transform(transform),
        data_collator=DetectionCollator(),
        optimizers=recipe.optimizers(model, args, len(data.dataset)),
    )


def test_the_stock_trainer_follows_the_schedule_and_resumes_in_it(data, tmp_path):
    changes = {"num_train_epochs": 3, "lr_drop_epochs": (1.5,), "warmup_steps": 2}
    recipe = get_recipe("paper-12ep", sampling_offsets_learning_rate=1e-5, **changes)
    whole = recipe_trainer(data, tmp_path, recipe, save_strategy="steps", save_steps=5)
    whole.train()
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert len(rates) == 3 * 4 == whole.state.global_step  # 7 images, 2 in a step
    assert rates == pytest.approx([1e-4 / 3, 2e-4 / 3] + [1e-4] * 4 + [1e-5] * 6, rel=1e-12)  # 1.5 epochs are 6 steps

    resumed = recipe_trainer(data, tmp_path, recipe)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert [entry["learning_rate"] for entry in resumed.state.log_history if "learning_rate" in entry] == rates
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


@pytest.mark.parametrize(
    "arguments",
    [
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 2.5},
        {"per_device_train_batch_size": 2, "dataloader_drop_last": True, "num_train_epochs": 2},
        {"per_device_train_batch_size": 4, "max_steps": 3},
    ],
)
def test_steps_are_planned_as_the_trainer_counts_them(arguments, data, tmp_path):
    trainer = recipe_trainer(data, tmp_path, get_recipe("paper-12ep", augmentation=Augmentation()), **arguments)
    planned = planned_steps(trainer.args, 7)
    values = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    assert planned == (values[-1], values[1])


# The model


LIMITS = {"max_denoising_queries": 40, "mask_denoising_padding": True}
SETTINGS = LIMITS | {
    "num_denoising": 70,
    "label_noise_ratio": 0.8,
    "box_noise_scale": 0.3,
    "class_cost": 1.5,
    "bbox_cost": 4.0,
    "giou_cost": 3.0,
    "cls_loss_coefficient": 2.5,
    "bbox_loss_coefficient": 6.0,
    "giou_loss_coefficient": 1.0,
    "focal_alpha": 0.4,
    "class_loss": "align_detr",
    "queries_per_box": 2,
    "denoising_cls_loss_coefficient": 0.5,
    "negative_noise_start": 0.25,
}


def settings_of(module) -> dict:
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}


def test_configure_sets_every_setting_in_the_configuration_and_in_what_was_built_from_it():
    assert set(SETTINGS) == set(get_recipe("paper-12ep").model_settings) | set(LIMITS)
    model = DinoDetrForObjectDetection(tiny_config()).train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    get_recipe("paper-12ep", model_settings=SETTINGS).configure(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: getattr(model.config, name) for name in SETTINGS} == SETTINGS
    expected = tiny_config(**SETTINGS)
    assert settings_of(model.model.denoising) == settings_of(DinoDetrDenoising(expected))
    assert settings_of(model.criterion) == settings_of(DinoDetrLoss(expected))
    assert model.model.denoising.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_limit_that_somebody_set_stays_unless_a_recipe_names_it(name):
    model = DinoDetrForObjectDetection(tiny_config(**LIMITS))
    recipe = get_recipe(name)
    recipe.configure(model)
    assert {field: getattr(model.config, field) for field in LIMITS} == LIMITS
    assert model.model.denoising.max_queries == LIMITS["max_denoising_queries"]
    lines = find_departures(recipe, recipe.training_arguments("out", use_cpu=True), model.config)
    assert f"max_denoising_queries {LIMITS['max_denoising_queries']}, the recipe has none" in lines
    assert "mask_denoising_padding True, the recipe has False" in lines
    get_recipe(name, model_settings={"max_denoising_queries": None}).configure(model)
    assert model.config.max_denoising_queries is model.model.denoising.max_queries is None


def test_a_configured_model_has_the_loss_of_one_that_is_built_so():
    torch.manual_seed(0)
    model = DinoDetrForObjectDetection(tiny_config()).train()
    built = DinoDetrForObjectDetection(tiny_config(**SETTINGS)).train()
    built.load_state_dict(model.state_dict())
    pixel_values, pixel_mask = tiny_images()
    batch = {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": tiny_labels(3, 0)}

    def loss(model):
        torch.manual_seed(1)
        return model(**batch).loss

    assert loss(model) != loss(built)
    get_recipe("paper-12ep", model_settings=SETTINGS).configure(model)
    assert loss(model) == loss(built)


def test_configure_can_turn_denoising_off_but_not_on():
    model = DinoDetrForObjectDetection(tiny_config())
    get_recipe("paper-12ep", model_settings={"num_denoising": 0}).configure(model)
    expected = DinoDetrForObjectDetection(tiny_config(num_denoising=0))
    assert set(model.state_dict()) == set(expected.state_dict())
    with pytest.raises(
        ValueError, match=r"num_denoising=0 and the recipe 'paper-12ep' has 100: load it with from_pretra"
    ):
        get_recipe("paper-12ep").configure(model)
    assert model.config.num_denoising == 0
    get_recipe("paper-12ep", model_settings={"num_denoising": 0, "focal_alpha": 0.4}).configure(model)
    assert model.criterion.alpha == 0.4


def test_a_model_without_losses_and_a_setting_out_of_range_are_refused():
    recipe = get_recipe("paper-12ep")
    for model in (DinoDetrModel(tiny_config()), torch.nn.DataParallel(DinoDetrForObjectDetection(tiny_config()))):
        with pytest.raises(ValueError, match=rf"model is a {type(model).__name__}, but must be a DinoDetrForObjectDet"):
            recipe.configure(model)
    model = DinoDetrForObjectDetection(tiny_config())
    with pytest.raises(ValueError, match=r"label_noise_ratio=3\.0 must lie in \[0, 2\]"):
        get_recipe("paper-12ep", model_settings={"label_noise_ratio": 3.0, "focal_alpha": 0.4}).configure(model)
    assert (model.config.label_noise_ratio, model.config.focal_alpha, model.criterion.alpha) == (0.5, 0.25, 0.25)


# Departures


def configured(recipe, **changes) -> DinoDetrConfig:
    return tiny_config(**recipe.model_settings | changes)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_run_by_the_recipe_does_not_depart(name, tmp_path):
    recipe = get_recipe(name)
    accumulation = recipe.accumulation_for(2)
    args = make_arguments(recipe, tmp_path, gradient_accumulation_steps=accumulation, bf16=True, seed=3)
    assert find_departures(recipe, args, configured(recipe), 100) == []
    assert find_departures(recipe, args, configured(recipe)) == []


def test_every_departure_is_a_line(tmp_path):
    recipe = get_recipe(
        "paper-12ep",
        lr_drop_epochs=(6, 10),
        backbone_learning_rate=5e-6,
        sampling_offsets_learning_rate=1e-5,
        ema_decay=0.9997,
        augmentation=Augmentation(crop=0.0, scale_jitter=(0.1, 2.0)),
    )
    args = make_arguments(
        recipe, tmp_path, num_train_epochs=8, learning_rate=2e-4, weight_decay=0.05, max_grad_norm=1.0, adam_beta2=0.99
    )
    config = configured(recipe, box_noise_scale=0.4, max_denoising_queries=40)
    assert find_departures(recipe, args, config, 100) == [
        "images per step 2, the recipe has 16; no scaling of learning rates, linear scaling would give 1.25e-05",
        "learning_rate 0.0002, the recipe has 0.0001",
        "sampling_offsets_learning_rate 2e-05, the recipe has none",
        "epochs 8, the recipe has 12",
        "the learning rate does not fall at epoch 10: the run ends before",
        "weight_decay 0.05, the recipe has 0.0001",
        "max_grad_norm 1, the recipe has 0.1",
        "adam_betas 0.9, 0.99, the recipe has 0.9, 0.999",
        "lr_drop_epochs 6, 10, the recipe has 11",
        "ema_decay 0.9997, the recipe has none",
        "max_denoising_queries 40, the recipe has none",
        "box_noise_scale 0.4, the recipe has 1",
        "augmentation.crop 0, the recipe has 0.5",
        "augmentation.scale_jitter 0.1, 2, the recipe has none",
    ]


def test_sizes_that_follow_each_other_are_told_in_one_line(tmp_path):
    resized = Augmentation(photometric=0.5).resized(96, 120)
    recipe = get_recipe("paper-12ep", augmentation=resized)
    args = make_arguments(recipe, tmp_path, per_device_train_batch_size=16)
    line = "images are resized to at most 96 (short side) and 120 pixels (long side), and cropped in proportion, the recipe has "
    expected = [line + "800 and 1333", "augmentation.photometric 0.5, the recipe has 0"]
    assert find_departures(recipe, args, configured(recipe)) == expected
    recipe = get_recipe(
        "paper-12ep", augmentation=dataclasses.replace(resized, crop_sizes=(40, 50))
    )  # these do not follow
    departures = find_departures(recipe, args, configured(recipe))
    assert "augmentation.longest_side 120, the recipe has 1333" in departures
    assert "augmentation.crop_sizes 40, 50, the recipe has 384, 600" in departures


def test_scaled_learning_rates_are_told(tmp_path):
    recipe = get_recipe("paper-12ep", scale_learning_rate="linear")
    args = make_arguments(recipe, tmp_path, gradient_accumulation_steps=2)
    assert find_departures(recipe, args, configured(recipe)) == [
        "images per step 4, the recipe has 16; linear scaling of learning rates",
        "learning_rate 2.5e-05, the recipe has 0.0001",
        "backbone_learning_rate 2.5e-06, the recipe has 1e-05",
    ]
    args = make_arguments(get_recipe("paper-12ep"), tmp_path, gradient_accumulation_steps=2)  # of another recipe
    assert find_departures(recipe, args, configured(recipe)) == [
        "images per step 4, the recipe has 16; no scaling of learning rates, linear scaling would give 2.5e-05"
    ]


def test_a_run_that_ends_by_steps_is_told_in_epochs_if_the_images_are_known(tmp_path):
    recipe = get_recipe("paper-12ep")
    args = make_arguments(recipe, tmp_path, max_steps=45, gradient_accumulation_steps=8)
    assert find_departures(recipe, args, configured(recipe), 100) == [
        "epochs 6.42857, the recipe has 12",
        "the learning rate does not fall at epoch 11: the run ends before",
    ]
    assert find_departures(recipe, args, configured(recipe)) == ["max_steps 45, the recipe has 12 epochs"]


def test_a_recipe_of_another_name_is_compared_with_itself(tmp_path):
    recipe = get_recipe("paper-12ep", name="mine", total_batch_size=2, learning_rate=3e-4)
    args = make_arguments(recipe, tmp_path, weight_decay=0.2)
    assert find_departures(recipe, args, configured(recipe)) == ["weight_decay 0.2, the recipe has 0.0001"]
