"""Outputs of the model -> detections: the part of the image processors that runs after the model."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from .box_ops import cxcywh_to_xyxy
from .canvas import canvas_in_pixels
from .nms import NmsSettings, read_nms, suppress
from .targets import PADDING_LABEL


class PostProcessingMixin:
    """Mixin for the image processors: the best detections of each image, in pixels of the original image."""

    nms: dict | None = None  # non-maximum suppression of detections, see `read_nms`; None: none, as in DINO
    canvas_value: int | None = None  # value of the pixels beside the image on a square canvas, see `canvas_side`

    @property
    def canvas_side(self) -> int | None:
        """Side in pixels of the square that images are placed on, as in models trained with large-scale jitter. None: no canvas.

        It is set by `canvas_value` and `size`, whose edges are both the side. An image is resized until its longer side is as
        long as the canvas, and placed at the top left. The other pixels have `canvas_value` before normalisation. They are not
        masked, and boxes are relative to the canvas.
        """
        return None if self.canvas_value is None else self.size.longest_edge

    def top_detections(
        self,
        outputs,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        top_k: int = 300,
        nms: Mapping | bool | None = None,
    ) -> dict[str, Tensor]:
        """The best pairs of a query and a class, as tensors with one row per image, on the device of the outputs.

        The detections of an image are bit-for-bit independent of the other images in the batch.

        Args:
            outputs, target_sizes, top_k, nms: as in `post_process_object_detection`.
        Returns:
            `scores` (B, N) in [0, 1], highest first; `labels` (B, N) int64 in [0, K); `boxes` (B, N, 4) as (x0, y0, x1, y1),
            float32; `queries` (B, N) int64 in [0, Q). N is top_k, or Q * K if that is less. Where non-maximum suppression leaves
            fewer detections, the last rows have the label -100, the score 0 and an empty box.
        Raises:
            ValueError: target_sizes is not one (height, width) per image, top_k is below 1, or nms is wrong.
        """
        logits, boxes = outputs.logits.float(), outputs.pred_boxes.float()
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1; a high threshold leaves detections out.")
        nms = read_nms(self.nms if nms is None else nms)
        num_queries, num_labels = logits.shape[1:]
        # Image by image: on a CPU, the last bit of a sigmoid depends on the position in the tensor, so also on the batch.
        scores = torch.stack([image.sigmoid() for image in logits.flatten(1)])  # (B, Q * K)
        num_kept = min(top_k, scores.shape[1])
        num_candidates = num_kept if nms is None else min(nms.candidates or num_queries, scores.shape[1])
        scores, index = scores.topk(num_candidates, dim=1)  # (B, N)
        labels, queries = index % num_labels, index // num_labels
        boxes = cxcywh_to_xyxy(boxes).gather(1, queries[..., None].expand(-1, -1, 4))  # (B, N, 4)
        if nms is not None:
            images = [_apply_nms(nms, num_kept, *image) for image in zip(scores, labels, boxes, queries, strict=True)]
            scores, labels, boxes, queries = map(torch.stack, zip(*images, strict=True))
        if target_sizes is not None:
            sizes = _read_sizes(target_sizes, len(logits))
            boxes = boxes * _corners(self.box_units(sizes)).to(boxes.device)
            if self.canvas_side is not None:
                boxes = torch.minimum(boxes.clamp(min=0), _corners(sizes).to(boxes.device))
        return {"scores": scores, "labels": labels, "boxes": boxes, "queries": queries}

    def box_units(self, sizes: Tensor) -> Tensor:
        """The size of the area that boxes in [0, 1] are relative to: of the image, or of the canvas.

        Args:
            sizes: (B, 2) height and width of the original images.
        Returns:
            (B, 2) height and width in pixels of the original images.
        """
        return sizes if self.canvas_side is None else canvas_in_pixels(sizes, self.canvas_side)

    def post_process_object_detection(
        self,
        outputs,
        threshold: float = 0.5,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        top_k: int = 300,
        config: PreTrainedConfig | None = None,
        nms: Mapping | bool | None = None,
    ) -> list[dict[str, Tensor | list[str]]]:
        """The best pairs of a query and a class, after non-maximum suppression if `nms` is set. DINO needs none.

        Args:
            outputs: with `logits` (B, Q, K) and `pred_boxes` (B, Q, 4).
            threshold: only detections with a higher score are returned; in [0, 1].
            target_sizes: (B, 2) tensor or B pairs of (height, width): the size that boxes are scaled to, usually the size of the
                original image. None: boxes stay in [0, 1]. With a canvas, give the size of the original image, not of the
                canvas: boxes are scaled by the canvas, and cut to the image.
            top_k: largest number of detections per image, at least 1. With non-maximum suppression there are at most as many as
                its `candidates`.
            config: configuration of the model; adds class names and category ids to the result.
            nms: non-maximum suppression, a dictionary with `method` and other fields of `NmsSettings`. Soft suppression also
                clamps boxes to the image. None: the setting of this image processor. False: no suppression.
        Returns:
            for each image `scores` (N,) in [0, 1], highest first; `labels` (N,) in [0, K); `boxes` (N, 4) as
            (x0, y0, x1, y1), float32. With `config` also `text_labels`, a list of N names, and, if it has category ids,
            `category_ids` (N,), int64, as in the training annotations.
        Raises:
            ValueError: target_sizes is not one (height, width) per image, top_k is below 1, nms is wrong, or the number of classes
                differs between config and logits.
        """
        _check_classes(config, outputs.logits.shape[-1])
        detections = self.top_detections(outputs, target_sizes, top_k, nms)
        results = [
            {name: detections[name][image, keep] for name in ("scores", "labels", "boxes")}
            for image, keep in enumerate((detections["scores"] > threshold) & (detections["labels"] != PADDING_LABEL))
        ]
        if config is not None:
            category_ids = getattr(config, "category_ids", None)
            for result in results:
                labels = result["labels"].tolist()
                result["text_labels"] = [config.id2label[label] for label in labels]
                if category_ids is not None:
                    ids = [category_ids[label] for label in labels]
                    result["category_ids"] = torch.tensor(ids, dtype=torch.int64, device=result["labels"].device)
        return results


def _apply_nms(
    nms: NmsSettings, num_rows: int, scores: Tensor, labels: Tensor, boxes: Tensor, queries: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Detections of one image after non-maximum suppression, highest score first, filled up to `num_rows` rows.

    Args:
        scores, labels, boxes, queries: (N,), (N,), (N, 4) corners relative to the image, (N,); highest score first.
    """
    if nms.method == "soft":
        boxes = boxes.clamp(0, 1)  # to the image, as Co-DINO does; Stable-DINO compares the boxes as they are
    kept, kept_scores = suppress(nms, scores, labels, boxes)
    count = min(len(kept), num_rows)
    kept, padding = kept[:count], (0, num_rows - count)
    fills = (kept_scores[:count], 0), (labels[kept], PADDING_LABEL), (queries[kept], 0)
    scores, labels, queries = (F.pad(values, padding, value=fill) for values, fill in fills)
    return scores, labels, F.pad(boxes[kept], (0, 0, *padding)), queries


