"""`dino-hf doctor` as a user calls it: what it prints, writes, and its exit code."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import typer
from datasets import Dataset
from datasets import Image as ImageFeature
from typer.testing import CliRunner

from broken_data import CASES, make_data
from dino_hf.cli.doctor import doctor
from dino_hf.common import output_folders
from dino_hf.doctor import cleaned_copy

app = typer.Typer()
app.command()(doctor)


def call(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "100"})
    return result.exit_code, result.stdout, result.stderr


def write(folder, *kinds):
    """A data set on disk, broken in these ways."""
    contents = make_data(folder)
    for kind in kinds:
        next(case for case in CASES if case.kind == kind).break_it(folder, contents)
    for name, content in contents.items():
        (folder / name / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write(tmp_path_factory.mktemp("doctor") / "sound")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    kinds = "box-outside", "leak", "image-broken", "box-sticks-out", "duplicate-category-name"
    return write(tmp_path_factory.mktemp("doctor") / "broken", *kinds[:3], kinds[4])


def test_sound_data_end_with_0(sound):
    code, output, errors = call(sound)
    assert (code, errors) == (0, "")
    assert "Nothing was found that would stop training or falsify AP (1 note)." in output
    assert "note image-without-boxes (2): images without boxes" in output
    assert "dog     7     10           6  ████████████████" in output
    assert "Largest image: 005.jpg of train, 125 x 79, 4 boxes" in output


def test_warnings_end_with_0(tmp_path):
    code, output, _ = call(write(tmp_path / "data", "box-sticks-out"))
    assert code == 0
    assert "warning box-sticks-out (1): boxes that extend beyond the border of their image" in output


def test_errors_end_with_2_the_worst_first(broken):
    code, output, errors = call(broken)
    assert (code, errors) == (2, "")
    lines = output.splitlines()
    assert all(len(line) <= 100 for line in lines)
    headings = [line.split()[1] for line in lines if line.startswith(("error ", "warning ", "note "))]
    assert headings[:4] == ["box-outside", "duplicate-category-name", "image-broken", "leak"]
    place = lines.index("error box-outside (1): boxes completely outside their image")
    assert lines[place + 1] == "    train  annotations[1]  000.png  (95, 0, 19, 8) in 90 x 64"
    assert lines[place + 2] == "  Scale them as the image was scaled, or remove them. --fix does this."
    assert lines[-1].startswith("The data have errors and cannot be used as they are (4 errors, ")


def test_json_has_every_finding(broken, tmp_path):
    code, output, _ = call(broken, "--json", tmp_path / "findings.json")
    assert code == 2
    assert f"All findings are in {tmp_path / 'findings.json'}." in output.replace("\n", "")
    content = json.loads((tmp_path / "findings.json").read_text())
    leak = next(finding for finding in content["findings"] if finding["kind"] == "leak")
    assert leak["offenders"] == [
        {"split": "train", "where": "images[4]", "file": "004.png", "value": "as 102.png of validation"}
    ]
    assert content["statistics"]["splits"]["validation"]["boxes"] == 12
    assert call(broken, "--json", tmp_path / "findings.json")[0] == 2  # once more


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_json_of_a_folder_whose_name_is_not_utf8(sound, tmp_path):
    folder = tmp_path / os.fsdecode(b"pets-\xe4")
    folder.mkdir()
    shutil.copytree(sound / "train", folder / "train")
    assert call(folder, "--json", tmp_path / "findings.json")[0] == 2
    assert json.loads((tmp_path / "findings.json").read_text())["dataset"] == str(folder)


def test_a_cleaned_copy_has_nothing_wrong_and_decides_the_exit_code(broken, tmp_path):
    before = sorted((path, path.read_bytes()) for path in broken.rglob("*") if path.is_file())
    code, output, _ = call(broken, "--fix", tmp_path / "fixed")
    assert code == 0
    text = " ".join(output.split("Cleaned copy")[1].split())
    assert "2 of 10 images and 9 of 32 boxes are not in the copy: " in text
    assert "1 image-broken: images that cannot be decoded" in text
    assert "1 leak: images that are also in another split" in text
    assert text.endswith("has no errors. It lacks 1 images and entries that could not be read.")
    assert "9 of 32 boxes" in (tmp_path / "fixed" / "CHANGES.txt").read_text()
    assert before == sorted((path, path.read_bytes()) for path in broken.rglob("*") if path.is_file())
    assert call(tmp_path / "fixed")[0] == 0


def test_errors_that_a_copy_cannot_cure_end_with_2(tmp_path):
    folder = write(tmp_path / "data")
    for name in ("train", "validation"):
        path = folder / name / "_annotations.coco.json"
        content = json.loads(path.read_text())
        content["annotations"] = content["annotations"][:3]
        for entry, box in zip(content["annotations"], [[0.4, 0.4, 0.1, 0.1]] * 3, strict=True):
            entry["bbox"] = box
        path.write_text(json.dumps(content))
    code, output, _ = call(folder, "--fix", tmp_path / "fixed")
    assert code == 2
    assert "The boxes of train are probably (x, y, width, height) relative to the image" in output
    assert "boxes-are-normalised" in output
    assert "--fix does this." not in output
    assert "The copy still has errors that only you can correct." in output


def test_pictures_are_drawn(broken, tmp_path):
    code, output, _ = call(broken, "--pictures", tmp_path / "pictures", "--max-examples", 1)
    assert code == 2
    written = {"suspects-1.png", "histograms.png"}
    assert {path.name for path in (tmp_path / "pictures").glob("*.*g")} == written
    assert "Pictures are in " in output

    mine = tmp_path / "pictures" / "suspects-7.png"
    mine.write_text("mine")
    before = {name: (tmp_path / "pictures" / name).stat().st_mtime_ns for name in written}
    code, _, errors = call(broken, "--pictures", tmp_path / "pictures")
    assert code == 1
    assert "has pictures of the doctor in it; choose another folder, or replace it with --overwrite" in errors
    assert {name: (tmp_path / "pictures" / name).stat().st_mtime_ns for name in written} == before
    code, _, _ = call(broken, "--pictures", tmp_path / "pictures", "--max-examples", 1, "--overwrite")
    assert code == 2
    assert mine.read_text() == "mine"


def test_pictures_do_not_go_into_an_album(broken, tmp_path):
    (tmp_path / "histograms.png").write_text("mine")
    code, _, errors = call(broken, "--pictures", tmp_path)
    assert code == 1
    assert "has files that are not of pictures of the doctor; choose a new or empty folder" in errors
    assert [path.read_text() for path in tmp_path.glob("histograms.png")] == ["mine"]


def test_images_can_be_left_alone(broken):
    code, output, _ = call(broken, "--no-images")
    assert code == 2
    assert "image-broken" not in output
    assert "Images were not opened, so damaged images" in output


def test_corners_in_a_hugging_face_data_set_are_named_and_cured_by_a_box_format(tmp_path):
    contents = make_data(tmp_path / "images")["train"]
    rows = []
    for image in contents["images"]:
        entries = [entry for entry in contents["annotations"] if entry["image_id"] == image["id"]]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in entries)]
        objects = {"bbox": boxes, "category": [entry["category_id"] for entry in entries]}
        path = str(tmp_path / "images" / "train" / image["file_name"])
        rows.append({"image": path, "width": image["width"], "height": image["height"], "objects": objects})
    data = Dataset.from_list(rows).cast_column("image", ImageFeature())
    data.to_parquet(tmp_path / "train.parquet")
    code, output, _ = call(tmp_path / "train.parquet")
    assert code == 2
    assert "error boxes-are-corners (20): boxes given as two corners" in output
    assert call(tmp_path / "train.parquet", "--box-format", "xyxy")[0] == 0
    code, output, _ = call(tmp_path / "train.parquet", "--fix", tmp_path / "fixed")
    assert (code, "The copy has no errors." in output) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fix", "{sound}/fixed"], r"sound, which must not be changed; choose a place outside."),
        (["--pictures", "{sound}/train"], r"sound, which must not be changed; choose a place outside."),
        (["--json", "{sound}/findings.json"], r"sound, which must not be changed; choose a place outside."),
        (["--json", "{sound}/train/_annotations.coco.json"], "exists and is not a findings file of the doctor"),
        (["--fix", "{tmp}/fixed", "--no-images"], "must open the images; remove --no-images."),
        (["--json", "{tmp}/nowhere/a.json"], "choose a file in an existing folder, such as --json findings.json."),
        (["--pictures", "{tmp}/file"], "is a file; choose a folder for the pictures."),
        (["--box-format", "xyxy"], "is in coco format, which defines the layout of boxes"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence_before_any_work(arguments, message, sound, tmp_path):
    (tmp_path / "file").touch()
    code, output, errors = call(sound, *(argument.format(sound=sound, tmp=tmp_path) for argument in arguments))
    assert (code, output) == (1, "")
    assert errors.startswith("error: ")
    assert message in errors


def test_what_is_no_data_set_ends_with_1(tmp_path):
    code, _, errors = call(tmp_path / "nowhere.json")
    assert code == 1
    assert errors == f"error: There is no file or folder {tmp_path / 'nowhere.json'}.\n"


def test_advice_names_no_option_that_does_not_help(sound, tmp_path):
    """Annotations whose images are elsewhere: a copy would be empty."""
    (tmp_path / "alone").mkdir()
    file = tmp_path / "alone" / "x.json"
    file.write_bytes((sound / "train" / "_annotations.coco.json").read_bytes())
    code, output, _ = call(file)
    assert code == 2
    assert "--fix" not in output
    assert "No image is where the annotations say." in output
    code, _, errors = call(file, "--fix", tmp_path / "fixed")
    assert (code, errors.startswith("error: Nothing would be left of")) == (1, True)
    code, output, _ = call(sound, "--no-images")
    assert (code, "Nothing was found" in output) == (0, False)
    assert "No error was found in the annotations; the images were not opened (1 note)." in output


def test_leftovers_of_a_killed_process_are_removed(broken, tmp_path, monkeypatch):
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    with monkeypatch.context() as of_dead:
        of_dead.setattr(output_folders.os, "getpid", lambda: int(process.stdout))
        leftover = output_folders._scratch(tmp_path / "fixed")
    (leftover / "fixed").mkdir(parents=True)
    (leftover / "fixed" / "half.png").write_bytes(b"half")
    assert call(broken, "--fix", tmp_path / "fixed")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["fixed"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(broken, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(cleaned_copy.shutil, "copyfile", full)
    code, _, errors = call(broken, "--fix", tmp_path / "fixed")
    assert code == 1
    assert errors.endswith("the disk is full; make room, or choose another place.\n")
    assert list(tmp_path.iterdir()) == []


def test_names_of_any_length_leave_the_output_readable(tmp_path):
    folder = write(tmp_path / "data", "category-without-boxes")
    path = folder / "train" / "_annotations.coco.json"
    content = json.loads(path.read_text())
    for entry in content["categories"]:
        entry["name"] += "n" * 10_000
    content["images"][0]["file_name"] = "f" * 10_000 + ".png"
    path.write_text(json.dumps(content))
    code, output, _ = call(folder, "--pictures", tmp_path / "pictures")
    assert code == 2
    assert len(output) < 12_000
    assert (tmp_path / "pictures" / "histograms.png").stat().st_size < 500_000
