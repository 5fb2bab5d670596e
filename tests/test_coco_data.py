"""Reading a COCO folder: class space, crowd and areas kept, augmentation, padding in the collator, and errors in the user's
words."""

import copy
import dataclasses
import json
import pickle
import re

import pytest
import torch
from datasets.fingerprint import Hasher
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from dino_hf import DinoDetrImageProcessor, DinoDetrImageProcessorPil
from dino_hf.training import DetectionCollator, DetectionTransform, load_coco
from dino_hf.training.augmentation import Augmentation
from processes import needs_fork

CONTENT = {
    "images": [
        {"id": 7, "file_name": "wide.png", "width": 60, "height": 40},
        {"id": 3, "file_name": "tall.png", "width": 36, "height": 50},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 90, "bbox": [6, 4, 30, 20], "area": 600, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 12, 10], "area": 55.5, "iscrowd": 0},
        {"id": 5, "image_id": 7, "category_id": 2, "bbox": [20, 20, 30, 15], "area": 450, "iscrowd": 1},
    ],
    "categories": [{"id": 90, "name": "kite"}, {"id": 2, "name": "dog"}, {"id": 17, "name": "cat"}],
}


def changed(index=0, **changes):
    content = copy.deepcopy(CONTENT)
    content["annotations"][index] |= changes
    return content


@pytest.fixture
def write(tmp_path):
    def save(content, **changes):
        for image in CONTENT["images"]:
            Image.new("RGB", (image["width"], image["height"]), "gray").save(tmp_path / image["file_name"])
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(content | changes))
        return path, tmp_path

    return save


def test_categories_with_gaps_become_indices_and_keep_their_ids_and_names(write):
    data = load_coco(*write(CONTENT))
    assert data.id2label == {0: "dog", 1: "cat", 2: "kite"}
    assert data.category_ids == [2, 17, 90]
    assert data.dataset[0]["objects"]["category"] == [2, 0, 0]


def test_areas_crowd_and_images_without_boxes_are_kept(write):
    dataset = load_coco(*write(CONTENT)).dataset
    assert dataset[0]["objects"]["area"] == [600, 55.5, 450]
    assert dataset[0]["objects"]["iscrowd"] == [0, 0, 1]
    assert dataset[1]["image_id"] == 3
    assert dataset[1]["objects"]["bbox"] == []
    assert dataset[1]["image"].size == (36, 50)
    assert dataset["file_name"][:] == ["wide.png", "tall.png"]


def test_an_object_without_area_or_crowd_flag_gets_the_area_of_its_box(write):
    objects = load_coco(*write(changed(area=None, iscrowd=None))).dataset[0]["objects"]
    assert (objects["area"][0], objects["iscrowd"][0]) == (600, 0)


def test_evaluation_data_take_over_the_classes_of_the_training_data(write):
    train = load_coco(*write(CONTENT))
    subset = load_coco(*write(CONTENT, categories=CONTENT["categories"][:2]), like=train)
    assert (subset.id2label, subset.category_ids) == (train.id2label, train.category_ids)
    with pytest.raises(ValueError, match="wolf"):
        load_coco(*write(CONTENT, categories=[{"id": 2, "name": "wolf"}]), like=train)
    with pytest.raises(ValueError, match=r"{5: 'cow'}, which the training data do not have"):
        load_coco(*write(CONTENT, categories=[{"id": 5, "name": "cow"}]), like=train)


