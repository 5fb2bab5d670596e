"""Repeat-factor sampling and class weights: their numbers, what trains with them, and what a run tells about them."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SeedableRandomSampler, skip_first_batches
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainerCallback

from dino_hf.common.scenes import make_scenes
from dino_hf.run.preflight import _repeats_line, describe_balance
from dino_hf.training import RepeatFactorSampler, class_weights, get_recipe, load_coco, repeat_factors
from dino_hf.training.class_balance import class_repeat_factors, images_of_classes, images_per_epoch
from dino_hf.training.steps import set_sampler_epoch
from test_dino_trainer import assert_same, make_recipe, make_trainer, state

NAMES = ["common", "rare", "never"]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Nine images: eight with "common" (one of them twice), the last also with "rare", one only with a crowd of "rare"."""
    folder = tmp_path_factory.mktemp("counted")
    classes = [[1], [1, 1], [1], [1], [], [1], [1], [1], [1, 2]]
    annotations = [
        {"image_id": image, "category_id": category, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
        for image, of_image in enumerate(classes)
        for category in of_image
    ]
    annotations.append({"image_id": 4, "category_id": 2, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 1})
    content = {
        "images": [{"id": image, "file_name": f"{image}.png", "width": 20, "height": 10} for image in range(9)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)],
        "annotations": [{"id": number} | annotation for number, annotation in enumerate(annotations)],
    }
    for image in range(9):
        Image.new("RGB", (20, 10)).save(folder / f"{image}.png")
    (folder / "annotations.json").write_text(json.dumps(content))
    return load_coco(folder / "annotations.json", folder)


def test_repeat_factors_follow_the_share_of_images_with_the_class(counted):
    rare = math.sqrt(0.5 * 9)  # one of nine images; the crowd does not count
    np.testing.assert_allclose(class_repeat_factors(counted, 0.5), [1, rare, 1])
    np.testing.assert_allclose(repeat_factors(counted, 0.5), [1] * 8 + [rare])
    all_repeated = class_repeat_factors(counted, 1)
    np.testing.assert_allclose(all_repeated, [math.sqrt(9 / 8), 3, 1])
    np.testing.assert_allclose(repeat_factors(counted, 1), [all_repeated[0]] * 4 + [1] + [all_repeated[0]] * 3 + [3])
    np.testing.assert_allclose(images_of_classes(counted, np.ones(9)), [8, 1, 0])
    np.testing.assert_allclose(images_of_classes(counted, repeat_factors(counted, 0.5)), [7 + rare, rare, 0])
    assert images_per_epoch(counted, None) == 9
    assert images_per_epoch(counted, 0.5) == math.ceil(8 + rare)
    assert images_per_epoch(counted, 0.01) == 9


def test_a_threshold_and_data_that_cannot_be_used_are_refused(counted):
    for threshold in (0, 1.5, "0.1", None, True):
        with pytest.raises(ValueError, match=r"must be a share of the training images in \(0, 1\]"):
            repeat_factors(counted, threshold)
    stream = counted._replace(dataset=counted.dataset.to_iterable_dataset())
    for function, argument in ((repeat_factors, 0.1), (class_weights, "balanced")):
        with pytest.raises(ValueError, match="are a stream"):
            function(stream, argument)
    for factors in ([], [1.0, -1.0], [1.0, math.nan], [[1.0]], [0.0, 0.0]):
        with pytest.raises(ValueError, match="factors must"):
            RepeatFactorSampler(factors)


def test_an_epoch_has_each_image_as_often_as_its_factor_on_average():
    factors = np.array([1.0, 2.3, 1.0, 1.7, 3.25, 0.4, 0.0])
    sampler, counts = RepeatFactorSampler(factors, seed=3), []
    for epoch in range(2000):
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert len(indices) == len(sampler) == math.ceil(factors.sum())
        counts.append(np.bincount(indices, minlength=len(factors)))
    counts = np.array(counts)
    filled = (math.ceil(factors.sum()) - factors.sum()) / len(factors)  # one random image may fill the epoch
    np.testing.assert_allclose(counts.mean(0), factors + filled, atol=0.05)
    assert ((counts >= np.floor(factors)) & (counts <= np.ceil(factors) + 1)).all()


