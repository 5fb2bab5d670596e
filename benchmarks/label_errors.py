"""Plant errors in the labels of drawn scenes, and count how many a detector finds among its first suspects.

    python benchmarks/label_errors.py MODEL [--num-images 1500] [--seed 21]

The detector must be trained on other scenes. 5 % of the boxes are broken, a quarter of them in each way: removed, of another class,
shifted and scaled, or added where no object is.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask

from dino_hf.common.scenes import CATEGORIES, make_scenes
from dino_hf.data.load import load_coco
from dino_hf.evaluation.label_errors import KINDS, LabelError, find_label_errors
from dino_hf.inference import Predictor

SHARE = 0.05
DEPTHS = (25, 50, 100)


def plant_errors(content: dict, share: float, seed: int) -> list[dict]:
    """Break a share of the boxes of COCO annotations in place.

    Returns:
        errors: kind as in `KINDS`, image_id, annotation id (None for a removed box), and the box of the object, x, y, width,
        height (None for an added box).
    """
    rng = np.random.default_rng(seed)
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    usable = [index for index, entry in enumerate(content["annotations"]) if not entry["iscrowd"]]
    each = max(1, round(share * len(usable) / len(KINDS)))
    missing, wrong, poor, near = rng.permutation(usable)[: len(KINDS) * each].reshape(len(KINDS), each).tolist()
    annotations, errors = content["annotations"], []

    def note(kind: str, image_id: int, annotation: int | None, box: Sequence[float] | None) -> None:
        errors.append({"kind": kind, "image_id": image_id, "annotation": annotation, "box": box})

    for index in missing:
        note("missing", annotations[index]["image_id"], None, annotations[index]["bbox"])
    for index in wrong:
        entry = annotations[index]
        entry["category_id"] = int(rng.choice([one for one in CATEGORIES if one != entry["category_id"]]))
        note("wrong class", entry["image_id"], entry["id"], entry["bbox"])
    for index in poor:
        entry = annotations[index]
        note("poor box", entry["image_id"], entry["id"], entry["bbox"])
        entry["bbox"] = _moved(rng, entry["bbox"], sizes[entry["image_id"]])
    added = []
    for index in near:  # in the image of another box
        image_id = annotations[index]["image_id"]
        others = [one["bbox"] for one in annotations if one["image_id"] == image_id]
        entry = {
            "id": 10**6 + index,
            "image_id": image_id,
            "iscrowd": 0,
            "category_id": int(rng.choice(list(CATEGORIES))),
        }
        added.append(entry | {"bbox": _free_box(rng, others, sizes[image_id])})
        note("spurious", image_id, added[-1]["id"], None)
    content["annotations"] = [one for index, one in enumerate(annotations) if index not in set(missing)] + added
    for entry in content["annotations"]:
        entry["area"] = entry["bbox"][2] * entry["bbox"][3]
    return errors


def _moved(rng: np.random.Generator, box: Sequence[float], size: tuple[int, int]) -> list[float]:
    """A box shifted and scaled so that its IoU with the old box is 0.2 to 0.6."""
    x, y, width, height = box
    while True:
        scale = np.exp(rng.uniform(-0.5, 0.5, 2))
        shift = rng.uniform(-0.6, 0.6, 2) * (width, height)
        corners = np.array([x, y]) + shift, np.array([x, y]) + shift + scale * (width, height)
        low, high = (np.clip(corner, 0, size) for corner in corners)
        moved = [*low.tolist(), *(high - low).tolist()]
        if min(moved[2:]) > 4 and 0.2 <= mask.iou(np.array([moved]), np.array([box], dtype=float), [0])[0, 0] <= 0.6:
            return moved


def _free_box(rng: np.random.Generator, others: list, size: tuple[int, int]) -> list[float]:
    """A box of 14 to 50 pixels that covers other boxes as little as possible."""
    sides = rng.uniform(14, 50, (40, 2))
    corners = rng.uniform(0, 1, (40, 2)) * (np.array(size) - sides)
    boxes = np.concatenate([corners, sides], axis=1)
    worst = np.asarray(mask.iou(boxes, np.array(others, dtype=float), [0] * len(others))).max(1, initial=0)
    return boxes[worst.argmin()].tolist()


def found_error(suspect: LabelError, errors: list[dict]) -> int | None:
    """The place of the planted error that a suspect points at: by its annotation, or by the object that has none."""
    for place, error in enumerate(errors):
        if error["image_id"] != suspect.image_id:
            continue
        if suspect.annotation is not None and suspect.annotation == error["annotation"]:
            return place
        if suspect.kind == "missing" and error["kind"] in ("missing", "poor box"):
            x0, y0, x1, y1 = suspect.model_box
            box = np.array([[x0, y0, x1 - x0, y1 - y0]])
            if mask.iou(box, np.array([error["box"]], dtype=float), [0])[0, 0] >= 0.5:
                return place
    return None


def precision_table(suspects: Sequence[LabelError], errors: list[dict]) -> str:
    """Markdown table of the shares of planted errors among the first suspects, for all kinds together and for each kind."""
    places = [found_error(suspect, errors) for suspect in suspects]
    lines = [
        f"| | planted | {' | '.join(f'first {depth}' for depth in DEPTHS)} | as many as planted | planted ones found there |",
        f"| --- | --- | {'--- | ' * len(DEPTHS)}--- | --- |",
    ]
    for kind in (None, *KINDS):
        own = [place for place, one in zip(places, suspects, strict=True) if kind in (None, one.kind)]
        planted = {place for place, error in enumerate(errors) if kind in (None, error["kind"])}
        shares = [f"{np.mean([place is not None for place in own[:depth]]):.2f}" for depth in (*DEPTHS, len(planted))]
        recall = len(planted & set(places[: len(errors)])) / len(planted)
        lines.append(f"| {kind or 'all'} | {len(planted)} | {' | '.join(shares)} | {recall:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a detector of the drawn scenes")
    parser.add_argument("--num-images", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=21, help="of the scenes and of the planted errors")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = make_scenes(Path(folder) / "scenes", arguments.num_images, arguments.seed)
        content = json.loads(path.read_text())
        errors = plant_errors(content, SHARE, arguments.seed)
        path.write_text(json.dumps(content))
        data = load_coco(path, path.parent)
        order = sorted(range(len(content["annotations"])), key=lambda place: content["annotations"][place]["image_id"])
        annotations = [content["annotations"][place]["id"] for place in order]
        suspects, _ = find_label_errors(Predictor(arguments.model, device="cpu"), data, annotations=annotations)
    print(f"{len(suspects)} suspects, {len(errors)} planted errors of {len(content['annotations'])} boxes\n")
    print(precision_table(suspects, errors))


if __name__ == "__main__":
    main()
