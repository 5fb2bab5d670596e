"""Training on tiles: AP is that of whole images, errors and records name whole images, and a resumed run repeats the tiles."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.data.image_digests import unpack
from dino_hf.data.tiled_data import cut_into_tiles
from dino_hf.evaluation import CocoEvaluator, evaluate_model, evaluator
from dino_hf.inference.predictor import Predictor
from dino_hf.training import DetectionTransform, DinoDetrTrainer, get_recipe
from dino_hf.training.augmentation import Augmentation
from dino_hf.training.readable_images import ReadableImages
from dino_hf.training.tile_sampler import TileSampler
from helpers import QUIET, tiny_config
from inference_toys import excite
from processes import run_processes
from tile_toys import TILES, draw_large, write_coco

SIZE = {"shortest_edge": 48, "longest_edge": 96}
SMALL = Augmentation(short_sides=(40, 48), longest_side=96, crop=0.0)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles")
    return draw_large(folder / "data", 4), draw_large(folder / "data", 5, seed=1, name="other.json")


def make_model(data):
    torch.manual_seed(0)
    classes = {"num_labels": 2, "id2label": data.id2label, "category_ids": data.category_ids}
    return excite(DinoDetrForObjectDetection(tiny_config(**classes)))


def make_trainer(sets, folder, batch_size=3, **settings):
    train, held_out = (cut_into_tiles(data, TILES) for data in sets)
    recipe = get_recipe("finetune", augmentation=SMALL, early_stopping_patience=None, ema_warmup_steps=1)
    args = recipe.training_arguments(
        str(folder),
        **QUIET,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=1,
        **(
            {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_strategy": "steps"}
            | settings
        ),
    )
    return DinoDetrTrainer(
        make_model(train),
        args,
        recipe=recipe,
        train=train,
        held_out=held_out,
        image_processor=DinoDetrImageProcessor(size=SIZE),
        on_bad_image="raise",
    )


@pytest.fixture(scope="module")
def trained(sets, tmp_path_factory):
    trainer = make_trainer(sets, tmp_path_factory.mktemp("run"))
    trainer.train()
    return trainer


def test_evaluation_in_training_has_the_detections_of_evaluation_with_tiles(sets, tmp_path, monkeypatch):
    trainer, scored = make_trainer(sets, tmp_path, batch_size=1), []  # batches without padding, as in evaluation
    evaluate_in_parts = evaluator._evaluate_in_parts
    monkeypatch.setattr(
        evaluator, "_evaluate_in_parts", lambda *parts: scored.append(parts) or evaluate_in_parts(*parts)
    )
    trainer.evaluate()
    truth, found, *_ = scored[0]
    predictor = Predictor(trainer.model, trainer.processing_class)
    expected = evaluate_model(predictor, sets[1], num_bootstrap=0, tiles=TILES, batch_size=1)
    assert len(found["scores"]) == len(expected.found["scores"]) > 100
    assert len(set(found["image_id"].tolist())) == 5
    for name, values in expected.truth.items():
        np.testing.assert_array_equal(truth[name], values)
    np.testing.assert_array_equal(found["image_id"], expected.found["image_id"])
    np.testing.assert_allclose(found["scores"], expected.found["scores"], rtol=1e-4)
    np.testing.assert_allclose(found["boxes"], expected.found["boxes"], atol=0.05)
    np.testing.assert_array_equal(found["labels"], expected.found["labels"])
    whole = evaluate_model(predictor, sets[1], num_bootstrap=0, tiles="none", batch_size=1)
    assert len(whole.found["scores"]) != len(found["scores"])


def test_the_record_has_the_tiles_and_counts_images(trained, sets):
    training = trained.model.config.provenance["training"]
    assert training["num_images"] == 4
    assert training["evaluation"]["num_images"] == trained._ema_evaluation["num_images"] == 5
    num_tiles = sum(row["tile"][:2] != [0, 0] or row["width"] == TILES[0] for row in trained._train_data.dataset)
    assert training["tiles"] == {"size": list(TILES), "overlap": 0.2, "count": num_tiles}
    assert "64 x 48" in training["recipe"]["tiles"]
    assert len(unpack(training["images"]["trained"])) == 4
    assert len(unpack(training["images"]["held_out"])) == 5
    assert isinstance(trained._repeat_sampler, TileSampler)


def test_a_resumed_run_repeats_the_tiles_bit_by_bit(trained, sets, tmp_path):
    again = make_trainer(sets, tmp_path)
    again.train(resume_from_checkpoint=f"{trained.args.output_dir}/checkpoint-2")
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_errors_name_the_image_and_the_tile(sets):
    tiled = cut_into_tiles(sets[0], TILES)
    transform = DetectionTransform(DinoDetrImageProcessor(size=SIZE))
    rows = tiled.dataset[3:4]
    x0, y0, x1, y1 = rows["tile"][0]
    text = f"100 (tile from {x0}, {y0} to {x1}, {y1})"
    for wrong in (
        {"objects": [{"bbox": [[90, 0, 9, 9]], "category": [0], "area": [81], "iscrowd": [0]}]},
        {"width": [9]},
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            transform(rows | wrong)


def test_all_tiles_of_a_bad_image_are_left_out(sets, tmp_path):
    data = draw_large(tmp_path / "bad", 4)
    (tmp_path / "bad" / "data_1.png").write_bytes(b"damaged")
    tiled = cut_into_tiles(data, TILES)
    sources = [int(value) for value in (np.array(tiled.dataset["source_id"][:]) - 100) // 7]
    rows = ReadableImages(tiled.dataset, list(data.dataset["file_name"]), images=sources)
    assert {rows[index]["source_id"] for index in range(len(rows))} == {100, 114, 121}
    assert rows.bad_images == ["data_1.png"]
    assert "1 of 4 training images" in rows.summary()


def test_a_part_of_the_tiles_is_evaluated_alone(sets):
    """Only two tiles of the first image, without the whole image."""
    tiled = cut_into_tiles(sets[1], TILES)
    metric = CocoEvaluator(tiled, DinoDetrImageProcessor(size=SIZE))
    tile = tiled.dataset[1]
    box = np.array(tile["objects"]["bbox"] or [[3, 3, 20, 12]], dtype=np.float32)[:1]
    corners = torch.tensor(np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1))[None]
    found = {"scores": torch.tensor([[0.9]]), "labels": torch.tensor([[0]], dtype=torch.int32), "boxes": corners}
    metric._merging.add(1, {name: values[0].numpy() for name, values in found.items()})
    metric._merging.add(2, {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0)})
    ((image_id, merged),) = metric._merging.take()
    assert image_id == 100
    x0, y0 = tile["tile"][:2]
    np.testing.assert_allclose(merged["boxes"], corners[0] + torch.tensor([x0, y0, x0, y0]), rtol=1e-6)
    assert list(metric._merging.take()) == []


def test_tiles_have_an_order_of_their_own(sets, tmp_path):
    with pytest.raises(ValueError, match=r"train_sampling_strategy='sequential'.*tiles"):
        make_trainer(sets, tmp_path, train_sampling_strategy="sequential")


def test_an_image_without_boxes_and_whole_held_out_images(tmp_path):
    """Training on tiles and evaluation on whole images may be combined."""
    Image.new("RGB", (150, 90)).save(tmp_path / "a.png")
    data = write_coco(tmp_path, [(1, "a.png", (150, 90), [])])
    metric = CocoEvaluator(data, DinoDetrImageProcessor(size=SIZE))
    assert metric._merging is None
    assert list(cut_into_tiles(data, TILES).dataset["source_id"]) == [1] * 10


def test_two_processes_score_every_image_once(tmp_path, monkeypatch):
    data = draw_large(tmp_path, 4, seed=1, name="other.json")
    scored, evaluate_in_parts = [], evaluator._evaluate_in_parts
    monkeypatch.setattr(
        evaluator, "_evaluate_in_parts", lambda *parts: scored.append(parts) or evaluate_in_parts(*parts)
    )
    metrics = make_trainer((data, data), tmp_path / "one", batch_size=1).evaluate()
    np.savez(tmp_path / "expected.npz", loss=metrics["eval_loss"], **scored[0][1])
    run_processes("tile_evaluation", 2, tmp_path)
