"""Each number by which the doctor of data decides has a case just inside of it and one just outside."""

import numpy as np
import pytest
from PIL import Image

from broken_data import as_raw, make_data
from data_layouts import annotations_of
from dino_hf.data.box_layouts import guess_reading
from dino_hf.data.image_facts import THUMBNAIL_SIDE, ImageFacts, inspect_images, near_copies
from dino_hf.data.raw import RawDataset, RawSplit, make_box_table
from dino_hf.doctor.boxes import ImageGeometry, clean_boxes
from dino_hf.doctor.checks import inspect
from dino_hf.doctor.cleaning import portable_name
from dino_hf.doctor.data_statistics import ASPECT_EDGES, COUNT_EDGES, RELATIVE_EDGES, describe
from dino_hf.doctor.image_checks import find_copies, fit_sizes

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


def split_of(boxes, size=(100, 60), name="train", category_ids=None, **fields) -> RawSplit:
    """Of one image."""
    annotations = [
        {"image_id": 0, "category_id": category_id, "bbox": list(box), **fields}
        for box, category_id in zip(boxes, category_ids or [1] * len(boxes), strict=True)
    ]
    return RawSplit(
        name,
        "here",
        [{"id": 0, "file_name": "a.png", "width": size[0], "height": size[1]}],
        annotations_of(annotations),
    )


def kinds_of(split: RawSplit) -> set[str]:
    report = inspect(RawDataset("coco", "here", {split.name: split}, CATEGORIES, []), check_images=False)
    return {finding.kind for finding in report.findings}


def reading_of(boxes, size=(100, 60), raw_format="coco"):
    return guess_reading([make_box_table(split_of(boxes, size), CATEGORIES)], raw_format)


# How boxes are read

FITTING = (10, 10, 30, 30)  # also as corners
CORNERS = (60, 20, 90, 50)  # leave 100 x 60 as a corner and a size


@pytest.mark.parametrize(("x", "is_as_read"), [(290.0, True), (290.01, False)])  # 600 wide: 2 % are 12
def test_boxes_may_leave_by_a_fiftieth_of_the_side(x, is_as_read):
    boxes = [(x, 20, 322, 60)] * 20  # as corners they fit
    assert reading_of(boxes, (600, 400)).is_as_read == is_as_read


@pytest.mark.parametrize(("x", "is_as_read"), [(22.0, True), (22.01, False)])  # 2 pixels of a side of 80
def test_boxes_may_leave_by_two_pixels(x, is_as_read):
    boxes = [(x, 20, 60, 50)] * 20
    assert reading_of(boxes, (80, 90)).is_as_read == is_as_read


@pytest.mark.parametrize(("num_boxes", "is_as_read"), [(200, False), (199, True), (400, False), (399, True)])
def test_of_200_boxes_one_may_not_fit_the_right_reading(num_boxes, is_as_read):
    num_wrong = num_boxes // 200 + (num_boxes % 200 > 0)
    wrong = [(300, 300, 400, 400)] * num_wrong
    assert reading_of(wrong + [CORNERS] * (num_boxes - num_wrong)).is_as_read == is_as_read


@pytest.mark.parametrize(("num_boxes", "is_relative"), [(200, True), (199, False)])
def test_of_200_relative_boxes_one_may_be_no_share_of_the_image(num_boxes, is_relative):
    boxes = [(30, 20, 10, 10)] + [(0.2, 0.3, 0.25, 0.5)] * (num_boxes - 1)
    assert reading_of(boxes).is_relative == is_relative


@pytest.mark.parametrize(("largest", "is_relative"), [(1.5, True), (1.51, False)])
def test_relative_boxes_reach_one_and_a_half(largest, is_relative):
    assert reading_of([(0.2, 0.3, largest, 0.5)] * 4).is_relative == is_relative


