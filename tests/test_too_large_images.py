"""An image that does not fit into memory is skipped with one sentence, and the others are predicted."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from dino_hf.cli.augmentation_grid import save_augmentation_grid
from dino_hf.common import images
from dino_hf.common.images import UnreadableImage, read_image
from dino_hf.common.scenes import make_scenes
from dino_hf.evaluation import evaluate_model
from dino_hf.inference import Predictor, predict
from dino_hf.inference.predictor import DoesNotFit
from dino_hf.training import load_coco
from dino_hf.training.augmentation import Augmentation
from inference_toys import noise, toy_detector
from test_sources import write_video

LARGE = (130, 70)
SENTENCE = "There is not enough memory for an image of 130 x 70 pixels; scale it down, or end other programs."
ERRORS = [
    MemoryError("Unable to allocate 1 TiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.fixture
def predictor():
    return Predictor(*toy_detector())


@pytest.fixture
def photos():
    return [noise(*size) for size in ((90, 60), LARGE, (60, 90))]


def fail_for(is_wanted, function, error):
    """`function`, which raises an error where its first argument is wanted."""

    def call(*arguments, **settings):
        if is_wanted(*arguments, **settings):
            raise error
        return function(*arguments, **settings)

    return call


def is_large(*arguments, images=None, **settings) -> bool:
    return (images[0] if images else arguments[0]).size == LARGE


@pytest.mark.parametrize("settings", [{}, {"tta": True}, {"tiles": 64}, {"tta": True, "tiles": 64}])
@pytest.mark.parametrize("error", ERRORS)
def test_an_image_that_cannot_be_resized_is_skipped(predictor, photos, error, settings):
    expected = predict(predictor, photos, threshold=0.0, **settings)
    predictor.image_processor = ProcessorThat(fail_for(is_large, predictor.image_processor, error), predictor)
    failures = []
    found = predict(predictor, photos, threshold=0.0, on_failure=failures.append, **settings)
    assert [one.name for one in found] == ["image-1", "image-3"]
    for one, other in zip(found, [expected[0], expected[2]], strict=True):
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=1e-5)  # float32 in other batches
    assert [(failure.source.name, failure.reason) for failure in failures] == [("image-2", SENTENCE)]


class ProcessorThat:
    """An image processor whose call is replaced."""

    def __init__(self, call, predictor):
        self._call, self._real = call, predictor.image_processor

    def __call__(self, **settings):
        return self._call(**settings)

    def __getattr__(self, name):
        return getattr(self._real, name)


def test_another_error_of_the_image_processor_is_raised(predictor, photos):
    error = RuntimeError("a fault of the program")
    predictor.image_processor = ProcessorThat(fail_for(is_large, predictor.image_processor, error), predictor)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        predict(predictor, photos, threshold=0.0)


def test_an_image_that_cannot_be_mirrored_is_skipped(predictor, photos, monkeypatch):
    monkeypatch.setattr(ImageOps, "mirror", fail_for(is_large, ImageOps.mirror, MemoryError()))
    failures = []
    found = predict(predictor, photos, threshold=0.0, tta=True, on_failure=failures.append)
    assert [one.name for one in found] == ["image-1", "image-3"]
    assert [failure.reason for failure in failures] == [SENTENCE]


def test_an_image_whose_tile_cannot_be_cut_is_skipped(predictor, photos, monkeypatch):
    def is_second_tile(image, box):
        return image.size == LARGE and box[0] > 0

    monkeypatch.setattr(Image.Image, "crop", fail_for(is_second_tile, Image.Image.crop, MemoryError()))
    failures = []
    found = predict(predictor, photos, threshold=0.0, tiles=64, on_failure=failures.append)
    assert [one.name for one in found] == ["image-1", "image-3"]
    assert [failure.reason for failure in failures] == [SENTENCE]


@pytest.mark.parametrize("error", ERRORS)
def test_an_image_that_the_model_has_no_room_for_is_skipped(predictor, photos, error, monkeypatch):
    def is_wide(pixel_values):
        return pixel_values.shape[-1] == 89  # 130 x 70 with a short side of 48

    monkeypatch.setattr(predictor.model, "forward", fail_for(is_wide, predictor.model.forward, error))
    failures = []
    found = predict(predictor, photos, threshold=0.0, on_failure=failures.append)
    assert [one.name for one in found] == ["image-1", "image-3"]
    [failure] = failures
    assert failure.reason == (
        'A single image, resized to 89 x 48, does not fit into the memory of cpu; use dtype="bfloat16", or an image processor '
        "with a smaller size."
    )


def test_a_video_with_frames_that_are_too_large_is_not_finished(predictor, tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", 5)
    real, calls = predictor.image_processor, []

    def is_second_or_third(images, **settings):
        calls.append(images)
        return len(calls) in (2, 3)

    monkeypatch.setattr("dino_hf.inference.predictor.map_ahead", one_by_one)
    predictor.image_processor = ProcessorThat(fail_for(is_second_or_third, real, MemoryError()), predictor)
    failures, save = [], tmp_path / "out"
    found = predict(predictor, tmp_path / "clip.mp4", save=save, threshold=0.0, on_failure=failures.append)
    assert [one.frame for one in found] == [0, 3, 4]
    assert [failure.reason.startswith("Frame 1: There is not enough memory for") for failure in failures] == [True]
    predictor.image_processor = real
    again = predict(predictor, tmp_path / "clip.mp4", save=save, threshold=0.0, resume=True)
    assert [one.frame for one in again] == [0, 1, 2, 3, 4]


def one_by_one(function, items, **settings):
    return ((item, function(item)) for item in items)


def test_the_predictor_raises_unless_it_is_told_to_skip(predictor, photos):
    predictor.image_processor = ProcessorThat(fail_for(is_large, predictor.image_processor, MemoryError()), predictor)
    with pytest.raises(DoesNotFit) as raised:
        list(predictor(photos))
    assert str(raised.value) == SENTENCE
    found = list(predictor(photos, skip_too_large=True))
    assert found[1] == (SENTENCE, *LARGE)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes") / "images", 3, seed=8)


def test_an_evaluation_names_the_image(predictor, scenes):
    """Without one of its images, an AP would be of other data."""
    data = load_coco(scenes, scenes.parent)
    third = data.dataset[2]["image"].tobytes()

    def is_third(images, **settings):
        return images[0].tobytes() == third

    predictor.image_processor = ProcessorThat(fail_for(is_third, predictor.image_processor, MemoryError()), predictor)
    with pytest.raises(DoesNotFit, match="There is not enough memory for an image of ") as raised:
        evaluate_model(predictor, data, num_bootstrap=0)
    assert raised.value.__notes__ == [f"This is {data.dataset['file_name'][2]}."]


def test_the_picture_of_an_augmentation_names_the_image(scenes, tmp_path, monkeypatch):
    data = load_coco(scenes, scenes.parent)
    monkeypatch.setattr(
        "dino_hf.training.coco_data.DetectionTransform.__call__", fail_for(lambda *_: True, None, MemoryError())
    )
    with pytest.raises(MemoryError) as raised:
        save_augmentation_grid(tmp_path / "grid.png", data, Augmentation())
    [note] = raised.value.__notes__
    assert note.startswith("This is image ")
    assert note.endswith(" pixels.")


@pytest.mark.parametrize("name", ["upright", "to_rgb", "load"])
def test_an_image_that_cannot_be_read_for_want_of_memory_is_unreadable(name, tmp_path, monkeypatch):
    noise(*LARGE).save(tmp_path / "a.png")
    where, what = (Image.Image, name) if name == "load" else (images, name)
    monkeypatch.setattr(where, what, fail_for(lambda *_: True, None, MemoryError()))
    with pytest.raises(UnreadableImage) as raised:
        read_image(tmp_path / "a.png")
    assert str(raised.value) == "There is not enough memory to read it; scale it down, or end other programs."
