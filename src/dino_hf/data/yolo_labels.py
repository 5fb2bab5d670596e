"""Images of YOLO data with their txt files, read as Ultralytics reads them."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..common.images import open_image, upright_size
from ..common.regular_files import is_regular, read_text
from ..common.values import short_repr
from .files import DataFolder
from .raw import Problem, RawSplit

_PHOTOS = {".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".avif"}  # others are without loss, as masks must be
_THREADS = 8  # headers of images are read: mostly waiting, on a disk of the network


def label_file(image: Path) -> Path:
    """The txt of an image: with the last folder `images` of its path replaced by `labels`, or beside it."""
    parts = image.parts
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            opposite = Path(*parts[:index], "labels", *parts[index + 1 :]).with_suffix(".txt")
            return opposite if is_regular(opposite) else image.with_suffix(".txt")
    return image.with_suffix(".txt")


def without_masks(paths: list[Path]) -> tuple[list[Path], list[str]]:
    """Images without those that have their txt in common with a photo, which are masks of it; and a note that names them.

    1.jpg and 1.png both have 1.txt. Of two photos none is left out: they are an image and its copy.
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
            f"{len(masks)} images have the name of a photo beside them, and so the same txt; they are passed over as masks. The "
            f"first is {min(masks)}. Give it a name of its own if it is not a mask."
        )
    if shared:
        names = " and ".join(map(str, shared[0][:2]))
        notes.append(
            f"Images of one name have one txt, so all get its boxes: {names}; there are {len(shared)} such groups."
        )
    return [path for path in paths if path not in masks], notes


def read_labels(
    name: str, yaml_file: Path, paths: list[Path], has_keypoints: bool, files: DataFolder, problems: list[Problem]
) -> RawSplit:
    """One split, of these images; adds to `problems`.

    Args:
        yaml_file: the yaml or the list of names; file names are relative to its folder where they can be.
        has_keypoints: after the box of each line.
        files: of the data set. An image whose txt lies outside of it is left out.
    """
    if name != "test" and not any(is_regular(label_file(path)) for path in paths):
        message = (
            f"None of the images of {name} has a txt, which must be beside it, or in a folder labels if it is in one called "
            f"images; the first image is {paths[0]}."
        )
        problems.append(Problem("missing-file", f"{yaml_file}: {name}", message))
    root = Path(os.path.commonpath([yaml_file.absolute().parent, paths[0]]))
    images, annotations = [], []
    with ThreadPoolExecutor(_THREADS) as pool:
        read = pool.map(lambda path: _read_image(path, has_keypoints, files), paths)
        for image_id, (path, (size, boxes, own_problems)) in enumerate(zip(paths, read, strict=True), start=1):
            problems += own_problems
            if boxes is None:
                continue
            width, height = size
            file_name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
            images.append({"id": image_id, "file_name": file_name, "width": width, "height": height, "path": path})
            annotations += [{"image_id": image_id, **box} for box in boxes]
    return RawSplit(name, yaml_file, images, annotations)


def labels_without_image(splits: dict[str, RawSplit], files: DataFolder) -> list[str]:
    """A note, if folders of labels have txt files with lines for images that are in no split."""
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


def _read_image(path: Path, has_keypoints: bool, files: DataFolder) -> tuple[tuple, list[dict] | None, list[Problem]]:
    """Size, boxes and problems of one image; None instead of boxes: its txt must not be read."""
    size = (None, None)
    problems = []
    labels = label_file(path)
    if is_regular(labels) and not files.is_inside(labels):
        message = f"The image {path} is left out, as {files.outside_text(labels)}"
        return size, None, [Problem("outside", str(labels), message)]
    if files.is_file(path):  # what is missing is found with the images of all formats
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
        where = f"{labels.parent.name}/{labels.name}, line {number}"
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
            boxes.append({"category_id": category_id, "bbox": _in_pixels(box, *size), "where": where})
    return size, boxes, problems


def _read_line(values: list[str], has_keypoints: bool) -> tuple[int, list[float]]:
    """Class number and (centre x, centre y, width, height), relative to the image."""
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
    """(centre x, centre y, width, height), relative -> (x, y, width, height) in pixels."""
    x, y, width, height = box
    return [(x - width / 2) * image_width, (y - height / 2) * image_height, width * image_width, height * image_height]
