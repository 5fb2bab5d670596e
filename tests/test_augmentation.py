"""Augmentation: objects follow the pixels, whatever is drawn; and what is drawn depends on the seed alone."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dino_hf.training.augmentation import Augmentation, augment

few = settings(derandomize=True, deadline=None, max_examples=100)
seeds = st.tuples(st.integers(0, 2**40), st.integers(0, 50), st.integers(0, 2**40))

SMALL = {"short_sides": (48, 64, 90), "longest_side": 133, "crop_short_sides": (40, 50, 70), "crop_sizes": (30, 60)}
AUGMENTATIONS = {
    "release": Augmentation(**SMALL),
    "crop": Augmentation(**SMALL, crop=1.0),
    "jitter": Augmentation(scale_jitter=(0.3, 2.0), jitter_size=100),
}
UNCHANGED = {"horizontal_flip": 0.0, "crop": 0.0}
every_augmentation = pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS)


def coordinates(height: int, width: int) -> Tensor:
    """(3, h, w) uint8: twice the column, twice the row, and white, which marks what is image and not padding."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([2 * columns, 2 * rows, torch.full_like(rows, 255)]).to(torch.uint8)


@st.composite
def annotated_images(draw):
    """An image, not square, that tells where each pixel was, and objects, of which some stick out; `category` numbers them."""
    height, width = draw(
        st.tuples(st.integers(20, 127), st.integers(20, 127)).filter(lambda sides: sides[0] != sides[1])
    )
    bbox = []
    for _ in range(draw(st.integers(0, 5))):
        x, y = draw(st.floats(-10, width - 4)), draw(st.floats(-10, height - 4))
        bbox.append([x, y, draw(st.floats(max(0.0, -x) + 3, width)), draw(st.floats(max(0.0, -y) + 3, height))])
    iscrowd = draw(st.lists(st.integers(0, 1), min_size=len(bbox), max_size=len(bbox)))
    visible = [clipped(box, height, width) for box in bbox]
    area = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in visible]
    return coordinates(height, width), {
        "category": list(range(len(bbox))),
        "bbox": bbox,
        "area": area,
        "iscrowd": iscrowd,
    }


def clipped(box, height, width) -> tuple[float, ...]:
    """xywh -> the corners of what is inside the image."""
    x, y, w, h = box
    return max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)


def inside(xs: Tensor, ys: Tensor, corners, margin: float) -> Tensor:
    """Which points lie in a box, by at least a margin; a negative one: at most that far outside."""
    x0, y0, x1, y1 = corners
    return (xs > x0 + margin) & (xs < x1 - margin) & (ys > y0 + margin) & (ys < y1 - margin)


@every_augmentation
@few
@given(sample=annotated_images(), seed=seeds)
def test_the_pixels_in_a_box_are_those_that_were_in_it(augmentation, sample, seed):
    """Each pixel says where it was: so the image tells where boxes must be, and which a crop has removed."""
    image, objects = sample
    pixels, changed = augment(augmentation.transforms(), image, objects, seed)
    height, width = pixels.shape[1:]
    was_x, was_y = pixels[0] / 2 + 0.5, pixels[1] / 2 + 0.5  # (h, w) centre of the pixel it was
    is_image = pixels[2] == 255
    is_y, is_x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    # Two resizes round pixels to halves of a source pixel and blend over about one pixel, of the source or of the result.
    of_source = 2.0 * max(1.0, image.shape[1] / height, image.shape[2] / width)
    for number, box in enumerate(objects["bbox"]):
        corners = clipped(box, *image.shape[1:])
        certainly_in = inside(was_x, was_y, corners, of_source) & is_image
        certainly_out = ~inside(was_x, was_y, corners, -of_source) | ~is_image
        if number not in changed["category"]:
            assert not certainly_in.any()
            continue
        x, y, w, h = changed["bbox"][changed["category"].index(number)]
        now_in = inside(is_x, is_y, (x, y, x + w, y + h), -0.01)
        assert now_in[certainly_in].all()
        assert not now_in[certainly_out].any()