@pytest.mark.parametrize(("num_boxes", "is_sure"), [(10, True), (9, False)])
def test_ten_boxes_make_another_reading_sure(num_boxes, is_sure):
    for boxes in ([CORNERS] * num_boxes, [(0.6, 0.1, 0.3, 0.7), (0.1, 0.4, 0.4, 0.5)] * 5):
        reading = reading_of(boxes[:num_boxes])
        assert (reading.is_as_read, reading.is_sure) == (False, is_sure)


@pytest.mark.parametrize(("num_sizeless", "is_sure"), [(0, False), (1, True)])
def test_a_reading_is_sure_if_another_one_leaves_twice_as_many(num_sizeless, is_sure):
    """As centres, one box of 200 leaves; as corners that one does too, and those that have no size."""
    boxes = [(300, 300, 400, 400)] + [(50, 32, 40, 40)] * num_sizeless
    reading = reading_of(boxes + [(50, 32, 60, 40)] * (200 - len(boxes)))
    assert (reading.layout, reading.is_as_read, reading.is_sure) == ("cxcywh", False, is_sure)


@pytest.mark.parametrize(("area", "is_kept"), [(9.9e99, True), (1e100, False)])
def test_numbers_from_1e100_are_none(area, is_kept):
    table = make_box_table(split_of([FITTING], area=area), CATEGORIES)
    assert np.isfinite(table.area).all() == is_kept


# What is wrong with a box


@pytest.mark.parametrize(
    ("area", "is_wrong"),
    [(900.0, False), (910.0, False), (910.1, True), (0.0, True), (0.1, False)],  # 1.01 * 900 + 1
)
def test_an_area_is_wrong_above_101_hundredths_of_the_box_and_a_pixel(area, is_wrong):
    assert ("area-wrong" in kinds_of(split_of([(10, 10, 30, 30)], area=area))) == is_wrong
    size = np.array([[100.0, 60.0]])
    geometry = ImageGeometry(size, size, np.ones(1, dtype=int), np.ones((1, 2)))
    cleaned = clean_boxes(np.array([[10.0, 10, 30, 30]]), np.array([area]), geometry)
    assert (cleaned.kinds[0] == "area-wrong") == is_wrong
    assert cleaned.areas[0] == (900 if is_wrong else min(area, 900))


@pytest.mark.parametrize(("excess", "is_reported"), [(0.0, False), (0.0049, False), (0.0051, True)])
def test_rounded_coordinates_are_clipped_without_a_report(excess, is_reported):
    size = np.array([[100.0, 60.0]])
    geometry = ImageGeometry(size, size, np.ones(1, dtype=int), np.ones((1, 2)))
    cleaned = clean_boxes(np.array([[60.0, 10, 40 + excess, 30]]), np.array([np.nan]), geometry)
    assert cleaned.kinds.tolist() == ["box-sticks-out" if is_reported else ""]
    assert cleaned.boxes.tolist() == [[60, 10, 40, 30]]


@pytest.mark.parametrize(("area", "is_area"), [(-0.1, False), (0.0, True), (2.0**61, True), (2.0**62, False)])
def test_areas_are_from_0_to_the_square_of_the_largest_side(area, is_area):
    kinds = kinds_of(split_of([(10, 10, 30, 30)], area=area))
    assert kinds & {"area-wrong", "area-not-number"} == {"area-wrong" if is_area else "area-not-number"}
    size = np.array([[100.0, 60.0]])
    geometry = ImageGeometry(size, size, np.ones(1, dtype=int), np.ones((1, 2)))
    cleaned = clean_boxes(np.array([[10.0, 10, 30, 30]]), np.array([area]), geometry)
    assert cleaned.kinds.tolist() == ["area-wrong" if is_area else "area-not-number"]
    assert cleaned.areas.tolist() == [900]


