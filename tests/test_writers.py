"""What is saved: drawn pictures, videos, tables; whole after each image, and never over what is the user's."""

import csv
import json
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

from dino_hf.common import drawing
from dino_hf.common.drawing import COLOURS
from dino_hf.common.text import abbreviate, printable
from dino_hf.inference.journal import Journal
from dino_hf.inference.pictures import draw_detections
from dino_hf.inference.predictor import Detections
from dino_hf.inference.sources import Picture, Source
from dino_hf.inference.videos import read_frames
from dino_hf.inference.writers import FORMATS, PredictionFolder
from inference_toys import noise

CATEGORIES = {0: (3, "disc"), 1: (40, "猫"), 2: (7, "a, b")}
NAMES = {index: name for index, (_, name) in CATEGORIES.items()}
FOUND = Detections.sorted([[10.5, 4, 30.25, 24], [0, 0, 50, 30]], [0.75, 0.5], [1, 2])
NOTHING = Detections.sorted([], [], [])
SETTINGS = {"model": "toy", "threshold": 0.5, "tiles": (64, 48)}


def picture(name="a/1.png", frame=None, size=(50, 30), origin=None) -> Picture:
    kind = "image" if frame is None else "video"
    source = Source(name, origin or f"/data/{name}", kind)
    return Picture(source, noise(*size), frame, None if frame is None else frame / 10)


def open_folder(path, **changes) -> PredictionFolder:
    return PredictionFolder(path, SETTINGS, CATEGORIES, **changes)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def fill(folder: PredictionFolder) -> None:
    with folder:
        folder.add(picture("a/1.png"), FOUND)
        folder.add(picture("a/1.jpg"), NOTHING)
        folder.add(picture("b.TIF"), FOUND)
        frames = [picture("clip.avi", frame, (65, 48)) for frame in (0, 2, 4)]
        for one in frames:
            folder.add(one._replace(source=frames[0].source), FOUND)
        folder.finish(frames[0].source)


