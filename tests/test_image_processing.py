"""Both image processors and what they share, `box_processing.py`."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, DetrConfig

from dino_hf import DinoDetrConfig, DinoDetrImageProcessor, DinoDetrImageProcessorPil

PROCESSORS = {"torchvision": DinoDetrImageProcessor, "pil": DinoDetrImageProcessorPil}
TINY = {"size": {"shortest_edge": 48, "longest_edge": 100}}
SIZES = [(60, 110), (90, 70)]  # (height, width); the resized ones are padded on different sides

both_backends = pytest.mark.parametrize("backend", PROCESSORS)


def make_processor(backend="torchvision", **changes):
    return PROCESSORS[backend](**{**TINY, **changes})


def make_images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def make_annotations() -> list[dict]:
    """COCO annotations with boxes that do not touch the border, and a crowd."""
    return [
        {
            "image_id": 7,
            "annotations": [
                {"bbox": [10, 20, 30, 25.5], "category_id": 3, "area": 700.0, "iscrowd": 0},
                {"bbox": [1, 1, 100, 50], "category_id": 1, "area": 5000.0, "iscrowd": 1},
                {"bbox": [60, 5, 40, 40], "category_id": 0, "area": 1600.0, "iscrowd": 0},
            ],
        },
        {"image_id": 8, "annotations": [{"bbox": [12, 30, 50, 45], "category_id": 2, "area": 9.0, "iscrowd": 0}]},
    ]


def process(processor, annotations=None):
    return processor(images=make_images(), annotations=annotations or make_annotations(), return_tensors="pt")


@both_backends
@pytest.mark.parametrize("pad_size", [None, {"height": 128, "width": 160}])
def test_boxes_times_the_original_size_are_the_annotation(backend, pad_size):
    batch = process(make_processor(backend, pad_size=pad_size))
    height, width = batch["pixel_mask"].shape[1:]
    valid = batch["pixel_mask"].amax(2).sum(1), batch["pixel_mask"].amax(1).sum(1)
    assert any(valid[0] < height)
    assert any(valid[1] < width)
    for labels, annotation, size in zip(batch["labels"], make_annotations(), SIZES, strict=True):
        expected = [entry["bbox"] for entry in annotation["annotations"] if not entry["iscrowd"]]
        center, box_size = (labels["boxes"] * torch.tensor([size[1], size[0]] * 2)).split(2, dim=1)
        # pixels in float32, through the resized image
        torch.testing.assert_close(
            torch.cat([center - box_size / 2, box_size], dim=1),
            torch.tensor(expected, dtype=torch.float32),
            rtol=0,
            atol=1e-3,
        )


@both_backends
def test_images_are_resized_and_padded_at_the_right_and_bottom(backend):
    batch = process(make_processor(backend))
    sizes = [(48, 88), (61, 48)]  # a shortest side of 48; the longer is int(48 * 90 / 70), as in the original
    assert batch["pixel_values"].shape == (2, 3, 61, 88)
    for (height, width), values, mask, labels in zip(
        sizes, batch["pixel_values"], batch["pixel_mask"], batch["labels"], strict=True
    ):
        expected = torch.zeros(61, 88, dtype=torch.long)
        expected[:height, :width] = 1
        assert torch.equal(mask, expected)
        assert not values[:, mask == 0].any()
        assert labels["size"].tolist() == [height, width]


@both_backends
def test_labels_hold_what_the_model_and_the_evaluation_need_without_crowds(backend):
    first, second = process(make_processor(backend))["labels"]
    assert first["class_labels"].tolist() == [3, 0]
    assert second["class_labels"].tolist() == [2]
    assert [labels["image_id"].tolist() for labels in (first, second)] == [[7], [8]]
    assert [labels["orig_size"].tolist() for labels in (first, second)] == [list(size) for size in SIZES]
    assert first["class_labels"].dtype == torch.int64
    assert first["boxes"].dtype == torch.float32
    assert first["iscrowd"].tolist() == [0, 0]


@both_backends
def test_an_image_without_annotations_has_boxes_of_the_usual_form(backend):
    annotations = make_annotations()
    annotations[1]["annotations"] = []
    labels = process(make_processor(backend), annotations)["labels"][1]
    assert labels["boxes"].shape == (0, 4)
    assert labels["class_labels"].shape == (0,)


@both_backends
def test_a_missing_area_is_that_of_the_box_and_a_missing_iscrowd_is_0(backend):
    annotations = make_annotations()
    complete = process(make_processor(backend), annotations)["labels"]
    for annotation in annotations:
        annotation["annotations"] = [
            {"bbox": entry["bbox"], "category_id": entry["category_id"]}
            for entry in annotation["annotations"]
            if not entry["iscrowd"]
        ]
    labels = process(make_processor(backend), annotations)["labels"]
    for got, expected in zip(labels, complete, strict=True):
        assert torch.equal(got["boxes"], expected["boxes"])
        assert torch.equal(got["class_labels"], expected["class_labels"])
    height, width = labels[1]["size"].tolist()
    scale = height * width / (SIZES[1][0] * SIZES[1][1])
    torch.testing.assert_close(labels[1]["area"], torch.tensor([50.0 * 45 * scale]))


@both_backends
def test_the_annotations_of_the_caller_are_not_changed(backend):
    annotations = make_annotations()
    del annotations[1]["annotations"][0]["area"]
    before = repr(annotations)
    process(make_processor(backend), annotations)
    assert repr(annotations) == before


@both_backends
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"category_id": 1}, r"the keys \['category_id'\], but needs bbox, as \(x, y, width, height\) in pixels"),
        ({"bbox": [1, 2, 3, 4]}, r"the keys \['bbox'\], but needs bbox.* and category_id"),
        ({"bbox": [1, 2, 3, 4, 5], "category_id": 1}, r"bbox=\[1, 2, 3, 4, 5\]; it must be \(x, y, width, height\)"),
        ({"bbox": [], "category_id": 1}, r"bbox=\[\]; it must be"),
        ({"bbox": [1, 2, float("nan"), 4], "category_id": 1}, r"bbox=\[1, 2, nan, 4\]; it must be"),
        ({"bbox": [1, float("inf"), 3, 4], "category_id": 1}, r"bbox=\[1, inf, 3, 4\]; it must be"),
        ({"bbox": [9, 9, -3, 4], "category_id": 1}, r"bbox=\[9, 9, -3, 4\]; it must be"),
        ({"bbox": ["a", 2, 3, 4], "category_id": 1}, r"bbox=\['a', 2, 3, 4\]; it must be"),
        ({"bbox": 7, "category_id": 1}, "bbox=7; it must be"),
    ],
)
def test_a_bad_annotation_is_shown_with_what_it_needs(backend, entry, message):
    annotations = make_annotations()
    annotations[1]["annotations"] = [entry]
    with pytest.raises(ValueError, match=message):
        process(make_processor(backend), annotations)


@both_backends
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_images_of_any_mode_become_rgb(backend, mode):
    images = [image.convert(mode) for image in make_images()]
    batch = make_processor(backend)(images=images, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 61, 88)
    rgb = make_processor(backend)(images=[image.convert("RGB") for image in images], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], rgb["pixel_values"])


WIDE = np.arange(60 * 110, dtype=np.uint16).reshape(60, 110) * 9


@both_backends
@pytest.mark.parametrize(
    ("image", "found"),
    [
        (Image.fromarray(WIDE), "mode 'I;16'"),
        (Image.fromarray(WIDE.astype(np.int32)), "mode 'I'"),
        (Image.fromarray(WIDE.astype(np.float32)), "mode 'F'"),
        (WIDE[..., None].repeat(3, -1), "values up to 59391"),
        (WIDE.astype(np.float32)[None].repeat(3, 0), "values up to 59391"),
        (torch.from_numpy(WIDE).expand(3, -1, -1), "values up to 59391"),
    ],
    ids=["I;16", "I", "F", "uint16", "float32", "tensor"],
)
def test_images_of_more_than_8_bits_are_refused_instead_of_turning_white(backend, image, found):
    processor = make_processor(backend)
    with pytest.raises(ValueError, match=f"An image has {found}, but 8 bits per channel are expected.*array / 257"):
        processor(images=[image], return_tensors="pt")
    processor(images=[Image.fromarray((WIDE / 257).astype("uint8"))])


@both_backends
def test_values_of_another_range_are_fine_with_their_own_scale_or_without_any(backend):
    processor, image = make_processor(backend), np.array(make_images()[0])
    expected = processor(images=[image], return_tensors="pt")["pixel_values"]
    got = processor(images=[(image / 255).astype(np.float32)], do_rescale=False, return_tensors="pt")["pixel_values"]
    assert (got - expected).abs().max() < 0.04  # a resize in float32, without rounding to whole grey values
    if backend == "torchvision":  # the other cannot resize them
        wide = processor(images=[image * np.uint16(257)], rescale_factor=1 / 65535, return_tensors="pt")["pixel_values"]
        assert (wide - expected).abs().max() < 0.04


@both_backends
@pytest.mark.parametrize("kind", ["array", "channels first", "tensor", "half"])
def test_floats_in_the_unit_interval_are_not_divided_by_255_once_more(backend, kind):
    image = np.array(make_images()[0])
    processor = make_processor(backend)
    expected = processor(images=[image], return_tensors="pt")["pixel_values"]
    for floats in (image / 255, image.astype(np.float64)):
        if kind == "channels first":
            floats = floats.transpose(2, 0, 1)
        elif kind in ("tensor", "half"):
            dtype = torch.float16 if kind == "half" else torch.float32
            floats = torch.from_numpy(floats).permute(2, 0, 1).to(dtype)
        assert torch.equal(processor(images=[floats], return_tensors="pt")["pixel_values"], expected)
    black = np.zeros((20, 30, 3), np.float32)
    pixels = processor(images=[black], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, processor(images=[black.astype(np.uint8)], return_tensors="pt")["pixel_values"])


@both_backends
@pytest.mark.parametrize(
    ("value", "settings", "message"),
    [
        (-1.5, {}, "values down to -1.5; pass the image before normalisation"),
        (float("nan"), {}, "NaN or infinite"),
        (float("inf"), {}, "NaN or infinite"),
        (float("nan"), {"do_rescale": False}, "NaN or infinite"),
        (200.0, {"do_rescale": False}, r"up to 200, but with do_rescale=False they must lie in \[0, 1\]"),
    ],
)
def test_arrays_on_another_scale_are_refused(backend, value, settings, message):
    image = np.full((20, 30, 3), 0.5, np.float32)
    image[3, 4, 1] = value
    with pytest.raises(ValueError, match=message):
        make_processor(backend)(images=[image], return_tensors="pt", **settings)


def test_bytes_without_a_scale_are_fine_where_the_mean_is_of_bytes():
    image = np.array(make_images()[0])
    settings = {"image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]}
    expected = make_processor("torchvision")(images=[image], return_tensors="pt")["pixel_values"]
    got = make_processor("torchvision", do_rescale=False, **settings)(images=[image], return_tensors="pt")[
        "pixel_values"
    ]
    assert (got - expected).abs().max() < 1e-4  # float32


@both_backends
@pytest.mark.parametrize(("height", "width"), [(1, 400), (400, 1)])
def test_an_extremely_long_image_keeps_a_pixel_of_its_short_side(backend, height, width):
    image = Image.new("RGB", (width, height), "red")
    annotations = {"image_id": 1, "annotations": [{"bbox": [0, 0, width, height], "category_id": 0}]}
    processor = make_processor(backend, size={"shortest_edge": 64, "longest_edge": 128})
    batch = processor(images=[image], annotations=[annotations], return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, *((1, 128) if height == 1 else (128, 1)))
    torch.testing.assert_close(batch["labels"][0]["boxes"], torch.tensor([[0.5, 0.5, 1.0, 1.0]]))


def test_both_backends_give_nearly_the_same():
    first, second = (process(make_processor(backend)) for backend in PROCESSORS)
    assert torch.equal(first["pixel_mask"], second["pixel_mask"])
    for a, b in zip(first["labels"], second["labels"], strict=True):
        assert torch.equal(a["class_labels"], b["class_labels"])
        torch.testing.assert_close(a["boxes"], b["boxes"])
    # each resize rounds to a whole grey value, 1 / 255, which the division by a deviation of 0.225 makes 0.0175
    difference = (first["pixel_values"] - second["pixel_values"]).abs()
    assert difference.max() < 0.04


@both_backends
def test_the_defaults_are_those_of_the_paper(backend):
    processor = PROCESSORS[backend]()
    assert dict(processor.size) == {"shortest_edge": 800, "longest_edge": 1333}
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert list(processor.image_std) == [0.229, 0.224, 0.225]
    assert processor.do_convert_rgb
    assert processor.do_pad


@both_backends
def test_a_saved_processor_is_the_same_again(tmp_path, backend):
    processor = make_processor(backend, image_mean=[0.5, 0.4, 0.3])
    processor.save_pretrained(tmp_path)
    loaded = PROCESSORS[backend].from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    for a, b in zip(process(loaded)["pixel_values"], process(processor)["pixel_values"], strict=True):
        assert torch.equal(a, b)


@both_backends
@pytest.mark.parametrize("saved_by", PROCESSORS)
def test_the_auto_class_finds_the_processor_of_each_backend(tmp_path, backend, saved_by):
    make_processor(saved_by).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(loaded) is PROCESSORS[backend]
    assert dict(loaded.size) == TINY["size"]


def make_outputs(images=2, queries=7, classes=5, dtype=torch.float32) -> SimpleNamespace:
    boxes = torch.cat([0.3 + 0.4 * torch.rand(images, queries, 2), 0.1 + 0.3 * torch.rand(images, queries, 2)], dim=-1)
    return SimpleNamespace(logits=torch.randn(images, queries, classes).to(dtype), pred_boxes=boxes.to(dtype))


def slow_detections(outputs, threshold, sizes, top_k):
    results = []
    for image, (logits, boxes) in enumerate(zip(outputs.logits, outputs.pred_boxes, strict=True)):
        pairs = [
            (logits[query, label].float().sigmoid().item(), label, query)
            for query in range(logits.shape[0])
            for label in range(logits.shape[1])
        ]
        detections = []
        for score, label, query in sorted(pairs, reverse=True)[:top_k]:
            if score > threshold:
                height, width = sizes[image] if sizes is not None else (1, 1)
                cx, cy, w, h = boxes[query].float().tolist()
                corners = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
                detections.append((score, label, corners))
        results.append(detections)
    return results


@both_backends
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("sizes", [None, [(480, 640), (1333, 800)], torch.tensor([[480, 640], [1333, 800]])], ids=str)
@pytest.mark.parametrize("top_k", [4, 300])
def test_detections_agree_with_a_loop_over_queries_and_classes(backend, threshold, sizes, top_k):
    outputs = make_outputs()
    results = make_processor(backend).post_process_object_detection(outputs, threshold, sizes, top_k)
    for got, expected in zip(results, slow_detections(outputs, threshold, sizes, top_k), strict=True):
        assert got["labels"].tolist() == [label for _, label, _ in expected]
        torch.testing.assert_close(got["scores"], torch.tensor([score for score, _, _ in expected]))
        corners = torch.tensor([corners for _, _, corners in expected]).reshape(-1, 4)
        # float32 against Python's doubles, in pixels
        torch.testing.assert_close(got["boxes"], corners, rtol=0, atol=1e-3)


@both_backends
def test_usually_the_best_300_above_a_half_are_kept(backend):
    outputs = make_outputs(queries=80)
    outputs.logits = outputs.logits + 6
    results = make_processor(backend).post_process_object_detection(outputs)
    assert [len(result["scores"]) for result in results] == [300, 300]
    outputs.logits[1] = -torch.rand(80, 5) * 1e-3  # a score of just below a half
    results = make_processor(backend).post_process_object_detection(outputs)
    assert [len(result["scores"]) for result in results] == [300, 0]
    assert results[1]["boxes"].shape == (0, 4)


@both_backends
def test_detections_are_float32_from_outputs_in_half_precision(backend):
    outputs = make_outputs(dtype=torch.bfloat16)
    sizes = torch.tensor([[480, 640], [1333, 800]], dtype=torch.int32)
    for result, expected in zip(
        make_processor(backend).post_process_object_detection(outputs, 0.0, sizes),
        slow_detections(outputs, 0.0, sizes.tolist(), 300),
        strict=True,
    ):
        assert result["boxes"].dtype == result["scores"].dtype == torch.float32
        corners = torch.tensor([corners for _, _, corners in expected])
        # compared in order of their left sides: scores of half precision have ties, whose order says nothing
        a, b = (boxes[boxes[:, 0].argsort()] for boxes in (result["boxes"], corners))
        # float32 against Python's doubles, in pixels; half precision has steps of 4 at 1000
        torch.testing.assert_close(a, b, rtol=0, atol=1e-2)


@both_backends
@pytest.mark.parametrize(
    "sizes",
    [
        [torch.tensor([480, 640]), torch.tensor([1333, 800])],
        ((480, 640), (1333, 800)),
        np.array([[480, 640], [1333, 800]]),
        torch.tensor([[480, 640], [1333, 800]], dtype=torch.int32),
    ],
    ids=["tensors", "tuples", "array", "int32"],
)
def test_target_sizes_may_come_in_any_form(backend, sizes):
    outputs, processor = make_outputs(), make_processor(backend)
    results = processor.post_process_object_detection(outputs, 0.0, sizes)
    for got, expected in zip(results, processor.post_process_object_detection(outputs, 0.0), strict=True):
        size = torch.tensor([640.0, 480.0] if got is results[0] else [800.0, 1333.0]).repeat(2)
        torch.testing.assert_close(got["boxes"], expected["boxes"] * size)


@both_backends
@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ([(480, 640)], r"have the shape \(1, 2\)"),
        (torch.ones(3, 2), r"have the shape \(3, 2\)"),
        (torch.ones(2, 3), r"have the shape \(2, 3\)"),
        ((480, 640), r"have the shape \(2,\)"),  # of one image
        (torch.tensor(480), r"are tensor\(480\)"),
        ([(480, 640), (3,)], r"are \[\(480, 640\), \(3,\)\]"),
        ([(480, 640), None], r"are \[\(480, 640\), None\]"),
        (["large", "small"], "are \\['large', 'small'\\]"),
        (480, "are 480"),
    ],
    ids=str,
)
def test_other_target_sizes_are_refused(backend, sizes, found):
    message = rf"target_sizes must be one \(height, width\) for each of 2 images, but {found}"
    with pytest.raises(ValueError, match=message):
        make_processor(backend).post_process_object_detection(make_outputs(), 0.5, sizes)


@both_backends
@pytest.mark.parametrize("top_k", [0, -3])
def test_at_least_one_detection_must_be_asked_for(backend, top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k} must be at least 1"):
        make_processor(backend).post_process_object_detection(make_outputs(), top_k=top_k)


CLASSES, CATEGORY_IDS = ["disc", "box", "N/A", "star", "ring"], [90, 3, 17, 44, 2]


def make_config(**changes) -> DinoDetrConfig:
    return DinoDetrConfig(**{"id2label": dict(enumerate(CLASSES)), "category_ids": CATEGORY_IDS, **changes})


@both_backends
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_a_config_adds_names_and_original_category_ids(backend, threshold):
    outputs, processor, sizes = make_outputs(), make_processor(backend), [(480, 640), (1333, 800)]
    plain = processor.post_process_object_detection(outputs, threshold, sizes)
    results = processor.post_process_object_detection(outputs, threshold, sizes, 300, make_config())
    for result, expected in zip(results, plain, strict=True):
        assert set(expected) == {"scores", "labels", "boxes"}
        assert set(result) == {*expected, "category_ids", "text_labels"}
        assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())
        labels = expected["labels"].tolist()
        assert len(set(labels)) >= 4  # of the 5
        assert result["text_labels"] == [CLASSES[label] for label in labels]
        assert result["category_ids"].tolist() == [CATEGORY_IDS[label] for label in labels]
        assert result["category_ids"].dtype == torch.int64


@both_backends
def test_an_image_without_detections_has_no_names_and_no_category_ids(backend):
    result = make_processor(backend).post_process_object_detection(make_outputs(), 1.0, config=make_config())[1]
    assert result["text_labels"] == []
    assert result["category_ids"].shape == (0,)
    assert result["category_ids"].dtype == torch.int64


@both_backends
@pytest.mark.parametrize("config", [make_config(category_ids=None), DetrConfig(num_labels=5)], ids=["ours", "theirs"])
def test_names_come_without_category_ids_where_the_config_has_none(backend, config):
    results = make_processor(backend).post_process_object_detection(make_outputs(), 0.0, config=config)
    for result in results:
        assert set(result) == {"scores", "labels", "boxes", "text_labels"}
        assert result["text_labels"] == [config.id2label[label] for label in result["labels"].tolist()]


@both_backends
@pytest.mark.parametrize(
    ("classes", "ids", "message"),
    [
        (4, None, "The logits have 5 classes, but the config names 4 classes; .* config=model.config"),
        (91, None, "The logits have 5 classes, but the config names 91 classes"),
        (5, [1, 2, 3], "The logits have 5 classes, but the config has 3 category_ids"),
    ],
)
def test_the_config_of_another_model_is_refused(backend, classes, ids, message):
    config = make_config(id2label={index: f"n{index}" for index in range(classes)}, category_ids=None)
    config.category_ids = ids
    with pytest.raises(ValueError, match=message):
        make_processor(backend).post_process_object_detection(make_outputs(), 0.5, config=config)


@both_backends
def test_labels_made_into_predictions_give_the_annotation_back(backend):
    """Before and after the model, boxes are relative to the same thing."""
    batch = process(make_processor(backend))
    logits, boxes = torch.full((2, 3, 5), -9.0), torch.full((2, 3, 4), 0.5)
    for image, labels in enumerate(batch["labels"]):
        for query, (label, box) in enumerate(zip(labels["class_labels"], labels["boxes"], strict=True)):
            logits[image, query, label] = 9.0 - query
            boxes[image, query] = box
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
    sizes = torch.stack([labels["orig_size"] for labels in batch["labels"]])
    results = make_processor(backend).post_process_object_detection(outputs, target_sizes=sizes)
    for result, annotation in zip(results, make_annotations(), strict=True):
        entries = [entry for entry in annotation["annotations"] if not entry["iscrowd"]]
        assert result["labels"].tolist() == [entry["category_id"] for entry in entries]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in entries)]
        # pixels in float32, through the resized image
        torch.testing.assert_close(result["boxes"], torch.tensor(corners).float(), rtol=0, atol=1e-3)


@both_backends
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_std": [0.2, 0.0, 0.2]}, r"image_std=.* must be positive: pixels are divided by it"),
        ({"image_std": [0.2, float("nan"), 0.2]}, "image_std=.* must be finite numbers"),
        ({"image_mean": [0.2, float("inf"), 0.2]}, "image_mean=.* must be finite numbers"),
        ({"image_mean": [0.1] * 5}, "has 5 numbers; give three"),
        ({"rescale_factor": 0.0}, "rescale_factor=0.0 must be a positive number"),
        ({"rescale_factor": float("nan")}, "rescale_factor=nan must be a positive number"),
        (
            {"size": {"height": 16_384, "width": 16_384}},
            "height=16384 and width=16384: more than 100000000 pixels together",
        ),
        ({"size": {"shortest_edge": 12_000, "longest_edge": 12_000}}, "more than 100000000 pixels together"),
        ({"pad_size": {"height": 16_384, "width": 16_384}}, "pad_size has height=16384"),
        ({"size": {"shortest_edge": -5, "longest_edge": 10}}, r"shortest_edge=-5; a side must lie in \[1, 16384\]"),
    ],
    ids=str,
)
def test_statistics_and_sizes_without_sense_are_refused(backend, settings, message):
    with pytest.raises(ValueError, match=message):
        make_processor(backend, **settings)(images=make_images(), return_tensors="pt")
