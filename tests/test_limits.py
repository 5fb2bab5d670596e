"""Limits of what is read, waited for and written have a case at each side of their border."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageColor

from dino_hf.common import downloads, drawing, images, output_folders, regular_files
from dino_hf.common.images import TooManyPixels, UnreadableImage, check_file, open_image
from dino_hf.common.regular_files import parse_yaml, read_text
from dino_hf.common.text import count_text
from dino_hf.data import coco_format, yolo_format
from dino_hf.data.files import DataFolder
from dino_hf.data.hub_files import _check_lines
from dino_hf.export import onnx_export, onnx_file
from dino_hf.inference import draw_detections, journal, videos
from dino_hf.inference.predictor import Detections
from dino_hf.training import run_lock


def sparse(path, size: int):
    """A file of so many bytes that takes no room."""
    with open(path, "wb") as file:
        file.truncate(size)
    return path


# Files


def test_images_have_500_million_pixels_and_2_gib_at_most(tmp_path, monkeypatch):
    for size, is_refused in (((25_000, 20_000), False), ((25_000, 20_001), True)):
        opened = SimpleNamespace(width=size[0], height=size[1], close=lambda: None)
        monkeypatch.setattr(images.Image, "open", lambda *arguments, opened=opened, **options: opened)
        if is_refused:
            with pytest.raises(TooManyPixels, match="25000 x 20001 pixels, and at most 500 million are read"):
                open_image(b"")
        else:
            assert open_image(b"") is opened
    check_file(sparse(tmp_path / "a.png", 2**31))
    with pytest.raises(UnreadableImage, match="larger than 2 GiB"):
        check_file(sparse(tmp_path / "b.png", 2**31 + 1))


def test_texts_have_64_mib_and_yaml_a_depth_of_50_and_200_000_values(tmp_path):
    with pytest.raises(OSError, match=r"67,108,865 bytes, more than .*67,108,864"):
        read_text(sparse(tmp_path / "a.txt", 2**26 + 1))
    assert (regular_files.LARGEST_YAML, regular_files.LARGEST_JSON) == (2**20, 2**34)
    with pytest.raises(OSError, match=r"1,048,577 bytes, more than .*1,048,576"):
        regular_files.read_yaml(sparse(tmp_path / "a.yaml", 2**20 + 1))
    assert parse_yaml("[" * 49 + "x" + "]" * 49, "it")
    with pytest.raises(ValueError, match="nested more than 50 deep"):
        parse_yaml("[" * 50 + "x" + "]" * 50, "it")
    # 99 times a list of 1,999 values, which counts for 2,000, and the list around them
    aliases = "[&a [" + "x," * 1999 + "]," + "*a," * 98
    assert len(parse_yaml(aliases + "y," * 1999 + "]", "it")) == 99 + 1999
    with pytest.raises(ValueError, match="more than 200,000 values"):
        parse_yaml(aliases + "y," * 2000 + "]", "it")


@pytest.mark.parametrize(("depth", "is_read"), [(64, True), (65, False)])
def test_lines_of_json_are_nested_64_deep_at_most(depth, is_read, tmp_path):
    path = tmp_path / "a.jsonl"
    line = [0, *([[]] * (258 - depth))]  # 257 brackets in all, as few as are looked into
    for _ in range(depth - 3):  # without the object, this list and the lists in it
        line = [line]
    text = json.dumps({"a": line})
    assert text.count("[") + text.count("{") == 257
    path.write_text(text)
    if is_read:
        _check_lines(path)
    else:
        with pytest.raises(ValueError, match="nested more than 64 deep"):
            _check_lines(path)
    path.write_text(text.replace("[], ", "", 1))  # 256 brackets are not looked into
    _check_lines(path)


@pytest.mark.parametrize(("count", "is_looked_at"), [(100, True), (101, False)])
def test_up_to_100_jsons_of_a_folder_may_be_in_coco_format(count, is_looked_at, tmp_path):
    for number in range(count):
        (tmp_path / f"{number}.json").write_text("{}")
    assert len(coco_format._candidates(tmp_path, DataFolder(tmp_path))) == (count if is_looked_at else 0)
    assert coco_format._is_number(10**300 - 1)
    assert not coco_format._is_number(10**300)


@pytest.mark.parametrize(("count", "is_read"), [("100000", True), ("100001", False)])
def test_yolo_has_100_000_classes_at_most(count, is_read):
    problems = []
    categories = yolo_format._categories({"nc": count}, Path("data.yaml"), problems)
    assert len(categories) == (100_000 if is_read else 0)
    assert [problem.where for problem in problems] == ([] if is_read else ["data.yaml: nc"])


# Waiting


def test_a_download_has_100_mib_30_seconds_and_20_without_an_answer(monkeypatch):
    seen, piece = {}, b"x" * 2**20

    class Answer:
        length = None

        def __init__(self, extra):
            self.pieces = [piece] * 100 + [b"y"] * extra

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def read1(self, size):
            return self.pieces.pop() if self.pieces else b""

    class Thread:
        def __init__(self, target, daemon):
            self.work = target

        def start(self):
            self.work()

        def join(self, seconds):
            seen["join"] = seconds

    for extra in (0, 1):

        def answer(request, timeout, extra=extra):
            seen["timeout"] = timeout
            return Answer(extra)

        monkeypatch.setattr(downloads, "build_opener", lambda handler: SimpleNamespace(open=answer))
        monkeypatch.setattr(downloads.threading, "Thread", Thread)
        if extra:
            with pytest.raises(ValueError, match="larger than 100 MiB"):
                downloads.download("http://here/a.jpg")
        else:
            assert len(downloads.download("http://here/a.jpg")) == 100 * 2**20
    assert seen == {"join": 30.0, "timeout": 20.0}


@pytest.mark.parametrize(("difference", "is_running"), [(1.0, True), (1.01, False)])
def test_a_process_is_known_by_its_start_to_a_second(difference, is_running, tmp_path, monkeypatch):
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 1000.0)
    holder = {"host": run_lock.socket.gethostname(), "pid": os.getpid(), "started": 1000.0 + difference}
    assert run_lock._is_running(holder, tmp_path) == is_running


@pytest.mark.parametrize(("age", "is_left"), [(24 * 3600 - 60, False), (24 * 3600 + 60, True)])
def test_a_scratch_file_of_another_machine_is_left_over_after_a_day(age, is_left, tmp_path, monkeypatch):
    with output_folders.scratch_folder(tmp_path / "a") as scratch:
        name = scratch.name
    path = tmp_path / name
    path.mkdir()
    os.utime(path, (time.time() - age,) * 2)
    monkeypatch.setattr(output_folders, "machine_mark", lambda: "another")
    assert output_folders.is_leftover(path) == is_left


# Predictions


def test_numbers_of_a_journal_are_below_1e15():
    assert journal._is_number(1e15 - 1)
    assert not journal._is_number(1e15)
    assert journal._is_count(10**15 - 1)
    assert not journal._is_count(10**15)


@pytest.mark.parametrize(("side", "zoom"), [(320, 1), (319, 2), (160, 2), (159, 3)])
def test_pictures_below_320_pixels_are_drawn_larger(side, zoom):
    none = Detections.sorted(np.zeros((0, 4)), [], [])
    assert draw_detections(Image.new("RGB", (side, 50)), none, {}).size == (zoom * side, zoom * 50)


@pytest.mark.parametrize(("count", "num_texts"), [(300, 300), (301, 300)])
def test_300_labels_are_drawn_at_most(count, num_texts, monkeypatch):
    drawn = []
    monkeypatch.setattr(drawing.ImageDraw.ImageDraw, "text", lambda self, place, text, **style: drawn.append(text))
    boxes = [(100 * (n % 20) + 5, 100 * (n // 20) + 45, 50, 40) for n in range(count)]  # labels do not hide each other
    found = Detections.sorted(boxes, [0.5] * count, [0] * count)
    draw_detections(Image.new("RGB", (2000, 1700)), found, {0: "fox"})
    assert len(drawn) == num_texts


def test_text_is_black_where_that_has_the_higher_contrast():
    """Grey of 117 has a relative luminance of 0.178, and 118 of 0.181; both contrasts are equal at 0.179."""
    assert drawing.text_colour("#757575") == "white"
    assert drawing.text_colour("#767676") == "black"
    assert ImageColor.getrgb("#757575") == (117,) * 3
    # The parts of red, green and blue in the luminance, and the straight part of the curve
    for light, dark in (("#ed0000", "#ec0000"), ("#008a00", "#008900"), ("#bd00ff", "#bc00ff")):
        assert (drawing.text_colour(light), drawing.text_colour(dark)) == ("black", "white")


@pytest.mark.parametrize(("height", "is_refused"), [(2**13, False), (2**13 + 1, True)])
def test_frames_of_a_video_have_2_to_the_27_pixels_at_most(height, is_refused):
    """Those that are decoded at the same time take half a GiB: 2 bytes a pixel, so two threads for the largest."""
    stream = SimpleNamespace(codec_context=SimpleNamespace(width=2**14, height=height, thread_count=4))
    if is_refused:
        with pytest.raises(ValueError, match="and at most 134 million are read"):
            videos._check_size(stream)
    else:
        videos._check_size(stream)
        assert stream.codec_context.thread_count == min(2, os.cpu_count())


# Export


def test_opsets_are_18_to_23():
    for opset in (18, 23):
        onnx_export._check_settings(opset, "float32", None, None)
    for opset in (17, 24):
        with pytest.raises(ValueError, match=f"opset={opset} must be one of 18 to 23"):
            onnx_export._check_settings(opset, "float32", None, None)


@pytest.mark.parametrize(
    ("dtype", "ap", "is_written"),
    [
        (torch.float32, 0.4991, True), (torch.float32, 0.4989, False), (torch.float32, 0.5011, False),
        (torch.float16, 0.4951, True), (torch.float16, 0.4949, False),
    ],
)  # fmt: skip
def test_the_ap_of_a_file_may_differ_by_a_tenth_of_a_point_and_in_half_precision_by_half_a_point(
    dtype, ap, is_written, monkeypatch
):
    model, file = SimpleNamespace(name="a model"), SimpleNamespace(name="a.onnx")
    monkeypatch.setattr(
        "dino_hf.evaluation.evaluate_model",
        lambda one, data, **settings: SimpleNamespace(metrics={"AP": 0.5 if one is model else ap}),
    )
    arguments = model, file, SimpleNamespace(dataset=[1]), onnx_export.AP_TOLERANCES[dtype], "a.onnx", lambda text: None
    if is_written:
        assert onnx_export._compare_ap(*arguments) == (0.5, ap)
    else:
        with pytest.raises(ValueError, match=r"a\.onnx was not written: its AP is"):
            onnx_export._compare_ap(*arguments)


def test_a_file_is_compared_on_three_scenes_of_ours():
    assert [image.mode for image in onnx_export._pictures(None)] == ["RGB"] * 3


@pytest.mark.parametrize(("extra", "weights"), [(0, None), (1, "a.onnx.data")])
def test_weights_near_2_gib_get_a_file_of_their_own(extra, weights, tmp_path, monkeypatch):
    onnx_ir = pytest.importorskip("onnx_ir")
    saved = []
    monkeypatch.setattr(onnx_ir, "save", lambda model, path, format, external_data: saved.append(external_data))
    value = SimpleNamespace(const_value=SimpleNamespace(nbytes=2**31 - 2**24 + extra))
    onnx_file._save(SimpleNamespace(graph=SimpleNamespace(initializers={"a": value})), tmp_path / "a.onnx")
    assert saved == [weights]


def test_a_count_of_one_has_no_plural():
    assert [count_text(count, "box") for count in (0, 1, 2)] == ["0 boxes", "1 box", "2 boxes"]
