"""YOLO data sets: where a yaml's paths may lead, what lines of a txt mean, and which are refused."""

import pytest
from PIL import ExifTags, Image

from dino_hf.data import load_data, read_raw

LINE = "1 0.5 0.5 0.25 0.4"  # on 40x30: 10 wide and 12 high, from (15, 9)
BOX = [15, 9, 10, 12]


def write(folder, yaml, **files):
    """Images are given by their suffix, and all are 40x30; a file in a folder has `__` for the slash."""
    folder.mkdir(parents=True, exist_ok=True)
    if yaml is not None:
        (folder / "data.yaml").write_text(yaml)
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_png", ".png").replace("_txt", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.new("RGB", (40, 30)).save(path)
        else:
            path.write_text(text)
    return folder


def boxes_of(split):
    return [entry["bbox"] for entry in split.annotations]


@pytest.mark.parametrize(
    ("path", "train", "image", "label"),
    [
        ("", "images/train", "images__train__a_png", "labels__train__a_txt"),
        ("path: .\n", "images/train", "images__train__deep__a_png", "labels__train__deep__a_txt"),
        ("path: sub\n", "train", "sub__train__images__a_png", "sub__train__labels__a_txt"),
        ("path: /content/elsewhere\n", "images", "images__a_png", "labels__a_txt"),
        ("", "../train/images", "train__images__a_png", "train__labels__a_txt"),
        ("", "photos", "photos__a_png", "photos__a_txt"),
        ("", "images", "images__a_png", "images__a_txt"),
        ("", "[images/one, images/two]", "images__two__a_png", "labels__two__a_txt"),
        ("", "images/images", "images__images__a_png", "images__labels__a_txt"),
    ],
)
def test_a_yaml_leads_to_images_and_labels(path, train, image, label, tmp_path):
    files = {image: None, label: LINE, "images__one__b_png": None}
    folder = write(tmp_path / "data", f"{path}train: {train}\nnames: [cat, dog]\n", **files)
    for source in (folder, folder / "data.yaml", folder.parent):
        raw = read_raw(source)
        assert raw.problems == []
        assert raw.categories == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
        split = raw.splits["train"]
        entry = next(entry for entry in split.images if entry["path"].name == "a.png")
        assert (entry["width"], entry["height"], entry["path"].is_absolute()) == (40, 30, True)
        assert (folder / entry["file_name"]).is_file()
        assert boxes_of(split) == [BOX]
        assert split.annotations[0]["image_id"] == entry["id"]
        assert split.annotations[0]["where"].endswith("a.txt, line 1")


def test_a_list_of_images_and_the_working_directory(tmp_path, monkeypatch):
    names = {"images__a_png": None, "images__b_png": None, "images__c_png": None, "labels__b_txt": LINE}
    write(tmp_path / "set", None, **names, train_txt="./images/b.png\nimages/a.png\n\n")
    write(tmp_path / "yamls", "path: set\ntrain: train.txt\nval: images\nnames: {0: cat, 1: dog}\n")
    monkeypatch.chdir(tmp_path)
    raw = read_raw("yamls/data.yaml")
    assert [entry["path"].name for entry in raw.splits["train"].images] == ["a.png", "b.png"]
    assert [entry["path"].name for entry in raw.splits["validation"].images] == ["a.png", "b.png", "c.png"]
    assert boxes_of(raw.splits["train"]) == boxes_of(raw.splits["validation"]) == [BOX]


def test_images_without_lines_have_no_boxes(tmp_path):
    files = {"images__a_png": None, "images__b_png": None, "images__c_png": None}
    folder = write(tmp_path, "train: images\nnames: [cat, dog]\n", **files, labels__a_txt="\n", labels__c_txt=LINE)
    data = load_data(folder, validation_fraction=0)
    assert [len(objects["bbox"]) for objects in data.train.dataset["objects"]] == [0, 0, 1]
    assert data.train.dataset["file_name"][:] == ["images/a.png", "images/b.png", "images/c.png"]
    assert data.train.dataset["image_id"][:] == [1, 2, 3]


def test_polygons_become_their_boxes_and_key_points_are_left(tmp_path):
    polygon = "0 0.25 0.2 0.5 0.1 0.75 0.2 0.5 0.9"
    folder = write(tmp_path / "a", "train: images\nnames: [cat]\n", images__a_png=None, labels__a_txt=polygon)
    # two roundings of numbers below 64 in float64
    assert boxes_of(read_raw(folder).splits["train"])[0] == pytest.approx([10, 3, 20, 24], abs=1e-12)
    pose = "0 0.5 0.5 0.25 0.4 0.1 0.1 2 0.2 0.2 2"
    yaml = "train: images\nnames: [cat]\nkpt_shape: [2, 3]\n"
    folder = write(tmp_path / "b", yaml, images__a_png=None, labels__a_txt=pose)
    assert boxes_of(read_raw(folder).splits["train"]) == [BOX]


