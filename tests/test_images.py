"""One reading of an image file: every mode of Pillow, in training, evaluation, prediction, the pipeline and the doctor."""

import inspect as inspect_module
import io
import json
import os
import threading
import warnings
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common import images
from dino_hf.data import load_data, read_raw
from dino_hf.doctor.checks import inspect
from dino_hf.inference import sources
from dino_hf.inference.predictor import Predictor
from dino_hf.runtime.pipeline import DinoDetrObjectDetectionPipeline
from dino_hf.training.coco_data import DetectionTransform
from helpers import tiny_config

SIZE = (21, 13)  # width and height
INK, WHITE = (200, 50, 50), (255, 255, 255)


def cut_out() -> Image.Image:
    """INK in the middle, around it transparent black, as editors save it."""
    pixels = np.zeros((SIZE[1], SIZE[0], 4), np.uint8)
    pixels[3:10, 5:16] = (*INK, 255)
    return Image.fromarray(pixels)


def shades() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8))


def deep(kind: type = np.uint16) -> Image.Image:
    return Image.fromarray(np.arange(SIZE[0] * SIZE[1], dtype=kind).reshape(SIZE[::-1]) * 240)


FILES = {
    "1.png": shades().convert("1"),
    "L.png": shades().convert("L"),
    "P.png": shades().quantize(9),
    "RGB.jpg": shades(),
    "CMYK.jpg": shades().convert("CMYK"),
    "CMYK.tif": shades().convert("CMYK"),
    "YCbCr.tif": shades().convert("YCbCr"),
    "LAB.tif": Image.new("LAB", SIZE, (120, 140, 90)),
    "RGBX.tif": shades().convert("RGBX"),
    "RGBA.png": cut_out(),
    "RGBA.webp": cut_out(),
    "RGBA.tif": cut_out(),
    "LA.png": cut_out().convert("LA"),
    "PA.tif": cut_out().convert("P").convert("PA"),
    "P-transparent.png": cut_out().quantize(8),
    "P.gif": cut_out(),
    "I;16.png": deep(),
    "I;16.tif": deep(),
    "I.tif": deep(np.int32),
}
if int(PIL.__version__.partition(".")[0]) < 13:
    del FILES["YCbCr.tif"]  # Pillow before 13 cannot read what it wrote
