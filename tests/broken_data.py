"""A small data set in COCO format that is as it should be, and what can be done to it."""

import copy
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from data_layouts import annotations_of
from dino_hf.data.raw import Problem, RawDataset, RawSplit

NAMES = {3: "cat", 7: "dog", 12: "cow"}
NUM_IMAGES = {"train": 6, "validation": 4}


def make_picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth noise: survives compression, and no two are alike."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def make_data(folder: Path) -> dict[str, dict]:
    """COCO's content of each split; its images are in a folder of its name. Image 3 of each has no boxes."""
    contents, rng = {}, np.random.default_rng(0)
    for offset, (name, count) in enumerate(NUM_IMAGES.items()):
        (folder / name).mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            width, height, image_id = 90 + 7 * number, 64 + 3 * number, 100 * offset + number
            file_name = f"{image_id:03}.{'jpg' if number % 2 else 'png'}"
            make_picture(image_id, width, height).save(folder / name / file_name)
            images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
            for category_id in (*NAMES, 7) if number != 3 else ():
                w, h = (rng.integers(8, side // 2) for side in (width, height))
                box = [int(rng.integers(0, width - w)), int(rng.integers(0, height - h)), int(w), int(h)]
                entry = {
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box,
                    "area": int(w * h),
                    "iscrowd": 0,
                }
                annotations.append({"id": 1000 * offset + len(annotations), **entry})
        categories = [{"id": category_id, "name": name} for category_id, name in NAMES.items()]
        contents[name] = {"images": images, "annotations": annotations, "categories": categories}
    return contents


def as_raw(folder: Path, contents: dict[str, dict], problems: tuple[Problem, ...] = ()) -> RawDataset:
    """As a reader gives it."""
    splits = {}
    for name, content in copy.deepcopy(contents).items():
        for image in content["images"]:
            image.setdefault("path", (folder / name / image["file_name"]).absolute())
        splits[name] = RawSplit(name, folder / name, content["images"], annotations_of(content["annotations"]))
    return RawDataset("coco", folder, splits, next(iter(contents.values()))["categories"], list(problems))


class Case:
    """One way to break a data set.

    Args:
        kind: the finding that it is.
        count: how often.
        break_it: (folder, contents) -> None, or problems of reading.
        first: what the first offender says: part of "split: where: file: value".
        also: kinds of warnings and errors that come with it.
    """

    def __init__(self, kind: str, count: int, first: str, break_it, also: tuple[str, ...] = ()):
        self.kind, self.count, self.first, self.break_it, self.also = kind, count, first, break_it, also

    def __repr__(self):
        return self.kind


def _set_box(change):
    """The second annotation of the first image gets the box (x, y, w, h) -> change(x, y, w, h, W, H)."""

    def break_it(folder, contents):
        entry, image = contents["train"]["annotations"][1], contents["train"]["images"][0]
        entry["bbox"] = list(change(*entry["bbox"], image["width"], image["height"]))
        entry["area"] = abs(entry["bbox"][2] * entry["bbox"][3])

    return break_it


def _set(split, part, number, **values):
    return lambda folder, contents: contents[split][part][number].update(values)


def _all_boxes(change):
    def break_it(folder, contents):
        for content in contents.values():
            sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
            for entry in content["annotations"]:
                entry["bbox"] = list(change(*entry["bbox"], *sizes[entry["image_id"]]))
                del entry["area"]

    return break_it


def _truncate(folder, contents):
    path = folder / "train" / "001.jpg"
    path.write_bytes(path.read_bytes()[:-300])


def _not_an_image(folder, contents):
    (folder / "train" / "002.png").write_text("this is no image")


def _resize(folder, contents):
    path = folder / "train" / "001.jpg"
    Image.open(path).resize((97 * 2, 67 * 2)).save(path)


def _turn(folder, contents):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    make_picture(1, 97, 67).save(folder / "train" / "001.jpg", exif=exif)


def _upside_down(folder, contents):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    make_picture(1, 97, 67).save(folder / "train" / "001.jpg", exif=exif)


def _deep(folder, contents):
    values = np.random.default_rng(0).integers(0, 2**14, (70, 104)).astype(np.uint16)
    values[0, :2] = 0, 2**14 - 1
    Image.fromarray(values).save(folder / "train" / "002.png")


def _float(folder, contents):
    Image.new("F", (104, 70), 0.5).save(folder / "train" / "002.png", format="TIFF")


def _frames(folder, contents):
    frames = [Image.fromarray(np.full((70, 104), 40 * number, np.uint8)) for number in range(3)]
    frames[0].save(folder / "train" / "002.png", save_all=True, append_images=frames[1:])


def _copy_image(split, number, source_split, source, **save):
    """Image `number` of a split becomes one of the other's, with its annotations."""

    def break_it(folder, contents):
        image, original = contents[split]["images"][number], contents[source_split]["images"][source]
        data = (folder / source_split / original["file_name"]).read_bytes()
        (folder / split / image["file_name"]).write_bytes(data)
        if save:
            with Image.open(folder / source_split / original["file_name"]) as opened:
                opened.convert("RGB").save(folder / split / image["file_name"], **save)
        image.update(width=original["width"], height=original["height"])
        contents[split]["annotations"] = [e for e in contents[split]["annotations"] if e["image_id"] != image["id"]]
        for entry in [e for e in contents[source_split]["annotations"] if e["image_id"] == original["id"]]:
            entry = entry | {"image_id": image["id"], "id": 5000 + len(contents[split]["annotations"])}
            contents[split]["annotations"].append(entry)

    return break_it


def _append(split, part, **values):
    """Once more the last entry, changed."""
    return lambda folder, contents: contents[split][part].append(contents[split][part][-1] | values)


def _shift_last(folder, contents):
    """The last box once more, wider by a twentieth."""
    entries = contents["train"]["annotations"]
    x, y, w, h = entries[-1]["bbox"]
    entries.append(entries[-1] | {"id": 900, "bbox": [x, y, 1.05 * w, h], "area": 1.05 * w * h})


def _category(**values):
    def break_it(folder, contents):
        for content in contents.values():
            content["categories"].append({"id": 20, "name": "pig"} | values)

    return break_it


def _use_category(split, *extra_categories):
    """A new category whose only boxes are three in one split."""

    def break_it(folder, contents):
        _category()(folder, contents)
        for entry in contents[split]["annotations"][:3]:
            entry["category_id"] = 20

    return break_it


def _background(folder, contents):
    _category(name="__background__")(folder, contents)
    for content in contents.values():
        content["annotations"][0]["category_id"] = 20


def _group(folder, contents):
    """As Roboflow writes it."""
    _category(name="animals", supercategory="none")(folder, contents)
    for content in contents.values():
        for entry in content["categories"][:3]:
            entry["supercategory"] = "animals"


def _only_listed(folder, contents):
    images = [{"id": 900 + n, "file_name": f"{n}.jpg", "width": 70, "height": 50} for n in range(2)]
    contents["test"] = {"images": images, "annotations": [], "categories": contents["train"]["categories"]}


def _many(folder, contents):
    for number in range(301):
        box = [number % 50, number // 50, 3 + number % 3, 4]
        values = {"image_id": 0, "category_id": 3, "bbox": box, "area": box[2] * 4, "iscrowd": 0}
        contents["train"]["annotations"].append({"id": 7000 + number, **values})


def _rare(folder, contents):
    _category()(folder, contents)
    _many(folder, contents)
    contents["train"]["annotations"][0]["category_id"] = 20
    contents["validation"]["annotations"][0]["category_id"] = 20


def _no_annotations(*splits):
    def break_it(folder, contents):
        for name in splits:
            contents[name]["annotations"] = []

    return break_it


def _bad_line(folder, contents):
    return (Problem("bad-line", "labels/7.txt, line 3", "labels/7.txt, line 3 has 4 numbers; it must have 5."),)


def _swap_split(folder, contents):
    contents["train"]["annotations"][0]["image_id"] = contents["validation"]["images"][0]["id"]


def _same_file(folder, contents):
    image = contents["train"]["images"][0]
    contents["train"]["images"].append(image | {"id": 50})
    contents["train"]["annotations"][0]["image_id"] = 50


CASES = [
    Case("image-missing", 1, "train: images[2]: 002.png", lambda folder, contents: (folder / "train/002.png").unlink()),
    Case(
        "image-broken",
        1,
        "train: images[1]: 001.jpg: Its pixels cannot be decoded, OSError: image file is truncated",
        _truncate,
    ),
    Case("image-broken", 1, "train: images[2]: 002.png: It is not an image of a known format", _not_an_image),
    Case("image-resized", 1, "train: images[1]: 001.jpg: 194 x 134, stated 97 x 67", _resize),
    Case("image-rotated", 1, "001.jpg: 67 x 97, stated 97 x 67, EXIF orientation 6", _turn),
    Case("image-orientation-unclear", 1, "001.jpg: 97 x 67, stated 97 x 67, EXIF orientation 3", _upside_down),
    Case("image-mode", 1, "002.png: values from 0 to 16,383, of 65,535", _deep),
    Case("image-mode-unknown", 1, "002.png: It has 32 bits per pixel", _float),
    Case("image-frames", 1, "002.png: the first of several frames", _frames),
    Case("image-size-wrong", 1, "width 0, height 64", _set("train", "images", 0, width=0)),
    Case("image-size-unknown", 1, "images[0]: 000.png", _set("train", "images", 0, width=None)),
    Case("duplicate-image-id", 1, "images[3]: 003.jpg: id 2", _set("train", "images", 3, id=2)),
    Case("duplicate-file", 1, "images[6]: 000.png: id 50", _same_file),
    Case("duplicate-image", 1, "train: images[5]: 005.jpg: as 002.png of train", _copy_image("train", 5, "train", 2)),
    Case(
        "near-copy",
        1,
        "train: images[5]: 005.jpg: as 002.png of train",
        _copy_image("train", 5, "train", 2, quality=40),
    ),
    Case("leak", 1, "train: images[4]: 004.png: as 102.png of validation", _copy_image("train", 4, "validation", 2)),
    Case(
        "near-leak",
        1,
        "train: images[5]: 005.jpg: as 102.png of validation",
        _copy_image("train", 5, "validation", 2, quality=40),
    ),
    Case("boxes-are-corners", 32, "certainly two corners", _all_boxes(lambda x, y, w, h, W, H: (x, y, x + w, y + h))),
    Case(
        "boxes-are-centres",
        32,
        "certainly centre, width and height",
        _all_boxes(lambda x, y, w, h, W, H: (x + w / 2, y + h / 2, w, h)),
    ),
    Case(
        "boxes-are-normalised",
        32,
        "certainly (x, y, width, height)",
        _all_boxes(lambda x, y, w, h, W, H: (x / W, y / H, w / W, h / H)),
    ),
    Case(
        "boxes-are-normalised",
        32,
        "certainly two corners",
        _all_boxes(lambda x, y, w, h, W, H: (x / W, y / H, (x + w) / W, (y + h) / H)),
    ),
    Case(
        "boxes-are-normalised",
        32,
        "certainly centre, width and height",
        _all_boxes(lambda x, y, w, h, W, H: ((x + w / 2) / W, (y + h / 2) / H, w / W, h / H)),
    ),
    Case(
        "box-not-numbers",
        1,
        "annotations[1]: 000.png: (nan, 2, 3, 4)",
        _set("train", "annotations", 1, bbox=[float("nan"), 2, 3, 4]),
    ),
    Case(
        "box-not-numbers", 1, "000.png: (1, 2, 3, inf)", _set("train", "annotations", 1, bbox=[1, 2, 3, float("inf")])
    ),
    Case(
        "box-not-numbers", 1, "000.png: (1, 2, 3, 2147483648)", _set("train", "annotations", 1, bbox=[1, 2, 3, 2**31])
    ),
    Case("box-negative", 1, "in 90 x 64", _set_box(lambda x, y, w, h, W, H: (x + w, y, -w, h))),
    Case("box-empty", 1, "0) in 90 x 64", _set_box(lambda x, y, w, h, W, H: (x, y, w, 0))),
    Case("box-tiny", 1, "0.5) in 90 x 64", _set_box(lambda x, y, w, h, W, H: (x, y, w, 0.5))),
    Case("box-outside", 1, "(95, ", _set_box(lambda x, y, w, h, W, H: (W + 5, y, w, h))),
    Case("box-sticks-out", 1, "annotations[1]: 000.png: (80, ", _set_box(lambda x, y, w, h, W, H: (W - 10, y, 20, h))),
    Case("area-wrong", 1, "area 9999 of (", _set("train", "annotations", 1, area=9999)),
    Case("duplicate-box", 1, "annotations[20]: 005.jpg", _append("train", "annotations", id=900)),
    Case("near-duplicate-box", 1, "nearly as (", _shift_last),
    Case("duplicate-box-other-class", 1, "as 'cow'", _append("train", "annotations", id=900, category_id=12)),
    Case("duplicate-annotation-id", 1, "annotations[2]: 000.png: id 1", _set("train", "annotations", 2, id=1)),
    Case("box-whole-image", 1, "(0, 0, 90, 64)", _set_box(lambda x, y, w, h, W, H: (0, 0, W, H))),
    Case("unknown-image", 1, "annotations[1]: None: image_id 77", _set("train", "annotations", 1, image_id=77)),
    Case("unknown-image", 1, "image_id -4611", _set("train", "annotations", 1, image_id=-(2**62))),  # as for a text
    Case("image-of-other-split", 1, "image_id 100, which is in validation", _swap_split),
    Case(
        "unknown-category", 1, "annotations[1]: 000.png: category_id 4", _set("train", "annotations", 1, category_id=4)
    ),
    Case("duplicate-category-id", 1, "categories[3]: None: id 7, name 'pig'", _category(id=7)),
    Case("duplicate-category-name", 1, "id 20, name 'dog'", _category(name="dog"), also=("category-without-boxes",)),
    Case("similar-category-name", 1, "' Dog' and 'dog'", _category(name=" Dog"), also=("category-without-boxes",)),
    Case("background-class", 1, "name '__background__'", _background),
    Case("placeholder-category", 1, "id 20, name '__background__'", _category(name="__background__")),
    Case("placeholder-category", 1, "id 20, name 'animals'", _group),
    Case("split-not-here", 1, "test: None: 2 images", _only_listed),
    Case("category-without-boxes", 1, "id 20, name 'pig'", _category()),
    Case("category-not-in-train", 1, "id 20, name 'pig': 0 in train, 3 in validation", _use_category("validation")),
    Case("category-not-in-validation", 1, "id 20, name 'pig': 3 in train", _use_category("train")),
    Case("class-imbalance", 1, "name 'pig': 1 of 305", _rare, also=("many-boxes",)),
    Case("many-boxes", 1, "train: images[0]: 000.png: 305 boxes", _many),
    Case("no-boxes", 1, "6 images", _no_annotations("train", "validation")),
    Case("unlabelled-split", 1, "validation", _no_annotations("validation")),
    Case("unlabelled-train", 1, "train", _no_annotations("train")),
    Case("crowd", 1, "annotations[1]", _set("train", "annotations", 1, iscrowd=1)),
    Case("bad-line", 1, "labels/7.txt, line 3: None: labels/7.txt, line 3 has 4 numbers", _bad_line),
]


def break_data(case: Case, folder: Path) -> RawDataset:
    contents = make_data(folder)
    problems = case.break_it(folder, contents) or ()
    return as_raw(folder, contents, problems if isinstance(problems, tuple) else ())
