"""Read YOLO data as Ultralytics does: a yaml with classes and folders, and a txt file for each image."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..common.images import IMAGE_SUFFIXES, open_image, upright_size
from ..common.regular_files import is_folder, is_regular, read_text
from ..common.values import short_repr
from .file_names import SplitNames, image_files, posix
from .files import DataFolder, only_usable
from .raw import AnnotationBuilder, Problem, RawDataset, RawSplit, in_order
from .split_lists import darknet_lists, lists_beside

_PHOTOS = {
    ".jpg",
    ".jpeg",
    ".jfif",
    ".jpe",
    ".webp",
    ".avif",
}  # masks have other suffixes, because they must be lossless
_THREADS = 8  # reading headers of images is mostly waiting for the disk


def label_file(image: Path) -> Path:
    """The txt of an image: in the folder `labels` in place of the last `images` of its path, else beside the image."""
    parts = image.parts
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            opposite = Path(*parts[:index], "labels", *parts[index + 1 :]).with_suffix(".txt")
            return opposite if is_regular(opposite) else image.with_suffix(".txt")
    return image.with_suffix(".txt")


def without_masks(paths: list[Path]) -> tuple[list[Path], list[str]]:
    """Leave out masks: images that share their txt with a photo, such as 1.png beside 1.jpg.

    Two photos with the same txt both stay, because they are an image and its copy.

    Returns:
        the other images, and notes for the user.
    """
    of_label: dict[Path, list[Path]] = {}
    for path in paths:
        of_label.setdefault(path.with_suffix(""), []).append(path)
    masks, shared = set(), []
    for group in of_label.values():
        if len(group) == 1 or not is_regular(label_file(group[0])):
            continue
        others = [path for path in group if path.suffix.lower() not in _PHOTOS]
        if len(others) == len(group) - 1:
            masks.update(others)
        else:
            shared.append(group)
    notes = []
    if masks:
        notes.append(
            f"{len(masks)} images have the same name, and so the same txt, as a photo beside them; they are skipped as masks. The "
            f"first is {min(masks)}. If it is not a mask, rename it."
        )
    if shared:
        names = " and ".join(map(str, shared[0][:2]))
        notes.append(
            f"Images with the same name share a txt, so all get its boxes: {names}; there are {len(shared)} such groups."
        )
    return [path for path in paths if path not in masks], notes


def read_labels(
    name: str, yaml_file: Path, paths: list[Path], has_keypoints: bool, files: DataFolder, problems: list[Problem]
) -> RawSplit:
    """Read the labels of one split.

    Args:
        yaml_file: the yaml or the list of class names. File names are relative to its folder if possible.
        paths: images of the split.
        has_keypoints: whether key points follow the box in each line.
        files: files of the data set. An image whose txt lies outside is left out.
        problems: new problems are added to it.
    """
    if name != "test" and not any(is_regular(label_file(path)) for path in paths):
        message = (
            f"No image of {name} has a txt file; the first image is {paths[0]}. Put each txt beside its image, or put images in "
            "a folder images and txt files in a folder labels beside it."
        )
        problems.append(Problem("missing-file", f"{yaml_file}: {name}", message))
    root = Path(os.path.commonpath([yaml_file.absolute().parent, paths[0]]))
    images, labels = [], [label_file(path) for path in paths]
    annotations = AnnotationBuilder("{0}, line {1}", [f"{label.parent.name}/{label.name}" for label in labels])
    with ThreadPoolExecutor(_THREADS) as pool:
        read = pool.map(lambda path: _read_image(path, has_keypoints, files), paths)
        for image_id, (path, (size, boxes, own_problems)) in enumerate(zip(paths, read, strict=True), start=1):
            problems += own_problems
            if boxes is None:
                continue
            width, height = size
            file_name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
            images.append({"id": image_id, "file_name": file_name, "width": width, "height": height, "path": path})
            for category_id, box, line in boxes:
                annotations.add(image_id, category_id, box, line, image_id - 1)
    return RawSplit(name, yaml_file, images, annotations.build())


def labels_without_image(splits: dict[str, RawSplit], files: DataFolder) -> list[str]:
    """A note, if folders with labels have txt files with boxes whose images are in no split."""
    known = {label_file(entry["path"]) for split in splits.values() for entry in split.images}
    folders = sorted({path.parent for path in known if path.parent.is_dir()})
    others = [path for folder in folders for path in sorted(folder.glob("*.txt")) if path not in known]
    first = next(
        (path for path in others if files.is_file(path) and _has_boxes(path)), None
    )  # not a classes.txt or README.txt
    if first is None:
        return []
    return [
        f"{first} has boxes, but no image of the data belongs to it; there are {len(others)} such txt files. Their images may be "
        "missing, or of a kind that is not read."
    ]


def _has_boxes(path: Path) -> bool:
    try:
        _read_line(next(filter(None, map(str.split, read_text(path).splitlines())), []), False)
    except (ValueError, OSError):
        return False
    return True


def _read_image(path: Path, has_keypoints: bool, files: DataFolder) -> tuple[tuple, list[tuple] | None, list[Problem]]:
    """Size, boxes as (class, box, line) and problems of one image. Boxes are None if the txt lies outside the data set."""
    size = (None, None)
    problems = []
    labels = label_file(path)
    if is_regular(labels) and not files.is_inside(labels):
        message = f"The image {path} is left out, because {files.outside_text(labels)}"
        return size, None, [Problem("outside", str(labels), message)]
    if files.is_file(path):  # a later check reports missing images for all formats
        try:
            with open_image(path) as image:
                size = upright_size(image)
        except OSError as error:
            message = f"{path} cannot be read, and its boxes are relative to its size. {error}"
            problems.append(Problem("unreadable-image", str(path), message))
    if not is_regular(labels):
        return size, [], problems
    try:
        lines = read_text(labels).splitlines()
    except (ValueError, OSError) as error:
        problems.append(Problem("unreadable-file", str(labels), str(error)))
        return size, [], problems
    boxes = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            category_id, box = _read_line(line.split(), has_keypoints)
        except ValueError as error:
            problems.append(
                Problem(
                    "bad-line",
                    f"{labels}, line {number}",
                    f"{labels}, line {number} is {short_repr(line.strip())}; {error}.",
                )
            )
            continue
        if size[0] is not None:
            boxes.append((category_id, _in_pixels(box, *size), number))
    return size, boxes, problems


def _read_line(values: list[str], has_keypoints: bool) -> tuple[int, list[float]]:
    """Class number and (centre x, centre y, width, height) relative to the image. Raises ValueError with the reason."""
    expected = "it must be class, centre x, centre y, width, height, relative to the image, or class and a polygon"
    try:
        numbers = list(map(float, values))
    except ValueError:
        raise ValueError(expected) from None
    if len(numbers) < 5 or not abs(numbers[0]) < 2**53 or numbers[0] != int(numbers[0]):
        raise ValueError(expected)
    coordinates = numbers[1:]
    if not all(map(math.isfinite, coordinates)):
        raise ValueError(f"it has a number that is not finite; {expected}")
    if len(coordinates) == 4 or has_keypoints:
        return int(numbers[0]), coordinates[:4]
    if len(coordinates) < 6 or len(coordinates) % 2:
        raise ValueError(expected)
    xs, ys = coordinates[::2], coordinates[1::2]
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    return int(numbers[0]), [min(xs) + width / 2, min(ys) + height / 2, width, height]


def _in_pixels(box: list[float], image_width: int, image_height: int) -> list[float]:
    """Relative (centre x, centre y, width, height) -> (x, y, width, height) in pixels."""
    x, y, width, height = box
    return [(x - width / 2) * image_width, (y - height / 2) * image_height, width * image_width, height * image_height]


_SPLIT_KEYS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
_NAMES_FILES = ("classes.txt", "obj.names", "labels/classes.txt", "data/obj.names")  # the third is from labelImg
_MOST_CLASSES = 100_000


def read_yaml(path: Path, files: DataFolder):
    """Content of a yaml without the keys that have no value."""
    content = files.read_yaml(path)
    if not isinstance(content, dict):
        return content
    return {key: value for key, value in content.items() if value not in ("", "~", "null", [])}


def read_yolo(yaml_file: Path, source: Path | None = None, allow_outside: bool = False) -> RawDataset:
    """Read the data set of a yaml: `path`, `names`, and `train`, `val` and `test` (folders, lists, or txt files with images).

    Each line of a label file has class, centre x, centre y, width and height, relative to the upright image. A polygon
    (class x1 y1 x2 y2 x3 y3 ...) is replaced by its bounding box. An image without a txt has no boxes. Images are numbered from 1
    in each split, in the order of their paths. Class numbers are the category ids.

    Args:
        source: the path that the user gave. If it is the yaml, its `path` may lead anywhere. If it is a folder, all files must lie
            inside.
    """
    beside, source = yaml_file.absolute().parent, source or yaml_file
    content = read_yaml(yaml_file, DataFolder(beside, allow_outside=True))
    problems, splits, notes = [], {}, []
    path = content.get("path")
    if path is not None and not isinstance(path, str):
        problems.append(
            Problem("bad-entry", f"{yaml_file}: path", f"{yaml_file} has path={short_repr(path)}; it must be a folder.")
        )
        path = None
    bases = (
        [beside] if path is None else [beside / posix(path), Path.cwd() / posix(path), beside]
    )  # an absolute path replaces
    folders = [source.absolute() if source.is_dir() else beside]
    if not source.is_dir() and path is not None:
        folders += [base for base in bases if is_folder(base)]
        if not DataFolder(beside).is_inside(folders[1] if len(folders) > 1 else beside):
            notes.append(f"The images are in {os.path.realpath(folders[1])}, which {yaml_file} names as its path.")
    files = DataFolder(*folders, allow_outside=allow_outside)
    categories = _categories(content, yaml_file, problems)
    for key, name in _SPLIT_KEYS.items():
        if content.get(key) is None or name in splits:
            continue
        paths, missing = _images_of(content[key], bases, files)
        missing = [(kind, f"{place}, which {yaml_file} names as {key}, {why}") for kind, place, why in missing]
        if missing and not paths and name == "test" and missing[0][0] != "outside":
            notes.append(f"{missing[0][1]}, so there are no test data.")
            continue
        problems += [Problem(kind, f"{yaml_file}: {key}", f"{one}.") for kind, one in missing]
        if paths:
            paths, masks = without_masks(paths)
            notes += masks
            splits[name] = read_labels(name, yaml_file, paths, "kpt_shape" in content, files, problems)
    notes += labels_without_image(splits, files) + files.notes()
    return only_usable(RawDataset("yolo", yaml_file, splits, categories, problems, notes), files)


def read_yolo_without_yaml(folder: Path, files: DataFolder) -> RawDataset | None:
    """Read an export of a labelling tool: `classes.txt` or `obj.names`, and images with txt files at any depth.

    Splits come from the lists that obj.data names, from lists such as train.txt, or from folders.

    Returns:
        None if there is no file with class names, or no image has a txt.
    """
    names_file = _names_file(folder, files)
    root = folder.absolute()
    paths = [] if names_file is None else sorted(image_files(root, files))
    if not any(is_regular(label_file(path)) for path in paths):
        return None
    names = map(str.strip, files.read_text(names_file).splitlines())
    categories = [{"id": number, "name": name} for number, name in enumerate(names) if name]
    paths, notes = without_masks(paths)
    lists = darknet_lists(root, files) or lists_beside(root, files)
    splits_of, missing = lists.shares(files, root, paths) if lists else ({}, [])
    if lists and not splits_of:
        notes.append(f"{folder}: no line of {lists.where} names an image, so these lists are ignored.")
        lists, missing = None, []
    split_names, of_split = SplitNames(root, paths), {}
    for path in paths:
        for split in splits_of.get(path, []) if lists else [split_names.split_of_file(path) or "train"]:
            of_split.setdefault(split, []).append(path)
    problems = [
        Problem(
            "missing-file",
            f"{folder}: {short_repr(line)}",
            f"{short_repr(line)}, listed as {split} data in {lists.where}, {why}.",
        )
        for split, line, why in missing
    ]
    unlisted = [path for path in paths if lists and path not in splits_of]
    if unlisted:
        notes.append(
            f"{folder}: {len(unlisted)} images are in no list of {lists.where} and are skipped; the first is {unlisted[0]}."
        )
    splits = {
        name: read_labels(name, names_file, paths, False, files, problems) for name, paths in in_order(of_split).items()
    }
    notes += split_names.notes() + labels_without_image(splits, files) + files.notes()
    return only_usable(RawDataset("yolo", folder, splits, categories, problems, notes), files)


def _names_file(folder: Path, files: DataFolder) -> Path | None:
    return next((folder / name for name in _NAMES_FILES if files.is_file(folder / name)), None)


def why_no_yolo(folder: Path, files: DataFolder) -> str | None:
    """The reason why a folder with class names is not a data set. None: it has no class names."""
    names_file = _names_file(folder, files)
    if names_file is None:
        return None
    num_labels = sum(path != names_file for path in files.files(folder, {".txt"}))
    image = next(image_files(folder, files), None)
    if image is None:
        return (
            f"it has class names in {names_file} and {num_labels or 'no'} txt files, but no images; copy the images into "
            f"{folder / 'images'}."
        )
    return (
        f"it has class names in {names_file} and images such as {image}, but no txt files; put each txt beside its image or in a "
        "folder labels."
    )


def _categories(content: dict, yaml_file: Path, problems: list[Problem]) -> list[dict]:
    def refuse(field: str, text: str) -> None:
        problems.append(Problem("bad-entry", f"{yaml_file}: {field}", f"{yaml_file} has {text}."))

    names, count = content.get("names"), content.get("nc")
    if count is not None:
        if isinstance(count, str) and count.isdecimal() and len(count) < 19 and int(count) <= _MOST_CLASSES:
            count = int(count)
        else:
            refuse("nc", f"nc={short_repr(count)}; it must be the number of classes, at most {_MOST_CLASSES:,}")
            count = None
    if names is None:
        names = [f"class_{index}" for index in range(count or 0)]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(key.isdecimal() and len(key) < 19 for key in map(str, names)):
        refuse("names", f"names={short_repr(names)}; they must be a list, or a dictionary with class numbers")
        return []
    if wrong := [name for name in names.values() if not isinstance(name, str)]:
        refuse("names", f"a class named {short_repr(wrong[0])}; a name must be a text")
        return []
    if count is not None and count != len(names):
        refuse("nc", f"nc={count}, but {len(names)} names: {short_repr(list(names.values()))}; correct one of them")
    return [{"id": int(number), "name": name} for number, name in names.items()]


def _images_of(entries, bases: list[Path], files: DataFolder) -> tuple[list[Path], list[tuple[str, Path | str, str]]]:
    """Images of one split in the order of their paths, and entries that lead to no image as (kind, place, reason)."""
    images, missing = [], []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, str):
            missing.append(("bad-entry", short_repr(entry), "must be a folder, a list of folders, or a txt file"))
            continue
        places = _places(posix(entry), bases)
        inside = [place for place in places if files.is_inside(place)]
        place = next((place for place in inside if place.is_dir() or is_regular(place)), None)
        if place is None:
            there = [place for place in places if place not in inside and (place.is_dir() or is_regular(place))]
            why = f"leads out of the data set: {files.outside_text(there[0])[:-1]}" if there else "does not exist"
            missing.append(("outside" if there else "missing-folder", there[0] if there else places[0], why))
            continue
        found = []
        if place.is_dir():
            found = list(image_files(place, files))
        elif place.suffix == ".txt":
            found = [_listed(posix(line), [place.parent, *bases], files) for line in files.read_lines(place)]
        elif place.suffix.lower() in IMAGE_SUFFIXES:
            found = [place]
        images += found
        if not found:
            missing.append(("missing-folder", place, "has no images"))
    return sorted(dict.fromkeys(images)), missing


def _places(entry: str, bases: list[Path]) -> list[Path]:
    """Paths that an entry may mean.

    Exports of Roboflow write "../train/images" for images beside the yaml. That place is tried first, because the folder above may
    contain another export.
    """
    stripped = entry.removeprefix("../")
    entries = [stripped, entry] if stripped != entry else [entry]
    return [Path(os.path.normpath(base / entry)) for entry in entries for base in bases]


def _listed(line: str, bases: list[Path], files: DataFolder) -> Path:
    places = [Path(os.path.normpath(base / line)) for base in bases]
    return next((place for place in places if files.is_file(place)), next(filter(is_regular, places), places[0]))