@every_augmentation
@few
@given(sample=annotated_images(), seed=seeds)
def test_boxes_stay_inside_and_what_belongs_to_them_follows(augmentation, sample, seed):
    image, objects = sample
    pixels, changed = augment(augmentation.transforms(), image, objects, seed)
    assert (pixels.dtype, type(pixels), len(pixels)) == (torch.uint8, Tensor, 3)
    height, width = pixels.shape[1:]
    assert changed["category"] == sorted(set(changed["category"]) & set(objects["category"]))  # some of them, in order
    assert changed["iscrowd"] == [objects["iscrowd"][number] for number in changed["category"]]
    for (x, y, w, h), area in zip(changed["bbox"], changed["area"], strict=True):
        assert 0 <= x < x + w <= width + 1e-9  # x + w was computed as a difference
        assert 0 <= y < y + h <= height + 1e-9
        assert min(w, h) >= 0.01
        assert area == pytest.approx(w * h, rel=1e-9)  # each area is that of its box, before and after


def test_a_resize_multiplies_areas_and_a_flip_keeps_them():
    objects = {"bbox": [[10, 5, 40, 20], [0, 0, 90, 60]], "area": [300.0, 1000.0]}

    def areas(**settings):
        _, changed = augment(Augmentation(**settings).transforms(), coordinates(60, 90), objects, (0,))
        return changed["area"]

    assert areas(short_sides=(60,), crop=0.0, horizontal_flip=1.0) == objects["area"]
    # float32: torchvision rounds the ratios of a resize
    assert areas(short_sides=(120,), **UNCHANGED) == pytest.approx([1200, 4000], rel=1e-6)


@pytest.fixture
def square_crop():
    """A chain that cuts 45 x 45 out of an image of 60 x 90 and does nothing else, and where it does so with the seed (1,)."""
    transforms = Augmentation(
        horizontal_flip=0.0, crop=1.0, crop_short_sides=(60,), crop_sizes=(45, 45), short_sides=(45,)
    ).transforms()
    pixels, _ = augment(transforms, coordinates(60, 90), {"bbox": [], "area": []}, (1,))
    left, top = int(pixels[0, 0, 0]) // 2, int(pixels[1, 0, 0]) // 2
    assert torch.equal(pixels, coordinates(60, 90)[:, top : top + 45, left : left + 45])
    return transforms, left, top


def test_a_cut_box_keeps_its_share_of_the_area(square_crop):
    transforms, left, top = square_crop
    bbox = [[left - 5, top + 30, 20, 20], [left + 10, top + 10, 10, 10], [0, 0, 90, 60]]
    objects = {"bbox": bbox, "area": [300.0, 70.0, 1000.0]}
    _, changed = augment(transforms, coordinates(60, 90), objects, (1,))
    assert changed["bbox"] == [[0, 30, 15, 15], [10, 10, 10, 10], [0, 0, 45, 45]]
    height = min(20, 60 - top - 30)  # of what the image has of the first
    assert changed["area"] == pytest.approx([300 * (15 * 15) / (20 * height), 70, 1000 * (45 * 45) / (90 * 60)])


def test_a_box_that_a_crop_only_touches_is_dropped_and_one_that_reaches_in_is_kept(square_crop):
    transforms, left, top = square_crop
    bbox = [
        [left - 5, top + 2, 5, 9],
        [left - 5, top + 2, 5.5, 9],
        [left + 45, top + 2, 5, 9],
        [left + 44.5, top + 2, 5, 9],
        [left + 7, top - 9, 6, 9],
        [left + 7, top - 9, 6, 9.5],
    ]
    objects = {"bbox": bbox, "area": [1.0] * 6, "iscrowd": [1, 1, 0, 0, 0, 1], "category": [4, 5, 6, 7, 8, 9]}
    _, changed = augment(transforms, coordinates(60, 90), objects, (1,))
    assert changed["category"] == [5, 7, 9]
    assert changed["iscrowd"] == [1, 0, 1]
    assert changed["bbox"] == [[0, 2, 0.5, 9], [44.5, 2, 0.5, 9], [7, 0, 6, 0.5]]


def sides_of(augmentation: Augmentation, image: Tensor, number: int = 60) -> list[tuple[int, int]]:
    transforms, objects = augmentation.transforms(), {"bbox": [], "area": []}
    return [tuple(augment(transforms, image, objects, (seed,))[0].shape[1:]) for seed in range(number)]


