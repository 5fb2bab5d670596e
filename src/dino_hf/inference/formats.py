"""Write detections in the formats of YOLO and COCO."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..common.output_folders import replace_file
from .predictor import Detections


def yolo_lines(detections: Detections, size: tuple[int, int]) -> str:
    """A line "class x y width height score" for each detection. Centre and size are relative to the image.

    Args:
        size: (width, height) of the image in pixels.
    """
    lines = []
    for (x0, y0, x1, y1), score, label in detections.rows():
        box = ((x0 + x1) / 2 / size[0], (y0 + y1) / 2 / size[1], (x1 - x0) / size[0], (y1 - y0) / size[1])
        lines.append(f"{label} {' '.join(f'{value:.6f}' for value in box)} {score:.6f}\n")
    return "".join(lines)


def write_coco(path: Path, records: Iterator[dict], categories: Mapping[int, tuple[int, str]]) -> None:
    """Write a json of images, categories and annotations with scores. A half-written file is never left behind.

    Hours of video do not fit in memory as json, so records are written one by one. Annotations are first collected in a temporary
    file.

    Args:
        records: records of the journal, one for each image or frame.
        categories: class index -> original category id and name.
    """
    num_annotations = 0
    with (
        replace_file(path) as new,
        open(new, "w", encoding="utf-8") as file,
        tempfile.TemporaryFile("w+", encoding="utf-8", dir=path.parent) as annotations,
    ):
        file.write('{"images": [')
        for image_id, record in enumerate(records, start=1):
            image = {name: record[name] for name in ("width", "height", "frame", "time") if record[name] is not None}
            image = {"id": image_id, "file_name": record["file"], **image}
            file.write((", " if image_id > 1 else "") + json.dumps(image, ensure_ascii=False))
            for found in record["objects"]:
                num_annotations += 1
                x0, y0, x1, y1 = found["box"]
                entry = {
                    "id": num_annotations,
                    "image_id": image_id,
                    "category_id": found["category_id"],
                    "bbox": [x0, y0, round(x1 - x0, 3), round(y1 - y0, 3)],
                    "area": round((x1 - x0) * (y1 - y0), 3),
                    "iscrowd": 0,
                    "score": found["score"],
                }
                annotations.write((", " if num_annotations > 1 else "") + json.dumps(entry))
        listed = [{"id": category_id, "name": name} for category_id, name in categories.values()]
        file.write(f'], "categories": {json.dumps(listed, ensure_ascii=False)}, "annotations": [')
        annotations.seek(0)
        while piece := annotations.read(2**20):
            file.write(piece)
        file.write("]}\n")
