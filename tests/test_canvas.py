"""The square canvas of image processors, `canvas.py`."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dino_hf import DinoDetrImageProcessor, DinoDetrImageProcessorPil
from dino_hf.model.canvas import canvas_in_pixels, fit_canvas
from dino_hf.model.targets import mask_from_sizes

SIDE = 96
SIZES = [(60, 110), (90, 70), (33, 33)]  # (height, width) of the images
CANVAS = {"size": {"shortest_edge": SIDE, "longest_edge": SIDE}, "canvas_value": 114}

both_backends = pytest.mark.parametrize("make", [DinoDetrImageProcessor, DinoDetrImageProcessorPil])


def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def annotations():
    """The last image has no objects, and a box of the first ends beyond its image."""
    boxes = [[[10, 20, 30, 25.5], [100, 50, 20, 20]], [[12, 30, 50, 45]], []]
    return [
        {"image_id": index, "annotations": [{"bbox": box, "category_id": 2} for box in of_image]}
        for index, of_image in enumerate(boxes)
    ]


def outputs(labels):
    """Outputs that repeat the labels, with a high score for class 2."""
    logits, boxes = torch.full((len(labels), 2, 4), -9.0), torch.full((len(labels), 2, 4), 0.5)
    for image, target in enumerate(labels):
        logits[image, : len(target["boxes"]), 2] = 3.0
        boxes[image, : len(target["boxes"])] = target["boxes"]
    return SimpleNamespace(logits=logits, pred_boxes=boxes)


@both_backends
def test_images_are_at_the_top_left_with_the_value_before_normalisation(make):
    processor = make(**CANVAS)
    batch = processor(images=images(), return_tensors="pt")
    assert batch["pixel_values"].shape == (3, 3, SIDE, SIDE)
    assert "pixel_mask" not in batch
    grey = processor(images=np.full((9, 9, 3), 114, np.uint8), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(grey, grey[:, :1, :1].expand(3, SIDE, SIDE))
    for pixels, size, image in zip(batch["pixel_values"], SIZES, images(), strict=True):
        height, width = fit_canvas(*size, SIDE)
        assert max(height, width) == SIDE
        assert torch.equal(pixels[:, height:], grey[:, height:])
        assert torch.equal(pixels[:, :, width:], grey[:, :, width:])
        alone = make(size={"height": height, "width": width})(images=image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels[:, :height, :width], alone)


@pytest.mark.parametrize(
    ("size", "resized"),
    [((480, 640), (768, 1024)), ((640, 427), (1024, 683)), ((1, 5000), (1, 1024)), ((7, 7), (1024,) * 2)],
)
def test_the_longer_side_is_the_canvas_and_the_other_is_rounded(size, resized):
    assert fit_canvas(*size, 1024) == resized


@both_backends
@pytest.mark.parametrize("nms", [None, {"method": "soft"}, {"method": "hard"}])
def test_boxes_go_to_the_canvas_and_back(make, nms):
    """Boxes of the labels are relative to the canvas. Detections are in pixels of the image, and end at its border."""
    processor = make(**CANVAS, nms=nms)
    labels = processor(images=images(), annotations=annotations(), return_tensors="pt")["labels"]
    assert [target["size"].tolist() for target in labels] == [[SIDE, SIDE]] * 3
    assert [target["orig_size"].tolist() for target in labels] == [list(size) for size in SIZES]
    assert labels[2]["boxes"].shape == (0, 4)
    expected = [[[10, 20, 40, 45.5], [100, 50, 110, 60]], [[12, 30, 62, 75]], []]
    for found, boxes in zip(
        processor.post_process_object_detection(outputs(labels), 0.5, SIZES), expected, strict=True
    ):
        found = found["boxes"][found["boxes"][:, 0].argsort()]
        torch.testing.assert_close(found, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), rtol=0, atol=1e-3)


@both_backends
def test_detections_in_the_padding_are_cut_to_the_image(make):
    processor = make(**CANVAS)
    whole = SimpleNamespace(logits=torch.full((3, 1, 1), 3.0), pred_boxes=torch.tensor([[[0.5, 0.5, 1.2, 1.2]]] * 3))
    for found, (height, width) in zip(processor.post_process_object_detection(whole, 0.5, SIZES), SIZES, strict=True):
        assert found["boxes"].tolist() == [[0, 0, width, height]]
    relative = processor.post_process_object_detection(whole, 0.5)[0]["boxes"]
    torch.testing.assert_close(relative, torch.tensor([[-0.1, -0.1, 1.1, 1.1]]))


def test_areas_are_those_of_the_resized_image():
    area = DinoDetrImageProcessor(**CANVAS)(images=images(), annotations=annotations(), return_tensors="pt")["labels"][
        1
    ]
    height, width = fit_canvas(*SIZES[1], SIDE)
    torch.testing.assert_close(area["area"], torch.tensor([50 * 45 * height * width / (90.0 * 70.0)]))


@both_backends
def test_images_that_are_not_resized_are_placed_as_they_are(make):
    processor = make(**CANVAS)
    batch = processor(images=images()[1:], annotations=annotations()[1:], do_resize=False, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
    expected = torch.tensor([[(12 + 25) / SIDE, (30 + 22.5) / SIDE, 50 / SIDE, 45 / SIDE]])
    torch.testing.assert_close(batch["labels"][0]["boxes"], expected)
    with pytest.raises(ValueError, match=r"110 x 60 pixels .* canvas of 96 x 96"):
        processor(images=images()[0], do_resize=False)


@both_backends
def test_images_in_0_to_1_get_the_same_canvas(make):
    processor = make(**CANVAS)
    pixels = np.random.default_rng(1).random((3, 50, 80), dtype=np.float32)
    batch = processor(images=pixels, do_rescale=False, do_resize=False, return_tensors="pt")
    grey = processor(images=np.full((9, 9, 3), 114, np.uint8), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"][..., -1, -1], grey[..., -1, -1])


def test_labels_on_a_canvas_make_no_mask():
    batch = DinoDetrImageProcessor(**CANVAS)(images=images(), annotations=annotations(), return_tensors="pt")
    assert mask_from_sizes(batch["labels"], batch["pixel_values"]) is None


def test_the_canvas_in_pixels_follows_the_rounding_of_each_side():
    expected = torch.tensor([[1024 * 427 / 683, 640.0], [5000.0, 5000.0]])
    torch.testing.assert_close(canvas_in_pixels(torch.tensor([[427.0, 640.0], [5000.0, 5000.0]]), 1024), expected)


@both_backends
def test_the_setting_is_saved_and_loaded(make, tmp_path):
    make(**CANVAS).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["canvas_value"] == 114
    assert make.from_pretrained(tmp_path).canvas_side == SIDE
    make().save_pretrained(tmp_path)
    assert "canvas_value" not in json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert make.from_pretrained(tmp_path).canvas_side is None


@both_backends
@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"canvas_value": 256}, "canvas_value=256"),
        ({"canvas_value": "114"}, "canvas_value='114'"),
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}}, "both .*1333"),
        ({"size": {"height": 96, "width": 96}}, "both .*'height': 96"),
        ({"pad_size": {"height": 128, "width": 128}}, "pad_size=.*128"),
        ({"do_pad": False}, "do_pad=False"),
    ],
)
def test_a_wrong_setting_is_refused_in_words(make, settings, fact):
    with pytest.raises(ValueError, match=fact):
        make(**CANVAS | settings)


def test_segmentation_masks_are_refused():
    with pytest.raises(ValueError, match="return_segmentation_masks"):
        DinoDetrImageProcessor(**CANVAS)(images=images(), annotations=annotations(), return_segmentation_masks=True)