def test_sizes_are_those_of_the_release():
    image = coordinates(48, 64).repeat(1, 10, 10)  # 480 x 640
    release = Augmentation()
    assert release.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    resized = sides_of(Augmentation(crop=0.0), image)
    assert {height for height, _ in resized} == set(release.short_sides)
    assert all(width == int(height * 640 / 480) for height, width in resized)
    ratios = [width / height for height, width in sides_of(release, image)]
    num_cropped = sum(abs(ratio - 640 / 480) > 0.01 for ratio in ratios)
    assert 18 <= num_cropped <= 42  # half of 60, by three deviations
    wide = coordinates(40, 120).repeat(1, 10, 10)  # 400 x 1200
    assert max(width for _, width in sides_of(Augmentation(crop=0.0), wide)) == 1333


def test_a_crop_has_the_sizes_that_are_asked_for_but_never_more_than_the_image():
    augmentation = Augmentation(crop=1.0, crop_short_sides=(50,), crop_sizes=(30, 80), short_sides=(50,))
    heights, widths = set(), set()
    for seed in range(150):
        pixels, _ = augment(augmentation.transforms(), coordinates(50, 120), {"bbox": [], "area": []}, (seed,))
        # What was not resized before the crop, and of which the outermost pixels keep their values when it is resized.
        widths.add((int(pixels[0].max()) - int(pixels[0].min())) // 2 + 1)
        heights.add((int(pixels[1].max()) - int(pixels[1].min())) // 2 + 1)
    assert (min(heights), max(heights)) == (30, 50)
    assert (min(widths), max(widths)) == (30, 80)
    small = Augmentation(crop=1.0, crop_short_sides=(20,), crop_sizes=(30, 80), short_sides=(20,), horizontal_flip=0.0)
    pixels, _ = augment(small.transforms(), coordinates(20, 25), {"bbox": [], "area": []}, (0,))
    assert torch.equal(pixels, coordinates(20, 25))  # both sides are below the lowest size


def test_half_of_the_images_are_flipped_and_pixels_with_them():
    image = coordinates(20, 30)
    same = Augmentation(short_sides=(20,), crop=0.0).transforms()
    flipped = 0
    for seed in range(60):
        pixels, changed = augment(same, image, {"bbox": [[2, 3, 4, 5]], "area": [20]}, (seed,))
        if changed["bbox"] == [[24, 3, 4, 5]]:
            assert torch.equal(pixels, image.flip(2))
            flipped += 1
        else:
            assert changed["bbox"] == [[2, 3, 4, 5]]
            assert torch.equal(pixels, image)
    assert 18 <= flipped <= 42  # half of 60, by three deviations


def test_scale_jitter_gives_one_size_and_scales_from_its_range_around_it():
    augmentation = Augmentation(scale_jitter=(0.1, 2.0), jitter_size=64, horizontal_flip=0.0)
    scales, image = [], coordinates(50, 100)
    for seed in range(80):
        objects = {"bbox": [[0, 0, 100, 50]], "area": [5000]}
        pixels, changed = augment(augmentation.transforms(), image, objects, (seed,))
        assert pixels.shape == (3, 64, 64)
        is_image = pixels[2] == 255
        w, h = changed["bbox"][0][2:]
        assert is_image.sum() == pytest.approx(w * h)  # the box of the whole image is where the image is
        padding = pixels[:, ~is_image]
        assert (padding == torch.tensor([[124], [116], [104]])).all()  # 0 after ImageNet's normalisation
        if round(w) < 64:
            scales.append(round(w) / 64)
    assert 6 / 64 <= min(scales) < 0.25  # 6.4 is rounded down
    assert 30 < len(scales) < 60  # the others were larger than the square


def test_colours_are_distorted_on_request_and_boxes_are_not():
    image = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8)
    objects = {"bbox": [[2.0, 3.0, 4.0, 5.0]], "area": [20.0]}
    same = {"short_sides": (30,), **UNCHANGED}
    transforms = Augmentation(photometric=1.0, **same).transforms()
    results = [augment(transforms, image, objects, (seed,)) for seed in range(20)]
    assert all(pixels.shape == image.shape and changed == objects for pixels, changed in results)
    assert (
        sum(torch.equal(pixels, image) for pixels, _ in results) < 4
    )  # each of five may be left out, with 1 / 32 all are
    assert torch.equal(augment(Augmentation(**same).transforms(), image, objects, (0,))[0], image)


@every_augmentation
@few
@given(sample=annotated_images(), seed=seeds, other=st.integers(0, 2**30))
def test_the_same_seed_gives_the_same_sample_whatever_else_is_drawn(augmentation, sample, seed, other):
    transforms = augmentation.transforms()
    torch.manual_seed(0)
    pixels, objects = augment(transforms, *sample, seed)
    torch.manual_seed(other)
    state = torch.get_rng_state()
    again, objects_again = augment(augmentation.transforms(), *sample, seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again, pixels)
    assert objects_again == objects


def test_no_other_generator_is_touched_or_read():
    image, transforms = coordinates(50, 70), Augmentation(**SMALL, photometric=1.0).transforms()
    results = []
    for start in (1, 2):
        random.seed(start)
        np.random.seed(start)
        before = random.getstate(), np.random.get_state()[1].tolist()
        results.append(augment(transforms, image, {"bbox": [], "area": []}, (7,))[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert torch.equal(*results)


@pytest.mark.parametrize("position", range(3))
def test_each_part_of_the_seed_counts(position):
    image, transforms = coordinates(50, 70), AUGMENTATIONS["release"].transforms()
    found = set()
    for value in range(12):
        seed = [3, 1, 2]
        seed[position] = value
        found.add(augment(transforms, image, {"bbox": [], "area": []}, tuple(seed))[0].numpy().tobytes())
    assert len(found) > 6  # two flips and three sizes, with or without one of many crops


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (1, 2)])
@every_augmentation
def test_a_side_that_would_vanish_keeps_one_pixel(augmentation, shape):
    image, objects = torch.zeros(3, *shape, dtype=torch.uint8), {"bbox": [[0, 0, shape[1], shape[0]]], "area": [300]}
    for seed in range(8):
        pixels, _ = augment(augmentation.transforms(), image, objects, (seed,))
        assert min(pixels.shape) >= 1


def test_settings_survive_json_and_compare():
    for augmentation in AUGMENTATIONS.values():
        assert Augmentation(**json.loads(json.dumps(dataclasses.asdict(augmentation)))) == augmentation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizontal_flip": 1.5}, r"horizontal_flip=1.5 must be a probability, a number in \[0, 1\]"),
        ({"crop": -0.1}, "crop=-0.1 must be a probability"),
        ({"photometric": "yes"}, "photometric='yes' must be a probability"),
        ({"horizontal_flip": float("nan")}, "horizontal_flip=nan must be a probability"),
        ({"short_sides": ()}, r"short_sides=\(\) must be a tuple of numbers of pixels"),
        ({"short_sides": 800}, "short_sides=800 must be a tuple of numbers of pixels"),
        ({"crop_short_sides": (400, 0)}, r"crop_short_sides=\(400, 0\) must be .* at least 1"),
        ({"crop_short_sides": (400.5,)}, r"crop_short_sides=\(400.5,\) must be .* an int"),
        ({"longest_side": None}, "longest_side=None must be a number of pixels"),
        ({"jitter_size": 0}, "jitter_size=0 must be a number of pixels, an int of at least 1"),
        ({"longest_side": 700}, "longest_side=700 is below the largest of short_sides=.*leave out the larger"),
        ({"crop_sizes": (600, 384)}, r"crop_sizes=\(600, 384\) must be the lowest and the highest .* in this order"),
        ({"crop_sizes": (384,)}, r"crop_sizes=\(384,\) must be the lowest and the highest"),
        ({"scale_jitter": (0, 2.0)}, r"scale_jitter=\(0, 2.0\) must be .* above 0"),
        ({"scale_jitter": (2.0, 0.1)}, r"scale_jitter=\(2.0, 0.1\) must be the lowest and the highest scale"),
        ({"scale_jitter": (1.0, math.inf)}, r"scale_jitter=\(1.0, inf\) must be .* finite and above 0"),
        ({"scale_jitter": (math.nan, 2.0)}, r"scale_jitter=\(nan, 2.0\) must be .* finite and above 0"),
        ({"scale_jitter": True}, "scale_jitter=True must be the lowest and the highest scale"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


def test_sizes_follow_the_image_processor():
    assert Augmentation().resized(800, 1333) == Augmentation()
    small = Augmentation(photometric=0.5).resized(96, 120)
    assert small.short_sides[0] == 58
    assert small.short_sides[-1] == 96
    assert (small.longest_side, small.crop_short_sides, small.crop_sizes) == (120, (48, 60, 72), (46, 72))
    assert (small.jitter_size, small.photometric) == (123, 0.5)
    assert Augmentation().resized(4, 5).short_sides == (2, 3, 4)
