"""NMS and canvas of the image processor in pipelines, predictions, evaluations and training: all give the same detections."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, pipeline

import dino_hf
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor, DinoDetrImageProcessorPil
from dino_hf.common.scenes import make_scenes
from dino_hf.inference import Predictor, predict
from dino_hf.inference.augmented import SCALES
from dino_hf.training import Augmentation, CocoEvaluator, DetectionCollator, DetectionTransform, load_coco
from helpers import tiny_config
from inference_toys import noise, save_toy_detector, toy_detector

SOFT = {"method": "soft", "iou_threshold": 0.3, "candidates": 40}  # random boxes overlap less than detections
SIZE = {"size": {"shortest_edge": 80, "longest_edge": 80}}
SETTINGS = {
    "nms": {"nms": SOFT},
    "canvas": {**SIZE, "canvas_value": 114},
    "both": {**SIZE, "canvas_value": 114, "nms": SOFT},
    "hard": {"nms": SOFT | {"method": "hard"}},
}
IMAGES = [noise(70, 40), noise(41, 90, 1), noise(64, 64, 2)]


@pytest.fixture(scope="module")
def model():
    return toy_detector()[0]


@pytest.fixture(scope="module", params=SETTINGS)
def processor(request):
    return DinoDetrImageProcessor(**{"size": {"shortest_edge": 48, "longest_edge": 96}} | SETTINGS[request.param])


@pytest.fixture(scope="module")
def expected(model, processor):
    """Detections of each image alone, by processor and model."""
    found = []
    for image in IMAGES:
        with torch.no_grad():
            outputs = model(**processor(images=image, return_tensors="pt"))
        found += processor.post_process_object_detection(outputs, 0.0, [(image.height, image.width)])
    return found


def assert_detections(found, expected, names=("boxes", "scores", "labels")):
    for one, other in zip(found, expected, strict=True):
        for name in names:
            np.testing.assert_allclose(getattr(one, name), other[name].numpy(), rtol=0, atol=2e-3)


def test_the_predictor_gives_them(model, processor, expected):
    predictor = Predictor(model, processor)
    assert_detections(list(predictor(IMAGES, batch_size=2)), expected)
    boxes = np.concatenate([found.boxes for found in predictor(IMAGES)])
    if processor.canvas_side:
        assert boxes.min() >= 0
        assert boxes.max() <= 90


def test_the_pipeline_gives_them(model, processor, expected):
    detector = pipeline("object-detection", model=model, image_processor=processor, device="cpu")
    for found, image in zip(detector(IMAGES, threshold=0.0, batch_size=2), expected, strict=True):
        np.testing.assert_allclose([entry["score"] for entry in found], image["scores"].numpy(), rtol=0, atol=2e-3)
        corners = [list(entry["box"].values()) for entry in found]
        np.testing.assert_allclose(corners, image["boxes"].int().numpy(), rtol=0, atol=1)


def test_scores_of_all_classes_belong_to_the_query_of_a_detection(model, processor, expected):
    found = list(Predictor(model, processor)(IMAGES, all_scores=True))
    assert_detections(found, expected)
    for one in found:
        own = one.class_scores[np.arange(len(one.labels)), one.labels]
        assert (own >= one.scores - 1e-5).all()  # NMS only lowers scores
        assert processor.nms or np.allclose(own, one.scores)


def test_a_limit_above_300_raises_the_number_of_candidates(model):
    predictor = Predictor(model, DinoDetrImageProcessor(nms={"method": "hard", "iou_threshold": 1, "candidates": 20}))
    assert predictor.limit(None) == 20
    assert [len(next(predictor(IMAGES[:1], max_detections=limit)).scores) for limit in (7, 300)] == [7, 20]
    many = next(predictor(IMAGES[:1], max_detections=301))
    assert len(many.scores) == model.config.num_queries * model.config.num_labels > 20
    detector = pipeline("object-detection", model=model, image_processor=predictor.image_processor, device="cpu")
    assert [len(detector(IMAGES[0], threshold=0.0, top_k=top_k)) for top_k in (300, 301)] == [20, len(many.scores)]


def test_each_scale_of_augmented_prediction_has_its_own_canvas(model):
    """At each scale, a box of the whole image is a box of the whole image again, although sides are rounded."""
    predictor = Predictor(model, DinoDetrImageProcessor(**SETTINGS["canvas"]))
    for scale in SCALES:
        scaled = predictor.at_scale(scale)
        image = noise(73, 41)
        pixels = scaled._prepare(image).pixel_values
        side = round(80 * scale)
        assert pixels.shape[-2:] == (side, side)
        height, width = ((pixels - pixels[:, -1:, -1:]).abs().amax(0) > 0).nonzero().amax(0).add(1).tolist()
        assert width == side
        share = torch.tensor([[[width / 2, height / 2, width, height]]]) / side
        outputs = SimpleNamespace(logits=torch.full((1, 1, 2), 3.0), pred_boxes=share)
        found = scaled.image_processor.post_process_object_detection(outputs, 0.0, [(41, 73)])[0]
        torch.testing.assert_close(found["boxes"][0], torch.tensor([0.0, 0, 73, 41]), rtol=0, atol=1e-4)
    assert predictor.image_processor.canvas_side == 80


@pytest.mark.parametrize("options", [{"tiles": 48}, {"tta": True}, {"tiles": 48, "tta": True}])
def test_tiles_and_augmented_prediction_run_with_both(model, options):
    processor = DinoDetrImageProcessor(**SETTINGS["both"])
    for found, image in zip(
        predict(Predictor(model, processor), IMAGES, threshold=0.0, max_detections=2000, **options), IMAGES, strict=True
    ):
        assert len(found.scores) > 5
        assert (found.boxes >= 0).all()
        assert (found.boxes <= np.array(image.size * 2)).all()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    path = make_scenes(tmp_path_factory.mktemp("scenes") / "eval", 8, seed=3)
    return load_coco(path, path.parent)


def batch_of(data, processor, augmentation=None):
    samples = data.dataset.with_transform(DetectionTransform(processor, augmentation))[:]
    return DetectionCollator()(
        [{"pixel_values": image, "labels": labels} for image, labels in zip(*samples.values(), strict=True)]
    )


@pytest.mark.parametrize("make", [DinoDetrImageProcessor, DinoDetrImageProcessorPil])
def test_perfect_detections_on_a_canvas_have_an_ap_of_1(scenes, make):
    processor = make(**SETTINGS["canvas"])
    labels = batch_of(scenes, processor)["labels"]
    count, queries = labels["class_labels"].shape
    logits = torch.full((count, queries, len(scenes.category_ids)), -9.0)
    image, query = (labels["class_labels"] >= 0).nonzero(as_tuple=True)
    logits[image, query, labels["class_labels"][image, query]] = 4.0
    predictions = ({}, logits, labels["boxes"].masked_fill(labels["class_labels"][..., None] < 0, 0.5))
    found = CocoEvaluator(scenes, processor)(EvalPrediction(predictions=predictions, label_ids=labels))
    assert found["AP"] == pytest.approx(1.0, abs=1e-3)
    other = CocoEvaluator(scenes, make(size={"shortest_edge": 48, "longest_edge": 80}))
    with pytest.raises(ValueError, match="or other boxes"):
        other(EvalPrediction(predictions=predictions, label_ids=labels))


def test_the_evaluator_of_a_trainer_and_eval_score_the_same_detections(scenes, model, processor):
    predictor, evaluator = Predictor(model, processor), CocoEvaluator(scenes, processor)
    for index in range(3):  # one by one, because padding would change the features
        subset = scenes._replace(dataset=scenes.dataset.select([index]))
        batch = batch_of(subset, processor)
        with torch.no_grad():
            outputs = model(batch["pixel_values"], batch["pixel_mask"])
        kept = evaluator.keep_top(({}, outputs.logits, outputs.pred_boxes), batch["labels"])
        assert set(kept) == {"scores", "labels", "boxes"}
        (found,) = predictor([scenes.dataset[index]["image"]], max_detections=evaluator.top_k)
        is_found = kept["labels"][0] >= 0
        assert_detections([found], [{name: values[0][is_found] for name, values in kept.items()}])


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(scale_jitter=(0.5, 1.5)), None])
def test_training_images_fit_on_the_canvas(scenes, augmentation):
    """The usual augmentation is for images of up to 1333 pixels."""
    processor = DinoDetrImageProcessor(**SETTINGS["canvas"])
    batch = batch_of(scenes, processor, augmentation)
    assert batch["pixel_values"].shape[-2:] == (80, 80)
    assert batch["pixel_mask"].all()
    torch.manual_seed(0)
    model = DinoDetrForObjectDetection(tiny_config(num_labels=len(scenes.category_ids))).train()
    outputs = model(**batch)
    outputs.loss.backward()
    assert outputs.loss.isfinite()


@pytest.mark.slow
def test_a_detector_is_trained_and_evaluated_on_its_canvas(tmp_path):
    model = save_toy_detector(tmp_path / "model")
    DinoDetrImageProcessor(**SETTINGS["both"]).save_pretrained(model)
    make_scenes(tmp_path / "data" / "train", 6, seed=1)
    make_scenes(tmp_path / "data" / "valid", 3, seed=2)
    output = tmp_path / "out"
    dino_hf.train(tmp_path / "data", model=model, output_dir=output, num_train_epochs=1, batch_size=2)
    saved = json.loads((output / "preprocessor_config.json").read_text())
    assert (saved["canvas_value"], saved["nms"]) == (114, SOFT)
    assert Predictor(output).image_processor.canvas_side == 80
