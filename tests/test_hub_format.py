"""Hugging Face data sets: the usual layouts of boxes and classes, box formats, streams, files, and ids without a network."""

import gc
import json
import pickle

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from data_layouts import draw_splits, hub_dataset, write_parquet
from dino_hf import DinoDetrImageProcessor
from dino_hf.data import hub_files, load_data, open_image, read_raw
from dino_hf.training import DetectionTransform

SIZE = (40, 30)
BOX = [4.0, 3.0, 10.0, 12.0]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return draw_splits(tmp_path_factory.mktemp("scenes"), train=5, validation=3)


def rows(objects, num=2, **columns):
    """`num` images; the last has no objects."""
    empty = {name: [] for name in objects} if isinstance(objects, dict) else []
    images = [Image.new("RGB", SIZE, "gray") for _ in range(num)]
    return Dataset.from_dict({"image": images, "objects": [objects] * (num - 1) + [empty], **columns})


def with_classes(data, names):
    features = data.features.copy()
    features["objects"]["category"] = List(ClassLabel(names=names))
    return data.cast(features)


def boxes_of(raw, split="train"):
    return [entry["bbox"] for entry in raw.splits[split].annotations]


OBJECTS = {"bbox": [BOX, BOX], "category": [7, 2]}


@pytest.mark.parametrize(
    ("objects", "ids", "names"),
    [
        (OBJECTS, [2, 7], ["class_2", "class_7"]),
        ([{"bbox": BOX, "category": 7}, {"bbox": BOX, "category": 2}], [2, 7], ["class_2", "class_7"]),
        ({"bbox": [BOX, BOX], "label": ["dog", "ant"]}, [1, 2], ["ant", "dog"]),
        ({"boxes": [BOX, BOX], "category_id": [7, 2], "category": ["dog", "ant"]}, [2, 7], ["ant", "dog"]),
        ({"bboxes": [BOX, BOX], "labels": [7, 2], "class_name": ["dog", "ant"]}, [2, 7], ["ant", "dog"]),
        ([{"box": dict(zip("xywh", BOX, strict=True)), "class": name} for name in ("b", "a")], [1, 2], ["a", "b"]),
    ],
)
def test_the_usual_layouts_of_objects(objects, ids, names):
    data = load_data(rows(objects), validation_fraction=0).train
    assert (data.category_ids, list(data.id2label.values())) == (ids, names)
    found = data.dataset["objects"][:]
    assert found[0] == {"category": [1, 0], "bbox": [BOX, BOX], "area": [120, 120], "iscrowd": [0, 0]}
    assert found[1] == {"category": [], "bbox": [], "area": [], "iscrowd": []}
    assert data.dataset[0]["image"].size == SIZE


def test_columns_without_a_group_and_a_class_label():
    features = Features(
        {
            "img": ImageFeature(),
            "bboxes": List(List(Value("float32"), 4)),
            "labels": List(ClassLabel(names=["zebra", "ant"])),
            "is_crowd": List(Value("bool")),
            "area": List(Value("float32")),
            "image_id": Value("int32"),
        }
    )
    columns = {"img": [Image.new("RGB", SIZE)] * 2, "bboxes": [[BOX], None], "labels": [[1], None]}
    columns |= {"is_crowd": [[True], None], "area": [[5.5], None], "image_id": [9, 4]}
    data = load_data(Dataset.from_dict(columns, features=features), validation_fraction=0).train
    assert (data.id2label, data.category_ids) == ({0: "zebra", 1: "ant"}, [0, 1])
    assert data.dataset["image_id"][:] == [9, 4]
    assert data.dataset[0]["objects"] == {"category": [1], "bbox": [BOX], "area": [5.5], "iscrowd": [1]}
    assert data.dataset[1]["objects"]["bbox"] == []


@pytest.mark.parametrize(
    ("box_format", "box"),
    [
        ("xywh", [4, 3, 10, 12]),
        ("xyxy", [4, 3, 14, 15]),
        ("cxcywh", [9, 9, 10, 12]),
        ("xywhn", [0.1, 0.1, 0.25, 0.4]),
        ("xyxyn", [0.1, 0.1, 0.35, 0.5]),
        ("cxcywhn", [0.225, 0.3, 0.25, 0.4]),
    ],
)
def test_box_formats_are_those_that_the_user_names(box_format, box):
    data = rows({"bbox": [[float(value) for value in box]], "category": [0]})
    # float64, of numbers below 64
    assert boxes_of(read_raw(data, box_format=box_format))[0] == pytest.approx(BOX, abs=1e-12)
    if box_format == "xyxy":
        assert boxes_of(read_raw(data))[0] == box
    with pytest.raises(ValueError, match="box_format='yxyx' is unknown; choose one of xywh, xyxy, "):
        read_raw(data, box_format="yxyx")


