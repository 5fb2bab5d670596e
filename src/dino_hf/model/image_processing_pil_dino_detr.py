"""The image processor on PIL and NumPy, for machines without torchvision."""

from transformers.models.deformable_detr.image_processing_pil_deformable_detr import (
    DeformableDetrImageProcessorKwargs,
    DeformableDetrImageProcessorPil,
)

from .image_processing_mixin import DinoDetrProcessingMixin


class DinoDetrImageProcessorKwargs(DeformableDetrImageProcessorKwargs, total=False):
    """The settings of Deformable DETR's image processor, and two more.

    nms: non-maximum suppression of detections, see `read_nms`.
    canvas_value: value of the pixels beside the image on a square canvas, see `DinoDetrProcessingMixin.canvas_side`.
    """

    nms: dict | None
    canvas_value: int | None


class DinoDetrImageProcessorPil(DinoDetrProcessingMixin, DeformableDetrImageProcessorPil):
    """As `DinoDetrImageProcessor`. Pixels can differ slightly, because two implementations of resizing round differently."""

    valid_kwargs = DinoDetrImageProcessorKwargs


__all__ = ["DinoDetrImageProcessorPil"]
