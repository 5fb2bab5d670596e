"""Images of every orientation, mode and format: --fix never makes right boxes wrong, and nothing starts a program."""

import json
import os

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from data_layouts import annotations_of
from dino_hf.data import load_data, read_raw
from dino_hf.doctor.checks import inspect
from dino_hf.doctor.cleaned_copy import write_cleaned_copy

STORED = (120, 80)  # width and height
THING = (84, 50, 20, 24)  # a bright block on the stored pixels: x, y, width, height


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(20, 60, (80, 120, 3)).astype(np.uint8)
    x, y, w, h = THING
    pixels[y : y + h, x : x + w] = 250
    image = Image.fromarray(pixels)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode in ("LA", "RGBA"):
        image.putalpha(200)
    return image.convert(mode)


def write(folder, image, name, stated, box, **save):
    folder.mkdir()
    image.save(folder / name, **save)
    content = {
        "images": [{"id": 1, "file_name": name, "width": stated[0], "height": stated[1]}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
        ],
        "categories": [{"id": 1, "name": "block"}],
    }
    (folder / "train.json").write_text(json.dumps(content))
    return read_raw(folder)


def upright_thing(orientation: int) -> tuple[tuple, tuple]:
    """The block and the size of the image as they are seen."""
    image = picture()
    image.getexif()[ExifTags.Base.Orientation] = orientation
    seen = np.asarray(ImageOps.exif_transpose(image).convert("L")) > 200
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    return (int(columns[0]), int(rows[0]), len(columns), len(rows)), seen.shape[::-1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_upright_boxes_and_sizes_stay_for_every_orientation(orientation, suffix, tmp_path):
    box, size = upright_thing(orientation)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    raw = write(tmp_path / "data", picture(), f"a{suffix}", size, box, exif=exif)
    copy = write_cleaned_copy(raw, inspect(raw), tmp_path / "copy")
    content = json.loads((tmp_path / "copy/train/_annotations.coco.json").read_text())
    assert tuple(content["annotations"][0]["bbox"]) == box
    assert (content["images"][0]["width"], content["images"][0]["height"]) == size
    assert copy.changes == []


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("is_box_upright", [True, False])
def test_boxes_with_the_stored_size_are_turned_only_if_they_are_stored_too(orientation, is_box_upright, tmp_path):
    """Both conventions are common. The box fits only one of both sizes, or nothing is changed."""
    upright, size = upright_thing(orientation)
    box = upright if is_box_upright else THING
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    raw = write(tmp_path / "data", picture(), "a.jpg", STORED, box, exif=exif)
    write_cleaned_copy(raw, inspect(raw), tmp_path / "copy")
    content = json.loads((tmp_path / "copy/train/_annotations.coco.json").read_text())
    after = tuple(content["annotations"][0]["bbox"])
    other = STORED if is_box_upright else size
    fits_one = box[0] + box[2] > other[0] + 2 or box[1] + box[3] > other[1] + 2
    assert after == (upright if fits_one else box)


MODES = {
    "RGBA": ".png", "LA": ".png", "P": ".gif", "I;16": ".png", "CMYK": ".jpg", "1": ".png", "L": ".jpg", "YCbCr": ".jpg",
    "LAB": ".tif",
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_that_training_reads_is_sound_and_copied_byte_by_byte(mode, tmp_path):
    name = f"a{MODES[mode]}"
    raw = write(tmp_path / "data", picture(mode), name, STORED, THING)
    report = inspect(raw)
    assert [one.kind for one in report.findings if one.severity != "note"] == []
    write_cleaned_copy(raw, report, tmp_path / "copy")
    assert (tmp_path / "copy" / "train" / name).read_bytes() == (tmp_path / "data" / name).read_bytes()
    assert load_data(tmp_path / "copy", validation_fraction=0).train.dataset[0]["image"].size == STORED


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch ran) (w) file\n"),
        ("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch ran) (w) file\n"),
        ("a.png", b"\xc5\xd0\xd3\xc6" + bytes(40)),
        ("a.png", b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(60)),  # WMF
        ("a.jpg", b"GRIB" + bytes(60)),
        ("a.jpg", b"\x89HDF\r\n\x1a\n" + bytes(60)),
        ("a.png", b"SIMPLE  =                    T" + bytes(80)),  # FITS
        ("a.jpg", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>"),
    ],
)
def test_formats_for_which_a_program_would_start_are_named_and_left_out(name, head, tmp_path, monkeypatch):
    raw = write(tmp_path / "data", picture(), "good.png", STORED, THING)
    (tmp_path / "data" / name).write_bytes(head)
    split = raw.splits["train"]
    entry = split.images[0] | {"id": 2, "file_name": name, "path": tmp_path / "data" / name}
    box = split.annotations[0] | {"id": 2, "image_id": 2}
    raw = raw._replace(
        splits={
            "train": split._replace(
                images=[*split.images, entry], annotations=annotations_of([*split.annotations, box])
            )
        }
    )
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"{command} was started"))
    monkeypatch.setattr("subprocess.Popen", lambda *arguments, **settings: pytest.fail("a program was started"))
    report = inspect(raw)
    assert [one.kind for one in report.findings if one.severity == "error"] == ["image-broken"]
    copy = write_cleaned_copy(raw, report, tmp_path / "copy")
    assert (copy.num_images, copy.num_unread) == ({"train": 1}, 1)
    assert copy.left_out_texts[0] == "1 of 2 images and 1 of 2 boxes are not in the copy:"


def test_nothing_is_written_through_a_link_beside_or_in_the_target(tmp_path):
    raw = write(tmp_path / "data", picture(), "a.png", STORED, THING)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "copy").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="is not an empty folder"):
        write_cleaned_copy(raw, inspect(raw), tmp_path / "copy")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    write_cleaned_copy(raw, inspect(raw), tmp_path / "gone")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "gone" / "CHANGES.txt").is_file()


def test_a_target_that_is_filled_meanwhile_is_kept(tmp_path):
    raw = write(tmp_path / "data", picture(), "a.png", STORED, THING)
    (tmp_path / "copy").mkdir()
    with pytest.raises(ValueError, match="is not an empty folder"):
        write_cleaned_copy(
            raw, inspect(raw), tmp_path / "copy", lambda done, total: (tmp_path / "copy" / "new.txt").write_text("mine")
        )
    assert (tmp_path / "copy" / "new.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["copy", "data"]