IN_MEMORY = {mode: cut_out().convert("RGBA" if mode == "RGBa" else "LA").convert(mode) for mode in ("RGBa", "La")} | {
    "HSV": shades().convert("HSV"),
    "I;16B": Image.new("I;16B", SIZE, 65535),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data set with one image of each mode."""
    folder = tmp_path_factory.mktemp("modes")
    for name, image in FILES.items():
        image.save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
    entries = [
        {"id": number, "file_name": name, "width": SIZE[0], "height": SIZE[1]} for number, name in enumerate(FILES)
    ]
    boxes = [
        {"id": entry["id"], "image_id": entry["id"], "category_id": 1, "bbox": [2, 3, 9, 5], "iscrowd": 0}
        for entry in entries[1:]
    ]
    content = {"images": entries, "annotations": boxes, "categories": [{"id": 1, "name": "cup"}]}
    (folder / "train.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def processor() -> DinoDetrImageProcessor:
    return DinoDetrImageProcessor(size={"shortest_edge": 26, "longest_edge": 42})


def test_training_prediction_and_the_pipeline_see_the_same_pixels_of_every_mode(folder, processor):
    model = DinoDetrForObjectDetection(tiny_config()).eval()
    transform = DetectionTransform(processor)
    pipeline = DinoDetrObjectDetectionPipeline(model=model, image_processor=processor, device="cpu")
    predictor = Predictor(model, image_processor=processor)
    data = load_data(folder, validation_fraction=0).train
    assert len(data.dataset) == len(FILES)
    for row in data.dataset:
        name = row["file_name"]
        trained = transform({key: [row[key]] for key in ("image_id", "image", "width", "height", "objects")})
        trained = trained["pixel_values"][0]
        predicted = processor(images=[sources.read_image(folder / name)], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(trained, predicted), name
        piped = pipeline.preprocess(str(folder / name))["pixel_values"][0]
        assert torch.equal(trained, piped), name
        stored = Image.open(io.BytesIO((folder / name).read_bytes()))
        assert torch.equal(trained, pipeline.preprocess(stored)["pixel_values"][0]), name
        assert torch.equal(trained, predictor._prepare(stored).pixel_values), name


@pytest.mark.parametrize(
    "name", ["RGBA.png", "RGBA.webp", "RGBA.tif", "LA.png", "PA.tif", "P-transparent.png", "P.gif"]
)
def test_transparency_is_white(folder, name):
    seen = images.read_image(folder / name)
    assert (seen.mode, seen.getpixel((1, 1))) == ("RGB", WHITE)


@pytest.mark.parametrize("mode", IN_MEMORY)
def test_modes_that_no_file_has(mode):
    seen = images.to_rgb(IN_MEMORY[mode])
    assert seen.mode == "RGB"
    if mode != "HSV":
        assert seen.getpixel((0, 0)) == WHITE


def test_transparent_colour_of_grey_and_rgb(tmp_path):
    for mode, colour in (("L", 7), ("RGB", (7, 8, 9)), ("1", 0)):
        Image.new(mode, SIZE, colour).save(tmp_path / "one.png", transparency=colour)
        assert images.read_image(tmp_path / "one.png").getpixel((2, 2)) == WHITE
    values = np.full(SIZE[::-1], 300, dtype=np.uint16)
    values[0] = 60000
    Image.fromarray(values).save(tmp_path / "deep.png", transparency=300)
    seen = images.read_image(tmp_path / "deep.png")
    assert (seen.getpixel((2, 2)), seen.getpixel((2, 0))) == (WHITE, (233,) * 3)


def test_composition_is_that_of_transformers():
    from transformers.image_transforms import convert_to_rgb

    if "return_numpy" not in inspect_module.signature(convert_to_rgb).parameters:
        pytest.skip("this version of transformers does not composite transparency")
    pixels = np.random.default_rng(1).integers(0, 256, (*SIZE[::-1], 4), dtype=np.uint8)
    for image in (Image.fromarray(pixels), Image.fromarray(pixels).convert("LA")):
        np.testing.assert_array_equal(np.asarray(images.to_rgb(image)), convert_to_rgb(image, return_numpy=True))


def test_grey_of_16_bits_is_scaled_from_the_full_range():
    values = np.array([[0, 128, 129, 257, 65535], [1, 2, 3, 4, 385]], dtype=np.uint16)
    expected = [[0, 0, 1, 1, 255], [0, 0, 0, 0, 1]]
    for kind in (np.uint16, np.int32):
        seen = np.asarray(images.to_rgb(Image.fromarray(values.astype(kind))))
        np.testing.assert_array_equal(seen[..., 1], expected)


def test_unknown_ranges_are_refused_with_a_sentence():
    for image in (Image.new("F", SIZE), Image.new("I", SIZE, 65536), Image.new("I", SIZE, -1)):
        with pytest.raises(images.UnknownRange, match="save it with 8 or 16 bits"):
            images.to_rgb(image)


def test_strips_join_without_a_seam(monkeypatch):
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (37, 11, 4), dtype=np.uint8))
    whole = images.to_rgb(image)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 22)
    assert images.to_rgb(image).tobytes() == whole.tobytes()


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_known_from_the_header(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    shades().save(tmp_path / f"a.{suffix}", exif=exif)
    seen = images.read_image(tmp_path / f"a.{suffix}")
    with images.open_image(tmp_path / f"a.{suffix}") as opened:
        assert images.orientation(opened) == orientation
        assert images.stored_size(opened) == SIZE
        assert images.upright_size(opened) == seen.size == (SIZE if orientation < 5 else SIZE[::-1])
    assert not seen.getexif()
    if suffix in ("png", "tif"):
        plain = np.asarray(shades())
        quarter = {1: 0, 3: 2, 6: 3, 8: 1}.get(orientation)
        if quarter is not None:
            np.testing.assert_array_equal(np.asarray(seen), np.rot90(plain, quarter))


def test_a_png_is_turned_by_a_block_behind_its_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    shades().save(file, "PNG", exif=exif)
    content = file.getvalue()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    last = content.index(b"IEND") - 4
    late = content[:start] + content[end:last] + content[start:end] + content[last:]
    assert images.read_image(late).size == SIZE[::-1]
    with images.open_image(late) as opened:
        assert images.upright_size(opened) == SIZE[::-1]


def test_the_size_of_a_png_is_read_without_decoding_it(monkeypatch, tmp_path):
    shades().save(tmp_path / "a.png")
    with images.open_image(tmp_path / "a.png") as opened:
        monkeypatch.setattr(opened, "load", lambda: pytest.fail("all pixels were decoded for the size"))
        assert images.upright_size(opened) == SIZE


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's own word for it
def test_a_damaged_exif_block_turns_nothing(tmp_path):
    shades().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*garbage")
    assert images.read_image(tmp_path / "a.jpg").size == SIZE
    with images.open_image(tmp_path / "a.jpg") as opened:
        assert (images.orientation(opened), images.upright_size(opened)) == (1, SIZE)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\nshowpage\n%%EOF\n"


def eps_data(folder: Path) -> Path:
    (folder / "1.png").write_bytes(EPS)
    shades().save(folder / "2.png")
    entries = [
        {"id": n, "file_name": f"{n}.png", "width": 64 if n == 1 else 21, "height": 48 if n == 1 else 13}
        for n in (1, 2)
    ]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [2, 3, 9, 5]} for n in (1, 2)]
    content = {"images": entries, "annotations": boxes, "categories": [{"id": 1, "name": "cup"}]}
    (folder / "train.json").write_text(json.dumps(content))
    return folder


def test_no_reader_starts_a_program_for_eps(tmp_path, monkeypatch, processor):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    folder = eps_data(tmp_path)
    report = inspect(read_raw(folder))
    found = {finding.kind: finding.offenders[0].value for finding in report.findings}
    assert "PostScript" in found["image-broken"]
    rows = load_data(folder, validation_fraction=0).train.dataset
    with pytest.raises(OSError, match="PostScript"):
        rows[0]
    assert rows[1]["image"].size == SIZE
    for read in (sources.read_image, images.read_image):
        with pytest.raises(images.UnreadableImage, match="convert it to PNG"):
            read(folder / "1.png")
    pipeline = DinoDetrObjectDetectionPipeline(
        model=DinoDetrForObjectDetection(tiny_config()), image_processor=processor, device="cpu"
    )
    with pytest.raises(OSError, match="PostScript"):
        pipeline.preprocess(str(folder / "1.png"))


@pytest.mark.parametrize("name", ["EPS", "WMF", "FITS", "HDF5", "GRIB", "BUFR", "PCD", "PSD", "FPX", "MIC"])
def test_formats_of_other_decoders_are_not_among_those_read(name):
    assert name not in images.FORMATS
    assert set(images.FORMATS) <= set(Image.OPEN)


def test_sentences_for_what_is_no_image(tmp_path):
    wrong = {
        b"": "empty",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "HEIC image, which cannot be read; convert it to JPEG",
        b"hello": "not an image of a known format",
    }
    for content, text in wrong.items():
        with pytest.raises(images.UnreadableImage, match=text):
            images.read_image(content)
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(images.UnreadableImage, match=text):
            images.read_image(tmp_path / "x.png")
    with pytest.raises(FileNotFoundError):
        images.read_image(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        images.read_image("a\0b.png")
    with pytest.raises(images.UnreadableImage, match="not a regular file"):
        images.read_image(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(images.UnreadableImage, match="not a regular file"):
        images.read_image(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "gif"])
def test_truncated_files_are_refused(tmp_path, suffix):
    noise = Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    noise.save(tmp_path / f"a.{suffix}")
    content = (tmp_path / f"a.{suffix}").read_bytes()
    with pytest.raises(images.UnreadableImage, match=r"\.$"):
        images.read_image(content[: len(content) * 2 // 3])


def test_the_largest_number_of_pixels(monkeypatch):
    file = io.BytesIO()
    shades().save(file, "PNG")
    monkeypatch.setattr(images, "MAX_PIXELS", SIZE[0] * SIZE[1])
    assert images.read_image(file.getvalue()).size == SIZE
    for limit in (SIZE[0] * SIZE[1] - 1, SIZE[0] * SIZE[1] // 3):  # Pillow itself refuses twice its limit
        monkeypatch.setattr(images, "MAX_PIXELS", limit)
        with pytest.raises(images.TooManyPixels, match="cut it into parts"):
            images.read_image(file.getvalue())


def test_pillow_prints_no_warning_beside_our_error(monkeypatch):
    file = io.BytesIO()
    shades().save(file, "PNG")
    num_pixels = SIZE[0] * SIZE[1]
    for limit in (num_pixels - 1, num_pixels // 2, num_pixels // 2 - 1):  # from half on, Pillow refuses by itself
        monkeypatch.setattr(images, "MAX_PIXELS", limit)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(images.TooManyPixels):
                images.open_image(file.getvalue())
        assert not caught


@pytest.mark.filterwarnings("error")
def test_more_than_pillow_takes_for_an_attack_is_read(monkeypatch):
    file = io.BytesIO()
    shades().save(file, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert images.read_image(file.getvalue()).size == SIZE
    assert Image.MAX_IMAGE_PIXELS == 50  # for other readers it holds as before


def test_only_a_bounded_number_of_bytes_is_decoded_at_once():
    room, running, most, lock = images.DecodingBudget(10), 0, 0, threading.Lock()

    def work(num_bytes):
        nonlocal running, most
        with room.reserve(num_bytes):
            with lock:
                running += min(num_bytes, 10)
                most = max(most, running)
            threading.Event().wait(0.005)
            with lock:
                running -= min(num_bytes, 10)

    threads = [threading.Thread(target=work, args=(size,)) for size in (4, 5, 6, 99, 3, 2, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert running == 0
    assert 5 < most <= 10


def test_further_frames_and_pages_are_named(tmp_path):
    others = [shades().convert("L"), cut_out().convert("L")]
    for name, expected in (("a.gif", "frames"), ("b.tif", "pages"), ("c.webp", "frames"), ("d.png", "frames")):
        others[0].save(tmp_path / name, save_all=True, append_images=others[1:])
        others[0].save(tmp_path / f"one-{name}")
        with images.open_image(tmp_path / name) as several, images.open_image(tmp_path / f"one-{name}") as one:
            assert (images.other_frames(several), images.other_frames(one)) == (expected, None)
        assert np.abs(np.asarray(images.read_image(tmp_path / name)).astype(int)[..., 0] - others[0]).max() < 40
