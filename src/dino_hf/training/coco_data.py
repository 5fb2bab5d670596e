"""A folder of images with a COCO json -> batches for the model."""

import copy
import json
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset, Features, Image, List, Value
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..targets import PADDING_LABEL
from .augmentation import SMALLEST_SIDE, Augmentation, augment


class _ImageFile(Image):
    """Of `datasets`, which reads images before any transform sees them: it does not say which file is damaged."""

    def decode_example(self, value, token_per_repo_id=None):
        try:
            return super().decode_example(value, token_per_repo_id)
        except Exception as error:  # those of Pillow have no common type
            path = value.get("path") if isinstance(value, dict) else None
            raise OSError(
                f"{path or 'An image'} cannot be read, {type(error).__name__}: {error}; it may be damaged: copy it anew, or take "
                "its entry and annotations out of the json."
            ) from error


_FEATURES = Features(
    {
        "image_id": Value("int64"),
        "image": _ImageFile(),
        "width": Value("int64"),
        "height": Value("int64"),
        "objects": {
            "category": List(Value("int64")),
            "bbox": List(List(Value("float64"), length=4)),
            "area": List(Value("float64")),
            "iscrowd": List(Value("int64")),
        },
    }
)


class CocoData(NamedTuple):
    """A data set and its class space."""

    # image_id, image, width and height (None where the json has none), objects: {category (index), bbox (x, y, w, h) in
    # pixels, area, iscrowd}
    dataset: Dataset
    id2label: dict[int, str]  # class index of the model, 0 to K - 1, -> name
    category_ids: list[int]  # class index -> original category id of the json, which may have gaps
    name: str | None = None  # in a model card


def load_coco(annotation_file: str | Path, image_dir: str | Path, like: CocoData | None = None) -> CocoData:
    """Read COCO annotations. Categories are numbered 0 to K - 1 in the order of their original ids.

    A box that sticks out of its image is kept as it is; one of no size is left out, of training and evaluation, with a warning.

    Args:
        annotation_file: json with `images`, `annotations` and `categories`.
        image_dir: folder that the `file_name`s are relative to.
        like: the training data, whose categories these data must have (they may lack some).
    Returns:
        the data in Arrow form; images are read when they are asked for.
    Raises:
        FileNotFoundError: the json or an image is missing.
        ValueError: what is wrong with the json, and in which entry.
    """
    annotation_file, image_dir = Path(annotation_file), Path(image_dir)
    content = _read_json(annotation_file)
    names = _unique(content["categories"], "category", {"id": int, "name": str}, annotation_file)
    names = {category_id: entry["name"] for category_id, entry in names.items()}
    if len(set(names.values())) < len(names):
        raise ValueError(
            f"{annotation_file} has categories of the same name: {sorted(names.values())}; names must differ."
        )
    category_ids = sorted(names) if like is None else like.category_ids
    if not category_ids:
        raise ValueError(f"{annotation_file} has no categories; each needs an id and a name.")
    id2label = (
        {index: names[category_id] for index, category_id in enumerate(category_ids)} if like is None else like.id2label
    )
    known = {category_id: id2label[index] for index, category_id in enumerate(category_ids)}
    if others := {category_id: name for category_id, name in names.items() if known.get(category_id) != name}:
        raise ValueError(
            f"{annotation_file} has the categories {others}, which the training data do not have: {known}."
        )
    index_of = {category_id: index for index, category_id in enumerate(category_ids)}

    images = _unique(content["images"], "image", {"id": int, "file_name": str}, annotation_file)
    if not images:
        raise ValueError(f"{annotation_file} lists no images.")
    for image in images.values():
        if not (image_dir / image["file_name"]).is_file():
            raise FileNotFoundError(f"{image_dir / image['file_name']}, listed in {annotation_file}, does not exist.")
    sizes = {image_id: _size(image, f"{annotation_file}: image {image_id}") for image_id, image in images.items()}

    objects = {image_id: {name: [] for name in _FEATURES["objects"]} for image_id in images}
    without_size = []
    for number, entry in enumerate(content["annotations"]):
        where = f"{annotation_file}: annotations[{number}]"
        _check(entry, {"image_id": int, "category_id": int, "bbox": list}, where)
        if entry["category_id"] not in index_of:
            raise ValueError(f"{where} has category_id={entry['category_id']}, but the categories are {category_ids}.")
        if entry["image_id"] not in images:
            raise ValueError(f"{where} has image_id={entry['image_id']}, which is not among the images.")
        box = entry["bbox"]
        if len(box) != 4 or not all(isinstance(value, int | float) and math.isfinite(value) for value in box):
            raise ValueError(f"{where} has bbox={box}; it must be (x, y, width, height) in pixels.")
        if not _has_size(box, sizes[entry["image_id"]], where):
            without_size.append(f"annotations[{number}] with bbox={box}")
            continue
        area = entry.get("area")
        of_image = objects[entry["image_id"]]
        of_image["category"].append(index_of[entry["category_id"]])
        of_image["bbox"].append(box)
        of_image["area"].append(box[2] * box[3] if area is None else area)
        of_image["iscrowd"].append(entry.get("iscrowd") or 0)
    if without_size:
        warnings.warn(
            f"{annotation_file}: {len(without_size)} boxes have no size and are left out of training and evaluation; the first is "
            f"{without_size[0]}.",
            stacklevel=2,
        )
    columns = {
        "image_id": list(images),
        "width": [width for width, _ in sizes.values()],
        "height": [height for _, height in sizes.values()],
        "image": [str(image_dir / image["file_name"]) for image in images.values()],
        "objects": list(objects.values()),
    }
    name = "/".join(annotation_file.parts[-2:])
    return CocoData(Dataset.from_dict(columns, features=_FEATURES), id2label, category_ids, name)


