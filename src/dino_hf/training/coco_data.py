"""Transform and collator: rows of a data set -> batches for the model."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..common.images import to_rgb
from ..data.load import load_coco
from ..data.rows import CocoData, check_image_size, visible_side
from ..data.tiled_data import row_name
from ..model.image_processing_mixin import pad_images
from ..model.targets import PADDING_LABEL
from .augmentation import Augmentation, augment, augment_by
from .own_augmentation import OwnAugmentation

__all__ = ["CocoData", "DetectionCollator", "DetectionTransform", "load_coco"]


def _num_inside(image, objects: dict[str, list]) -> int:
    """Number of boxes that overlap the image, without crowds."""
    boxes = zip(objects["bbox"], objects["iscrowd"], strict=True)
    return sum(not iscrowd and visible_side(box, image.width, image.height) > 0 for box, iscrowd in boxes)


class DetectionTransform:
    """Rows of a `CocoData` -> inputs of the model, not padded. Use it as `dataset.with_transform(DetectionTransform(processor))`.
    `Trainer` then needs `remove_unused_columns=False`, otherwise it removes the images.

    The augmentation of an image depends only on seed, epoch and image id. It does not depend on the worker, the process, the order
    of images or earlier random numbers, so a resumed run repeats it. Call `set_epoch` at the start of each epoch; otherwise all
    epochs have the same augmentation.

    Args:
        image_processor: a `DinoDetrImageProcessor`, or another image processor with its interface.
        augmentation: augmentation of training images. It sets the image size, and the image processor only rescales and
            normalises. If the image processor has a canvas, images are at most as large as the canvas, and get the same padding as
            in inference. None: the image processor resizes, as in inference.
        seed: random seed of the augmentation.
        own: the user's augmentation, applied before `augmentation`.
    """

    def __init__(
        self,
        image_processor,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        own: OwnAugmentation | None = None,
    ):
        if own is not None and augmentation is None:
            raise ValueError("own=... is applied before an augmentation, so augmentation must be given too.")
        self.own = own
        self.image_processor = image_processor
        side = getattr(image_processor, "canvas_side", None)
        augmentation = augmentation if augmentation is None or side is None else augmentation.fitted(side)
        self.augmentation = augmentation
        self.seed = seed
        self._transforms = None if augmentation is None else augmentation.transforms(pads_jitter=side is None)
        # In shared memory, so that `set_epoch` reaches workers that are running.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __deepcopy__(self, memo):
        # `datasets` copies the transform with every change of columns, and `set_epoch` must reach the copies too.
        return copy.copy(self)

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._epoch.share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the augmentation, in this object, its copies and running workers of a `DataLoader`."""
        self._epoch.fill_(int(epoch))

    def augment(self, image_id: int, image, objects: dict[str, list]) -> tuple[Tensor, dict[str, list]]:
        """Augment one image as in the current epoch.

        Args:
            image: PIL image of the annotated size.
            objects: `category`, `bbox`, `area`, `iscrowd`, as in a row of a `CocoData`.
        Returns:
            (3, h, w) uint8 pixels; objects in these pixels, with crowds.
        """
        convert_rgb = getattr(self.image_processor, "do_convert_rgb", None)
        pixels = torch.as_tensor(self.image_processor.process_image(image, do_convert_rgb=convert_rgb))
        if self.augmentation is None:
            return pixels, objects
        if self.own is not None:
            pixels, objects = augment_by(self.own, pixels, objects, seed=(self.seed, int(self._epoch), image_id, 1))
        return augment(self._transforms, pixels, objects, seed=(self.seed, int(self._epoch), image_id))

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """
        Args:
            rows: columns as lists.
        Returns:
            `pixel_values`, each (3, h, w), and `labels`, each a dictionary of tensors: boxes relative to the augmented image, or to
            the canvas, and `orig_size` of the original image. An augmented image may have no boxes.
        Raises:
            ValueError: the image has another size than annotated, or a box lies outside of it.
        """
        samples = {"pixel_values": [], "labels": []}
        columns = (rows[name] for name in ("image_id", "image", "width", "height", "objects"))
        nothing = [None] * len(rows["image_id"])
        tiles = (rows.get("source_id", nothing), rows.get("tile", nothing))
        for image_id, image, width, height, objects, *tile in zip(*columns, *tiles, strict=True):
            name = row_name(image_id, *tile)
            check_image_size(name, image, (width, height))
            if image.mode != "RGB":  # only in rows that are not from `load_data`
                image = to_rgb(image)
            try:
                if self.augmentation is None:
                    pixel_values, labels = self._process(image_id, image, objects)
                    num_inside = len(labels["class_labels"])
                else:
                    pixels, changed = self.augment(image_id, image, objects)
                    pixel_values, labels = self._process(
                        image_id, pixels, changed, do_resize=False, input_data_format="channels_first"
                    )
                    labels.setdefault("size", labels["orig_size"])  # with a canvas, `size` is its size
                    labels["orig_size"] = torch.tensor([image.height, image.width])
                    num_inside = _num_inside(
                        image, objects
                    )  # checked on the original image: a box outside of a crop is not an error
            except ValueError as error:
                error.add_note(f"This is image {name}.")
                raise
            if lost := objects["iscrowd"].count(0) - num_inside:
                raise ValueError(
                    f"Image {name} is {image.width} wide and {image.height} high, and {lost} of its boxes are completely "
                    f"outside: {objects['bbox']}. Boxes must be (x, y, width, height) in pixels of the image."
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
            do_pad=False,  # images of a batch differ in size; the collator pads them
            return_tensors="pt",
            **settings,
        )
        return sample["pixel_values"][0], dict(sample["labels"][0])


class DetectionCollator:
    """Samples of `DetectionTransform` -> a batch. Images are padded at the right and bottom.

    Labels become padded tensors, because `Trainer` cannot gather lists of dictionaries over batches and processes.
    """

    def __call__(self, samples: list[dict]) -> dict[str, Tensor | dict[str, Tensor]]:
        """
        Returns:
            pixel_values (B, 3, h, w), pixel_mask (B, h, w) 1 on the image, and labels: class_labels (B, M) padded with -100,
            boxes (B, M, 4), image_id (B), orig_size (B, 2) as (height, width).
        """
        pixel_values, pixel_mask = pad_images([sample["pixel_values"] for sample in samples])
        return {
            "pixel_values": pixel_values,
            "pixel_mask": pixel_mask,
            "labels": pad_labels([sample["labels"] for sample in samples]),
        }


def pad_labels(labels: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Labels of single images -> padded tensors of a batch, as `DetectionCollator` returns them.

    `image_id` and `orig_size` are left out if an image has none. Other entries are dropped.
    """
    batch = {
        "class_labels": pad_sequence(
            [entry["class_labels"] for entry in labels], batch_first=True, padding_value=PADDING_LABEL
        ),
        "boxes": pad_sequence([entry["boxes"] for entry in labels], batch_first=True),
    }
    if all("image_id" in entry for entry in labels):
        batch["image_id"] = torch.cat([torch.as_tensor(entry["image_id"]).reshape(1) for entry in labels])
    if all("orig_size" in entry for entry in labels):
        batch["orig_size"] = torch.stack([torch.as_tensor(entry["orig_size"]) for entry in labels])
    return batch