def test_an_epoch_is_determined_by_seed_and_epoch_and_in_random_order():
    def draw(epoch, seed=0):
        sampler = RepeatFactorSampler([1.0] * 20 + [1.5] * 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert draw(2) == draw(2)
    assert draw(2) != draw(3)
    assert draw(2) != draw(2, seed=1)
    assert draw(0) != sorted(draw(0))
    assert sorted(draw(5))[:20] == list(range(20))
    whole = RepeatFactorSampler(np.full(7, 1.0))
    assert sorted(whole) == list(range(7))  # nothing is repeated, nothing is left out


def test_processes_share_an_epoch():
    sampler = RepeatFactorSampler([1.0, 1.0, 2.5, 1.0, 1.5], seed=1)
    sampler.set_epoch(4)
    shards = [list(BatchSamplerShard(BatchSampler(sampler, 2, False), 2, process)) for process in range(2)]
    assert len(shards[0]) == len(shards[1]) == 2
    together = [index for batches in zip(*shards, strict=True) for batch in batches for index in batch]
    assert together[: len(sampler)] == list(sampler)


@pytest.mark.parametrize(
    "make_sampler",
    [
        lambda: RepeatFactorSampler([1.0, 1.0, 2.5, 1.0, 1.5, 1.0, 1.0], seed=1),
        lambda: SeedableRandomSampler(range(7), data_seed=5),
    ],
)
def test_several_processes_resume_in_the_middle_of_an_epoch(make_sampler):
    def make_loader():
        return DataLoaderShard(range(7), batch_sampler=BatchSamplerShard(BatchSampler(make_sampler(), 2, False), 2, 1))

    loader = make_loader()
    loader.set_epoch(3)
    whole = [batch.tolist() for batch in loader]
    loader = make_loader()
    set_sampler_epoch(loader, 3)  # `StepCallback` does so, because accelerate does not reach the sampler
    rest = skip_first_batches(loader, 1)
    rest.set_epoch(3)
    assert [batch.tolist() for batch in rest] == whole[1:]
    set_sampler_epoch(None, 3)


def test_balanced_weights_have_the_mean_one_over_boxes_and_an_upper_limit(counted):
    weights = class_weights(counted, "balanced")
    raw = torch.tensor([9**-0.5, 1.0])
    expected = raw * 10 / (raw * torch.tensor([9, 1])).sum()
    torch.testing.assert_close(weights, torch.tensor([*expected, 1.0]))
    assert (weights * torch.tensor([9, 1, 0])).sum() == pytest.approx(10)
    torch.testing.assert_close(class_weights(counted, {"rare": 3}), torch.tensor([1.0, 3.0, 1.0]))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("sqrt", r'class_weights=\'sqrt\' must be "balanced", or weights by class name'),
        ({1: 2.0}, "must be .balanced., or weights by class name"),
        ({"rare": 0}, "the weight 0 of 'rare' must be above 0"),
        ({"rare": "2"}, "the weight '2' of 'rare' must be above 0"),
        ({"rare": math.inf}, "the weight inf of 'rare' must be above 0"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(counted, weights, message):
    for check in (lambda: class_weights(counted, weights), lambda: get_recipe("finetune", class_weights=weights)):
        with pytest.raises(ValueError, match=message):
            check()


def test_weights_of_unknown_classes_are_refused(counted):
    with pytest.raises(ValueError, match="no class 'rar'; did you mean 'rare'"):
        class_weights(counted, {"rar": 2})
    with pytest.raises(ValueError, match="no class 'zebra'; there are common, rare, never"):
        class_weights(counted, {"zebra": 2})


def test_recipes_check_the_threshold():
    for threshold in (0, 1.01, -1):
        with pytest.raises(ValueError, match=r"repeat_threshold=.* must be a share of the training images in \(0, 1\]"):
            get_recipe("finetune", repeat_threshold=threshold)
    with pytest.raises(ValueError, match="repeat_threshold='often' must be a finite number or None"):
        get_recipe("finetune", repeat_threshold="often")


def test_the_plan_shows_repeated_classes(counted):
    plan = describe_balance(counted, get_recipe("finetune", repeat_threshold=0.5, class_weights={"rare": 3.0}))
    assert plan["class_weights"] == "rare 3, common 1, never 1"
    assert plan["repeats"]["images_per_epoch"] == 11
    assert plan["repeats"]["images_of_classes"] == {"common": [8, 9.1], "rare": [1, 2.1], "never": [0, 0.0]}
    assert _repeats_line(plan["repeats"]) == (
        "11 images in an epoch instead of 9; images with rare 1 to 2, common 8 to 9"
    )
    unchanged = describe_balance(counted, get_recipe("finetune", repeat_threshold=0.1))["repeats"]
    assert _repeats_line(unchanged) == ("9 images in an epoch instead of 9: no class is repeated at the threshold 0.1")
    assert describe_balance(counted, get_recipe("finetune")) == {"repeats": None, "class_weights": None}


# In training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_scenes(folder / "train", 7, seed=0)
    make_scenes(folder / "eval", 5, seed=1)
    train = load_coco(folder / "train/annotations.json", folder / "train")
    return train, load_coco(folder / "eval/annotations.json", folder / "eval", like=train)


class _Seen(TrainerCallback):
    """Keeps the image ids of each step."""

    def __init__(self):
        self.ids, self.trainer = [], None

    def on_step_end(self, args, state, control, **kwargs):
        self.ids.append([int(number) for batch in self.trainer._image_ids for number in batch])


def train_and_see(data, folder, recipe, resume=None, **settings):
    seen = _Seen()
    trainer = make_trainer(data, folder, recipe, **settings)
    seen.trainer = trainer
    trainer.add_callback(seen)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen.ids


def test_a_run_with_repeated_images_resumes_in_the_middle_of_an_epoch(data, tmp_path):
    recipe = make_recipe(repeat_threshold=1.0, ema_decay=None)
    length = images_per_epoch(data[0], 1.0)
    per_epoch = math.ceil(length / 3)
    assert length > 7
    assert per_epoch >= 3
    epochs = (per_epoch + 2) / per_epoch
    settings = {"max_steps": -1, "num_train_epochs": epochs, "save_strategy": "steps", "save_steps": per_epoch + 1}
    whole, seen = train_and_see(data, tmp_path / "whole", recipe, **settings)
    assert whole.state.max_steps == whole.state.global_step == per_epoch + 2
    ids = data[0].dataset["image_id"]
    for epoch, steps in enumerate((seen[:per_epoch], seen[per_epoch:])):
        whole._repeat_sampler.set_epoch(epoch)
        drawn = [number for step in steps for number in step]
        assert drawn == [ids[index] for index in whole._repeat_sampler][: len(drawn)]
    record = whole.model.config.provenance["training"]["recipe"]
    assert (record["repeat_threshold"], record["images_per_epoch"]) == (1.0, length)
    checkpoint = str(tmp_path / f"whole/checkpoint-{per_epoch + 1}")
    resumed, rest = train_and_see(data, tmp_path / "whole", recipe, checkpoint, **settings)
    assert rest == seen[per_epoch + 1 :]
    assert_same(state(whole.model), state(resumed.model))


def test_class_weights_reach_the_loss_and_the_record(data, tmp_path):
    losses = []
    for weights in (None, {"disc": 5.0, "box": 5.0}):
        recipe = make_recipe(class_weights=weights, ema_decay=None)
        trainer = make_trainer(data, tmp_path / "run", recipe, max_steps=1)
        trainer.train()
        losses.append(next(entry for entry in trainer.state.log_history if "loss_ce" in entry))
    assert losses[0]["loss_ce"] < losses[1]["loss_ce"] < 5 * losses[0]["loss_ce"]
    assert losses[0]["loss_bbox"] == pytest.approx(losses[1]["loss_bbox"], rel=1e-5)
    record = trainer.model.config.provenance["training"]["recipe"]
    assert record["class_weights"].startswith(("disc 5, box 5", "box 5, disc 5"))
    assert "class_weights" in record["departures_from_the_recipe"]


def test_another_loss_or_another_order_does_not_go_with_the_options(data, tmp_path):
    trainer = make_trainer(data, tmp_path, make_recipe(ema_decay=None))
    model = trainer.model
    model.loss_function = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"class_weights need the loss of the model"):
        make_trainer(data, tmp_path, make_recipe(class_weights="balanced", ema_decay=None), model)
    with pytest.raises(ValueError, match=r"repeat_threshold=0\.5 .* train_sampling_strategy='sequential'"):
        make_trainer(data, tmp_path, make_recipe(repeat_threshold=0.5), train_sampling_strategy="sequential")


def test_a_loop_of_ones_own_uses_the_sampler(counted):
    sampler = RepeatFactorSampler(repeat_factors(counted, 0.5))
    rows = DataLoader(counted.dataset.select_columns("image_id"), batch_size=4, sampler=sampler)
    drawn = torch.cat([batch["image_id"] for batch in rows])
    assert len(drawn) == 11
    assert (drawn == 8).sum() >= 2
