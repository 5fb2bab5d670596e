"""Images and COCO annotations -> model inputs; model outputs -> detections. On torchvision."""

from transformers.models.deformable_detr.image_processing_deformable_detr import (
    DeformableDetrImageProcessor,
    DeformableDetrImageProcessorKwargs,
)

from .image_processing_mixin import DinoDetrProcessingMixin


class DinoDetrImageProcessorKwargs(DeformableDetrImageProcessorKwargs, total=False):
    """The settings of Deformable DETR's image processor."""


class DinoDetrImageProcessor(DinoDetrProcessingMixin, DeformableDetrImageProcessor):
    """Resizes to a shortest side of 800 and a longest of at most 1333, normalises with ImageNet's mean and deviation, pads.

    Images may have any mode with 8 bits per channel. Others are refused, but what opens files by the library's `load_image`
    (`pipeline`, and the PIL processor given a path) turns 16-bit grey into white before it gets here.

    Annotations are COCO's, {"image_id": int, "annotations": [{"bbox": (x, y, w, h) in pixels, "category_id": index in [0, K),
    ...}]}; `labels` then are those that the model wants: boxes cut off at the border, without crowds and without boxes of no
    size.
    """

    valid_kwargs = DinoDetrImageProcessorKwargs


__all__ = ["DinoDetrImageProcessor"]
