"""The image processor on torchvision: images and COCO annotations -> model inputs; model outputs -> detections."""

from transformers.models.deformable_detr.image_processing_deformable_detr import (
    DeformableDetrImageProcessor,
    DeformableDetrImageProcessorKwargs,
)

from .image_processing_mixin import DinoDetrProcessingMixin


class DinoDetrImageProcessorKwargs(DeformableDetrImageProcessorKwargs, total=False):
    """The settings of Deformable DETR's image processor, and two more.

    nms: non-maximum suppression of detections, see `read_nms`.
    canvas_value: value of the pixels beside the image on a square canvas, see `DinoDetrProcessingMixin.canvas_side`.
    """

    nms: dict | None
    canvas_value: int | None


class DinoDetrImageProcessor(DinoDetrProcessingMixin, DeformableDetrImageProcessor):
    """Resizes images to a shortest side of 800 and a longest side of at most 1333, normalises with ImageNet's statistics, pads.

    Images may have any mode with 8 bits per channel; other images raise an error. The library's `load_image`, which the PIL
    processor uses for paths, converts 16-bit grey to white before this check.

    Annotations have COCO's form, {"image_id": int, "annotations": [{"bbox": (x, y, w, h) in pixels, "category_id": index in [0, K),
    ...}]}. The model takes the resulting `labels`: boxes are clipped to the image; crowds and empty boxes are left out.
    """

    valid_kwargs = DinoDetrImageProcessorKwargs


__all__ = ["DinoDetrImageProcessor"]
