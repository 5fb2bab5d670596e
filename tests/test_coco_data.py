"""Reading a COCO folder: class space, crowd and areas kept, padding in the collator, and errors in the user's words."""

import copy
import json

import pytest
import torch
from PIL import ExifTags, Image

from dino_hf import DinoDetrImageProcessor
from dino_hf.training import DetectionCollator, DetectionTransform, load_coco

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
            CONTENT | {"categories": [{"id": "2", "name": "dog"}]},
            ValueError,
            "category 0 has id='2', but needs id as int",
        ),
        (CONTENT | {"categories": [{"id": i, "name": "dog"} for i in (2, 90)]}, ValueError, "same name"),
        (CONTENT | {"images": []}, ValueError, "lists no images"),
        (CONTENT | {"images": [IMAGE, IMAGE]}, ValueError, "two image entries with id=7"),
        (CONTENT | {"images": [IMAGE | {"id": "u1"}]}, ValueError, "image 0 has id='u1'"),
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
            r"annotations\[1\] .* wholly outside .* 60 wide and 40 high; .*scale",
        ),
        (changed(1, bbox=[5, -9, 30, 9]), ValueError, r"annotations\[1\] .* wholly outside of its image"),
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


def test_a_json_without_image_sizes_is_read_and_its_outer_boxes_are_found_at_the_image(write):
    data = load_coco(*write(without_sizes()))
    assert data.dataset["width"][:] == data.dataset["height"][:] == [None, None]
    assert len(prepare(data)["labels"]) == 2
    content = without_sizes()
    content["annotations"][0]["bbox"] = [60, 4, 30, 20]
    with pytest.raises(
        ValueError, match=r"Image 7 is 60 wide and 40 high, and 1 of its boxes lie wholly outside: \[\[60"
    ):
        prepare(load_coco(*write(content)))


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
    with pytest.raises(
        ValueError, match=r"Image 7 is 40 wide and 60 high, but 60 and 40 by its json; .* its EXIF orientation"
    ):
        prepare(data)


def test_an_image_that_the_processor_refuses_is_named(write):
    json_file, folder = write(CONTENT)
    Image.new("I;16", (60, 40)).save(folder / "wide.png")
    with pytest.raises(ValueError, match="mode 'I;16'") as caught:
        prepare(load_coco(json_file, folder))
    assert caught.value.__notes__ == ["This is image 7."]


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
