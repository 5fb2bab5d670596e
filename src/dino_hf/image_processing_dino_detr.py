"""Images and COCO annotations -> model inputs; model outputs -> detections. On torchvision."""

from transformers.models.deformable_detr.image_processing_deformable_detr import (
    DeformableDetrImageProcessor,
    DeformableDetrImageProcessorKwargs,
)

from .box_processing import DinoDetrProcessingMixin


class DinoDetrImageProcessorKwargs(DeformableDetrImageProcessorKwargs, total=False):
    """The settings of Deformable DETR's image processor."""


class DinoDetrImageProcessor(DinoDetrProcessingMixin, DeformableDetrImageProcessor):
    """Resizes to a shortest side of 800 and a longest of at most 1333, normalises with ImageNet's mean and deviation, pads.

    Takes images of any mode and COCO annotations, {"image_id": int, "annotations": [{"bbox": (x, y, w, h) in pixels,
    "category_id": index in [0, K), ...}]}; `labels` then are those that the model wants, crowd boxes left out.
    """

    valid_kwargs = DinoDetrImageProcessorKwargs


__all__ = ["DinoDetrImageProcessor"]
