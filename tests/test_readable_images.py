"""Bad images that are met in training: another image takes their place, they are named once and counted, and there is a limit."""

import json
import logging
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import dino_hf
from dino_hf import DinoDetrImageProcessor
from dino_hf.data import load_data
from dino_hf.data.rows import ImageSizeError
from dino_hf.run import image_check
from dino_hf.run.image_check import leave_out_bad_images
from dino_hf.training import DetectionTransform
from dino_hf.training.readable_images import ReadableImages, TooManyBadImages
from helpers import tiny_config
from processes import exit_codes_of_forks, needs_fork


class Rows:
    """A data set of numbers, some of which cannot be read."""

    def __init__(self, count, bad, error=OSError):
        self.count, self.bad, self.error, self.reads = count, set(bad), error, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads.append(index)
        if index in self.bad:
            raise self.error(f"{index} is cut off.")
        return index


def names(count):
    return [f"{index}.jpg" for index in range(count)]


@pytest.mark.parametrize("error", [OSError, ImageSizeError])
def test_the_next_image_takes_the_place_of_a_bad_one_which_is_read_once_and_named_once(error, caplog):
    rows = Rows(7, [2, 3, 6], error)
    data = ReadableImages(rows, names(7))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [data[index] for index in range(len(data))] == [0, 1, 4, 4, 4, 5, 0]
    assert [rows.reads.count(index) for index in (2, 3, 6)] == [1, 1, 1]
    assert [record.getMessage() for record in caplog.records] == [
        f"Training continues without the image {index}.jpg: {index} is cut off." for index in (2, 3, 6)
    ]
    assert data.bad_images == ["2.jpg", "3.jpg", "6.jpg"]
    assert data.summary().startswith(
        "3 of 7 training images could not be read, or have another size than annotated: 2.jpg,"
    )


def test_other_errors_are_not_swallowed():
    with pytest.raises(ValueError, match="1 is cut off"):
        ReadableImages(Rows(3, [1], ValueError), names(3))[1]


@pytest.mark.parametrize(("count", "bad", "fits"), [(200, 20, True), (200, 21, False), (40, 10, True), (40, 11, False)])
def test_a_tenth_of_the_images_and_at_least_ten_may_be_bad(count, bad, fits):
    data = ReadableImages(Rows(count, range(bad)), names(count))
    if fits:
        assert data[0] == bad
    else:
        with pytest.raises(
            TooManyBadImages, match=rf"{bad} of {count} training images .* and {bad - 3} more\. They are too many"
        ):
            data[0]


def test_without_any_other_image_it_is_an_error():
    with pytest.raises(TooManyBadImages, match="3 of 3 training images"):
        ReadableImages(Rows(3, range(3)), names(3))[1]


def test_where_bad_images_stop_the_first_one_does():
    data = ReadableImages(Rows(30, [4]), names(30), most=0)
    assert data[3] == 3
    with pytest.raises(TooManyBadImages, match=r"4 is cut off.* leave them out by --on-bad-image skip"):
        data[4]


@needs_fork
@pytest.mark.forks
def test_each_process_knows_the_bad_images_of_all_after_training(tmp_path):
    found = ((2, 5), (), (5, 6))  # by each of three processes

    def meet(rank):
        torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=rank, world_size=3)
        data = ReadableImages(Rows(8, found[rank]), names(8), most=2)
        for index in range(8):
            data[index]
        assert data.bad_images == [f"{index}.jpg" for index in found[rank]]
        data.gather()
        assert data.bad_images == ["2.jpg", "5.jpg", "6.jpg"]
        assert data.summary().endswith(
            "2.jpg, 5.jpg, 6.jpg. Other images took their places."
        )  # three, though two may be

    assert exit_codes_of_forks([partial(meet, rank) for rank in range(3)]) == [0, 0, 0]


def test_a_single_process_has_nothing_to_gather():
    data = ReadableImages(Rows(4, [1]), names(4))
    data[1]
    data.gather()
    assert data.bad_images == ["1.jpg"]


def write_data(folder, count=6):
    for split, numbers in (("train", range(count)), ("validation", range(count, count + 3)), ("test", range(90, 92))):
        (folder / split).mkdir(parents=True)
        images, boxes = [], []
        for number in numbers:
            pixels = np.random.default_rng(number).integers(0, 255, (64, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{number}.jpg")
            images.append({"id": number, "file_name": f"{number}.jpg", "width": 96, "height": 64})
            if number != 1:
                boxes.append({"id": number, "image_id": number, "category_id": 1, "bbox": [10, 8, 30, 20], "area": 600})
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "roo"}]}
        (folder / split / "annotations.json").write_text(json.dumps(content))
    return folder


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-200])


def test_held_out_and_test_images_are_decoded_before_training_however_many_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(image_check, "MOST_DECODED", 3)
    data = write_data(tmp_path / "data")
    for bad in ("train/2.jpg", "validation/7.jpg", "test/91.jpg"):
        cut_off(data / bad)
    kept, warnings = leave_out_bad_images(load_data(data), "skip", False)
    assert kept.train.dataset["file_name"][:] == [f"{number}.jpg" for number in range(6)]  # these are met in training
    assert kept.validation.dataset["file_name"][:] == ["6.jpg", "8.jpg"]
    assert kept.test.dataset["file_name"][:] == ["90.jpg"]
    assert len(warnings) == 2


def test_workers_tell_the_main_process_what_they_met(tmp_path):
    data = load_data(write_data(tmp_path / "data")).train
    cut_off(tmp_path / "data/train/2.jpg")
    transform = DetectionTransform(DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}))
    rows = ReadableImages(data.dataset.with_transform(transform), data.dataset["file_name"][:])
    loader = torch.utils.data.DataLoader(rows, batch_size=2, num_workers=2, collate_fn=list)
    ids = [int(sample["labels"]["image_id"]) for batch in loader for sample in batch]
    assert ids == [0, 1, 3, 3, 4, 5]
    assert rows.bad_images == ["2.jpg"]


@pytest.mark.parametrize("on_bad_image", ["skip", "raise"])
def test_a_run_goes_on_and_counts_or_stops_in_a_sentence(on_bad_image, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_check, "MOST_DECODED", 0)
    cut_off(write_data(tmp_path / "data") / "train/2.jpg")
    tiny_config(num_denoising=5).save_pretrained(tmp_path / "untrained")
    DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}).save_pretrained(tmp_path / "untrained")

    def train(**settings):
        return dino_hf.train(
            tmp_path / "data",
            model=tmp_path / "untrained",
            output_dir=tmp_path / "out",
            max_steps=3,
            batch_size=2,
            report_to="none",
            use_cpu=True,
            num_denoising=5,
            on_bad_image=on_bad_image,
            **settings,
        )

    if on_bad_image == "raise":
        with pytest.raises(
            ValueError, match=r"^1 of 6 training images could not be read.* 2\.jpg\. Repair or remove them"
        ):
            train()
        return
    train()
    assert json.loads((tmp_path / "out/run.json").read_text())["bad_images"] == ["2.jpg"]
    assert "1 of 6 training images could not be read" in " ".join(capsys.readouterr().out.split())
