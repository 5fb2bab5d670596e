"""Copies of images, found by content and by look."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image

from dino_hf.common.scenes import draw_scene
from dino_hf.data import image_digests as digests_module
from dino_hf.data import load_data
from dino_hf.data import splits as splits_module
from dino_hf.data.image_digests import FINGERPRINT_SIZE, are_alike, image_digests, image_fingerprints, pack, unpack
from dino_hf.data.image_facts import COARSE_DISTANCE, COARSE_SIDE, MIN_CONTRAST
from dino_hf.data.rows import CocoData


def write_data(folder, pictures):
    """`pictures`: file name -> Pillow image."""
    images, annotations = [], []
    for number, (name, picture) in enumerate(pictures.items()):
        picture.save(folder / name)
        images.append({"id": number, "file_name": name, "width": picture.width, "height": picture.height})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [5, 6, 30, 20], "area": 600})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "fox"}]}
    (folder / "train.json").write_text(json.dumps(content))
    return folder


def picture(seed, size=(90, 60)):
    """Smooth, so that compression changes little."""
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def held_out_names(data):
    return [set(part.dataset["file_name"]) for part in (data.train, data.validation)]


@pytest.mark.parametrize("copy", ["exact", "compressed", "scaled"])
def test_copies_stay_on_one_side(tmp_path, copy):
    pictures = {}
    for seed in range(14):
        pictures[f"{seed}.png"] = picture(seed)
        suffix = "jpg" if copy == "compressed" else "png"
        pictures[f"{seed}-again.{suffix}"] = picture(seed, (135, 90) if copy == "scaled" else (90, 60))
    data = load_data(write_data(tmp_path, pictures), validation_fraction=0.3)
    trained, held_out = ({name.split(".")[0].split("-")[0] for name in names} for names in held_out_names(data))
    assert held_out
    assert not trained & held_out
    assert "14 of 28 images are copies of others and stay on their side of the split." in data.notes


def test_copies_of_copies_are_one_group(tmp_path):
    names = {f"{seed}.png": picture(seed % 3) for seed in range(12)}
    data = load_data(write_data(tmp_path, names), validation_fraction=0.3)
    trained, held_out = ({int(name.split(".")[0]) % 3 for name in names} for names in held_out_names(data))
    assert trained | held_out == {0, 1, 2}
    assert not trained & held_out


@pytest.mark.parametrize(("num_others", "is_camera"), [(11, False), (10, True)])
def test_frames_of_a_fixed_camera_are_split_by_exact_copies_alone(tmp_path, num_others, is_camera):
    """Near copies are kept together up to half of the images: 11 of 22, and 11 of 21 are more."""
    base = np.asarray(picture(0)).copy()
    pictures = {}
    for number in range(10):
        frame = base.copy()
        frame[0, number] ^= 3
        pictures[f"{number}.png"] = Image.fromarray(frame)
    pictures["copy.png"] = pictures["3.png"]
    pictures |= {f"other{seed}.png": picture(seed) for seed in range(1, 1 + num_others)}
    data = load_data(write_data(tmp_path, pictures))
    note = "11 of 21 images look the same, as with a fixed camera, so near copies may be on both sides of the split."
    assert (note in data.notes) == is_camera
    trained, held_out = held_out_names(data)
    assert trained
    assert len({"3.png", "copy.png"} & held_out) in (0, 2)
    if not is_camera:
        assert len({name for name in held_out if not name.startswith("other")}) in (0, 11)


def test_images_that_are_all_one_are_split_all_the_same(tmp_path):
    data = load_data(write_data(tmp_path, {f"{number}.png": picture(0) for number in range(10)}))
    assert "All images are copies of one image, so copies may be on both sides of the split." in data.notes
    assert all(held_out_names(data))


@pytest.mark.parametrize(("most", "is_decoded"), [(8, True), (7, False)])
def test_of_many_images_only_exact_copies_are_looked_for(tmp_path, monkeypatch, most, is_decoded):
    monkeypatch.setattr(splits_module, "MOST_DECODED", most)
    data = load_data(write_data(tmp_path, {f"{seed}.png": picture(seed) for seed in range(8)}))
    assert any("near copies are not searched for" in note for note in data.notes) != is_decoded


def test_digests_are_of_content_and_both_ends(tmp_path):
    rng = np.random.default_rng(0)
    large = Image.fromarray(rng.integers(0, 255, (120, 130, 3), dtype=np.uint8))  # 46 kB
    data = load_data(write_data(tmp_path, {"a.bmp": large, "b.bmp": large, "c.bmp": large}), validation_fraction=0)
    content = bytearray((tmp_path / "b.bmp").read_bytes())
    content[-1] ^= 1
    (tmp_path / "b.bmp").write_bytes(content)
    first, second, third = image_digests(data.train)
    assert first == third != second
    assert len(first) == 5
    (tmp_path / "c.bmp").unlink()
    assert image_digests(data.train)[2] is None


def test_packed_digests_come_back():
    digests = [bytes([number] * 5) for number in (3, 1, 2)]
    assert unpack(pack([*digests, None, digests[0]])) == set(digests)
    for text in (None, 7, "not base64!", "", ["a"], "AAAA"):
        assert unpack(text) == set()


@pytest.mark.parametrize("is_stored", [True, False])
def test_16_kib_at_each_end_are_read_and_a_digest_has_5_bytes(is_stored, tmp_path):
    def digest(content: bytearray) -> bytes:
        path = tmp_path / "file"
        path.write_bytes(content)
        return digests_module._digest({"bytes": bytes(content)} if is_stored else {"bytes": None, "path": str(path)})

    content = bytearray(60_000)
    usual = digest(content)
    assert len(usual) == 5
    for place, is_read in ((0, True), (16_383, True), (16_384, False), (43_615, False), (43_616, True), (59_999, True)):
        content[place] = 1
        assert (digest(content) != usual) == is_read, place
        content[place] = 0
    assert digest(content + b"\0") != usual


@pytest.mark.parametrize(("count", "is_noted"), [(5000, False), (5001, True)])
def test_near_copies_are_looked_for_in_up_to_5000_images(count, is_noted, monkeypatch):
    column = {"file_name": [f"{number}.png" for number in range(count)]}
    dataset = type("Rows", (), {"select_columns": lambda self, name: self, "__getitem__": lambda self, rows: column})()
    monkeypatch.setattr(splits_module, "image_digests", lambda data: [None] * count)
    monkeypatch.setattr(splits_module, "inspect_images", lambda splits, decode: {"": []})
    _, notes = splits_module.copy_groups(SimpleNamespace(images=[]), SimpleNamespace(dataset=dataset))
    assert any("near copies are not searched for" in note for note in notes) == is_noted


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
    looks = image_fingerprints(data_of(drawn))  # a few scenes are too even
    return [scene for scene, look in zip(drawn, looks, strict=True) if look is not None][:40]


def test_copies_are_recognised_and_other_pictures_are_not(scenes):
    trained, others = scenes[:20], scenes[20:]
    known = unpack(pack(image_fingerprints(data_of(trained))), FINGERPRINT_SIZE)
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
        assert are_alike(image_fingerprints(copies), known) == [True] * 20
    assert are_alike(image_fingerprints(data_of(others)), known) == [False] * 20
    mirrored = [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in trained]
    assert not any(are_alike(image_fingerprints(data_of(mirrored)), known))


def test_even_and_broken_pictures_have_no_look(scenes):
    data = data_of([Image.new("RGB", (90, 60), "white"), scenes[0]])
    rows = [*data.dataset["image"], {"bytes": b"no image", "path": None}]
    dataset = Dataset.from_dict({"image": rows}).cast_column("image", ImageColumn(decode=False))
    looks = image_fingerprints(data._replace(dataset=dataset))
    assert [look is None for look in looks] == [True, False, True]
    assert are_alike(looks, {looks[1]}) == [False, True, False]
    side = np.where(np.arange(32 * 32).reshape(32, 32) % 2, 0, 1)
    for contrast, has_look in ((MIN_CONTRAST - 0.5, False), (MIN_CONTRAST + 0.5, True)):
        thumbnail = 100 + 2 * contrast * side
        facts = digests_module.ImageFacts(size=(60, 90), thumbnail=thumbnail)
        assert (digests_module._fingerprint(facts) is not None) == has_look


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
