"""Draw a small data set in COCO format, and make the configuration of a small model for it.

The scenes have the difficulties of photographs: textured backgrounds, shapes of any colour and size that cover each other, category
ids with gaps, crowds, and images without objects.
"""

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..model.configuration_dino_detr import DinoDetrConfig
from ..model.image_processing_dino_detr import DinoDetrImageProcessor

# Name of the folder with a configuration without weights. `dino_hf.train` and its command accept it as the model.
UNTRAINED = "untrained"
CATEGORIES = {3: "disc", 7: "box", 12: "triangle", 21: "star", 40: "ring"}
_OVERSAMPLE = 2  # shapes are drawn larger and scaled down, for smooth edges
_MAX_OBJECTS = 4


def make_scenes(folder: Path, num_images: int, seed: int, shares: Sequence[float] | None = None) -> Path:
    """Draw images and write `annotations.json` beside them. The same arguments give the same files.

    Args:
        folder: new folder for the images and the annotations.
        shares: probability of each of the `CATEGORIES`, with the sum 1. None: all are equally frequent.
    Returns:
        path of the annotations.
    """
    folder.mkdir(parents=True)

    def draw(image_id: int) -> tuple[dict, list[dict]]:
        picture, objects = draw_scene(np.random.default_rng([seed, image_id]), shares)
        file_name = f"{image_id:06}.png"
        picture.save(folder / file_name, compress_level=1)
        return {"id": image_id, "file_name": file_name, "width": picture.width, "height": picture.height}, objects

    with ThreadPoolExecutor(2) as pool:  # noise and compression, which take most time, run in parallel
        drawn = list(pool.map(draw, range(1, num_images + 1)))
    images, annotations = [image for image, _ in drawn], []
    for image_id, (_, objects) in enumerate(drawn, start=1):
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **entry})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for category_id, name in CATEGORIES.items()],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def draw_scene(rng: np.random.Generator, shares: Sequence[float] | None = None) -> tuple[Image.Image, list[dict]]:
    """Draw a picture, 88 to 120 pixels wide and high, and return it with its annotations, which have no ids.

    One in ten pictures is empty. The others hold 1 to 4 objects of 14 to 64 pixels, which may cover each other. An object is
    annotated by its visible part, if at least half of it is visible. One in eight pictures has a crowd, annotated as one region.
    """
    width, height = rng.integers(88, 121, size=2).tolist()
    canvas = _background(rng, width, height)
    visible = np.zeros((height, width), dtype=np.int64)  # number of the visible object at each pixel
    drawn = []

    if rng.random() < 0.125:
        category_id = int(rng.choice(list(CATEGORIES), p=shares))
        mask = np.zeros((height, width), dtype=bool)
        cx, cy = rng.uniform(0.3, 0.7, size=2) * (width, height)
        for _ in range(rng.integers(9, 16)):
            x, y = rng.normal((cx, cy), 9)
            shape = _shape_mask(rng, category_id, x, y, rng.uniform(6, 9), width, height)
            canvas = _paint(rng, canvas, shape)
            mask |= shape > 0.5
        drawn.append((category_id, mask, 1))
        visible[mask] = len(drawn)

    num_objects = 0 if rng.random() < 0.1 and not drawn else int(rng.integers(1, _MAX_OBJECTS + 1))
    for _ in range(num_objects):
        category_id = int(rng.choice(list(CATEGORIES), p=shares))
        size = max(14, 64 * math.sqrt(rng.random()))
        x, y = rng.uniform(0.1, 0.9, size=2) * (width, height)
        shape = _shape_mask(rng, category_id, x, y, size, width, height)
        canvas = _paint(rng, canvas, shape)
        drawn.append((category_id, shape > 0.5, 0))
        visible[shape > 0.5] = len(drawn)

    objects = []
    for number, (category_id, mask, iscrowd) in enumerate(drawn, start=1):
        seen = visible == number
        if seen.sum() < max(20, mask.sum() / 2):
            continue
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        x, y = int(columns[0]), int(rows[0])
        box = [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
        objects.append({"category_id": category_id, "bbox": box, "area": int(seen.sum()), "iscrowd": iscrowd})
    return Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8)), objects


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A background, (h, w, 3) in [0, 1]: two colours, mixed by smooth noise or stripes, and grain."""
    y, x = np.mgrid[:height, :width]
    if rng.random() < 0.5:
        cells = rng.random((rng.integers(3, 9), rng.integers(3, 9))).astype(np.float32)
        mix = np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))
    else:
        angle, period = rng.uniform(0, math.pi), rng.uniform(6, 40)
        mix = 0.5 + 0.5 * np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period)
    first, second = rng.random((2, 3))
    second = first + (second - first) * rng.uniform(0.2, 0.7)
    canvas = first + (second - first) * mix[..., None]
    return canvas + rng.normal(0, rng.uniform(0.01, 0.04), canvas.shape)


def _paint(rng: np.random.Generator, canvas: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Cover the canvas where `shape` is 1, with a gradient of a random colour that differs from the covered part."""
    height, width = shape.shape
    covered = canvas[shape > 0.5].mean(0) if (shape > 0.5).any() else canvas.mean((0, 1))
    flat = rng.random(3)
    while np.abs(flat - covered).max() < 0.4:
        flat = rng.random(3)
    y, x = np.mgrid[:height, :width]
    slope = rng.normal(0, 0.004, size=2)
    shade = (x - width / 2) * slope[0] + (y - height / 2) * slope[1]
    colour = flat + shade[..., None] + rng.normal(0, 0.02, canvas.shape)
    return canvas + (colour - canvas) * shape[..., None]


