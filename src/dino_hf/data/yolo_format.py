"""YOLO: a yaml with classes and folders, and a txt beside or opposite each image, read as Ultralytics reads them."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from PIL import Image

from .image_finder import image_files
from .raw import IMAGE_SUFFIXES, Problem, RawDataset, RawSplit, image_size, in_order, split_in

_SPLIT_KEYS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
_NAMES = ("data", "dataset")
_THREADS = 8  # headers of images are read: mostly waiting, on a disk of the network


def find_yaml(source: Path) -> Path | None:
    """The yaml given, or the one in a folder that describes a YOLO data set.

    Raises:
        ValueError: several do, and none is called data.yaml or dataset.yaml; or the one given is none.
    """
    if source.is_file():
        if not _is_yolo(source):
            raise ValueError(
                f"{source} is not the yaml of a YOLO data set: it needs `names`, and `train` or `val` folders."
            )
        return source
    found = []
    for patterns in (("*.yaml", "*.yml"), ("*/*.yaml", "*/*.yml")):  # archives often hold a single folder
        paths = sorted(path for pattern in patterns for path in source.glob(pattern))
        found = found or [path for path in paths if _is_yolo(path, must_be_yaml=path.stem in _NAMES)]
    named = [path for path in found if path.stem in _NAMES]
    if len(found) > 1 and len(named) != 1:
        names = [path.relative_to(source).as_posix() for path in found]
        raise ValueError(f"{source} has several yaml files of YOLO data sets: {names}; give one of them.")
    return (named or found or [None])[0]


def _is_yolo(path: Path, must_be_yaml: bool = True) -> bool:
    try:
        content = _read_yaml(path)
    except ValueError:
        if must_be_yaml:
            raise
        return False
    return (
        isinstance(content, dict)
        and {"names", "nc"} & set(content)
        and {"train", "val", "test"} & set(content) != set()
    )


def _read_yaml(path: Path):
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid yaml: {' '.join(str(error).split())}.") from error


def read_yolo(yaml_file: Path) -> RawDataset:
    """The data set of a yaml: `path`, `train`, `val` and `test` (folders, lists of them, or txt files that list images), `names`.

    A txt has lines of class, centre x, centre y, width, height, relative to the image as it is seen (turned by its EXIF
    orientation); of a polygon (class x1 y1 x2 y2 x3 y3 ...) the bounding box is taken. An image without a txt has no boxes.
    Images are numbered from 1 in each split, in the order of their paths; class numbers are the category ids.
    """
    content = _read_yaml(yaml_file)
    problems, splits, notes = [], {}, []
    categories = _categories(content, yaml_file, problems)
    for key, name in _SPLIT_KEYS.items():
        if content.get(key) is None or name in splits:
            continue
        paths, missing = _images_of(content[key], content.get("path"), yaml_file)
        if missing and not paths and name == "test":
            notes.append(f"{yaml_file}: there is no {missing[0]}, so there are no test data.")
            continue
        problems += [
            Problem(
                "missing-folder", f"{yaml_file}: {key}", f"{one}, which {yaml_file} names as {key}, does not exist."
            )
            for one in missing
        ]
        if paths:
            splits[name] = _read_split(name, yaml_file, paths, "kpt_shape" in content, problems)
    return RawDataset("yolo", yaml_file, splits, categories, problems, notes)


def read_yolo_without_yaml(folder: Path) -> RawDataset | None:
    """As labelling tools export: `classes.txt` or `obj.names` with a class per line, and images with their txt files anywhere
    below, in folders called as splits or not. None if there is none of them, or no txt of an image."""
    names_file = next((folder / name for name in ("classes.txt", "obj.names") if (folder / name).is_file()), None)
    paths = [] if names_file is None else [path.absolute() for path in image_files(folder)]
    if not any(label_file(path).is_file() for path in paths):
        return None
    names = [line.strip() for line in names_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    of_split: dict[str, list[Path]] = {}
    for path in sorted(paths):
        told = filter(None, map(split_in, path.relative_to(folder.absolute()).parts[-2::-1]))
        of_split.setdefault(next(told, "train"), []).append(path)
    problems = []
    splits = {name: _read_split(name, names_file, paths, False, problems) for name, paths in in_order(of_split).items()}
    return RawDataset("yolo", folder, splits, categories, problems)


def _categories(content: dict, yaml_file: Path, problems: list[Problem]) -> list[dict]:
    names = content.get("names")
    if names is None:
        names = [f"class_{index}" for index in range(int(content["nc"]))]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(str(key).isdigit() for key in names):
        message = f"{yaml_file} has names={names!r}; they must be a list, or a dictionary with class numbers."
        problems.append(Problem("bad-entry", f"{yaml_file}: names", message))
        return []
    if content.get("nc") not in (None, len(names)):
        message = (
            f"{yaml_file} has nc={content['nc']}, but {len(names)} names: {list(names.values())}; correct one of them."
        )
        problems.append(Problem("bad-entry", f"{yaml_file}: nc", message))
    return [{"id": int(number), "name": str(name)} for number, name in names.items()]


def _images_of(entries, path, yaml_file: Path) -> tuple[list[Path], list[str]]:
    """Images of one split in the order of their paths, and entries for which there is neither folder nor file."""
    beside = yaml_file.absolute().parent
    bases = (
        [beside] if path is None else [beside / str(path), Path.cwd() / str(path), beside]
    )  # an absolute path replaces
    images, missing = [], []
    for entry in map(str, entries if isinstance(entries, list) else [entries]):
        # "../train/images" is meant from the folder of the yaml in exports of Roboflow, which is where it is not
        places = [base / entry for base in bases] + [base / entry.removeprefix("../") for base in bases]
        place = next((Path(os.path.normpath(place)) for place in places if place.exists()), None)
        if place is None:
            missing.append(str(places[0]))
        elif place.is_dir():
            images += image_files(place)
        elif place.suffix == ".txt":
            listed = [line.strip() for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
            images += [_listed(line, [place.parent, *bases]) for line in listed]
        elif place.suffix.lower() in IMAGE_SUFFIXES:
            images.append(place)
    return sorted(dict.fromkeys(images)), missing


def _listed(line: str, bases: list[Path]) -> Path:
    places = [Path(os.path.normpath(base / line)) for base in bases]
    return next((place for place in places if place.is_file()), places[0])


def label_file(image: Path) -> Path:
    """The txt of an image: with the last folder `images` of its path replaced by `labels`, or beside it."""
    parts = image.parts
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            opposite = Path(*parts[:index], "labels", *parts[index + 1 :]).with_suffix(".txt")
            return opposite if opposite.is_file() else image.with_suffix(".txt")
    return image.with_suffix(".txt")


def _read_split(
    name: str, yaml_file: Path, paths: list[Path], has_keypoints: bool, problems: list[Problem]
) -> RawSplit:
    root = Path(os.path.commonpath([yaml_file.absolute().parent, paths[0]]))
    images, annotations = [], []
    with ThreadPoolExecutor(_THREADS) as pool:
        read = pool.map(lambda path: _read_image(path, has_keypoints), paths)
        for image_id, (path, (size, boxes, own_problems)) in enumerate(zip(paths, read, strict=True), start=1):
            width, height = size
            file_name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
            images.append({"id": image_id, "file_name": file_name, "width": width, "height": height, "path": path})
            annotations += [{"image_id": image_id, **box} for box in boxes]
            problems += own_problems
    return RawSplit(name, yaml_file, images, annotations)


def _read_image(path: Path, has_keypoints: bool) -> tuple[tuple, list[dict], list[Problem]]:
    """Size, boxes and problems of one image."""
    size = (None, None)
    problems = []
    if path.is_file():  # what is missing is found with the images of all formats
        try:
            with Image.open(path) as image:
                size = image_size(image)
        except Exception as error:  # those of Pillow have no common type
            message = f"{path} cannot be read, {type(error).__name__}: {error}; its boxes are relative to its size."
            problems.append(Problem("unreadable-image", str(path), message))
    labels = label_file(path)
    if not labels.is_file():
        return size, [], problems
    try:
        lines = labels.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        problems.append(Problem("unreadable-file", str(labels), f"{labels} is not text: {error}."))
        return size, [], problems
    boxes = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{labels.parent.name}/{labels.name}, line {number}"
        try:
            category_id, box = _read_line(line.split(), has_keypoints)
        except ValueError as error:
            problems.append(
                Problem(
                    "bad-line", f"{labels}, line {number}", f"{labels}, line {number} is {line.strip()!r}; {error}."
                )
            )
            continue
        if size[0] is not None:
            boxes.append({"category_id": category_id, "bbox": _in_pixels(box, *size), "where": where})
    return size, boxes, problems


def _read_line(values: list[str], has_keypoints: bool) -> tuple[int, list[float]]:
    """Class number and (centre x, centre y, width, height), relative to the image."""
    expected = "it must be class, centre x, centre y, width, height, relative to the image, or class and a polygon"
    try:
        numbers = list(map(float, values))
    except ValueError:
        raise ValueError(expected) from None
    if not math.isfinite(numbers[0]) or numbers[0] != int(numbers[0]) or len(numbers) < 5:
        raise ValueError(expected)
    coordinates = numbers[1:]
    if len(coordinates) == 4 or has_keypoints:
        return int(numbers[0]), coordinates[:4]
    if len(coordinates) < 6 or len(coordinates) % 2:
        raise ValueError(expected)
    xs, ys = coordinates[::2], coordinates[1::2]
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    return int(numbers[0]), [min(xs) + width / 2, min(ys) + height / 2, width, height]


def _in_pixels(box: list[float], image_width: int, image_height: int) -> list[float]:
    """(centre x, centre y, width, height), relative -> (x, y, width, height) in pixels."""
    x, y, width, height = box
    return [(x - width / 2) * image_width, (y - height / 2) * image_height, width * image_width, height * image_height]
