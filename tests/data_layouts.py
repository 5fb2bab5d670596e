"""The same drawn scenes as data sets in the layouts that people have, and in six layouts of category ids.

    splits = draw_splits(tmp_path / "scenes", train=6, validation=4, test=3)
    source = write_layout("roboflow-yolo", splits, tmp_path / "data")    # what load_data gets

All layouts have the same images, boxes (whole pixels) and classes; areas are those of the boxes, and there are no crowds, which
YOLO cannot tell. The second image of each split has no boxes. Classes in the order of their names, so that formats without ids
number them as those with ids do.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value

from dino_hf.common.scenes import CATEGORIES, make_scenes
from dino_hf.data.raw import AnnotationBuilder, Annotations

NAMES = sorted(CATEGORIES.values())  # class index -> name


def annotations_of(entries: list[dict]) -> Annotations:
    """Annotations from COCO's entries, as a reader gives them. A field that is missing gets a value that means nothing."""
    annotations = AnnotationBuilder()
    for number, entry in enumerate(entries):
        box, others = entry.get("bbox", [0] * 4), (entry.get(name) for name in ("area", "iscrowd", "id"))
        annotations.add(entry.get("image_id", -1), entry["category_id"], box, number, 0, *others)
    return annotations.build()


class Scene(NamedTuple):
    path: Path
    width: int
    height: int
    objects: list[tuple[str, list[int]]]  # class name, (x, y, width, height) in pixels


Splits = dict[str, list[Scene]]  # "train", "validation", "test"


def draw_splits(folder: Path, seed: int = 0, **counts: int) -> Splits:
    """`counts` images for each split, with file names that differ between splits."""
    splits = {}
    for number, (split, count) in enumerate(counts.items()):
        content = json.loads(make_scenes(folder / split, count, seed=1000 * seed + number).read_text())
        objects = {image["id"]: [] for image in content["images"]}
        for entry in content["annotations"]:
            if not entry["iscrowd"]:
                objects[entry["image_id"]].append((CATEGORIES[entry["category_id"]], entry["bbox"]))
        splits[split] = []
        for index, image in enumerate(content["images"]):
            path = (folder / split / image["file_name"]).rename(folder / split / f"{split}_{image['file_name']}")
            boxes = [] if index == 1 else objects[image["id"]]
            splits[split].append(Scene(path, image["width"], image["height"], boxes))
    return splits


