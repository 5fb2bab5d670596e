"""Copies that were compressed again or scaled are known by how they look; different pictures are not."""

import io

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image

from dino_hf.common.scenes import draw_scene
from dino_hf.data import image_looks as looks_module
from dino_hf.data.image_digests import pack, unpack
from dino_hf.data.image_facts import COARSE_DISTANCE, COARSE_SIDE, MIN_CONTRAST
from dino_hf.data.image_looks import LOOK_SIZE, are_alike, image_looks
from dino_hf.data.rows import CocoData


def data_of(pictures, file_format="PNG", **options):
    rows = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, file_format, **options)
        rows.append({"bytes": file.getvalue(), "path": None})
    dataset = Dataset.from_dict({"image": rows}).cast_column("image", ImageColumn(decode=False))
    return CocoData(dataset, {0: "fox"}, [1], "pictures")


@pytest.fixture(scope="module")
def scenes():
    drawn = [draw_scene(np.random.default_rng([5, number]))[0] for number in range(60)]
    looks = image_looks(data_of(drawn))  # a few scenes are too even
    return [scene for scene, look in zip(drawn, looks, strict=True) if look is not None][:40]


def test_copies_are_recognised_and_other_pictures_are_not(scenes):
    trained, others = scenes[:20], scenes[20:]
    known = unpack(pack(image_looks(data_of(trained))), LOOK_SIZE)
    assert len(known) == 20
    halves = [picture.resize((picture.width // 2, picture.height // 2)) for picture in trained]
    for copies in (
        data_of(trained),
        data_of(trained, "JPEG", quality=75),
        data_of(trained, "JPEG", quality=30),
        data_of(trained, "WEBP", quality=50),
        data_of([picture.resize((2 * picture.width, 2 * picture.height)) for picture in trained]),
        data_of(halves),
    ):
        assert are_alike(image_looks(copies), known) == [True] * 20
    assert are_alike(image_looks(data_of(others)), known) == [False] * 20
    mirrored = [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in trained]
    assert not any(are_alike(image_looks(data_of(mirrored)), known))


def test_even_and_broken_pictures_have_no_look(scenes):
    data = data_of([Image.new("RGB", (90, 60), "white"), scenes[0]])
    rows = [*data.dataset["image"], {"bytes": b"no image", "path": None}]
    dataset = Dataset.from_dict({"image": rows}).cast_column("image", ImageColumn(decode=False))
    looks = image_looks(data._replace(dataset=dataset))
    assert [look is None for look in looks] == [True, False, True]
    assert are_alike(looks, {looks[1]}) == [False, True, False]
    side = np.where(np.arange(32 * 32).reshape(32, 32) % 2, 0, 1)
    for contrast, has_look in ((MIN_CONTRAST - 0.5, False), (MIN_CONTRAST + 0.5, True)):
        thumbnail = 100 + 2 * contrast * side
        facts = looks_module.ImageFacts(size=(60, 90), thumbnail=thumbnail)
        assert (looks_module._look(facts) is not None) == has_look


def look_of(cells, ratio=1.5):
    return np.asarray(cells, dtype=np.uint8).tobytes() + np.array(ratio, dtype="<f2").tobytes()


def test_borders_of_likeness():
    cells = np.arange(COARSE_SIDE**2) * 3
    known = {look_of(cells)}
    alternating = np.where(np.arange(COARSE_SIDE**2) % 2, 1, -1)
    one_cell = np.zeros(COARSE_SIDE**2, dtype=int)
    one_cell[9] = 1
    distance = int(COARSE_DISTANCE)
    for change, is_alike in (
        (distance * alternating, True),
        ((distance + 1) * alternating, False),
        (12 * one_cell, True),
        (13 * one_cell, False),
    ):
        assert are_alike([look_of(np.clip(cells + 20 + change, 0, 255))], {look_of(cells + 20)}) == [is_alike]
    for ratio, is_alike in ((1.5, True), (1.525, True), (1.535, False), (0.0, False), (np.nan, False), (np.inf, False)):
        assert are_alike([look_of(cells, ratio)], known) == [is_alike], ratio
    assert are_alike([None, look_of(cells)], known) == [False, True]