IMAGE = CONTENT["images"][0]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ([], ValueError, "not in COCO format"),
        ({"images": []}, ValueError, r"has no list of \['annotations', 'categories'\]"),
        (CONTENT | {"annotations": None}, ValueError, r"has no list of \['annotations'\]"),
        (CONTENT | {"categories": []}, ValueError, "has no categories"),
        (CONTENT | {"categories": [{"id": 2}]}, ValueError, "category 0 has name=None"),
        (
            CONTENT | {"categories": [{"id": [2], "name": "dog"}]},
            ValueError,
            r"category 0 has id=\[2\]; it must be a whole number or a text",
        ),
        (CONTENT | {"categories": [{"id": i, "name": "dog"} for i in (2, 90)]}, ValueError, "same name"),
        (CONTENT | {"images": []}, ValueError, "lists no images"),
        (CONTENT | {"images": [IMAGE, IMAGE]}, ValueError, "two image entries with id=7"),
        (CONTENT | {"images": [IMAGE | {"id": ""}]}, ValueError, "image 0 has id=''"),
        (CONTENT | {"images": [IMAGE | {"file_name": "lost.png"}]}, FileNotFoundError, r"lost\.png"),
        (changed(category_id=4), ValueError, r"annotations\[0\] has category_id=4"),
        (changed(image_id=99), ValueError, "image_id=99, which is not among the images"),
        (changed(bbox=[1, 2, 3]), ValueError, r"annotations\[0\] has bbox=\[1, 2, 3\]"),
        (changed(bbox=None), ValueError, "has bbox=None"),
        (changed(bbox=[1, 2, float("nan"), 4]), ValueError, "bbox=.*nan"),
        (
            changed(1, bbox=[30, 20, -10, 5]),
            ValueError,
            r"annotations\[1\] has bbox=\[30, 20, -10, 5\], of negative size",
        ),
        (
            changed(1, bbox=[60, 4, 30, 20]),
            ValueError,
            r"annotations\[1\] .* completely outside .* 60 x 40 pixels .*scale",
        ),
        (changed(1, bbox=[5, -9, 30, 9]), ValueError, r"annotations\[1\] .* completely outside of its image"),
        (
            CONTENT | {"images": [IMAGE | {"width": "60"}]},
            ValueError,
            "image 7 has width='60' and height=40; they must be",
        ),
        (CONTENT | {"images": [IMAGE | {"height": 0}]}, ValueError, "image 7 has width=60 and height=0"),
    ],
)
def test_what_is_wrong_with_a_json_is_said(content, error, message, tmp_path):
    for image in CONTENT["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / image["file_name"])
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(error, match=message):
        load_coco(tmp_path / "annotations.json", tmp_path)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        load_coco(tmp_path / "none.json", tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not valid json"):
        load_coco(tmp_path / "broken.json", tmp_path)


def boxes_of(data, row=0):
    return data.dataset[row]["objects"]["bbox"]


def prepare(data, **columns):
    """All images through the transform, as Trainer's workers do it."""
    processor = DinoDetrImageProcessor(size={"shortest_edge": 80, "longest_edge": 110})
    return DetectionTransform(processor)(data.dataset[:] | columns)


@pytest.mark.parametrize("bbox", [[-5, 4, 30, 20], [50, 30, 11, 10.5], [-1, -1, 62, 42]])
def test_a_box_that_sticks_out_is_kept_and_cut_off_for_training(write, bbox):
    data = load_coco(*write(changed(bbox=bbox)))
    assert boxes_of(data)[0] == bbox
    labels = prepare(data)["labels"][0]
    assert len(labels["boxes"]) == 2
    center, size = labels["boxes"].split(2, dim=1)
    assert (center - size / 2).min() >= -1e-6
    assert (center + size / 2).max() <= 1 + 1e-6


@pytest.mark.parametrize("bbox", [[6, 4, 0, 20], [6, 4, 30, 0], [6, 4, 1e-9, 20], [59.999, 4, 30, 20], [80, 4, 0, 0]])
def test_boxes_of_no_size_are_left_out_everywhere_with_one_warning(write, bbox):
    content = changed(bbox=bbox)
    content["annotations"].append({"id": 9, "image_id": 3, "category_id": 17, "bbox": [1, 1, 0, 0]})
    with pytest.warns(
        UserWarning, match=r": 2 boxes have no size and are left out .*annotations\[0\] with bbox="
    ) as record:
        data = load_coco(*write(content))
    assert len(record) == 1
    assert [len(boxes_of(data, row)) for row in range(2)] == [2, 0]
    assert [len(objects["area"]) for objects in data.dataset["objects"]] == [2, 0]
    assert [len(labels["class_labels"]) for labels in prepare(data)["labels"]] == [1, 0]


def without_sizes():
    content = copy.deepcopy(CONTENT)
    for image in content["images"]:
        del image["width"], image["height"]
    return content


def with_outer_box(data):
    """Columns of rows without sizes, as other programs may make them, whose first box lies outside of its image."""
    objects = copy.deepcopy(data.dataset[:]["objects"])
    objects[0]["bbox"][0] = [60, 4, 30, 20]
    return {"objects": objects, "width": [None, None], "height": [None, None]}


def test_sizes_that_a_json_does_not_state_are_those_of_the_files(write):
    stated, data = load_coco(*write(CONTENT)), load_coco(*write(without_sizes()))
    for side in ("width", "height"):
        assert list(data.dataset[side]) == list(stated.dataset[side])
    assert len(prepare(data)["labels"]) == 2
    content = without_sizes()
    content["annotations"][0]["bbox"] = [60, 4, 30, 20]
    with pytest.raises(ValueError, match="outside of its image of 60 x 40 pixels"):
        load_coco(*write(content))


def test_outer_boxes_of_rows_without_sizes_are_found_at_the_image(write):
    data = load_coco(*write(CONTENT))
    with pytest.raises(
        ValueError, match=r"Image 7 is 60 wide and 40 high, and 1 of its boxes are completely outside: \[\[60"
    ):
        prepare(data, **with_outer_box(data))


def test_an_image_that_was_resized_after_annotation_is_an_error(write):
    json_file, folder = write(CONTENT)
    Image.new("RGB", (30, 20)).save(folder / "wide.png")
    data = load_coco(json_file, folder)
    with pytest.raises(
        ValueError, match=r"Image 7 is 30 wide and 20 high, but 60 and 40 by its json; .* it was resized"
    ):
        prepare(data)


def test_an_image_that_its_exif_tag_turns_is_an_error(write):
    json_file, folder = write(CONTENT)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turn by 90 degrees
    Image.new("RGB", (60, 40)).save(folder / "wide.png", exif=exif)
    data = load_coco(json_file, folder)
    with pytest.raises(ValueError, match=r"Image 7 is 40 wide and 60 high, but 60 and 40 by its json; .* turned after"):
        prepare(data)


def test_an_image_of_unknown_range_is_named(write):
    json_file, folder = write(CONTENT)
    Image.new("F", (60, 40)).save(folder / "wide.png", format="TIFF")
    with pytest.raises(OSError, match=r"wide\.png cannot be read\. It has 32 bits per pixel, mode 'F'"):
        prepare(load_coco(json_file, folder))


@pytest.mark.parametrize("cut", [slice(None, 60), slice(None, 20), slice(8, None)])
def test_a_damaged_image_is_named(write, cut):
    paths = write(CONTENT)
    data = load_coco(*paths)
    file = paths[1] / "tall.png"
    file.write_bytes(file.read_bytes()[cut])
    message = rf"(?s){re.escape(str(file))} cannot be read\. It.* If it is damaged, copy it again, or remove its entry"
    assert isinstance(data.dataset[0]["image"], Image.Image)
    with pytest.raises(OSError, match=message):
        data.dataset[1]
    dataset = data.dataset.select(range(2)).with_transform(DetectionTransform(DinoDetrImageProcessor()))
    for copied in (dataset, copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):  # workers get a pickle
        with pytest.raises(OSError, match=message):
            copied[:]


def test_a_batch_of_two_sizes_is_padded_and_its_boxes_stay_relative_to_each_image(write):
    data = load_coco(*write(CONTENT))
    processor = DinoDetrImageProcessor(size={"shortest_edge": 80, "longest_edge": 110})
    dataset = data.dataset.with_transform(DetectionTransform(processor))
    batch = DetectionCollator()(dataset.__getitems__([0, 1]))
    assert batch["pixel_values"].shape == (2, 3, 110, 110)  # 73x110 and 110x79, padded together
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [73 * 110, 110 * 79]
    assert (batch["pixel_values"][batch["pixel_mask"][:, None].expand(-1, 3, -1, -1) == 0] == 0).all()
    labels = batch["labels"]
    assert labels["class_labels"].tolist() == [[2, 0], [-100, -100]]  # the crowd is not trained on
    expected = torch.tensor([[21 / 60, 14 / 40, 30 / 60, 20 / 40], [6 / 60, 5 / 40, 12 / 60, 10 / 40]])
    torch.testing.assert_close(labels["boxes"][0], expected)  # 73 is rounded: the box is scaled with the image
    assert labels["image_id"].tolist() == [7, 3]
    assert labels["orig_size"].tolist() == [[40, 60], [50, 36]]


AUGMENTATION = Augmentation(
    short_sides=(48, 64, 80), longest_side=110, crop_short_sides=(40, 50), crop_sizes=(30, 45), photometric=0.3
)


def augmented(data, augmentation=AUGMENTATION, seed=0, epoch=0, processor=None, **columns):
    """All images through the transform, as they are in one epoch."""
    transform = DetectionTransform(processor or DinoDetrImageProcessor(), augmentation, seed)
    transform.set_epoch(epoch)
    return transform(data.dataset[:] | columns)


def same(first, second) -> bool:
    """Whether two samples, or columns of them, are equal in every tensor."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    pairs = [(first[key], second[key]) for key in first] if isinstance(first, dict) else zip(first, second, strict=True)
    return all(same(*pair) for pair in pairs)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(width=st.integers(1, 200), height=st.integers(1, 200), short_side=st.integers(20, 120), more=st.floats(1, 3))
def test_an_image_that_is_only_resized_is_the_one_of_inference(width, height, short_side, more):
    """The arithmetic of pixels, sizes, boxes and areas is the image processor's."""
    longest_side = int(short_side * more)
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    row = {
        "image_id": [4],
        "image": [Image.fromarray(noise.numpy())],
        "width": [width],
        "height": [height],
        "objects": [
            {
                "category": [2, 1],
                "bbox": [[0, 0, width / 2, height / 3], [-9, -9, 99, 99]],
                "area": [5.5, 99.0],
                "iscrowd": [0, 0],
            }
        ],
    }
    processor = DinoDetrImageProcessor(size={"shortest_edge": short_side, "longest_edge": longest_side})
    augmentation = Augmentation(horizontal_flip=0.0, crop=0.0, short_sides=(short_side,), longest_side=longest_side)
    plain, resized = DetectionTransform(processor)(row), DetectionTransform(processor, augmentation)(row)
    assert torch.equal(plain["pixel_values"][0], resized["pixel_values"][0])
    expected, labels = plain["labels"][0], resized["labels"][0]
    assert set(labels) == set(expected)
    for name, tensor in expected.items():
        # float32: boxes come through other products
        torch.testing.assert_close(labels[name], tensor, rtol=1e-5, atol=1e-6)


def test_augmented_labels_are_of_the_augmented_image_and_leave_crowds_out(write):
    data = load_coco(*write(CONTENT))
    flip = dataclasses.replace(AUGMENTATION, horizontal_flip=1.0, crop=0.0, short_sides=(80,), longest_side=110)
    transform = DetectionTransform(DinoDetrImageProcessor(), flip)
    samples = transform(data.dataset[:])
    assert [image.shape for image in samples["pixel_values"]] == [(3, 73, 110), (3, 110, 79)]
    labels, without_boxes = samples["labels"]
    assert labels["class_labels"].tolist() == [2, 0]
    expected = torch.tensor([[1 - 21 / 60, 14 / 40, 30 / 60, 20 / 40], [1 - 6 / 60, 5 / 40, 12 / 60, 10 / 40]])
    torch.testing.assert_close(labels["boxes"], expected)
    torch.testing.assert_close(labels["area"], torch.tensor([600, 55.5]) * (73 * 110) / (60 * 40))
    assert labels["orig_size"].tolist() == [40, 60]  # of the file
    assert labels["size"].tolist() == [73, 110]
    assert labels["image_id"].tolist() == [7]
    assert without_boxes["boxes"].shape == (0, 4)
    _, objects = transform.augment(7, data.dataset[0]["image"], data.dataset[0]["objects"])
    assert objects["iscrowd"] == [0, 0, 1]
    assert objects["category"] == [2, 0, 0]
    plain = DetectionTransform(DinoDetrImageProcessor()).augment(
        7, data.dataset[0]["image"], data.dataset[0]["objects"]
    )
    assert (plain[0].shape, plain[1]) == ((3, 40, 60), data.dataset[0]["objects"])


def test_the_pixels_of_an_object_stay_under_its_box(write):
    """A white object on black, found again in what the model gets."""
    json_file, folder = write(CONTENT | {"annotations": CONTENT["annotations"][:1]})
    picture = Image.new("RGB", (60, 40))
    picture.paste((255, 255, 255), (6, 4, 36, 24))
    picture.save(folder / "wide.png")
    data = load_coco(json_file, folder)
    seen = 0
    for epoch in range(20):
        samples = augmented(data, dataclasses.replace(AUGMENTATION, photometric=0.0), epoch=epoch)
        image, boxes = samples["pixel_values"][0], samples["labels"][0]["boxes"]
        white = image[0] > 0.2  # brighter than half, between -2.1 for black and 2.2 for white
        if len(boxes) == 0:
            assert not white.any()
            continue
        seen += 1
        rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
        found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        center, size = boxes[0].split(2)
        height, width = white.shape
        corners = torch.cat([center - size / 2, center + size / 2]) * torch.tensor([width, height, width, height])
        # an edge is blurred over a pixel of the first resize, which the second one enlarges up to twice
        torch.testing.assert_close(corners, found.float(), rtol=0, atol=2.0)
    assert seen > 10


@pytest.mark.parametrize("make", [DinoDetrImageProcessor, DinoDetrImageProcessorPil])
@pytest.mark.parametrize(
    ("scales", "jitter_size"), [((0.2, 0.9), 96), ((0.5, 2.0), 96), ((0.5, 1.5), 64), ((0.9, 2.0), 200)]
)
def test_jitter_on_a_canvas_has_the_padding_of_inference(make, scales, jitter_size, write):
    """The images are white, so what is not white is padding: only at the right and bottom, with the value of the canvas."""
    json_file, folder = write(CONTENT)
    for image in CONTENT["images"]:
        Image.new("RGB", (image["width"], image["height"]), "white").save(folder / image["file_name"])
    data = load_coco(json_file, folder)
    processor = make(size={"shortest_edge": 96, "longest_edge": 96}, canvas_value=114)
    grey = DetectionTransform(processor)(data.dataset[:])["pixel_values"][0][:, -1, -1]
    transform = DetectionTransform(processor, Augmentation(scale_jitter=scales, jitter_size=jitter_size), seed=1)
    found = set()
    for epoch in range(12):
        transform.set_epoch(epoch)
        samples = transform(data.dataset[:])
        for pixels, labels in zip(samples["pixel_values"], samples["labels"], strict=True):
            assert (pixels.shape, labels["size"].tolist()) == ((3, 96, 96), [96, 96])
            is_grey = (pixels == grey[:, None, None]).all(0)
            height, width = (int((~is_grey).any(axis).sum()) for axis in (1, 0))
            assert not is_grey[:height, :width].any()
            assert is_grey.sum() == 96 * 96 - height * width
            assert torch.equal(pixels[:, :height, :width], pixels[:, :1, :1].expand(3, height, width))
            center, size = labels["boxes"].split(2, dim=1)
            assert ((center + size / 2) * 96 <= torch.tensor([width, height]) + 1e-3).all()
            found.add((height, width))
    assert len(found) > 6
    assert max(max(size) for size in found) <= min(jitter_size, 96)


def test_what_a_crop_removed_is_no_error_and_a_sample_may_be_empty(write):
    content = changed(bbox=[0, 0, 2, 2])
    content["annotations"] = content["annotations"][:1]
    data = load_coco(*write(content))
    samples = augmented(data, dataclasses.replace(AUGMENTATION, crop=1.0, crop_sizes=(20, 20)))
    assert samples["labels"][0]["boxes"].shape == (0, 4)
    rows = [{name: values[index] for name, values in samples.items()} for index in range(2)]
    batch = DetectionCollator()(rows)
    assert batch["labels"]["boxes"].shape == (2, 0, 4)
    assert batch["labels"]["orig_size"].tolist() == [[40, 60], [50, 36]]


def test_the_original_is_checked_before_it_is_augmented(write):
    json_file, folder = write(CONTENT)
    data = load_coco(json_file, folder)
    with pytest.raises(ValueError, match="Image 7 is 60 wide and 40 high, and 1 of its boxes are completely outside"):
        augmented(data, **with_outer_box(data))
    Image.new("RGB", (30, 20)).save(folder / "wide.png")
    with pytest.raises(ValueError, match="Image 7 is 30 wide and 20 high, but 60 and 40 by its json"):
        augmented(data)
    Image.new("L", (60, 40), 99).save(folder / "wide.png")
    assert len(augmented(data)["pixel_values"][0]) == 3


def test_both_image_processors_give_the_same_augmented_pixels(write):
    data = load_coco(*write(CONTENT))
    for epoch in range(4):
        first = augmented(data, epoch=epoch)
        second = augmented(data, epoch=epoch, processor=DinoDetrImageProcessorPil())
        for one, other in zip(first["pixel_values"], second["pixel_values"], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)  # float32, normalised in one step or two


def test_a_sample_depends_on_seed_epoch_and_image_and_not_on_the_order(write):
    data = load_coco(*write(CONTENT))
    first = augmented(data, epoch=3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert same(augmented(data, epoch=3), first)
    assert torch.equal(torch.get_rng_state(), state)
    reversed_columns = {name: values[::-1] for name, values in data.dataset[:].items()}
    assert same(augmented(data, epoch=3, **reversed_columns), {name: values[::-1] for name, values in first.items()})
    shapes = {
        name: {tuple(augmented(data, **{name: value})["pixel_values"][0].shape) for value in range(12)}
        for name in ("seed", "epoch")
    }
    assert min(map(len, shapes.values())) > 3
    same_image = data.dataset[:]["image"][:1] * 2
    others = {"image": same_image, "width": [60, 60], "height": [40, 40], "objects": data.dataset[:]["objects"][:1] * 2}
    drawn = [augmented(data, epoch=epoch, **others)["pixel_values"] for epoch in range(12)]
    assert sum(one.shape == other.shape for one, other in drawn) < 9  # images 7 and 3 draw their own numbers


def test_copies_and_pickles_follow_or_keep_the_epoch(write):
    data = load_coco(*write(CONTENT))
    transform = DetectionTransform(DinoDetrImageProcessor(), AUGMENTATION, seed=5)
    transform.set_epoch(2)
    rows = data.dataset[:]
    assert same(pickle.loads(pickle.dumps(transform))(rows), transform(rows))
    dataset = data.dataset.with_transform(transform)
    copies = [copy.deepcopy(transform), copy.deepcopy(dataset).format["format_kwargs"]["transform"]]
    transform.set_epoch(3)
    for copied in copies:
        assert same(copied(rows), transform(rows))
    assert same(dataset[0]["pixel_values"], transform(rows)["pixel_values"][0])
    assert Hasher.hash(transform) == Hasher.hash(copies[0])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # of Python 3.12, about any fork
@pytest.mark.parametrize(
    ("start_method", "num_workers"),
    [pytest.param("fork", 2, marks=needs_fork), pytest.param("spawn", 1, marks=pytest.mark.slow)],
)
def test_epochs_reach_workers_that_are_running(write, start_method, num_workers):
    data = load_coco(*write(CONTENT))
    transform = DetectionTransform(DinoDetrImageProcessor(), AUGMENTATION)
    loader = DataLoader(
        data.dataset.with_transform(transform),
        batch_size=1,
        num_workers=num_workers,
        persistent_workers=True,
        multiprocessing_context=start_method,
        collate_fn=DetectionCollator(),
    )
    found = []
    for epoch in (0, 1, 5, 1):
        transform.set_epoch(epoch)
        batches = [batch["pixel_values"][0] for batch in loader]
        assert same(batches, augmented(data, epoch=epoch)["pixel_values"])
        found.append(batches)
    assert same(found[3], found[1])
    assert not all(one.shape == other.shape and torch.equal(one, other) for one, other in zip(*found[:2], strict=True))