@pytest.mark.parametrize("image_ids", [[5, 5], ["a", "b"], [None, 3]])
def test_image_ids_that_are_none_are_replaced(image_ids):
    assert [entry["id"] for entry in read_raw(rows(OBJECTS, image_id=image_ids)).splits["train"].images] == [1, 2]


def test_splits_with_other_classes_or_another_order_share_one_class_space():
    train = with_classes(rows({"bbox": [BOX], "category": [1]}), ["cat", "dog", "fox"])
    other = with_classes(rows({"bbox": [BOX], "category": [1]}), ["dog", "cat", "ant", "bat"])
    data = load_data(DatasetDict(train=train, valid=other))
    assert data.train.id2label == data.validation.id2label == {0: "cat", 1: "dog", 2: "fox", 3: "ant", 4: "bat"}
    assert data.train.dataset[0]["objects"]["category"] == [1]
    assert data.validation.dataset[0]["objects"]["category"] == [0]
    strings = {"bbox": [BOX], "category": ["fox"]}
    data = load_data(
        DatasetDict(train=rows(strings), test=rows(strings | {"category": ["bee"]})), validation_fraction=0
    )
    assert (data.train.id2label, data.train.category_ids) == ({0: "bee", 1: "fox"}, [1, 2])
    assert data.test.dataset[0]["objects"]["category"] == [0]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # by `datasets`, of its Arrow files
def test_streams_are_written_to_disk_with_their_bytes_as_they_are(splits, tmp_path):
    folder = write_parquet(splits, tmp_path / "data")
    streams = datasets.load_dataset(str(folder), streaming=True)
    expected = load_data(folder)
    data = load_data(streams)
    for part, wanted in ((data.train, expected.train), (data.validation, expected.validation)):
        assert part.dataset.remove_columns("image")[:] == wanted.dataset.remove_columns("image")[:]
        assert [image.tobytes() for image in part.dataset["image"]] == [
            image.tobytes() for image in wanted.dataset["image"]
        ]
    stored = read_raw(streams["train"]).splits["train"].images[0]["image"]
    assert stored["bytes"] == splits["train"][0].path.read_bytes()
    files = [entry["filename"] for entry in data.train.dataset.cache_files]
    assert files
    assert all(file.startswith(str(tmp_path / "cache")) for file in files)
    mapped = load_data(streams["train"].map(lambda row: row), validation_fraction=0).train.dataset
    for row, scene in zip(mapped, splits["train"], strict=True):
        with Image.open(scene.path) as image:
            assert row["image"].tobytes() == image.tobytes()
        assert row["objects"]["bbox"] == [bbox for _, bbox in scene.objects]
    gc.collect()  # what `datasets` leaves open, while its warning is ignored


def test_rows_that_were_selected_keep_their_images(splits):
    data = hub_dataset(splits["train"]).shuffle(seed=3)
    part = load_data(data.select([3, 0, 2]), validation_fraction=0).train.dataset
    names = [splits["train"][image_id - 1].path.name for image_id in data["image_id"]]
    assert part["file_name"][:] == [names[3], names[0], names[2]]
    scenes = {scene.path.name: scene for scene in splits["train"]}
    for row in part:
        with Image.open(scenes[row["file_name"]].path) as expected:
            assert row["image"].tobytes() == expected.tobytes()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # by `datasets`, where Pillow fails
def test_a_damaged_image_is_named_in_workers_too(splits):
    features = hub_dataset(splits["train"]).features
    rows = hub_dataset(splits["train"]).cast_column("image", ImageFeature(decode=False))[:]
    rows["image"][1]["bytes"] = rows["image"][1]["bytes"][:60]
    data = Dataset.from_dict(rows, features=features)
    for source in (data, data.select([2, 1, 0])):
        dataset = load_data(source, validation_fraction=0).train.dataset
        for copied in (dataset, pickle.loads(pickle.dumps(dataset))):
            assert isinstance(copied[0]["image"], Image.Image)
            with pytest.raises(OSError, match=r"train_000002\.png cannot be read\. It.* If it is damaged"):
                copied[1]
    gc.collect()  # the unclosed files, while their warning is ignored