def _shape_mask(
    rng: np.random.Generator, category_id: int, x: float, y: float, size: float, width: int, height: int
) -> np.ndarray:
    """(h, w) coverage in [0, 1] of one object of about `size` pixels, centred at (x, y)."""
    picture = Image.new("L", (width * _OVERSAMPLE, height * _OVERSAMPLE))
    draw = ImageDraw.Draw(picture)
    half = size / 2 * _OVERSAMPLE
    stretch = rng.uniform(0.8, 1.25)
    half_width, half_height = half * math.sqrt(stretch), half / math.sqrt(stretch)
    cx, cy = x * _OVERSAMPLE, y * _OVERSAMPLE
    turn = -math.pi / 2 + rng.normal(0, 0.3)  # objects have an upper side, and are rarely exactly upright

    def polygon(angles: list[float], radii: list[float]) -> list[tuple[float, float]]:
        return [
            (cx + r * half_width * math.cos(a + turn), cy + r * half_height * math.sin(a + turn))
            for a, r in zip(angles, radii, strict=True)
        ]

    name = CATEGORIES[category_id]
    frame = (cx - half_width, cy - half_height, cx + half_width, cy + half_height)
    if name == "disc":
        draw.ellipse(frame, fill=255)
    elif name == "ring":
        draw.ellipse(frame, outline=255, width=max(2, round(0.42 * min(half_width, half_height))))
    elif name == "box":
        draw.polygon(polygon([math.pi / 4 + k * math.pi / 2 for k in range(4)], [1.2] * 4), fill=255)
    elif name == "triangle":
        draw.polygon(polygon([k * 2 * math.pi / 3 for k in range(3)], [1.25] * 3), fill=255)
    else:
        draw.polygon(polygon([k * math.pi / 5 for k in range(10)], [1.25, 0.5] * 5), fill=255)
    small = picture.resize((width, height), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def small_config(**classes) -> DinoDetrConfig:
    """Configuration of a small DINO that two CPU cores train in minutes. It has all parts of the full model.

    The backbone is a BiT (arXiv:1912.11370), because it starts without pretrained weights: group norm and weight standardisation
    can be trained from scratch with four images per step. A ResNet has frozen batch norms, which need pretrained weights.

    Args:
        classes: fields of the configuration about classes, such as `id2label`.
    """
    return DinoDetrConfig(
        backbone_config={
            "model_type": "bit",
            "depths": [2, 2, 2, 1],
            "hidden_sizes": [128, 256, 384, 384],
            "embedding_size": 48,
            "num_groups": 16,
            "out_features": ["stage2", "stage3", "stage4"],
        },
        num_feature_levels=3,
        d_model=128,
        encoder_layers=1,
        decoder_layers=3,
        encoder_ffn_dim=384,
        decoder_ffn_dim=384,
        num_queries=50,
        num_denoising=50,
        box_noise_scale=0.4,
        cls_loss_coefficient=3.0,
        **classes,
    )


def draw_data(folder: Path, num_train: int, num_validation: int, seed: int = 0) -> None:
    """Write `train` and `validation` in COCO format, and `untrained`: configuration and image processor of a small model."""
    make_scenes(folder / "train", num_train, seed=seed)
    make_scenes(folder / "validation", num_validation, seed=seed + 1)
    ids = sorted(CATEGORIES)
    classes = {
        "id2label": {index: CATEGORIES[category_id] for index, category_id in enumerate(ids)},
        "category_ids": ids,
    }
    small_config(**classes).save_pretrained(folder / UNTRAINED)
    DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 120}).save_pretrained(folder / UNTRAINED)
