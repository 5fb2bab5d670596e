"""Pascal VOC: folders, image sets, corners from 0 or 1, difficult objects, and files that are broken."""

import pytest
from PIL import Image

from data_layouts import Scene, voc_xml
from dino_hf.data import load_data, read_raw


def write(folder, name, objects=(("cat", [4, 3, 10, 12]),), image=None, **settings):
    """An xml and its image of 40x30; the image's path if it is not beside the xml."""
    path = folder / f"{name}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = folder / (image or f"{name}.png")
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(image)
    path.write_text(voc_xml(Scene(image, 40, 30, list(objects)), **settings))
    return path


def file_names(raw):
    return {name: [entry["file_name"] for entry in split.images] for name, split in raw.splits.items()}


def test_corners_are_from_1_only_in_vocs_own_files(tmp_path):
    write(tmp_path, "a", database="The VOC2012 Database", first_pixel=1)
    write(tmp_path, "b", database="Unknown")
    write(tmp_path, "c", database="My VOC copy")
    raw = read_raw(tmp_path)
    assert [entry["bbox"] for entry in raw.splits["train"].annotations] == [[4, 3, 10, 12]] * 3
    text = (tmp_path / "a.xml").read_text()
    assert "<xmin>5</xmin>" in text
    assert "<xmax>14</xmax>" in text


def test_difficult_objects_are_ignored_as_crowds_are(tmp_path):
    write(tmp_path, "a", difficult=1)
    write(tmp_path, "b", difficult=0)
    objects = load_data(tmp_path, validation_fraction=0).train.dataset["objects"]
    assert [one["iscrowd"] for one in objects] == [[1], [0]]


@pytest.mark.parametrize(
    ("xml", "image"),
    [
        ("Annotations/a", "../JPEGImages/a.jpg"),
        ("labels/a", "../images/a.JPG"),
        ("annotations/a", "../a.png"),
        ("xmls/a", "a.webp"),
        ("annotations/train/a", "../../images/train/a.png"),
    ],
)
def test_images_are_found_beside_the_xml_or_in_a_folder_beside_its_own(xml, image, tmp_path):
    path = write((tmp_path / xml).parent, "a", image=image)
    entry = read_raw(tmp_path).splits["train"].images[0]
    assert entry["path"].samefile(path.parent / image)


def test_the_name_of_the_xml_goes_before_the_name_in_it(tmp_path):
    path = write(tmp_path, "a", image="other.png")
    assert file_names(read_raw(tmp_path)) == {"train": ["other.png"]}
    path.write_text(path.read_text().replace("other.png", "C:\\photos\\other.png"))
    assert file_names(read_raw(tmp_path)) == {"train": ["other.png"]}
    write(tmp_path, "a")
    path.write_text(path.read_text().replace("a.png", "other.png"))
    assert file_names(read_raw(tmp_path)) == {"train": ["a.png"]}


def test_splits_come_from_lists_or_folders(tmp_path):
    for name in "abcd":
        write(tmp_path / "lists/Annotations", name, image=f"../JPEGImages/{name}.png")
        write(tmp_path / f"folders/{'train' if name < 'c' else 'valid'}/xml", name, image=f"../images/{name}.png")
    sets = tmp_path / "lists/ImageSets/Main"
    sets.mkdir(parents=True)
    (sets / "trainval.txt").write_text("a\nb\n")
    (sets / "cat_trainval.txt").write_text("a 1\nb -1\n")
    (tmp_path / "lists/JPEGImages/t.png").write_bytes((tmp_path / "lists/JPEGImages/a.png").read_bytes())
    (sets / "test.txt").write_text("c\nt\n")
    raw = read_raw(tmp_path / "lists")
    assert file_names(raw) == {
        "train": ["JPEGImages/a.png", "JPEGImages/b.png"],
        "test": ["JPEGImages/c.png", "JPEGImages/t.png"],  # the second without annotation
    }
    assert [note for note in raw.notes if "1 xml files are in no list of ImageSets/Main" in note]
    (sets / "train.txt").write_text("a\n")
    (sets / "val.txt").write_text("b\nlost\n")
    raw = read_raw(tmp_path / "lists")
    assert (file_names(raw)["train"], file_names(raw)["validation"]) == (["JPEGImages/a.png"], ["JPEGImages/b.png"])
    with pytest.raises(FileNotFoundError, match=r"lost\.xml does not exist, but ImageSets/Main lists it as validation"):
        load_data(tmp_path / "lists")
    assert file_names(read_raw(tmp_path / "folders")) == {
        "train": ["train/images/a.png", "train/images/b.png"],
        "validation": ["valid/images/c.png", "valid/images/d.png"],
    }