def test_names_of_classes_and_files_are_no_formulas_of_a_spreadsheet(tmp_path):
    names = ["=HYPERLINK(1)", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "-5", "a=1"]
    categories = {index: (index + 1, name) for index, name in enumerate(names)}
    found = Detections.sorted([[0, 0, 9, 9]] * len(names), [0.5] * len(names), list(range(len(names))))
    with PredictionFolder(tmp_path / "out", SETTINGS, categories, formats=["csv"]) as folder:
        folder.add(picture("=cmd.png"), found)
    with open(tmp_path / "out" / "predictions.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {"'=cmd.png"}
    # Numbers, and text with a sign inside, are what they are.
    assert [row["label"] for row in rows] == [f"'{printable(name)}" for name in names[:6]] + ["-5", "a=1"]


def test_names_do_not_act_on_a_terminal_that_shows_the_table(tmp_path):
    found = Detections.sorted([[0, 0, 9, 9]], [0.5], [0])
    with PredictionFolder(tmp_path / "out", SETTINGS, {0: (1, "cat\x1b[2J")}, formats=["csv"]) as folder:
        folder.add(picture("a\x1b]52;c;aGFja2Vk\x07\r.png"), found)
    text = (tmp_path / "out" / "predictions.csv").read_text(encoding="utf-8-sig")
    assert "\na\\x1b]52;c;aGFja2Vk\\x07\\r.png," in text
    assert "cat\\x1b[2J" in text
    assert not set("\x1b\x07\r") & set(text)


def test_all_formats_of_all_kinds_of_sources(tmp_path):
    fill(open_folder(tmp_path / "out", every=2))
    assert files(tmp_path / "out") == [
        "classes.txt",
        "images/a/1.jpg",
        "images/a/1.png",
        "images/b.jpg",
        "labels/a/1.jpg.txt",
        "labels/a/1.txt",
        "labels/b.txt",
        *(f"labels/clip.avi/{frame:06}.txt" for frame in (0, 2, 4)),
        "predictions.csv",
        "predictions.json",
        "predictions.jsonl",
        "videos/clip.mp4",
    ]
    first, *records = lines(tmp_path / "out" / "predictions.jsonl")
    assert first == {"settings": SETTINGS | {"tiles": [64, 48]}}
    assert records[0] == {
        "file": "a/1.png",
        "origin": "/data/a/1.png",
        "frame": None,
        "time": None,
        "width": 50,
        "height": 30,
        "objects": [
            {"label": "猫", "category_id": 40, "score": 0.75, "box": [10.5, 4, 30.25, 24]},
            {"label": "a, b", "category_id": 7, "score": 0.5, "box": [0, 0, 50, 30]},
        ],
    }
    assert [record.get("frame", "end") for record in records] == [None, None, None, 0, 2, 4, "end"]

    with open(tmp_path / "out" / "predictions.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    numbers = {"score": "0.75", "x0": "10.5", "y0": "4.0", "x1": "30.25", "y1": "24.0"}
    assert rows[0] == {"file": "a/1.png", "frame": "", "time": "", "label": "猫", "category_id": "40", **numbers}
    assert rows[-1]["label"] == "a, b"
    assert (rows[-1]["frame"], rows[-1]["time"]) == ("4", "0.4")

    assert (tmp_path / "out" / "classes.txt").read_text(encoding="utf-8") == "disc\n猫\na, b\n"
    assert (tmp_path / "out" / "labels" / "a" / "1.txt").read_text() == (
        "1 0.407500 0.466667 0.395000 0.666667 0.750000\n2 0.500000 0.500000 1.000000 1.000000 0.500000\n"
    )
    assert (tmp_path / "out" / "labels" / "a" / "1.jpg.txt").read_text() == ""

    frames = list(read_frames(tmp_path / "out" / "videos" / "clip.mp4"))
    assert [frame.image.size for frame in frames] == [(64, 48)] * 3
    with Image.open(tmp_path / "out" / "images" / "b.jpg") as drawn:
        assert drawn.format == "JPEG"
        assert drawn.size == (350, 210)  # 7 times as large as a small image


def test_the_json_is_coco(tmp_path, capsys):
    fill(open_folder(tmp_path))
    coco = COCO(tmp_path / "predictions.json")
    assert coco.getCatIds() == [3, 40, 7]
    assert coco.loadCats(40)[0]["name"] == "猫"
    assert coco.getImgIds() == [1, 2, 3, 4, 5, 6]
    assert coco.loadImgs(1) == [{"id": 1, "file_name": "a/1.png", "width": 50, "height": 30}]
    assert coco.loadImgs(6)[0]["frame"] == 4
    results = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))["annotations"]
    assert results[0] == {
        "id": 1,
        "image_id": 1,
        "category_id": 40,
        "bbox": [10.5, 4.0, 19.75, 20.0],
        "area": 395.0,
        "iscrowd": 0,
        "score": 0.75,
    }
    assert len(coco.loadRes(results).getAnnIds()) == 10


@pytest.mark.parametrize("formats", [(), *[(name,) for name in FORMATS]])
def test_only_the_wanted_formats_are_written(tmp_path, formats):
    fill(open_folder(tmp_path, formats=formats))
    found = {name.split("/")[0] for name in files(tmp_path)} - {"predictions.jsonl"}
    expected = {"images": {"images", "videos"}, "coco": {"predictions.json"}, "csv": {"predictions.csv"}}
    expected["yolo"] = {"labels", "classes.txt"}
    assert found == set().union(*(expected[name] for name in formats))


def test_each_image_is_there_before_the_next(tmp_path):
    with open_folder(tmp_path / "out") as folder:
        for number in (1, 2):
            folder.add(picture(f"{number}.png"), FOUND)
            assert len(lines(tmp_path / "out" / "predictions.jsonl")) == 1 + number
            assert (
                len((tmp_path / "out" / "predictions.csv").read_text(encoding="utf-8").splitlines()) == 1 + 2 * number
            )
            assert (tmp_path / "out" / "images" / f"{number}.png").is_file()