def _size(image: dict, where: str) -> tuple[int, int] | tuple[None, None]:
    """Width and height of an image, if the json has them."""
    size = image.get("width"), image.get("height")
    if None in size:
        return None, None
    if not all(isinstance(side, int | float) and side > 0 for side in size):
        raise ValueError(f"{where} has width={size[0]!r} and height={size[1]!r}; they must be numbers of pixels.")
    return int(size[0]), int(size[1])


def _has_size(box: list[float], image_size: tuple[int, int] | tuple[None, None], where: str) -> bool:
    """Whether there is something of a box in its image. Raises ValueError where there should be."""
    width, height = box[2:]
    if width < 0 or height < 0:
        raise ValueError(
            f"{where} has bbox={box}, of negative size; it must be (x, y, width, height) in pixels, not two corners."
        )
    if min(width, height) < SMALLEST_SIDE:
        return False
    image_width, image_height = image_size if None not in image_size else (math.inf, math.inf)
    visible = _visible_side(box, image_width, image_height)
    if visible <= 0:
        raise ValueError(
            f"{where} has bbox={box}, wholly outside of its image, which is {image_width} wide and {image_height} high; it must be "
            "(x, y, width, height) in pixels of the image as listed: scale it as the image was scaled, or remove it."
        )
    return visible >= SMALLEST_SIDE


def _visible_side(box: list[float], image_width: float, image_height: float) -> float:
    """The shorter side of what is inside the image, at most 0 if nothing is."""
    x, y, width, height = box
    return min(min(x + width, image_width) - max(x, 0), min(y + height, image_height) - max(y, 0))


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"There is no annotation file {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid json: {error}.") from error
    parts = ("images", "annotations", "categories")
    wrong = [part for part in parts if not isinstance(content, dict) or not isinstance(content.get(part), list)]
    if wrong:
        raise ValueError(f"{path} is not in COCO format: it has no list of {wrong}.")
    return content


def _check(entry: dict, fields: dict[str, type], where: str) -> None:
    for name, kind in fields.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
            value = entry.get(name) if isinstance(entry, dict) else entry
            raise ValueError(f"{where} has {name}={value!r}, but needs {name} as {kind.__name__}.")


def _unique(entries: list[dict], kind: str, fields: dict[str, type], path: Path) -> dict[int, dict]:
    """Entries by their id."""
    by_id = {}
    for number, entry in enumerate(entries):
        _check(entry, fields, f"{path}: {kind} {number}")
        if entry["id"] in by_id:
            raise ValueError(f"{path} has two {kind} entries with id={entry['id']}; ids must differ.")
        by_id[entry["id"]] = entry
    return by_id


def _check_image(image_id: int, image, size: tuple[int, int] | tuple[None, None]) -> None:
    """Annotations mean nothing on an image of another size than the json's."""
    if None in size or image.size == size:
        return
    if image.size == size[::-1]:
        cause = (
            "its EXIF orientation turns it, while the annotations are for the pixels as stored: save it without that tag, "
            "or annotate it upright"
        )
    else:
        cause = "it was resized after it was annotated: bring width, height and boxes in the json to its size"
    raise ValueError(
        f"Image {image_id} is {image.width} wide and {image.height} high, but {size[0]} and {size[1]} by its json; probably "
        f"{cause}."
    )


def _num_inside(image, objects: dict[str, list]) -> int:
    """How many boxes, crowds aside, have something inside the image."""
    boxes = zip(objects["bbox"], objects["iscrowd"], strict=True)
    return sum(not iscrowd and _visible_side(box, image.width, image.height) > 0 for box, iscrowd in boxes)


