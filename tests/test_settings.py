"""Settings by name, from Python and from a command line."""

import inspect

import pytest
from transformers.integrations import integration_utils

from dino_hf.run import settings
from dino_hf.run.settings import find_trackers, flat_settings, parse_settings, split_settings
from dino_hf.run.training_run import train
from dino_hf.training import Augmentation, get_recipe


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--learning-rate 1e-4", {"learning_rate": 1e-4}),
        ("--learning_rate=1e-4 --max-steps=7", {"learning_rate": 1e-4, "max_steps": 7}),
        ("--bf16", {"bf16": True}),
        ("--bf16 false", {"bf16": False}),
        ("--bf16=true --fp16 no", {"bf16": True, "fp16": False}),
        ("--ema-decay none --early_stopping_patience 3", {"ema_decay": None, "early_stopping_patience": 3}),
        ("--lr-scheduler step --lr-drop-epochs 3 4.5", {"lr_scheduler": "step", "lr_drop_epochs": [3, 4.5]}),
        ("--short-sides 480 512 --scale-jitter none", {"short_sides": [480, 512], "scale_jitter": None}),
        ("--num-denoising 20 --normalize-over-window false", {"num_denoising": 20, "normalize_over_window": False}),
        ("--eval-strategy steps --eval-steps 10", {"eval_strategy": "steps", "eval_steps": 10.0}),
        ("--class-weights balanced --repeat-threshold 0.1", {"class_weights": "balanced", "repeat_threshold": 0.1}),
        ("--class-weights bus=3,dog=0.5", {"class_weights": {"bus": 3.0, "dog": 0.5}}),
        ("--class-weights none", {"class_weights": None}),
        ("--nms soft", {"nms": {"method": "soft"}}),
        ("--nms none", {"nms": None}),
        ("", {}),
    ],
)
def test_a_command_line_is_typed_and_only_what_it_says(line, expected):
    found = parse_settings(line.split())
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in expected.items()
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--learning-rat 1", "There is no option --learning-rat; did you mean --learning-rate"),
        ("--learning 1", "There is no option --learning; did you"),  # no abbreviations: they change with transformers
        ("--lr 1", "no option --lr; did you mean --learning-rate?"),
        ("--epochs 1", "no option --epochs; did you mean .*--num-train-epochs"),
        ("--modle dino", "no option --modle; did you mean --model"),
        ("--zzz=3", "--zzz=3; settings are the fields of Recipe"),
        ("--learning-rate fast", "--learning-rate: invalid float value: 'fast'"),
        ("--eval-strategy never", "--eval-strategy: invalid choice: 'never'"),
        ("--bf16 maybe", r"--bf16: .*maybe.*[^.]\.$"),
        ("--class-weights bus=often", "--class-weights 'bus=often' must be like bus=3,person=0.5"),
        ("--class-weights bus=1,bus=2", "--class-weights names 'bus' twice"),
        ("more-data", "'more-data' does not belong to an option"),
    ],
)
def test_a_command_line_that_cannot_be_meant(line, message):
    with pytest.raises(ValueError, match=message):
        parse_settings(line.split())


def test_what_train_itself_has_is_known():
    parameters = inspect.signature(train).parameters.values()
    assert {one.name for one in parameters if one.kind is one.KEYWORD_ONLY} == settings._TRAIN_ARGUMENTS


def test_settings_go_to_the_recipe_and_to_the_arguments():
    recipe, arguments = split_settings(
        "paper-12ep",
        {
            "num_train_epochs": 3,
            "lr_drop_epochs": [2],
            "num_denoising": 20,
            "short_sides": [64],
            "longest_side": 96,
            "bf16": True,
        },
    )
    published = get_recipe("paper-12ep")
    assert (recipe.num_train_epochs, recipe.lr_drop_epochs, recipe.learning_rate) == (3, (2,), published.learning_rate)
    assert recipe.model_settings == published.model_settings | {"num_denoising": 20}
    assert recipe.augmentation.short_sides == (64,)
    assert recipe.augmentation.crop_sizes == published.augmentation.crop_sizes
    assert arguments == {"bf16": True}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learningrate": 1}, "no setting 'learningrate'; did you mean learning_rate"),
        ({"resume_from_checkpoint": True}, "resume=True"),
        ({"per_device_train_batch_size": 2}, "--batch-size"),
        ({"push_to_hub": True}, "dino-hf push FOLDER"),
        ({"ema_decay": 3}, "ema_decay=3 must lie between 0 and 1"),
        ({"short_sides": "large"}, "short_sides='large'"),
    ],
)
def test_settings_that_cannot_be_meant(given, message):
    with pytest.raises(ValueError, match=message):
        split_settings("finetune", given)


def test_settings_are_written_down_by_their_own_names():
    flat = flat_settings(
        {"augmentation": Augmentation(short_sides=(64, 96)), "model_settings": {"num_denoising": 5}, "bf16": True}
    )
    assert (flat["short_sides"], flat["num_denoising"], flat["bf16"]) == ([64, 96], 5, True)
    assert split_settings("finetune", flat)[0].augmentation == Augmentation(short_sides=(64, 96))
    with pytest.raises(ValueError, match=r"dataset_kind=<object .* cannot be written"):
        flat_settings({"dataset_kind": object()})


def test_trackers_are_those_that_are_installed(monkeypatch):
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    assert find_trackers(None) == ["tensorboard"]
    assert find_trackers("none") == []
    assert find_trackers(["tensorboard", "tensorboard"]) == ["tensorboard"]
    assert find_trackers(["none", "none"]) == []
    with pytest.raises(ValueError, match=r"^report_to contains 'none' and tensorboard"):
        find_trackers(["none", "tensorboard"])
    with pytest.raises(ImportError, match="wandb is not installed: pip install wandb"):
        find_trackers("wandb")
    with pytest.raises(ValueError, match="no tracker 'tensorbord'; did you mean tensorboard"):
        find_trackers("tensorbord")
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    assert find_trackers(None) == []


def test_an_option_without_its_value_is_told_what_it_needs():
    with pytest.raises(ValueError, match="--disable-tqdm needs a value, as in --disable-tqdm true"):
        parse_settings(["--disable-tqdm"])