def test_boxes_are_for_the_image_as_it_is_seen(tmp_path):
    folder = write(tmp_path, "train: images\nnames: [cat, dog]\n", images__a_png=None, labels__a_txt=LINE)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turn by 90 degrees
    Image.new("RGB", (30, 40)).save(folder / "images/a.png", exif=exif)
    row = load_data(folder, validation_fraction=0).train.dataset[0]
    assert row["image"].size == (row["width"], row["height"]) == (40, 30)
    assert row["objects"]["bbox"] == [BOX]


@pytest.mark.parametrize(
    "line", ["1 0.5 0.5 0.25", "dog 0.5 0.5 0.25 0.4", "0.5 0.5 0.5 0.25 0.4", "1 0.5 0.5 0.2 0.4 0.9", "nan 1 1 1 1"]
)
def test_a_line_that_is_no_box_is_a_problem(line, tmp_path):
    text = f"{LINE}\n{line}\n"
    folder = write(tmp_path, "train: images\nnames: [cat, dog]\n", images__a_png=None, labels__a_txt=text)
    raw = read_raw(folder)
    assert boxes_of(raw.splits["train"]) == [BOX]
    assert [(problem.kind, problem.where) for problem in raw.problems] == [
        ("bad-line", f"{folder / 'labels/a.txt'}, line 2")
    ]
    with pytest.raises(ValueError, match=rf"a\.txt, line 2 is '{line}'; it must be class, centre x, .*--fix writes"):
        load_data(folder)


def test_boxes_that_are_wrong_are_named_by_their_line(tmp_path):
    text = f"{LINE}\n7 0.5 0.5 0.25 0.4"
    folder = write(tmp_path, "train: images\nnames: [cat, dog]\n", images__a_png=None, labels__a_txt=text)
    with pytest.raises(ValueError, match=r"labels/a\.txt, line 2 has category_id=7, but the categories are \[0, 1\]"):
        load_data(folder)
    (folder / "labels/a.txt").write_text("1 20 15 10 12")  # in pixels
    with pytest.raises(ValueError, match=r"data\.yaml: the boxes are in pixels, while yolo data have them relative"):
        load_data(folder)


@pytest.mark.parametrize(
    ("yaml", "error", "message"),
    [
        ("train: images\nnames: [cat]\nnc: 3\n", ValueError, r"has nc=3, but 1 names: \['cat'\]; correct one"),
        ("train: images\nnames: cat\n", ValueError, "has names='cat'; they must be a list, or a dictionary"),
        (
            "train: images\nval: none\nnames: [cat]\n",
            FileNotFoundError,
            "none, which .*data.yaml names as val, does not",
        ),
        ("train: images\n", ValueError, "is not the yaml of a YOLO data set: it needs `names`"),
        ("train: [", ValueError, "data.yaml is not valid yaml: "),
        ("train: images\nnc: many\n", ValueError, "nc='many'; it must be the number of classes"),
        ("train: images\nnc: [1]\n", ValueError, r"nc=\['1'\]; it must be the number of classes"),
        (
            "train: images\nval: empty\nnames: [cat]\n",
            FileNotFoundError,
            "empty, which .*data.yaml names as val, has no im",
        ),
    ],
)
def test_what_is_wrong_with_a_yaml_is_said(yaml, error, message, tmp_path):
    folder = write(tmp_path, yaml, images__a_png=None, images__a_txt="")
    (folder / "empty").mkdir()
    with pytest.raises(error, match=message):
        load_data(folder / "data.yaml")


def test_names_may_be_a_dictionary_with_gaps_or_missing(tmp_path):
    folder = write(tmp_path, "train: images\nnames: {7: dog, 2: cat}\n", images__a_png=None, images__a_txt="")
    data = load_data(folder, validation_fraction=0).train
    assert (data.id2label, data.category_ids) == ({0: "cat", 1: "dog"}, [2, 7])
    folder = write(tmp_path, "train: images\nnc: 2\n")
    assert load_data(folder, validation_fraction=0).train.id2label == {0: "class_0", 1: "class_1"}


def test_test_data_that_are_not_here_are_left_out(tmp_path):
    folder = write(tmp_path, "train: images\ntest: far/away\nnames: [cat]\n", images__a_png=None, images__a_txt="")
    data = load_data(folder, validation_fraction=0)
    assert data.test is None
    assert any("so there are no test data" in note for note in data.notes)