def test_what_a_killed_run_left_is_resumed(tmp_path):
    folder = open_folder(tmp_path, every=2)
    folder.__enter__()
    folder.add(picture("a/1.png"), FOUND)
    clip = picture("clip.avi", 0).source
    folder.add(picture("clip.avi", 0)._replace(source=clip), FOUND)
    folder.close()
    (tmp_path / "predictions.json").unlink()
    with open(tmp_path / "predictions.jsonl", "a", encoding="utf-8") as journal:
        journal.write('{"file": "c.png", "or')  # a line that was being written

    resumed = open_folder(tmp_path, resume=True, every=2)
    assert resumed.has_finished
    assert resumed.is_finished(picture("a/1.png").source)
    assert not resumed.is_finished(picture("a/1.png", origin="/other/1.png").source)
    assert not resumed.is_finished(clip)  # it had not come to its end
    assert not resumed.is_finished(picture("c.png").source)
    with resumed:
        resumed.add(picture("a/1.jpg"), NOTHING)
        for frame in (0, 2):
            resumed.add(picture("clip.avi", frame)._replace(source=clip), FOUND)
        resumed.finish(clip)
    records = lines(tmp_path / "predictions.jsonl")[1:]
    assert [(record["file"], record.get("frame")) for record in records if "end" not in record] == [
        ("a/1.png", None),
        ("a/1.jpg", None),
        ("clip.avi", 0),
        ("clip.avi", 2),
    ]
    assert (tmp_path / "labels" / "a" / "1.jpg.txt").is_file()  # a/1.txt is that of the first run
    assert len((tmp_path / "predictions.csv").read_text(encoding="utf-8").splitlines()) == 1 + 2 + 4
    assert len(json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))["images"]) == 4
    assert open_folder(tmp_path, resume=True).is_finished(clip)
    with pytest.raises(
        ValueError, match=r"was predicted with threshold=0.5, not 0.4; resume with the same value, overwrite it"
    ):
        PredictionFolder(tmp_path, SETTINGS | {"threshold": 0.4}, CATEGORIES, resume=True)


def test_overwriting_deletes_what_the_earlier_prediction_wrote_and_nothing_else(tmp_path):
    fill(open_folder(tmp_path))
    (tmp_path / "images" / "mine.png").write_bytes(b"mine")
    (tmp_path / "mine.txt").write_text("mine")
    with open_folder(tmp_path, overwrite=True, formats=["csv"]):
        assert files(tmp_path) == ["images/mine.png", "mine.txt", "predictions.csv", "predictions.jsonl"]
    assert not (tmp_path / "labels").exists()


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for wanted in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(
            FileExistsError, match="has files that are not of an earlier prediction; choose a new or empty"
        ):
            open_folder(tmp_path, **wanted)
    with pytest.raises(FileExistsError, match=r"mine.txt is not a folder; choose another place"):
        open_folder(tmp_path / "mine.txt")
    with pytest.raises(FileExistsError, match=r"mine.txt is not a folder; choose another place"):
        open_folder(tmp_path / "mine.txt" / "deep" / "out")
    fill(open_folder(tmp_path / "out"))
    before = files(tmp_path)
    with pytest.raises(
        FileExistsError,
        match="has an earlier prediction in it; choose another folder, or replace it with --overwrite, or continue",
    ):
        open_folder(tmp_path / "out")
    with pytest.raises(ValueError, match="overwrite deletes the results that resume would keep"):
        open_folder(tmp_path / "out", overwrite=True, resume=True)
    with pytest.raises(
        ValueError, match=r"There are no formats \['xml'\] to save predictions in; choose from images, coco"
    ):
        open_folder(tmp_path / "new", formats=["csv", "xml"])
    assert files(tmp_path) == before


DEEP = "[" * 10**5


