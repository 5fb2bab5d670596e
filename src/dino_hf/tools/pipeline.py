"""`pipeline("object-detection", ..., batch_size=N)` on images of different sizes."""

from torch import Tensor
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.object_detection import ObjectDetectionPipeline

from ..box_processing import DinoDetrProcessingMixin, pad_images

TASK = "object-detection"


class DinoDetrObjectDetectionPipeline(ObjectDetectionPipeline):
    """The library's, which joins the images of a batch as they are and so needs all of one size. With our image processor, they are
    padded to that of the largest, and the model is told what is padding. With any other, nothing changes."""

    def preprocess(self, image, timeout: float | None = None):
        """As in the library, the image in a list: lists are batched as they are."""
        inputs = super().preprocess(image, timeout)
        if isinstance(self.image_processor, DinoDetrProcessingMixin):
            inputs["pixel_values"] = list(inputs["pixel_values"])
            inputs["pixel_mask"] = list(inputs["pixel_mask"])
        return inputs

    def _forward(self, model_inputs):
        if isinstance(self.image_processor, DinoDetrProcessingMixin):
            images, masks = (_flat(model_inputs[name]) for name in ("pixel_values", "pixel_mask"))
            model_inputs["pixel_values"], model_inputs["pixel_mask"] = pad_images(images, masks)
        return super()._forward(model_inputs)


def _flat(images: list[Tensor] | list[list[Tensor]]) -> list[Tensor]:
    """Of one image, or of a batch."""
    return [image for one in images for image in (one if isinstance(one, list) else [one])]


def register_pipeline() -> None:
    """Have `transformers.pipeline` take this class. `register_pipeline` of the library does the same, with a warning."""
    PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = DinoDetrObjectDetectionPipeline