def coco_content(
    scenes: list[Scene],
    category_ids: list[int] | None = None,
    first_image_id: int = 1,
    supercategory: str = "shape",
) -> dict:
    """A COCO json of scenes; `category_ids` of NAMES, 1 to K if not given."""
    ids = dict(zip(NAMES, category_ids or range(1, len(NAMES) + 1), strict=True))
    images, annotations = [], []
    for image_id, scene in enumerate(scenes, start=first_image_id):
        images.append({"id": image_id, "file_name": scene.path.name, "width": scene.width, "height": scene.height})
        for name, bbox in scene.objects:
            fields = {"category_id": ids[name], "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **fields})
    categories = [{"id": ids[name], "name": name, "supercategory": supercategory} for name in NAMES]
    return {"images": images, "annotations": annotations, "categories": categories}


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _copy_images(scenes: list[Scene], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        shutil.copy(scene.path, folder / scene.path.name)


def write_coco(splits: Splits, folder: Path, category_ids: list[int] | None = None) -> Path:
    """As COCO is distributed: annotations/instances_train2017.json, train2017/."""
    for split, scenes in splits.items():
        word = f"{'val' if split == 'validation' else split}2017"
        _copy_images(scenes, folder / word)
        _write_json(folder / "annotations" / f"instances_{word}.json", coco_content(scenes, category_ids))
    return folder


def write_coco_flat(splits: Splits, folder: Path) -> Path:
    """train.json, val.json and all images in images/."""
    for split, scenes in splits.items():
        _copy_images(scenes, folder / "images")
        _write_json(folder / f"{'val' if split == 'validation' else split}.json", coco_content(scenes))
    return folder


def write_roboflow_coco(splits: Splits, folder: Path) -> Path:
    """train/_annotations.coco.json beside the images; category 0 is the name of the project, which no object has."""
    for split, scenes in splits.items():
        part = folder / ("valid" if split == "validation" else split)
        _copy_images(scenes, part)
        content = coco_content(scenes, supercategory="shapes")
        content["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"})
        _write_json(part / "_annotations.coco.json", content)
    return folder


def _yolo_lines(scene: Scene) -> str:
    lines = []
    for name, (x, y, width, height) in scene.objects:
        center = ((x + width / 2) / scene.width, (y + height / 2) / scene.height)
        lines.append(
            " ".join(map(repr, [NAMES.index(name), *center, width / scene.width, height / scene.height]))
        )  # repr: as many digits as there are
    return "\n".join(lines)


def _write_labels(scenes: list[Scene], folder: Path) -> None:
    """Images without boxes have no file, or an empty one: both are usual."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(scenes):
        if scene.objects or index % 2:
            (folder / f"{scene.path.stem}.txt").write_text(_yolo_lines(scene))


def write_yolo(splits: Splits, folder: Path) -> Path:
    """images/train, labels/train, and data.yaml with names as a dictionary."""
    words = {split: "val" if split == "validation" else split for split in splits}
    for split, scenes in splits.items():
        _copy_images(scenes, folder / "images" / words[split])
        _write_labels(scenes, folder / "labels" / words[split])
    lines = [f"path: {folder}", *(f"{word}: images/{word}" for word in words.values()), "names:"]
    lines += [f"  {index}: {name}" for index, name in enumerate(NAMES)]
    (folder / "data.yaml").write_text("\n".join(lines))
    return folder


def write_roboflow_yolo(splits: Splits, folder: Path) -> Path:
    """train/images, train/labels, and a data.yaml whose paths begin with ../ though they lie beside it."""
    lines = []
    for split, scenes in splits.items():
        word = "valid" if split == "validation" else split
        _copy_images(scenes, folder / word / "images")
        _write_labels(scenes, folder / word / "labels")
        lines.append(f"{'val' if split == 'validation' else split}: ../{word}/images")
    lines += [f"nc: {len(NAMES)}", f"names: {NAMES}", "roboflow:", "  license: CC BY 4.0"]
    (folder / "data.yaml").write_text("\n".join(lines))
    return folder / "data.yaml"


def voc_xml(scene: Scene, database: str = "Unknown", first_pixel: int = 0, difficult: int = 0) -> str:
    """`first_pixel` 1: corners as VOC's own, counted from 1, the last one inside the box."""
    root = ElementTree.Element("annotation")

    def add(parent, **values):
        for tag, value in values.items():
            ElementTree.SubElement(parent, tag).text = str(value)

    add(root, folder="JPEGImages", filename=scene.path.name)
    add(ElementTree.SubElement(root, "source"), database=database)
    add(ElementTree.SubElement(root, "size"), width=scene.width, height=scene.height, depth=3)
    for name, (x, y, width, height) in scene.objects:
        entry = ElementTree.SubElement(root, "object")
        add(entry, name=name, pose="Unspecified", truncated=0, difficult=difficult)
        x, y = x + first_pixel, y + first_pixel
        corners = {"xmin": x, "ymin": y, "xmax": x + width - first_pixel, "ymax": y + height - first_pixel}
        add(ElementTree.SubElement(entry, "bndbox"), **corners)
    return ElementTree.tostring(root, encoding="unicode")


def write_voc(splits: Splits, folder: Path) -> Path:
    """Annotations/, JPEGImages/ and ImageSets/Main/, with VOC's own corners."""
    for part in ("Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for split, scenes in splits.items():
        _copy_images(scenes, folder / "JPEGImages")
        for scene in scenes:
            text = voc_xml(scene, database="The VOC2007 Database", first_pixel=1)
            (folder / "Annotations" / f"{scene.path.stem}.xml").write_text(text)
        stems = "".join(f"{scene.path.stem}\n" for scene in scenes)
        (folder / "ImageSets/Main" / f"{'val' if split == 'validation' else split}.txt").write_text(stems)
    return folder


def write_roboflow_voc(splits: Splits, folder: Path) -> Path:
    """train/, valid/, test/ with xml files beside the images; corners from 0, the last one outside."""
    for split, scenes in splits.items():
        part = folder / ("valid" if split == "validation" else split)
        _copy_images(scenes, part)
        for scene in scenes:
            (part / f"{scene.path.stem}.xml").write_text(voc_xml(scene, database="roboflow.com"))
    return folder


def hub_dataset(scenes: list[Scene], category: str = "label", first_image_id: int = 1) -> Dataset:
    """Rows with `image`, `image_id`, `width`, `height` and `objects`: dictionaries of lists.

    Args:
        category: "label" for a ClassLabel, "name" for strings.
    """
    kind = ClassLabel(names=NAMES) if category == "label" else Value("string")
    features = Features(
        {
            "image": Image(),
            "image_id": Value("int64"),
            "width": Value("int64"),
            "height": Value("int64"),
            "objects": {"id": List(Value("int64")), "bbox": List(List(Value("float64"), 4)), "category": List(kind)},
        }
    )
    rows = {name: [] for name in features}
    for image_id, scene in enumerate(scenes, start=first_image_id):
        names = [name for name, _ in scene.objects]
        rows["image"].append({"bytes": scene.path.read_bytes(), "path": scene.path.name})
        rows["image_id"].append(image_id)
        rows["width"].append(scene.width)
        rows["height"].append(scene.height)
        rows["objects"].append(
            {
                "id": list(range(len(names))),
                "bbox": [bbox for _, bbox in scene.objects],
                "category": [NAMES.index(name) for name in names] if category == "label" else names,
            }
        )
    return Dataset.from_dict(rows, features=features)


def write_hub(splits: Splits, folder: Path, category: str = "label") -> Path:
    """A DatasetDict, saved by `save_to_disk`."""
    data = DatasetDict({split: hub_dataset(scenes, category) for split, scenes in splits.items()})
    data.save_to_disk(folder)
    return folder


def write_parquet(splits: Splits, folder: Path) -> Path:
    """data/train-00000-of-00001.parquet, as data sets lie on the Hub."""
    (folder / "data").mkdir(parents=True)
    for split, scenes in splits.items():
        hub_dataset(scenes).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


LAYOUTS = {
    "coco": write_coco,
    "coco-flat": write_coco_flat,
    "roboflow-coco": write_roboflow_coco,
    "yolo": write_yolo,
    "roboflow-yolo": write_roboflow_yolo,
    "voc": write_voc,
    "roboflow-voc": write_roboflow_voc,
    "hub": write_hub,
    "parquet": write_parquet,
}
FOUR_FORMATS = ("coco", "yolo", "voc", "hub")


def write_layout(name: str, splits: Splits, folder: Path) -> Path:
    """A data set of `splits` in the new `folder`. Returns its source for `load_data`: the folder, or a yaml in it."""
    return LAYOUTS[name](splits, folder)


_NUM = len(NAMES)
CATEGORY_IDS = {
    "zero-based": list(range(_NUM)),
    "one-based": list(range(1, _NUM + 1)),
    "gappy": [3, 7, 12, 21, 40],
    "huge": [2**31 + 5, 2**33, 2**40 + 1, 2**52, 2**62 + 3],
    "string-names": None,  # the files have no numbers
    "background": list(range(1, _NUM + 1)),  # 0 is Roboflow's
}


def write_category_layout(name: str, splits: Splits, folder: Path) -> Path:
    """The same data with the category ids of one of CATEGORY_IDS."""
    if name == "string-names":
        return write_hub(splits, folder, category="name")
    if name == "background":
        return write_roboflow_coco(splits, folder)
    return write_coco(splits, folder, CATEGORY_IDS[name])