@pytest.mark.parametrize("line", ["[]", "junk", DEEP, '{"file": "a", "origin": "", "frame": null}', "", "\x00"])
def test_a_damaged_line_costs_one_picture(tmp_path, line):
    fill(open_folder(tmp_path))
    journal = tmp_path / "predictions.jsonl"
    written = journal.read_text(encoding="utf-8").splitlines()
    written[2] = line  # of a/1.jpg
    journal.write_text("\n".join(written) + "\n", encoding="utf-8")
    resumed = open_folder(tmp_path, resume=True, every=1)
    assert resumed.is_finished(picture("a/1.png").source)
    assert not resumed.is_finished(picture("a/1.jpg").source)
    with open_folder(tmp_path, overwrite=True, formats=["csv"]):
        pass
    assert files(tmp_path) == ["images/a/1.jpg", "labels/a/1.jpg.txt", "predictions.csv", "predictions.jsonl"]


@pytest.mark.parametrize("name", ["predictions.jsonl", ".predictions.jsonl", ".predictions.host-1-1.partial.jsonl"])
@pytest.mark.parametrize("wanted", ["overwrite", "resume"])
def test_a_run_that_was_killed_before_its_first_line_stops_nothing(tmp_path, name, wanted):
    (tmp_path / name).write_text("" if name.startswith("p") else '{"set')
    os.utime(tmp_path / name, (0, 0))
    fill(open_folder(tmp_path, formats=["csv"], **{wanted: True}))
    assert files(tmp_path) == ["predictions.csv", "predictions.jsonl"]


def test_a_journal_without_its_settings_cannot_be_resumed_but_replaced(tmp_path):
    fill(open_folder(tmp_path))
    journal = tmp_path / "predictions.jsonl"
    journal.write_text("{\n" + journal.read_text(encoding="utf-8").partition("\n")[2], encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"cannot be resumed, because the first line of its predictions.jsonl, with the settings"
    ):
        open_folder(tmp_path, resume=True)
    with open_folder(tmp_path, overwrite=True, formats=[]):
        assert files(tmp_path) == ["predictions.jsonl"]


def test_nothing_is_written_or_deleted_through_links(tmp_path):
    mine, out = tmp_path / "mine", tmp_path / "out"
    (mine / "a").mkdir(parents=True)
    for name in ("a/1.png", "1.txt", "table"):
        (mine / name).write_text("mine")
    fill(open_folder(out))
    shutil.rmtree(out / "images")
    (out / "images").symlink_to(mine)
    with pytest.raises(ValueError, match="images is a link, and nothing is written through links; remove it"):
        open_folder(out, overwrite=True)
    (out / "images").unlink()
    for name in ("predictions.csv", "predictions.json", "classes.txt", "labels/b.txt"):
        (out / name).unlink()
        (out / name).symlink_to(mine / "table")
    fill(open_folder(out, overwrite=True))
    assert [(mine / name).read_text() for name in ("a/1.png", "1.txt", "table")] == ["mine"] * 3
    assert not (out / "predictions.csv").is_symlink()


def test_a_file_of_the_user_in_the_folder_keeps_its_name(tmp_path):
    fill(open_folder(tmp_path))
    (tmp_path / "images" / "c.png").write_bytes(b"mine")
    with open_folder(tmp_path, overwrite=True) as folder:
        folder.add(picture("c.png"), FOUND)
    assert (tmp_path / "images" / "c.png").read_bytes() == b"mine"
    assert (tmp_path / "images" / "c-2.png").is_file()


def test_no_file_is_written_for_two_sources(tmp_path):
    sources = ("x.bmp", "x.jpg", "y.jpg", "y.png.jpg", "y.png", "Y.tif")
    with open_folder(tmp_path / "out") as folder:
        for number, name in enumerate(sources):
            folder.add(picture(name, size=(400, 300 + number)), FOUND)
    heights = []
    for file in (tmp_path / "out" / "images").iterdir():
        with Image.open(file) as drawn:
            heights.append(drawn.height)
    assert sorted(heights) == [300 + number for number in range(len(sources))]
    assert len(list((tmp_path / "out" / "labels").iterdir())) == len(sources)