def test_in_several_folders_yamls_the_one_called_data_is_taken(tmp_path):
    folder = write(tmp_path, "train: images\nnames: [cat]\n", images__a_png=None)
    (folder / "other.yaml").write_text("train: x\nnames: [dog]\n")
    (folder / "settings.yaml").write_text("epochs: 3\n")
    (folder / "broken.yml").write_text("{{ x }}: [")
    assert read_raw(folder).categories[0]["name"] == "cat"
    (folder / "data.yaml").rename(folder / "pets.yaml")
    with pytest.raises(ValueError, match=r"has several yaml files of YOLO data sets: \['other.yaml', 'pets.yaml'\]"):
        read_raw(folder)


def test_a_damaged_image_is_a_problem_as_its_boxes_need_its_size(tmp_path):
    folder = write(tmp_path, "train: images\nnames: [cat, dog]\n", images__a_txt="no image", labels__a_txt=LINE)
    (folder / "images/a.txt").rename(folder / "images/a.png")
    assert [problem.kind for problem in read_raw(folder).problems] == ["unreadable-image"]
    with pytest.raises(ValueError, match=r"a\.png cannot be read, and its boxes are .* not an image of a known"):
        load_data(folder)


@pytest.mark.parametrize(
    ("names", "train", "other"),
    [("classes_txt", "images__a", "labels__a"), ("obj.names", "obj_train_data__a", "obj_train_data__a")],
)
def test_exports_of_labelling_tools_have_no_yaml(names, train, other, tmp_path):
    files = {f"{train}_png": None, f"{other}_txt": LINE, names: "cat\ndog\n", "valid__images__b_png": None}
    raw = read_raw(write(tmp_path, None, **files))
    assert (raw.format, [entry["name"] for entry in raw.categories]) == ("yolo", ["cat", "dog"])
    assert boxes_of(raw.splits["train"]) == [BOX]
    assert [entry["file_name"] for entry in raw.splits["validation"].images] == ["valid/images/b.png"]


def test_names_are_what_is_written_though_yaml_takes_them_for_other_things(tmp_path):
    folder = write(
        tmp_path, "train: images\ntest: # none\nnames: [no, 007, 1.0]\n", images__a_png=None, images__a_txt=LINE
    )
    assert load_data(folder, validation_fraction=0).train.id2label == {0: "no", 1: "007", 2: "1.0"}


def test_files_made_on_windows(tmp_path):
    yaml = "path: C:\\me\\set\r\ntrain: train.txt\r\nval: images\\val\r\nnames: [cat, dog]\r\n"
    folder = write(tmp_path, None, images__a_png=None, images__val__b_png=None, labels__val__b_txt="")
    for name, text in {"data.yaml": yaml, "train.txt": ".\\images\\a.png\r\n", "labels/a.txt": f"{LINE}\r\n"}.items():
        (folder / name).write_bytes(text.encode("utf-8-sig"))
    raw = read_raw(folder)
    assert raw.problems == []
    assert {name: len(split.images) for name, split in raw.splits.items()} == {"train": 1, "validation": 1}
    assert boxes_of(raw.splits["train"]) == [BOX]


@pytest.mark.parametrize("name", ["classes.txt", "labels/classes.txt"])
def test_a_list_of_names_keeps_its_numbers_and_is_in_utf_8(name, tmp_path):
    folder = write(tmp_path, None, images__a_png=None, labels__a_txt="2 0.5 0.5 0.25 0.4")
    (folder / name).write_bytes("\ufeffcat\r\n\r\ndög\r\n".encode())
    data = load_data(folder, validation_fraction=0).train
    assert (data.id2label, data.category_ids) == ({0: "cat", 1: "dög"}, [0, 2])
    (folder / name).write_bytes("dög".encode("latin-1"))
    with pytest.raises(ValueError, match=r"classes.txt is not text in UTF-8: .*; save it in that encoding"):
        read_raw(folder)


def test_images_without_any_txt_are_a_problem_and_txt_files_without_image_a_note(tmp_path):
    yaml = "train: train\ntest: test\nnames: [cat, dog]\n"
    folder = write(tmp_path, yaml, train__a_png=None, labels__train__a_txt=LINE, test__a_png=None)
    with pytest.raises(
        FileNotFoundError, match=r"No image of train has a txt file; the first image is .*train/a\.png\."
    ):
        load_data(folder)
    write(
        folder,
        None,
        train__a_txt=LINE,
        train__lost_txt=f"\n{LINE}",
        train__README_txt="not boxes",
        train__classes_txt="cat",
    )
    (note,) = read_raw(folder).notes
    assert "lost.txt has boxes, but no image of the data belongs to it" in note