class DetectionTransform:
    """Rows of `load_coco` -> inputs of the model, unpadded. For `dataset.with_transform(DetectionTransform(processor))`;
    `Trainer` then needs `remove_unused_columns=False`, or it takes the images away first.

    What an augmentation does to an image depends on the seed, the epoch and the image's id, and on nothing else: not on the
    worker, the process, the order of images or what was drawn before, so a resumed run repeats it. Call `set_epoch` at the
    start of each epoch, or all are alike.

    Args:
        image_processor: a `DinoDetrImageProcessor`, or another one with its interface.
        augmentation: for training images; the sizes are then its own, while the image processor rescales and normalises. None:
            the image processor's resize, as in inference.
        seed: of the augmentation.
    """

    def __init__(self, image_processor, augmentation: Augmentation | None = None, seed: int = 0):
        self.image_processor = image_processor
        self.augmentation = augmentation
        self.seed = seed
        self._transforms = None if augmentation is None else augmentation.transforms()
        # In shared memory, so that `set_epoch` reaches workers that are running.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __deepcopy__(self, memo):
        # `datasets` copies the transform with every change of columns; epochs must reach the copies too.
        return copy.copy(self)

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._epoch.share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw anew from here on: in this process, in its copies, and in workers of a `DataLoader`, also in running ones."""
        self._epoch.fill_(int(epoch))

    def augment(self, image_id: int, image, objects: dict[str, list]) -> tuple[Tensor, dict[str, list]]:
        """One image as it is in this epoch, (3, h, w) uint8, and its objects in its pixels, those of crowds included.

        Args:
            image: PIL, of the size that boxes are for.
            objects: `category`, `bbox`, `area`, `iscrowd`, as in a row of `load_coco`.
        """
        convert_rgb = getattr(self.image_processor, "do_convert_rgb", None)
        pixels = torch.as_tensor(self.image_processor.process_image(image, do_convert_rgb=convert_rgb))
        if self.augmentation is None:
            return pixels, objects
        return augment(self._transforms, pixels, objects, seed=(self.seed, int(self._epoch), image_id))

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """Columns as lists -> `pixel_values`, each (3, h, w), and `labels`, each a dictionary of tensors: boxes relative to the
        image as it is then, `orig_size` of the image as it was. An augmented image may be left without boxes.

        Raises:
            ValueError: the image has not the size that the json says, or a box lies outside of it.
        """
        samples = {"pixel_values": [], "labels": []}
        columns = (rows[name] for name in ("image_id", "image", "width", "height", "objects"))
        for image_id, image, width, height, objects in zip(*columns, strict=True):
            _check_image(image_id, image, (width, height))
            try:
                if self.augmentation is None:
                    pixel_values, labels = self._process(image_id, image, objects)
                    num_inside = len(labels["class_labels"])
                else:
                    pixels, changed = self.augment(image_id, image, objects)
                    pixel_values, labels = self._process(
                        image_id, pixels, changed, do_resize=False, input_data_format="channels_first"
                    )
                    labels["size"], labels["orig_size"] = labels["orig_size"], torch.tensor([image.height, image.width])
                    num_inside = _num_inside(image, objects)  # of the original: what a crop leaves out is not lost
            except ValueError as error:
                error.add_note(f"This is image {image_id}.")
                raise
            if lost := objects["iscrowd"].count(0) - num_inside:
                raise ValueError(
                    f"Image {image_id} is {image.width} wide and {image.height} high, and {lost} of its boxes lie wholly outside: "
                    f"{objects['bbox']}; they must be (x, y, width, height) in its pixels."
                )
            samples["pixel_values"].append(pixel_values)
            samples["labels"].append(labels)
        return samples

    def _process(self, image_id: int, image, objects: dict[str, list], **settings) -> tuple[Tensor, dict[str, Tensor]]:
        annotations = [
            {"bbox": bbox, "category_id": category, "area": area, "iscrowd": iscrowd}
            for bbox, category, area, iscrowd in zip(
                objects["bbox"], objects["category"], objects["area"], objects["iscrowd"], strict=True
            )
        ]
        sample = self.image_processor(
            images=[image],
            annotations=[{"image_id": image_id, "annotations": annotations}],
            do_pad=False,  # one by one: images of a batch differ in size, the collator pads them
            return_tensors="pt",
            **settings,
        )
        return sample["pixel_values"][0], dict(sample["labels"][0])


class DetectionCollator:
    """Samples of `DetectionTransform` -> a batch: images padded at the right and bottom, labels as padded tensors, which
    `Trainer` can gather over batches and processes (lists of dictionaries it cannot)."""

    def __call__(self, samples: list[dict]) -> dict[str, Tensor | dict[str, Tensor]]:
        """
        Returns:
            pixel_values (B, 3, h, w), pixel_mask (B, h, w) 1 on the image, and labels: class_labels (B, M) padded with -100,
            boxes (B, M, 4), image_id (B), orig_size (B, 2) as (height, width).
        """
        images = [sample["pixel_values"] for sample in samples]
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        pixel_values = images[0].new_zeros(len(images), 3, height, width)
        pixel_mask = torch.zeros(len(images), height, width, dtype=torch.int64)
        for index, image in enumerate(images):
            pixel_values[index, :, : image.shape[1], : image.shape[2]] = image
            pixel_mask[index, : image.shape[1], : image.shape[2]] = 1
        labels = [sample["labels"] for sample in samples]
        return {
            "pixel_values": pixel_values,
            "pixel_mask": pixel_mask,
            "labels": {
                "class_labels": pad_sequence(
                    [entry["class_labels"] for entry in labels], batch_first=True, padding_value=PADDING_LABEL
                ),
                "boxes": pad_sequence([entry["boxes"] for entry in labels], batch_first=True),
                "image_id": torch.cat([entry["image_id"].reshape(1) for entry in labels]),
                "orig_size": torch.stack([entry["orig_size"] for entry in labels]),
            },
        }