OUTSIDE = '{"file": "%s", "origin": "", "frame": null, "time": null, "width": 1, "height": 1, "objects": []}'


OBJECT = {"label": "disc", "category_id": 3, "score": 0.5, "box": [1, 2.5, 3, 4]}
RECORD = {"file": "a.png", "origin": "", "frame": None, "time": None, "width": 9, "height": 7, "objects": [OBJECT]}


@pytest.mark.parametrize(
    "change",
    [
        {"file": 3},
        {"origin": None},
        {"file": "../a.png"},
        {"frame": -1},
        {"frame": True},
        {"frame": "3"},
        {"time": "now"},
        {"time": float("nan")},
        {"width": 2.5},
        {"height": None},
        {"objects": None},
        {"objects": [[]]},
        *(
            {"objects": [OBJECT, OBJECT | wrong]}
            for wrong in (
                {"label": 3},
                {"label": None},
                {"category_id": "3"},
                {"score": "0.5"},
                {"score": True},
                {"score": float("inf")},
                {"box": 3},
                {"box": [1, 2, 3]},
                {"box": [1, 2, 3, 4, 5]},
                {"box": [1, 2, 3, "4"]},
                {"box": "1234"},
            )
        ),
    ],
)
def test_a_line_that_no_prediction_writes_is_damaged(tmp_path, change):
    def write(*records):
        (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        journal = Journal(tmp_path)
        return journal.num_records, journal.num_damaged, journal.is_ours

    assert write(RECORD) == (1, 0, True)
    assert write(RECORD | {"frame": 0, "time": 0.0, "objects": []}) == (1, 0, True)
    assert write(RECORD | change) == (0, 1, False)


def test_half_of_a_pair_in_a_journal_is_a_damaged_line(tmp_path):
    fill(open_folder(tmp_path, formats=["csv"]))
    journal = tmp_path / "predictions.jsonl"
    text = journal.read_text(encoding="utf-8")
    journal.write_text(
        text.replace("a/1.png", "a/\\uD800.png").replace("b.TIF", "\\ud83d\\ude00.TIF"), encoding="utf-8"
    )
    assert Journal(tmp_path).num_damaged == 1
    assert "😀.TIF" in [record["file"] for record in Journal(tmp_path).records()]
    with open_folder(tmp_path, formats=["csv", "coco"], overwrite=True):
        pass
    assert files(tmp_path) == ["predictions.csv", "predictions.json", "predictions.jsonl"]


def test_a_journal_that_is_not_ours_deletes_nothing(tmp_path):
    (tmp_path / "out" / "images").mkdir(parents=True)
    kept = [tmp_path / "mine.jpg", tmp_path / "out" / "images" / "mine.jpg"]
    for path in kept:
        path.write_bytes(b"mine")
    (tmp_path / "out" / "predictions.jsonl").write_text('{"file": "a"}\njunk\n')
    for wanted in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(FileExistsError, match="has files that are not of an earlier prediction"):
            open_folder(tmp_path / "out", **wanted)
    lines = ['{"settings": {}}', *(OUTSIDE % name for name in ("../../mine.jpg", str(kept[0]), "a\\u0000b", ""))]
    (tmp_path / "out" / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    with open_folder(tmp_path / "out", overwrite=True, formats=[]):
        pass
    assert all(path.read_bytes() == b"mine" for path in kept)


def test_no_text_of_the_table_is_a_formula(tmp_path):
    names = ("=1+1", "+a", "-a", "@a", "\ta", "\ra", "-5", "a=b", "=1,\n2")
    categories = {index: (index, name) for index, name in enumerate(names)}
    found = Detections.sorted(np.tile([1, 1, 9, 9], (len(names), 1)), [0.5] * len(names), range(len(names)))
    with PredictionFolder(tmp_path, SETTINGS, categories) as folder:
        folder.add(picture("=cmd|' /C calc'!A0.png"), found)
    with open(tmp_path / "predictions.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {"'=cmd|' /C calc'!A0.png"}
    written = ["'=1+1", "'+a", "'-a", "'@a", "'\ta", "'\\ra", "-5", "a=b", "'=1,\n2"]
    assert [row["label"] for row in rows] == written


@pytest.mark.parametrize(
    "name",
    ["x" * 251 + ".jpg", "x" * 250 + ".webp", "猫" * 84 + ".png", "y" * 240 + "/a.png", "folder/" * 500 + "a.png"],
)
def test_the_longest_names_of_sources_have_results(tmp_path, name):
    """Suffixes and numbers that are added must not make a name too long for the file system."""
    with open_folder(tmp_path / "out") as folder:
        folder.add(picture(name), FOUND)
        folder.add(picture(name.removesuffix("x.jpg") + "y.jpg" if name.endswith("x.jpg") else "b.png"), FOUND)
        folder.add(picture(name + ".mp4", 3, (64, 48)), FOUND)
    written = files(tmp_path / "out")
    assert len([file for file in written if file.startswith("images/")]) == 2
    assert len([file for file in written if file.startswith("labels/")]) == 3
    assert len([file for file in written if file.startswith("videos/")]) == 1
    assert lines(tmp_path / "out/predictions.jsonl")[1]["file"] == name
    with open_folder(tmp_path / "out", overwrite=True):
        pass  # all of it is found again
    assert not [file for file in files(tmp_path / "out") if "/" in file]


def test_passwords_of_addresses_are_not_written(tmp_path):
    with open_folder(tmp_path) as folder:
        folder.add(picture("x.jpg", origin="http://me:secret@x.org/x.jpg"), FOUND)
    assert lines(tmp_path / "predictions.jsonl")[1]["origin"] == "http://x.org/x.jpg"


# -- drawing


def colours(image: Image.Image) -> set[str]:
    return {"#{:02X}{:02X}{:02X}".format(*colour) for _, colour in image.getcolors(2**24)}


def test_boxes_are_drawn_where_they_are_in_the_colour_of_their_class():
    image = Image.new("RGB", (400, 300), (128, 128, 128))
    drawn = draw_detections(image, Detections.sorted([[100, 120, 300, 250]], [0.9], [1]), NAMES)
    assert drawn.size == image.size
    assert image.getcolors() == [(400 * 300, (128, 128, 128))]  # the user's own is as it was
    changed = np.asarray(drawn) != np.asarray(image)
    rows, columns = np.flatnonzero(changed.any((1, 2))), np.flatnonzero(changed.any((0, 2)))
    assert (columns[0], columns[-1], rows[-1]) == (100, 299, 249)
    assert 90 < rows[0] < 110  # the label
    assert COLOURS[1] in colours(drawn)
    assert drawn.getpixel((200, 180)) == (128, 128, 128)
    assert colours(draw_detections(image, NOTHING, NAMES)) == {"#808080"}


@pytest.mark.parametrize("size", [(400, 300), (33, 20), (40, 700), (1, 1), (3000, 40)])
def test_labels_stay_inside_images_of_any_size(size, monkeypatch):
    places = []
    place = drawing._place
    monkeypatch.setattr(drawing, "_place", lambda *arguments: places.append(place(*arguments)) or places[-1])
    width, height = size
    boxes = [
        [0, 0, width, height],
        [width - 5, height - 5, width, height],
        [0, 0, 3, 3],
        [-9, 5, 2 * width, 9],
        [4, 4, 4, 4],
    ]
    names = {0: "x", 1: "a name much longer than most pictures are wide, whatever they show", 2: "猫 \n\t🐱 كلب"}
    drawn = draw_detections(noise(*size), Detections.sorted(boxes, [0.9, 0.8, 0.7, 0.6, 0.5], [0, 1, 2, 1, 0]), names)
    assert max(drawn.size) >= 320
    assert len(places) == 5
    for x0, y0, x1, y1 in places:
        assert 0 <= x0 <= x1
        assert 0 <= y0 <= y1
        if size[0] >= 33 and drawn.height >= 40:
            assert x1 < drawn.width
            assert y1 < drawn.height
    assert draw_detections(noise(*size), FOUND, NAMES, enlarge=False).size == size


def test_labels_keep_out_of_each_others_way(monkeypatch):
    places = []
    place = drawing._place
    monkeypatch.setattr(drawing, "_place", lambda *arguments: places.append(place(*arguments)) or places[-1])
    boxes = [[100, 100, 300, 250]] * 4
    draw_detections(noise(500, 400), Detections.sorted(boxes, [0.9, 0.8, 0.7, 0.6], [0, 1, 2, 0]), NAMES)
    assert sum(drawing._shared(a, b) for i, a in enumerate(places) for b in places[:i]) == 0


def test_a_label_without_room_is_left_out(monkeypatch):
    """The surest keep theirs: labels over labels cannot be read."""
    drawn = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, at, *_, **__: drawn.append(at) or text(self, at, *_, **__)
    )
    boxes = np.array([[100.0, 100, 300, 250]] * 30)
    draw_detections(noise(500, 400), Detections.sorted(boxes, np.linspace(0.9, 0.6, 30), [0] * 30), NAMES)
    assert 4 <= len(drawn) < 10
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(("second", "num_labels"), [((0, 18, 99, 37), 2), ((0, 17, 99, 36), 1), ((89, 0, 999, 19), 1)])
def test_a_tenth_of_the_smaller_of_two_labels_may_be_covered(monkeypatch, second, num_labels):
    drawn, places = [], iter([(0, 0, 99, 19), second])
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *arguments, **_: drawn.append(arguments))
    monkeypatch.setattr(drawing, "_place", lambda *_: next(places))
    draw_detections(noise(400, 300), Detections.sorted([[1, 1, 90, 90]] * 2, [0.9, 0.8], [0, 0]), NAMES)
    assert len(drawn) == num_labels


def test_names_and_numbers_of_any_length_are_drawn_in_no_time():
    assert abbreviate("x" * 80, 80) == "x" * 80
    assert abbreviate("x" * 81, 80) == "x" * 79 + "…"
    boxes = np.tile([10.0, 10, 300, 200], (3000, 1)) + np.arange(3000)[:, None] % 90
    crowd = Detections.sorted(boxes, np.linspace(1, 0, 3000), np.zeros(3000))
    start = time.monotonic()
    draw_detections(noise(400, 300), crowd, {0: "word " * 2000})
    assert time.monotonic() - start < 20  # it would be hours


def test_the_first_300_have_labels(monkeypatch):
    places = []
    monkeypatch.setattr(drawing, "_place", lambda *arguments: places.append((0, 0, 9, 9)) or places[-1])
    draw_detections(noise(60, 40), Detections.sorted(np.tile([1, 1, 9, 9], (301, 1)), [0.5] * 301, [0] * 301), NAMES)
    assert len(places) == 300


def test_text_can_be_read_on_its_colour():
    assert {colour: drawing.text_colour(colour) for colour in ("#000000", "#FFFFFF", "#0072B2", "#E69F00")} == {
        "#000000": "white",
        "#FFFFFF": "black",
        "#0072B2": "white",
        "#E69F00": "black",
    }


def test_a_font_is_found_for_letters_that_the_usual_one_lacks(monkeypatch):
    from matplotlib import get_data_path

    drawing._font.cache_clear()
    usual = drawing._font(12, frozenset("abcяλ"))
    assert usual.getname()[0] == "DejaVu Sans"
    other = f"{get_data_path()}/fonts/ttf/STIXGeneral.ttf"
    lacking = next(
        chr(code) for code in drawing.FT2Font(other).get_charmap() if not drawing._has(usual.path, {chr(code)})
    )
    monkeypatch.setattr(drawing, "_system_fonts", lambda: ["/none.ttf", usual.path, other])
    assert drawing._font(12, frozenset(lacking + "a")).path == other
    assert drawing._font(12, frozenset("\U0010fffd")).path == usual.path  # nobody has it: an empty square
    drawing._font.cache_clear()
