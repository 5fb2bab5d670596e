"""Copies that were scaled, sharpened or compressed again, as photographs on the web are; and frames, which are none."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter

from dino_hf.data.image_facts import _inspect_file, near_copies


def photograph(seed: int) -> Image.Image:
    """Texture of all sizes, as in nature."""
    rng, size = np.random.default_rng(seed), (320, 480)
    layers = [gaussian_filter(rng.normal(size=(*size, 3)), (sigma, sigma, 0)) * sigma for sigma in (1, 3, 9, 27, 60)]
    values = sum(layer / layer.std() * weight for layer, weight in zip(layers, (4, 8, 16, 24, 24), strict=True))
    return Image.fromarray((128 + values).clip(0, 255).astype(np.uint8))


def are_alike(first: Image.Image, second: Image.Image) -> bool:
    facts = []
    for image in (first, second):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=88)
        facts.append(_inspect_file(file))
    return bool(sum(len(pairs) for pairs in near_copies(facts)))


COPIES = {
    "scaled and sharpened": lambda image: image.resize((165, 110)).filter(ImageFilter.UnsharpMask(2, 100)),
    "half the size, sharpened": lambda image: image.resize((240, 160)).filter(ImageFilter.SHARPEN),
    "sharpened": lambda image: image.filter(ImageFilter.UnsharpMask(3, 150)),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "grey": lambda image: image.convert("L"),
}


@pytest.mark.parametrize("change", COPIES)
@pytest.mark.parametrize("seed", range(3))
def test_a_changed_copy_is_found(change, seed):
    image = photograph(seed)
    assert are_alike(image, COPIES[change](image))


@pytest.mark.parametrize("seed", range(3))
def test_other_images_are_none(seed):
    image, other = photograph(seed), photograph(seed + 10)
    frames = [image.copy(), image.copy()]
    thing = Image.new("RGB", (48, 32), "red")
    for frame, place in zip(frames, [(100, 100), (130, 120)], strict=True):
        frame.paste(thing, place)
    assert not are_alike(*frames)
    assert not are_alike(image, other)
    assert not are_alike(image, image.crop((10, 0, 480, 320)))  # a camera that turns