def test_a_transform_of_the_user_does_not_hide_the_columns(splits):
    data = hub_dataset(splits["train"]).with_transform(lambda batch: {"nothing": [0] * len(batch["image"])})
    dataset = load_data(data, validation_fraction=0).train.dataset
    samples = dataset.with_transform(DetectionTransform(DinoDetrImageProcessor()))[:]
    assert [len(labels["boxes"]) for labels in samples["labels"]] == [len(scene.objects) for scene in splits["train"]]


def test_a_folder_of_images_with_metadata_and_single_files(splits, tmp_path):
    folder = tmp_path / "data"
    for split, scenes in splits.items():
        (folder / split).mkdir(parents=True)
        lines = []
        for scene in scenes:
            (folder / split / scene.path.name).write_bytes(scene.path.read_bytes())
            names = [name for name, _ in scene.objects]
            objects = {"bbox": [bbox for _, bbox in scene.objects], "category": names}
            lines.append(json.dumps({"file_name": scene.path.name, "objects": objects}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    data = load_data(folder)
    used = {name for scenes in splits.values() for scene in scenes for name, _ in scene.objects}
    assert data.train.id2label == dict(enumerate(sorted(used)))
    single = load_data(folder / "train" / "metadata.jsonl", validation_fraction=0)
    for part, scenes in (
        (data.train, splits["train"]),
        (data.validation, splits["validation"]),
        (single.train, splits["train"]),
    ):
        found = {
            row["file_name"].rpartition("/")[2]: (row["image"].size, row["objects"]["bbox"]) for row in part.dataset
        }
        assert found == {
            scene.path.name: ((scene.width, scene.height), [bbox for _, bbox in scene.objects]) for scene in scenes
        }
    parquet = write_parquet(splits, tmp_path / "parquet") / "data" / "validation-00000-of-00001.parquet"
    assert list(read_raw(parquet).splits) == ["validation"]


def test_images_are_opened_from_bytes_or_paths(splits, tmp_path):
    entries = read_raw(hub_dataset(splits["train"])).splits["train"].images
    with open_image(entries[2]) as image:
        assert image.size == (splits["train"][2].width, splits["train"][2].height)
    assert set(entries[2]["image"]) == {"bytes", "path"}


def test_rows_without_an_image_are_a_problem():
    data = rows(OBJECTS, num=3)
    images = [data[0]["image"], None, data[2]["image"]]
    features = data.features
    data = Dataset.from_dict({"image": images, "objects": data["objects"][:]}, features=features)
    raw = read_raw(data)
    with pytest.raises(OSError, match="Image 2 is empty: it has neither bytes nor a path"):
        open_image(raw.splits["train"].images[1])
    with pytest.raises(FileNotFoundError, match=r"^Dataset, train: row 1 has no image, neither bytes nor a path"):
        load_data(data)


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"bbox": [BOX, BOX], "category": [1]}, r"row 0 has lists of different lengths: {'bbox': 2, 'category': 1}"),
        ({"bbox": [BOX[:3]], "category": [1]}, r"row 0, object 0 has bbox=\[4.0, 3.0, 10.0\]; it must be four numbers"),
        ({"bbox": [BOX], "category": [None]}, r"row 0, object 0 has category=None; it must be a class"),
        ({"bbox": [[4.0, 3.0, -1.0, 2.0]], "category": [1]}, r"row 0, object 0 has bbox=.* of negative size"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(objects, message):
    features = Features(
        {"image": ImageFeature(), "objects": {"bbox": List(List(Value("float64"))), "category": List(Value("int64"))}}
    )
    with pytest.raises(ValueError, match=f"^Dataset, train: {message}"):
        load_data(rows(objects).cast(features))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": [b"x"], "text": ["a"]},
            "Dataset, train has the columns image, text, but no boxes and classes under a",
        ),
        ({"objects": [OBJECTS]}, r"has the columns objects \['bbox', 'category'\], but no images under a known name"),
    ],
)
def test_unknown_columns_are_shown(columns, message):
    with pytest.raises(ValueError, match=message):
        read_raw(Dataset.from_dict(columns))


def test_what_is_no_data_set_is_said():
    with pytest.raises(ValueError, match="The data are of type list; give a path, an id on the Hub, or a Dataset"):
        load_data([1, 2])


