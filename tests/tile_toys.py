"""Large images of toy size, for tiles of 64 x 48 pixels."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dino_hf.training import CocoData, load_coco

TILES = (64, 48)  # width and height


def write_coco(folder: Path, images: list[tuple], name: str = "data.json") -> CocoData:
    """Write and load a data set.

    Args:
        images: id, file name, (width, height), boxes as (category id, x, y, width, height) or with a sixth number for crowds.
    """
    entries, annotations = [], []
    for image_id, file_name, size, boxes in images:
        entries.append({"id": image_id, "file_name": file_name, "width": size[0], "height": size[1]})
        for category_id, x, y, width, height, *crowd in boxes:
            box = {"bbox": [x, y, width, height], "area": width * height, "iscrowd": int(bool(crowd))}
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id} | box)
    categories = [{"id": 3, "name": "disc"}, {"id": 8, "name": "box"}]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / name).write_text(json.dumps(content))
    return load_coco(folder / name, folder)


def draw_large(folder: Path, num_images: int = 4, seed: int = 0, name: str = "data.json") -> CocoData:
    """Noise with bright rectangles of 8 to 20 pixels. Every fourth image is small, every fourth has no boxes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, images = np.random.default_rng(seed), []
    for number in range(num_images):
        size = (50, 40) if number % 4 == 2 else (int(rng.integers(100, 180)), int(rng.integers(60, 130)))
        pixels, boxes = rng.integers(0, 90, (size[1], size[0], 3), dtype=np.uint8), []
        for _ in range(0 if number % 4 == 3 else int(rng.integers(2, 6))):
            width, height = rng.integers(8, 20, 2).tolist()
            x, y = int(rng.integers(0, size[0] - width)), int(rng.integers(0, size[1] - height))
            pixels[y : y + height, x : x + width] = 250
            boxes.append((int(rng.choice([3, 8])), x, y, width, height))
        file_name = f"{name.removesuffix('.json')}_{number}.png"
        Image.fromarray(pixels).save(folder / file_name)
        images.append((100 + 7 * number, file_name, size, boxes))
    return write_coco(folder, images, name)
