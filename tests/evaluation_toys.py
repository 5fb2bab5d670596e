"""A detector that has its answers ready, and detections to give it: right ones, near ones and wrong ones."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dino_hf.common.scenes import make_scenes
from dino_hf.inference.predictor import Detections, Predictor
from dino_hf.training import CocoData, load_coco


class ReadyPredictor:
    """What `evaluate_model` needs of a `Predictor`; it knows images by their pixels.

    Args:
        answers: image -> (boxes (x0, y0, x1, y1), scores, class indices), as `answers_of` gives them.
    """

    def __init__(self, id2label: dict[int, str], answers: dict[bytes, tuple], category_ids=None, name="toy"):
        self.id2label, self.category_ids, self.name, self.answers = id2label, category_ids, name, answers

    def __call__(self, images, *, batch_size=8, threshold=0.0, max_detections=None):
        for image in images:
            yield Detections.sorted(*self.answers[image.tobytes()])


def noisy_answers(data: CocoData, seed: int = 0, noise: float = 2.0, num_false: int = 2, missed: float = 0.2) -> dict:
    """Boxes near the annotated ones, some in another class or twice, and boxes anywhere; right ones have higher scores."""
    rng, answers = np.random.default_rng(seed), {}
    num_classes = len(data.category_ids)
    for row in data.dataset:
        boxes, scores, labels = [], [], []
        objects = row["objects"]
        for (x, y, w, h), category in zip(objects["bbox"], objects["category"], strict=True):
            for _ in range(1 + (rng.random() < 0.15)):
                if rng.random() > missed:
                    boxes.append(np.array([x, y, x + w, y + h]) + rng.normal(0, noise, 4))
                    scores.append(rng.beta(5, 3))
                    labels.append(category if rng.random() < 0.85 else rng.integers(num_classes))
        for _ in range(num_false):
            x, y = rng.uniform(0, 0.7, 2) * row["image"].size
            boxes.append(np.array([x, y, x + rng.uniform(8, 40), y + rng.uniform(8, 40)]))
            scores.append(rng.beta(2, 6))
            labels.append(rng.integers(num_classes))
        boxes = np.array(boxes).reshape(-1, 4)
        boxes = np.concatenate([boxes[:, :2], np.maximum(boxes[:, 2:], boxes[:, :2] + 1)], axis=1)
        answers[row["image"].tobytes()] = boxes, np.float32(scores), np.array(labels, dtype=int)
    return answers


def draw_blocks(folder: Path, names: list[str], num_images: int, seed: int = 0, unused: int = 0) -> CocoData:
    """Plain images with coloured blocks of many classes; the last `unused` classes have no objects."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        width, height = rng.integers(110, 190, 2).tolist()
        pixels = rng.integers(180, 230, (height, width, 3)).astype(np.uint8)
        for _ in range(rng.integers(1, 7)):
            w, h = np.exp(rng.uniform(2.3, 4.7, 2)).astype(int).clip(10, 100).tolist()
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            category = int(rng.integers(len(names) - unused))
            pixels[y : y + h, x : x + w] = rng.integers(0, 200, 3)
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 10 + 2 * category}
            annotations.append(entry | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
        Image.fromarray(pixels).save(folder / f"{image_id:04}.png")
        images.append({"id": image_id, "file_name": f"{image_id:04}.png", "width": width, "height": height})
    categories = [{"id": 10 + 2 * index, "name": name} for index, name in enumerate(names)]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return load_coco(path, folder)


def hard_columns(seed: int, num_images: int = 7) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Truth and detections of one class, with what makes matching hard: equal scores, crowds, sizes on both sides of the borders,
    more than 100 detections in an image, images without objects."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for image_id in range(1, num_images + 1):
        for _ in range(rng.integers(0, 7)):
            x, y, w, h = *rng.uniform(0, 80, 2), *rng.choice([20, 32, 45, 96, 130], 2)
            truth.append((image_id, [x, y, w, h], w * h, rng.random() < 0.15))
        own = [entry[1] for entry in truth if entry[0] == image_id]
        for _ in range(rng.choice([0, 15, 130], p=[0.2, 0.6, 0.2])):
            x, y, w, h = own[rng.integers(len(own))] if own and rng.random() < 0.6 else [*rng.uniform(0, 80, 2), 30, 40]
            x, y = np.array([x, y]) + rng.choice([0, 1, 6]) * rng.normal(0, 1, 2)
            found.append((image_id, [x, y, x + w, y + h], rng.integers(1, 30) / 30))
    image_id, boxes, area, iscrowd = zip(*truth, strict=True)
    truth = {"image_id": np.array(image_id), "boxes": np.array(boxes), "area": np.array(area)}
    truth |= {"iscrowd": np.array(iscrowd).astype(int), "labels": np.ones(len(area), dtype=int)}
    image_id, boxes, scores = zip(*found, strict=True)
    found = {"image_id": np.array(image_id), "boxes": np.array(boxes), "scores": np.array(scores)}
    return truth, found | {"labels": np.ones(len(scores), dtype=int)}


def draw_crowded(folder: Path) -> Path:
    """Three images: 130 and 105 objects of two classes, a few objects, and none. Returns the annotation file."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    annotations = []
    for image_id, category, count in ((4, 7, 130), (4, 9, 105), (2, 7, 3), (2, 8, 1)):
        for _ in range(count):
            x, y = rng.uniform(0, (150, 90)).round(1).tolist()
            w, h = rng.choice([4.0, 9.0, 33.0], 2).tolist()
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category}
            annotations.append(entry | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": int(rng.random() < 0.05)})
    sizes = {4: (190, 130), 2: (185, 140), 5: (50, 70)}
    for image_id, size in sizes.items():
        Image.new("RGB", size, (image_id, 0, 0)).save(folder / f"{image_id}.png")
    images = [
        {"id": image_id, "file_name": f"{image_id}.png", "width": width, "height": height}
        for image_id, (width, height) in sizes.items()
    ]
    categories = [{"id": index, "name": name} for index, name in ((7, "cell"), (8, "fibre"), (9, "grain"))]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def annotate_with(model: Path, folder: Path, num_images: int = 7) -> Path:
    """Drawn scenes in `folder`/validation whose objects are the two best detections of a model in each image but the first."""
    path = make_scenes(folder / "validation", num_images, seed=7)
    content = json.loads(path.read_text())
    predictor, annotations = Predictor(model), []
    for entry in content["images"][1:]:
        with Image.open(path.parent / entry["file_name"]) as image:
            found = next(iter(predictor([image.convert("RGB")])))
        for box, _, label in found.rows()[:2]:
            x0, y0, x1, y1 = np.clip(box, 0, [entry["width"], entry["height"]] * 2).tolist()
            place = {"id": len(annotations) + 1, "image_id": entry["id"], "category_id": predictor.category_ids[label]}
            sizes = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
            annotations.append(place | sizes)
    path.write_text(json.dumps(content | {"annotations": annotations}))
    return folder