def test_an_id_that_cannot_be_loaded_is_one_sentence(monkeypatch):
    def fail(name):
        raise ConnectionError(f"Couldn't reach\n'{name}' on the Hub.")

    monkeypatch.setattr(hub_files, "reach_hub", lambda name, is_dataset: None)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        OSError,
        match=r"no file or folder some/pets, .* with ConnectionError: Couldn't reach 'some/pets' "
        r"on the Hub\. Correct the path or id, or load it with",
    ):
        load_data("some/pets")
    for path in ("data/pets/train", "pets.json", "/pets", "some/"):
        with pytest.raises(FileNotFoundError, match=f"^There is no file or folder {path}"):
            load_data(path)


def test_an_id_of_the_hub_is_read_as_its_data_set(monkeypatch, splits):
    parts = DatasetDict({split: hub_dataset(scenes) for split, scenes in splits.items()})
    monkeypatch.setattr(hub_files, "reach_hub", lambda name, is_dataset: None)
    monkeypatch.setattr(datasets, "load_dataset", {"some/pets": parts}.__getitem__)
    data = load_data("some/pets")
    assert (data.origin, data.train.name) == ("some/pets", "some/pets, train")
    assert data.train.dataset["file_name"][0] == splits["train"][0].path.name


def test_two_parts_of_one_name_are_a_choice_of_the_user(splits):
    part = hub_dataset(splits["train"])
    with pytest.raises(ValueError, match="DatasetDict has val and validation, which both are validation data; pass a"):
        load_data(DatasetDict(train=part, val=part, validation=part))


@pytest.mark.parametrize(
    ("box", "box_format", "pixels"),
    [
        ({"height": 12.0, "width": 10.0, "x": 4.0, "y": 3.0}, None, BOX),
        ({"xmin": 4.0, "xmax": 14.0, "ymin": 3.0, "ymax": 15.0}, None, BOX),
        ({"y1": 3.0, "x1": 4.0, "y2": 15.0, "x2": 14.0}, "xyxy", BOX),
        ({"w": 0.5, "h": 0.5, "cx": 0.5, "cy": 0.5}, "cxcywhn", [10.0, 7.5, 20.0, 15.0]),
    ],
)
@pytest.mark.parametrize("as_list", [True, False])
def test_boxes_with_named_fields_are_read_by_their_names(box, box_format, pixels, as_list):
    objects = [{"bbox": box, "category": 1}] if as_list else {"bbox": [box], "category": [1]}
    assert boxes_of(read_raw(rows(objects), box_format=box_format)) == [pixels]


@pytest.mark.parametrize(
    ("fields", "box_format", "message"),
    [
        ("abcd", None, r"bbox with the fields \['a', 'b', 'c', 'd'\]; call them x, y, width, height"),
        (
            "xywh",
            "xyxyn",
            r"bbox with the fields \['x', 'y', 'w', 'h'\], which is not box_format='xyxyn'; leave it out",
        ),
    ],
)
def test_fields_of_boxes_that_are_unknown_or_contradict_are_said(fields, box_format, message):
    objects = {"bbox": [dict(zip(fields, BOX, strict=True))], "category": [1]}
    with pytest.raises(ValueError, match=message):
        read_raw(rows(objects), box_format=box_format)


@pytest.mark.parametrize("label", ["bird", "cat"])  # a word of four letters is not four classes
def test_one_object_for_each_row_is_refused(label):
    columns = {"image": [Image.new("RGB", SIZE)] * 2, "bbox": [BOX] * 2, "label": [label] * 2}
    with pytest.raises(
        ValueError, match=f"row 0 has label='{label}'; it must be a list with one value for each object"
    ):
        load_data(Dataset.from_dict(columns))


@pytest.mark.parametrize(
    ("word", "name"), [("train[:80%]", "train"), ("test[5:]", "test"), ("train+validation", "train"), (None, "train")]
)
def test_a_slice_of_a_split_is_that_split(word, name):
    data = rows(OBJECTS)
    data._split = None if word is None else datasets.NamedSplit(word)
    assert list(read_raw(data).splits) == [name]


@pytest.mark.parametrize(("source", "kind"), [({}, "dict"), ({"train": [1]}, "dict of list"), (3, "int")])
def test_an_object_of_another_kind_is_said(source, kind):
    with pytest.raises(ValueError, match=f"The data are of type {kind}; give a path"):
        load_data(source)
