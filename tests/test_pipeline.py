"""`pipeline` on images of different sizes, alone and in batches."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DeformableDetrImageProcessor, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor, DinoDetrImageProcessorPil
from dino_hf.inference import Predictor, predict
from dino_hf.model.image_processing_mixin import pad_images
from dino_hf.runtime.pipeline import DinoDetrObjectDetectionPipeline
from helpers import tiny_config

SIZES = ((60, 41), (33, 70), (90, 52), (47, 47), (64, 30))  # (width, height)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(256, size=(h, w, 3), dtype=np.uint8)) for w, h in SIZES]


@pytest.fixture(scope="module")
def model() -> DinoDetrForObjectDetection:
    torch.manual_seed(0)
    return DinoDetrForObjectDetection(tiny_config()).eval()


def make(model, processor=DinoDetrImageProcessor, **settings):
    image_processor = processor(size={"shortest_edge": 48, "longest_edge": 72}, **settings)
    return pipeline("object-detection", model=model, image_processor=image_processor, device="cpu")


def assert_same(found: list[list[dict]], expected: list[list[dict]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert [entry["label"] for entry in one] == [entry["label"] for entry in other]
        # float32 arithmetic whose order depends on the size of the batch
        scores = ([entry["score"] for entry in entries] for entries in (one, other))
        np.testing.assert_allclose(*scores, rtol=0, atol=1e-5)
        corners = ([list(entry["box"].values()) for entry in entries] for entries in (one, other))
        np.testing.assert_allclose(*corners, rtol=0, atol=1)


def by_hand(detector, images) -> list[list[dict]]:
    """Processor and model called on each image alone."""
    results = []
    for batch in ([image] for image in images):
        with torch.no_grad():
            outputs = detector.model(**detector.image_processor(images=batch, return_tensors="pt"))
        sizes = [(image.height, image.width) for image in batch]
        found = detector.image_processor.post_process_object_detection(
            outputs, 0.0, sizes, config=detector.model.config
        )
        for one in found:
            columns = zip(one["scores"].tolist(), one["text_labels"], one["boxes"].int().tolist(), strict=True)
            results.append(
                [
                    {
                        "score": score,
                        "label": label,
                        "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)),
                    }
                    for score, label, box in columns
                ]
            )
    return results


@pytest.mark.parametrize("processor", [DinoDetrImageProcessor, DinoDetrImageProcessorPil])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_images_of_different_sizes_are_batched(model, images, processor, batch_size):
    detector = make(model, processor)
    assert isinstance(detector, DinoDetrObjectDetectionPipeline)
    found = detector(images, threshold=0.0, batch_size=batch_size)
    assert all(found)
    assert_same(found, by_hand(detector, images))


def test_a_stream_and_half_precision(model, images):
    detector = make(model)
    streamed = list(detector((image for image in images), threshold=0.0, batch_size=3))
    assert_same(streamed, by_hand(detector, images))
    half = make(copy.deepcopy(model).bfloat16())
    assert [len(found) for found in half(images, threshold=0.0, batch_size=3)] == [len(found) for found in streamed]


def test_one_image_gives_what_the_library_gives(model, images):
    """Without batches nothing is padded, so nothing may change, not by a bit."""
    ours = make(model)
    library = type(ours).__mro__[1](model=model, image_processor=ours.image_processor, device="cpu")
    assert ours(images[0], threshold=0.0) == library(images[0], threshold=0.0)


def test_a_common_size_set_by_hand_still_works(model, images):
    detector = make(model, pad_size={"height": 80, "width": 80})
    assert_same(detector(images, threshold=0.0, batch_size=5), by_hand(detector, images))


def test_the_pipeline_and_predict_give_an_image_one_score(model, images):
    detector = make(model)
    piped = detector(images, threshold=0.0, batch_size=4)
    predicted = predict(Predictor(model, detector.image_processor), images, threshold=0.0, batch_size=3)
    for one, other in zip(piped, predicted, strict=True):
        np.testing.assert_allclose([entry["score"] for entry in one], other.scores[: len(one)], rtol=0, atol=1e-5)


def test_more_detections_than_the_default_can_be_asked_for(model, images):
    detector = make(model)
    everything = detector(images[1], threshold=0.0)
    few = detector(images[1], threshold=0.0, top_k=7)
    assert len(few) == 7
    assert_same([few], [everything[:7]])
    with pytest.raises(ValueError, match="top_k needs the image processor of DINO"):
        make(model, DeformableDetrImageProcessor)(images[0], top_k=7)


def test_other_image_processors_are_left_alone(model, images):
    """Of Deformable DETR: the library's way, with its limit."""
    detector = make(model, DeformableDetrImageProcessor)
    with pytest.raises(RuntimeError, match=r"(?i)sizes? of .*tensors? .*must match"):
        detector(images, batch_size=2)
    assert detector(images[:1] * 2, batch_size=2, threshold=0.0)
    assert PIPELINE_REGISTRY.supported_tasks["object-detection"]["impl"] is DinoDetrObjectDetectionPipeline


def test_pad_images():
    batch, mask = pad_images([torch.ones(3, 2, 5), torch.ones(3, 4, 3)])
    assert batch.shape == (2, 3, 4, 5)
    assert torch.equal(batch[:, 0].long(), mask)
    assert mask.sum(dim=(1, 2)).tolist() == [10, 12]
    _, mask = pad_images([torch.ones(3, 2, 5)] * 2, [torch.eye(2, 5, dtype=torch.int64)] * 2)
    assert mask.sum() == 4