def _check_classes(config: PreTrainedConfig | None, num_labels: int) -> None:
    if config is None:
        return
    num_ids = num_labels if getattr(config, "category_ids", None) is None else len(config.category_ids)
    if config.num_labels != num_labels or num_ids != num_labels:
        found = f"names {config.num_labels} classes"
        if config.num_labels == num_labels:
            found = f"has {num_ids} category_ids"
        raise ValueError(
            f"The logits have {num_labels} classes, but the config {found}; pass the configuration of the same model, "
            "config=model.config."
        )


def _corners(sizes: Tensor) -> Tensor:
    """(B, 2) height and width -> (B, 1, 4) factors or limits of the corners (x0, y0, x1, y1)."""
    return sizes[:, None, [1, 0, 1, 0]]


def _read_sizes(target_sizes: Tensor | Sequence, num_images: int) -> Tensor:
    """Convert a tensor, or a list of tuples or tensors, to (B, 2) float32."""
    try:
        sizes = torch.stack([torch.as_tensor(size, dtype=torch.float32, device="cpu") for size in target_sizes])
    except (TypeError, ValueError, RuntimeError):
        sizes = None
    if sizes is None or sizes.shape != (num_images, 2):
        found = f"are {target_sizes!r:.200}" if sizes is None else f"have the shape {tuple(sizes.shape)}"
        raise ValueError(f"target_sizes must be one (height, width) for each of {num_images} images, but {found}.")
    return sizes