def test_ids_are_given_by_name_over_all_splits(tmp_path):
    write(tmp_path / "train", "a", [("dog", [1, 1, 5, 5]), ("bird", [2, 2, 5, 5])])
    write(tmp_path / "valid", "b", [("cat", [1, 1, 5, 5]), ("dog", [2, 2, 5, 5])])
    data = load_data(tmp_path)
    assert (data.train.id2label, data.train.category_ids) == ({0: "bird", 1: "cat", 2: "dog"}, [1, 2, 3])
    assert data.train.dataset[0]["objects"]["category"] == [2, 0]
    assert data.validation.dataset[0]["objects"]["category"] == [1, 2]


def test_sizes_come_from_the_image_where_the_xml_has_none(tmp_path):
    path = write(tmp_path, "a")
    path.write_text(path.read_text().replace("<width>40</width>", "<width>0</width>"))
    entry = read_raw(tmp_path).splits["train"].images[0]
    assert (entry["width"], entry["height"]) == (40, 30)
    (tmp_path / "a.png").unlink()
    assert read_raw(tmp_path).splits["train"].images[0]["width"] is None
    with pytest.raises(FileNotFoundError, match=r"a\.png, listed in .*, does not exist\. `dino-hf doctor"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "kind", "message"),
    [
        ("</annotation>", "", "unreadable-file", r"b\.xml is not valid xml: "),
        ("<name>cat</name>", "<name/>", "bad-entry", r"b\.xml, object 0 has no name"),
        ("<xmin>4</xmin>", "", "bad-entry", r"b\.xml, object 0 has {'xmin': None, .*} as bndbox; it must be four"),
        ("<xmin>4</xmin>", "<xmin>left</xmin>", "bad-entry", r"has {'xmin': 'left', .*} as bndbox"),
    ],
)
def test_what_cannot_be_read_is_a_problem_and_then_an_error(old, new, kind, message, tmp_path):
    write(tmp_path, "a")
    path = write(tmp_path, "b")
    path.write_text(path.read_text().replace(old, new))
    assert [problem.kind for problem in read_raw(tmp_path).problems] == [kind]
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path)


def test_a_wrong_box_is_named_by_its_object(tmp_path):
    write(tmp_path, "a", [("cat", [4, 3, 10, 12]), ("dog", [4, 3, -2, 12])])
    with pytest.raises(ValueError, match=r": a\.xml, object 1 has bbox=\[4, 3, -2, 12\], of negative size"):
        load_data(tmp_path)


def test_other_xml_files_are_no_data_set(tmp_path):
    (tmp_path / "pom.xml").write_text("<project/>")
    with pytest.raises(ValueError, match="is not a data set"):
        read_raw(tmp_path)
    write(tmp_path, "a")
    assert file_names(read_raw(tmp_path)) == {"train": ["a.png"]}


def test_names_with_spaces_and_suffixes_in_upper_case(tmp_path):
    write(tmp_path, "Annotations/my a", image="JPEGImages/my a.png")
    second = write(tmp_path, "Annotations/my b", image="JPEGImages/my b.PNG")
    second.rename(second.with_suffix(".XML"))
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_bytes("\ufeffmy a\r\n".encode())
    (lists / "val.txt").write_bytes(b"my b\r\n")
    raw = read_raw(tmp_path)
    assert raw.problems == []
    assert file_names(raw) == {"train": ["JPEGImages/my a.png"], "validation": ["JPEGImages/my b.PNG"]}


@pytest.mark.parametrize("named", ["a.jpg", "a.png"])
def test_of_an_image_and_its_mask_the_named_one_is_taken(named, tmp_path):
    for name in ("a.jpg", "a.png", named):  # the last writes the xml
        write(tmp_path, "a", image=name)
    assert f"<filename>{named}</filename>" in (tmp_path / "a.xml").read_text()
    assert file_names(read_raw(tmp_path)) == {"train": [named]}
