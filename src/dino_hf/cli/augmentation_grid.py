"""Draw training images beside their augmented versions, with the boxes that the model is trained on."""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from ..common.drawing import plot_style, show_boxes
from ..common.free_memory import is_lack_of_memory
from ..data.tiled_data import id_name
from ..model.box_ops import cxcywh_to_xyxy
from ..model.image_processing_dino_detr import DinoDetrImageProcessor
from ..training import CocoData, DetectionTransform
from ..training.augmentation import Augmentation
from ..training.own_augmentation import OwnAugmentation
from ..training.tile_sampler import make_sampler

_CELL = (290, 250)  # width and height of a picture in the grid, in pixels
_DPI = 100


@plot_style()
def save_augmentation_grid(
    path: Path,
    data: CocoData,
    augmentation: Augmentation,
    num_images: int = 4,
    num_samples: int = 4,
    seed: int = 0,
    image_processor=None,
    own: OwnAugmentation | None = None,
) -> None:
    """Draw a grid of images. Each row shows an image as annotated, and then as training sees it in the first epochs.

    Augmented images are the tensors of `DetectionTransform` with the normalisation undone, and boxes are their labels. Crowds are
    no targets; they are drawn at their new places and marked. All images are scaled to one size for the picture, and their titles
    give the width and height that the model gets.

    Args:
        data: images, or tiles of them.
        num_images: number of rows. The seed chooses the images.
        num_samples: number of epochs, from 0 on. Each is a column.
        seed: seed of the choice of images and of the augmentation.
        image_processor: image processor of the trained model. None: a `DinoDetrImageProcessor`.
        own: the user's augmentation, applied before `augmentation`.
    Raises:
        ValueError: an image does not fit its annotations.
        OSError: an image cannot be read, or the picture cannot be written.
    """
    transform = DetectionTransform(image_processor or DinoDetrImageProcessor(), augmentation, seed, own)
    chosen = _choose(data, num_images, seed)
    size = (num_samples + 1) * (_CELL[0] + 10) / _DPI, len(chosen) * (_CELL[1] + 25) / _DPI  # with room for titles
    figure = Figure(figsize=size, layout="constrained", dpi=_DPI)
    grid = figure.subplots(len(chosen), num_samples + 1, squeeze=False)
    for axes, index in zip(grid, chosen, strict=True):
        row = data.dataset[index]
        try:
            _draw(axes[0], f"image {id_name(data, row['image_id'])}", row["image"], row["objects"], data.id2label)
            for epoch, of_epoch in enumerate(axes[1:]):
                transform.set_epoch(epoch)
                _draw(of_epoch, f"epoch {epoch}", *_training_sample(transform, row), data.id2label)
        except (RuntimeError, MemoryError) as error:
            if is_lack_of_memory(error):
                width, height = row["image"].size
                error.add_note(f"This is image {id_name(data, row['image_id'])} of {width} x {height} pixels.")
            raise
    figure.savefig(path, facecolor="white")


def _choose(data: CocoData, num_images: int, seed: int) -> list[int]:
    """Rows to draw. Of tiles, those that an epoch draws: few of them have no boxes."""
    sampler = make_sampler(data, None, seed)
    if sampler is None:
        return torch.randperm(len(data.dataset), generator=torch.Generator().manual_seed(seed))[:num_images].tolist()
    return sampler.draw(sampler.random_numbers())[:num_images].tolist()


def _training_sample(transform: DetectionTransform, row: dict) -> tuple[Image.Image, dict[str, list]]:
    """The image that the model gets for a row of the data, and its objects: the targets, then the crowds."""
    sample = transform({name: [value] for name, value in row.items()})
    pixel_values, labels = sample["pixel_values"][0], sample["labels"][0]
    height, width = pixel_values.shape[1:]
    corners = cxcywh_to_xyxy(labels["boxes"]) * torch.tensor([width, height, width, height])
    bboxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
    objects = {
        "bbox": bboxes.tolist(),
        "category": labels["class_labels"].tolist(),
        "iscrowd": [0] * len(bboxes),
    }
    # The same augmentation again, to get the crowds.
    _, with_crowds = transform.augment(row["image_id"], row["image"], row["objects"])
    for number, iscrowd in enumerate(with_crowds["iscrowd"]):
        if iscrowd:
            for name, values in objects.items():
                values.append(with_crowds[name][number])

    processor = transform.image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return to_pil_image((pixel_values * std + mean).clamp(0, 1)), objects


def _draw(axes: Axes, title: str, image: Image.Image, objects: dict[str, list], names: dict[int, str]) -> None:
    scale = min(_CELL[0] / image.width, _CELL[1] / image.height)
    texts = [
        names[category] + (" (crowd)" if iscrowd else "")
        for category, iscrowd in zip(objects["category"], objects["iscrowd"], strict=True)
    ]
    boxes = [
        (x * scale, y * scale, (x + width) * scale, (y + height) * scale) for x, y, width, height in objects["bbox"]
    ]
    scaled = image.resize([max(1, round(side * scale)) for side in image.size])
    show_boxes(axes, scaled, boxes, objects["category"], texts)
    axes.set_title(f"{title}: {image.width} x {image.height}", fontsize=8)
