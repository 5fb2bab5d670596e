"""The object-detection pipeline, which also accepts batches of images of different sizes."""

import base64
import os
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.object_detection import ObjectDetectionPipeline

from ..common.image_origins import read_image as read_from_anywhere
from ..common.images import read_image
from ..model.image_processing_mixin import DinoDetrProcessingMixin
from ..model.nms import with_candidates

TASK = "object-detection"
_NO_SCORE = -1e4  # logit of padding queries; their score is 0


class DinoDetrObjectDetectionPipeline(ObjectDetectionPipeline):
    """The library's pipeline, which needs images of one size in a batch, extended to images of any size.

    With our image processor, the model runs on images of equal size together. Nothing is padded, so the scores of an image do not
    depend on its batch. With any other image processor, this is the library's pipeline.

    `top_k` limits the number of detections per image. The default is 300, or the number of queries if that is higher. Non-maximum
    suppression leaves at most as many detections as it has candidates; a `top_k` above 300 raises that number.
    """

    def _sanitize_parameters(self, top_k: int | None = None, **kwargs):
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if top_k is not None:
            if not self._is_ours():
                raise ValueError("top_k needs the image processor of DINO; leave it out.")
            postprocess["top_k"] = top_k
        return preprocess, forward, postprocess

    def preprocess(self, image, timeout: float | None = None):
        """As in the library, but the image is in a list, because the library batches lists without joining them.

        With our image processor, images are read as in training. The library would show colours hidden by transparency, turn
        16-bit grey into white, and start Ghostscript for EPS.
        """
        if self._is_ours():
            image = _read(image)
        inputs = super().preprocess(image, timeout)
        if self._is_ours():
            for name in {
                "pixel_values",
                "pixel_mask",
            } & inputs.keys():  # an image processor with a canvas gives no mask
                inputs[name] = list(inputs[name])
        return inputs

    def _forward(self, model_inputs):
        if not self._is_ours():
            return super()._forward(model_inputs)
        images = _flat(model_inputs["pixel_values"])
        masks = _flat(model_inputs["pixel_mask"]) if "pixel_mask" in model_inputs else None
        outputs: dict[int, tuple[Tensor, Tensor]] = {}  # image number -> logits (Q, K), boxes (Q, 4)
        for shape in dict.fromkeys(image.shape for image in images):
            numbers = [number for number, image in enumerate(images) if image.shape == shape]
            found = self.model(
                pixel_values=torch.stack([images[number] for number in numbers]),
                pixel_mask=None if masks is None else torch.stack([masks[number] for number in numbers]),
            )
            outputs |= dict(zip(numbers, zip(found.logits, found.pred_boxes, strict=True), strict=True))
        logits, boxes = zip(*(outputs[number] for number in range(len(images))), strict=True)
        joined = {"logits": _join(logits, _NO_SCORE), "pred_boxes": _join(boxes, 0.0)}
        return type(found)({"target_size": model_inputs["target_size"], **joined})

    def postprocess(self, model_outputs, threshold: float = 0.5, top_k: int | None = None):
        if not self._is_ours():
            return super().postprocess(model_outputs, threshold)
        num_queries = model_outputs["logits"].shape[1]
        nms = None if top_k is None else with_candidates(self.image_processor.nms, top_k, num_queries)
        top_k = max(300, num_queries) if top_k is None else top_k
        (found,) = self.image_processor.post_process_object_detection(
            model_outputs, threshold, model_outputs["target_size"], top_k=top_k, nms=nms
        )
        names = [self.model.config.id2label[label] for label in found["labels"].tolist()]
        boxes = [self._get_bounding_box(box) for box in found["boxes"]]
        columns = zip(found["scores"].tolist(), names, boxes, strict=True)
        return [{"score": score, "label": label, "box": box} for score, label, box in columns]

    def _is_ours(self) -> bool:
        return isinstance(self.image_processor, DinoDetrProcessingMixin)


def _read(image):
    """Read a path, a URL, base64 text or a Pillow image as RGB. Other values are returned; the library raises an error."""
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return read_from_anywhere(image)
    if isinstance(image, str) and not os.path.isfile(image):
        try:
            image = base64.b64decode(image.removeprefix("data:").partition("base64,")[2] or image, validate=True)
        except ValueError:
            return image
    return read_image(image) if isinstance(image, str | bytes | Path | Image.Image) else image


def _flat(images: list[Tensor] | list[list[Tensor]]) -> list[Tensor]:
    """Images of one input or of a batch of inputs, as one list."""
    return [image for item in images for image in (item if isinstance(item, list) else [item])]


def _join(values: tuple[Tensor, ...], fill: float) -> Tensor:
    """Join B tensors (q, ...) to (B, Q, ...), padded with `fill`: small images have fewer queries."""
    joined = values[0].new_full((len(values), max(map(len, values)), *values[0].shape[1:]), fill)
    for row, value in zip(joined, values, strict=True):
        row[: len(value)] = value
    return joined


# The library's `register_pipeline` does the same but gives a warning.
PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = DinoDetrObjectDetectionPipeline
