"""What DINO does differently from Deformable DETR before and after the model, for either image backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .box_ops import cxcywh_to_xyxy


class DinoDetrProcessingMixin:
    """Mixed into the image processors of the library: labels relative to the unpadded image, and the top 300 detections."""

    do_convert_rgb = True

    def pad(self, image, padded_size, annotation=None, update_bboxes=True, fill=0):
        """As in the library, but boxes and `size` in the annotation stay relative to the image without its padding, which
        is what DINO's reference points and its post-processing are relative to."""
        image, mask, padded = super().pad(image, padded_size, annotation=annotation, update_bboxes=False, fill=fill)
        if padded is not annotation:
            pairs = [(padded, annotation)] if isinstance(padded, dict) else zip(padded, annotation, strict=True)
            for after, before in pairs:
                after["size"] = before.get("size", tuple(image.shape[-2:]))
        return image, mask, padded

    def prepare_annotation(self, image, target, *args, **kwargs):
        """As in the library; objects without `area` or `iscrowd` get the area of their box and 0."""
        if "annotations" in target:
            target = {**target, "annotations": [_complete(entry) for entry in target["annotations"]]}
        return super().prepare_annotation(image, target, *args, **kwargs)

    def post_process_object_detection(
        self,
        outputs,
        threshold: float = 0.5,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        top_k: int = 300,
    ) -> list[dict[str, Tensor]]:
        """The best pairs of a query and a class, without non-maximum suppression (DETR has no use for it).

        Args:
            outputs: with `logits` (B, Q, K) and `pred_boxes` (B, Q, 4).
            threshold: detections with a score of at most this, in [0, 1], are left out.
            target_sizes: (B, 2) or B pairs of (height, width): the size that boxes are scaled to, usually that of the
                original image. None leaves them in [0, 1].
            top_k: at most this many detections of each image.
        Returns:
            for each image `scores` (N,) in [0, 1], highest first; `labels` (N,) in [0, K); `boxes` (N, 4) as
            (x0, y0, x1, y1), float32.
        Raises:
            ValueError: the number of target sizes is not that of images.
        """
        logits, boxes = outputs.logits.float(), outputs.pred_boxes.float()
        if target_sizes is not None and len(target_sizes) != len(logits):
            raise ValueError(
                f"There are {len(target_sizes)} target_sizes for {len(logits)} images; pass one (height, width) per image."
            )
        num_labels = logits.shape[-1]
        scores, index = logits.sigmoid().flatten(1).topk(min(top_k, logits[0].numel()), dim=1)  # (B, N)
        query = (index // num_labels)[..., None].expand(-1, -1, 4)
        boxes = cxcywh_to_xyxy(boxes).gather(1, query)  # (B, N, 4)
        if target_sizes is not None:
            height, width = torch.as_tensor(target_sizes, dtype=torch.float32, device=boxes.device).unbind(1)
            boxes = boxes * torch.stack([width, height, width, height], dim=1)[:, None]
        return [
            {"scores": image_scores[keep], "labels": labels[keep], "boxes": image_boxes[keep]}
            for image_scores, labels, image_boxes, keep in zip(
                scores, index % num_labels, boxes, scores > threshold, strict=True
            )
        ]


def _complete(entry: dict) -> dict:
    if "bbox" not in entry or "category_id" not in entry:
        raise ValueError(
            f"An annotation has the keys {sorted(entry)}, but needs bbox, as (x, y, width, height) in pixels, and category_id."
        )
    if not hasattr(entry["bbox"], "__len__") or isinstance(entry["bbox"], str) or len(entry["bbox"]) != 4:
        raise ValueError(f"An annotation has bbox={entry['bbox']}; it must be (x, y, width, height) in pixels.")
    known = {name: value for name, value in entry.items() if value is not None}
    return {"area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0, **known}
