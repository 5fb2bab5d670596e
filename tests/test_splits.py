"""The held-out part: every class has its share, copies of one photo stay together, and a seed gives the same again."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_hf.data.splits import stratified_split


def many_images(num=600, seed=0):
    """Classes of each image: class k in about 1 of 2 ** (k + 1) images, some together, some in none."""
    rng = np.random.default_rng(seed)
    return [{label for label in range(6) if rng.random() < 0.5 ** (label + 1)} for _ in range(num)]


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_each_class_and_images_without_boxes_get_their_share(fraction):
    classes = many_images()
    kept, held_out = stratified_split(classes, fraction, seed=0)
    assert sorted(kept + held_out) == list(range(len(classes)))
    assert abs(len(held_out) - fraction * len(classes)) <= 0.01 * len(
        classes
    )  # classes come before the number of images
    total = Counter(label for image in classes for label in image or {"none"})
    found = Counter(label for index in held_out for label in classes[index] or {"none"})
    assert len(total) == 7
    for label, count in total.items():
        assert (
            abs(found[label] - fraction * count) <= 2
        )  # a random split has a standard deviation of 7 for the largest class


def test_a_seed_gives_the_same_split_and_another_gives_another():
    classes = many_images(100)
    first = stratified_split(classes, 0.2, seed=3)
    assert first == stratified_split(classes, 0.2, seed=3)
    assert first != stratified_split(classes, 0.2, seed=4)
    assert first == tuple(sorted(part) for part in first)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    classes=st.lists(st.sets(st.integers(0, 4), max_size=3), min_size=2, max_size=30),
    fraction=st.floats(0.01, 0.99),
    num_groups=st.integers(2, 30),
)
def test_any_images_fall_into_two_parts_and_groups_stay_whole(classes, fraction, num_groups):
    groups = [f"{index % num_groups}" for index in range(len(classes))]
    kept, held_out = stratified_split(classes, fraction, 0, groups)
    assert kept
    assert held_out
    assert sorted(kept + held_out) == list(range(len(classes)))
    assert not {groups[index] for index in kept} & {groups[index] for index in held_out}


def test_one_image_or_one_photo_cannot_be_split():
    with pytest.raises(ValueError, match="1 image cannot be split into training and validation data"):
        stratified_split([{1}], 0.2, seed=0)
    with pytest.raises(ValueError, match="3 images, all copies of one image, cannot be split"):
        stratified_split([{1}] * 3, 0.2, 0, ["a"] * 3)
