"""Groups of copies of one picture."""

import numpy as np
from PIL import Image

from broken_data import make_picture
from dino_hf.data.image_copies import MOST_NEAR, group_copies
from dino_hf.data.raw import RawSplit


def split_of(folder, pictures: list[Image.Image], **save) -> RawSplit:
    images = []
    for number, picture in enumerate(pictures):
        path = folder / f"{number}.png"
        picture.save(path)
        images.append({"id": number, "file_name": path.name, "path": path})
    return RawSplit("train", folder, images, [])


def test_exact_scaled_and_compressed_copies_are_of_one_group(tmp_path):
    first, second, third = (make_picture(number, 120, 88) for number in range(3))
    pictures = [first, second, first, second.resize((180, 132)), third]
    split = split_of(tmp_path, pictures)
    first.save(tmp_path / "5.jpg", quality=50)
    split.images.append({"id": 5, "file_name": "5.jpg", "path": tmp_path / "5.jpg"})
    (tmp_path / "6.png").write_bytes(b"damaged")
    split.images.append({"id": 6, "file_name": "6.png", "path": tmp_path / "6.png"})
    groups = group_copies(split)
    assert groups[0] == groups[2] == groups[5]
    assert groups[1] == groups[3]
    assert len(set(groups.tolist())) == 4


def test_frames_of_a_fixed_camera_are_not_one_group(tmp_path):
    rng, scene = np.random.default_rng(0), np.asarray(make_picture(0, 120, 88))
    frames = [
        Image.fromarray(np.clip(scene + rng.integers(-2, 3, scene.shape), 0, 255).astype(np.uint8)) for _ in range(6)
    ]
    others = [make_picture(number, 120, 88) for number in range(1, 7)]
    groups = group_copies(split_of(tmp_path, frames + others))  # six of twelve
    assert MOST_NEAR == 0.5
    assert len(set(groups[:6].tolist())) == 1
    groups = group_copies(split_of(tmp_path, frames + others[:5]))  # more than half
    assert len(set(groups.tolist())) == 11


def test_no_images(tmp_path):
    assert group_copies(RawSplit("train", tmp_path, [], [])).tolist() == []