@pytest.mark.parametrize(
    ("box", "kind", "is_found"),
    [
        ((0.5, 0, 99, 59.4), "box-whole-image", True),
        ((0.5, 0, 98.9, 59.4), "box-whole-image", False),
        ((0.5, 0, 99, 59.3), "box-whole-image", False),
        ((10, 10, 1, 5), "box-tiny", False),
        ((10, 10, 0.99, 5), "box-tiny", True),
        ((80, 10, 21, 5), "box-sticks-out", False),
        ((80, 10, 21.01, 5), "box-sticks-out", True),
        ((-1, 10, 21, 5), "box-sticks-out", False),
        ((-1.01, 10, 21, 5), "box-sticks-out", True),
        ((0, 10, 0.01, 5), "box-empty", False),
        ((0, 10, 0.0099, 5), "box-empty", True),
    ],
)
def test_borders_of_a_box(box, kind, is_found):
    assert (kind in kinds_of(split_of([box]))) == is_found


@pytest.mark.parametrize(("num_boxes", "is_found"), [(300, False), (301, True)])
def test_an_image_has_many_boxes_above_300(num_boxes, is_found):
    boxes = [(number % 90, number // 90, 5, 6) for number in range(num_boxes)]
    assert ("many-boxes" in kinds_of(split_of(boxes))) == is_found


@pytest.mark.parametrize(("num_common", "is_found"), [(200, False), (201, True)])
def test_a_class_is_rare_below_a_hundredth_of_the_commonest(num_common, is_found):
    boxes = [(number % 90, number // 90, 5, 6) for number in range(num_common + 2)]
    assert ("class-imbalance" in kinds_of(split_of(boxes, category_ids=[1] * num_common + [2] * 2))) == is_found


# Histograms


def histograms(boxes, size=(1000, 500), **fields) -> dict:
    split = split_of(boxes, size, **fields)
    raw = RawDataset("coco", "here", {"train": split}, CATEGORIES, [])
    table = make_box_table(split, CATEGORIES)
    return describe(raw, {"train": table}, {"train": table.boxes}, {"train": np.array([size], dtype=float)})


def test_sizes_are_those_of_coco():
    sides = [(32, 31.99), (32, 32), (96, 95.995), (96, 96)]
    found = histograms([(1, 2, *side) for side in sides])["sizes"]["train"]
    assert found == {"small": 1, "medium": 2, "large": 1}
    masks = histograms([(1, 2, 100, 100)] * 2, area=1023.0)["sizes"]["train"]
    assert masks == {"small": 2, "medium": 0, "large": 0}
    assert histograms([(1, 2, 10, 10)], area=5000.0)["sizes"]["train"] == {"small": 1, "medium": 0, "large": 0}


@pytest.mark.parametrize("place", range(1, 8))
def test_a_box_on_an_edge_of_its_relative_size_belongs_to_the_higher_bin(place):
    edge = (0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)[place]
    for side, bin_of in ((edge * 1.0001, place), (edge * 0.9999, place - 1)):
        counts = histograms([(0, 0, 1000 * side, 500 * side)])["relative_sizes"]["train"]
        assert counts.index(1) == bin_of
    assert len(RELATIVE_EDGES) - 1 == len(counts) == 8
    assert histograms([(0, 0, 1000, 500)])["relative_sizes"]["train"][-1] == 1


@pytest.mark.parametrize("place", range(1, 9))
def test_a_box_on_an_edge_of_its_aspect_ratio_belongs_to_the_higher_bin(place):
    edge = (0, 1 / 8, 1 / 4, 1 / 2, 4 / 5, 5 / 4, 2, 4, 8)[place]
    for width, bin_of in ((40 * edge, place), (39.99 * edge, place - 1)):
        counts = histograms([(0, 0, width, 40)])["aspect_ratios"]["train"]
        assert counts.index(1) == bin_of
    assert len(ASPECT_EDGES) - 1 == len(counts) == 9


@pytest.mark.parametrize("place", range(1, 10))
def test_an_image_is_counted_by_its_boxes(place):
    edge = (0, 1, 2, 3, 5, 10, 20, 50, 100, 300)[place]
    for count, bin_of in ((edge, place), (edge - 1, place - 1)):
        counts = histograms([FITTING] * count)["boxes_per_image"]["train"]
        assert counts.index(1) == bin_of
    assert len(COUNT_EDGES) - 1 == len(counts) == 10


# Copies of images


def checker(seed=0, contrast=60) -> np.ndarray:
    """(THUMBNAIL_SIDE, THUMBNAIL_SIDE) int, blocks that no two seeds share."""
    cells = np.random.default_rng(seed).integers(0, 2, (8, 8)) * contrast + 90
    return np.kron(cells, np.ones((4, 4), dtype=int))


def pairs_of(*thumbnails, sizes=None) -> list[list[int]]:
    facts = [
        ImageFacts(size=size, digest=bytes([number]), thumbnail=thumbnail.astype(np.uint8))
        for number, (thumbnail, size) in enumerate(zip(thumbnails, sizes or [(64, 48)] * len(thumbnails), strict=True))
    ]
    return [pair for pairs in near_copies(facts) for pair in pairs.tolist()]


@pytest.mark.parametrize(("difference", "is_copy"), [(24, True), (25, False)])
def test_copies_differ_by_24_grey_levels_in_one_place_at_most(difference, is_copy):
    first, second = checker(), checker()
    second[3, 5] += difference
    assert (pairs_of(first, second) == [[0, 1]]) == is_copy


@pytest.mark.parametrize(("num_changed", "is_copy"), [(256, True), (257, False)])  # of 1,024 places: mean 2.5, and more
def test_copies_differ_by_two_and_a_half_grey_levels_on_average_at_most(num_changed, is_copy):
    first, second = checker(contrast=20), checker(contrast=20)
    # Up and down side by side: the coarse thumbnails stay the same.
    places = np.arange(num_changed)
    second.reshape(-1)[places] += np.where(places % 2, 10, -10)
    assert (pairs_of(first, second) == [[0, 1]]) == is_copy


@pytest.mark.parametrize(("size", "is_copy"), [((102, 100), True), ((103, 100), False), ((100, 103), False)])
def test_copies_have_aspect_ratios_within_a_fiftieth(size, is_copy):
    second = checker()
    second[0, 0] += 1
    assert (pairs_of(checker(), second, sizes=[(100, 100), size]) == [[0, 1]]) == is_copy


@pytest.mark.parametrize(("num_columns", "is_compared"), [(0, True), (1, False)])  # standard deviations of 4.0 and 3.97
def test_images_need_a_contrast_of_four_grey_levels(num_columns, is_compared):
    first = np.full((32, 32), 112)
    first[:, :16] = 104
    first[:, :num_columns] += 1
    assert 3.96 < first.std() <= 4.0
    assert (pairs_of(first, first.copy()) == [[0, 1]]) == is_compared


@pytest.mark.parametrize(("levels", "is_copy"), [(47, True), (49, False)])  # of 16 places: 2.94 and 3.06
def test_candidates_differ_by_less_than_three_grey_levels_in_the_coarse_thumbnail(levels, is_copy):
    added = np.full(16, 3)
    added[0] += levels - 48
    second = checker() + np.tile(added.reshape(4, 4), (8, 8))
    assert (pairs_of(checker(), second) == [[0, 1]]) == is_copy


def sharpened(first: np.ndarray, change: int) -> np.ndarray:
    """Up and down in turn at all places, which leaves the coarse thumbnail as it is."""
    return first + np.where(np.arange(32) % 2, change, -change)


@pytest.mark.parametrize(("more", "is_copy"), [(0, True), (1, False)])
def test_a_sharpened_copy_differs_by_six_grey_levels_on_average_at_most(more, is_copy):
    first = checker(contrast=120)
    second = sharpened(first, 6)
    second[3, 5] += more  # a place that went up
    assert (pairs_of(first, second) == [[0, 1]]) == is_copy


@pytest.mark.parametrize(("peak", "is_copy"), [(42, True), (43, False)])  # of 3.04 on average: 13.8 and 14.1 times
def test_a_sharpened_copy_differs_in_one_place_by_14_times_the_mean_at_most(peak, is_copy):
    first = checker(contrast=120)
    second = sharpened(first, 3)
    second[3, 5] += peak - 3
    assert (pairs_of(first, second) == [[0, 1]]) == is_copy


@pytest.mark.parametrize("contrast", range(54, 62))
def test_a_sharpened_copy_has_a_correlation_of_0_985_at_least(contrast):
    first = checker(contrast=contrast)
    second = sharpened(first, 5)
    correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
    assert 0.982 < correlation < 0.988
    assert (pairs_of(first, second) == [[0, 1]]) == (correlation >= 0.985)


@pytest.mark.parametrize(("count", "are_compared"), [(64, True), (65, False)])
def test_an_image_is_compared_with_its_64_nearest_itself_included(count, are_compared):
    """Images in a row: those at the ends are the last neighbours of each other."""
    row = []
    for number in range(count):
        added = np.full(16, number // 16) + (np.arange(16) < number % 16)
        image = checker()
        image[:4, :] += np.tile(added.reshape(4, 4), (1, 8))
        row.append(image)
    assert ([0, count - 1] in pairs_of(*row)) == are_compared


def test_progress_is_told_after_each_64_images():
    images = [{"id": number, "file_name": f"{number}.png", "path": f"nowhere/{number}.png"} for number in range(65)]
    steps = []
    split = RawSplit("train", "here", images, annotations_of([]))
    inspect_images({"train": split}, decode=False, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(64, 65), (65, 65)]


def test_thumbnails_have_32_pixels_a_side():
    assert THUMBNAIL_SIDE == 32


@pytest.mark.parametrize(
    ("held_out", "other"),
    [("validation", "train"), ("test", "train"), ("test", "validation"), ("extra", "train"), ("validation", "extra")],
)
def test_of_two_splits_the_more_held_out_one_keeps_an_image(held_out, other):
    for names in ((held_out, other), (other, held_out)):
        splits = {name: split_of([FITTING], name=name) for name in names}
        facts = {name: [ImageFacts(digest=b"1")] for name in names}
        boxes = {held_out: np.array([1]), other: np.array([9])}
        (copy,) = find_copies(RawDataset("coco", "here", splits, CATEGORIES, []), facts, boxes)
        assert (copy.split, copy.original) == (other, (held_out, 0))


@pytest.mark.parametrize(("highest", "is_dark"), [(2**14 - 1, True), (2**14, False)])
def test_16_bits_are_dark_below_a_quarter_of_the_range(highest, is_dark, tmp_path):
    raw = as_raw(tmp_path, make_data(tmp_path))
    values = np.zeros((70, 104), dtype=np.uint16)
    values[3, 5] = highest
    Image.fromarray(values).save(tmp_path / "train" / "002.png")
    assert ("image-mode" in {finding.kind for finding in inspect(raw).findings}) == is_dark


# Sizes and names


@pytest.mark.parametrize(("side", "is_clear"), [(447.3, True), (447.1, False)])  # 2 boxes: (447.2 / 100)^2 = 20
def test_a_size_is_sure_if_it_is_20_times_as_likely(side, is_clear):
    facts = [ImageFacts(size=(1000, 447), stored_size=(1000, 447))]
    split = split_of([(1, 1, 5, 5), (3, 4, 5, 5)])
    stated = np.array([[1000.0 * 100 / side, 447.0]])
    table = make_box_table(split, CATEGORIES)
    assert (fit_sizes(facts, stated, table).kinds == ["image-resized"]) == is_clear


def test_names_of_the_copy_have_200_bytes_at_most():
    assert portable_name("x" * 200) == "x" * 200
    assert portable_name("ab" + "x" * 199) == "b" + "x" * 199


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_that_is_flipped_or_a_square_that_is_turned_is_unclear(orientation):
    for size, is_unclear in (((60, 60), orientation > 1), ((80, 60), 1 < orientation < 5)):
        facts = [ImageFacts(size=size, stored_size=size, orientation=orientation)]
        table = make_box_table(split_of([FITTING], size), CATEGORIES)
        kinds = fit_sizes(facts, np.array([size], dtype=float), table).kinds
        assert kinds == ["image-orientation-unclear" if is_unclear else None]
