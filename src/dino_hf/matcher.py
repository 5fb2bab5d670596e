"""Which prediction answers for which target: Hungarian matching of all layers and images at once."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import is_scipy_available

from .box_ops import cxcywh_to_xyxy, generalized_iou
from .targets import Targets

if is_scipy_available():
    from scipy.optimize import linear_sum_assignment


class Matches(NamedTuple):
    """Which query answers for which target, over all layers and images. Four index vectors of length M."""

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor  # index into the T targets of the whole batch


class CostWeights(NamedTuple):
    """Weights of the matching cost."""

    classes: float
    l1: float
    giou: float


@torch.no_grad()
def matching_cost(
    logits: Tensor, boxes: Tensor, targets: Targets, weights: CostWeights, alpha: float, gamma: float = 2.0
) -> Tensor:
    """Cost of every pair of a prediction and a target of its image (arXiv:2010.04159, app. A.2).

    Args:
        logits, boxes: (D, B, Q, K) and (D, B, Q, 4), float32.
        alpha, gamma: of the focal loss, whose positive minus negative term is the cost of a class.
    Returns:
        (D, B, Q, M), M being the largest number of targets in an image; beyond an image's own number it means nothing.
    """
    num_layers, batch_size, num_queries, _ = logits.shape
    largest = max(targets.counts, default=0)
    where = targets.image, targets.position
    labels = targets.class_labels.new_zeros(batch_size, largest)  # (B, M)
    labels[where] = targets.class_labels
    target_boxes = targets.boxes.new_zeros(batch_size, largest, 4)  # (B, M, 4)
    target_boxes[where] = targets.boxes

    prob = logits.gather(-1, labels[None, :, None].expand(num_layers, -1, num_queries, -1)).sigmoid()  # (D, B, Q, M)
    positive = alpha * (1 - prob) ** gamma * -(prob + 1e-8).log()
    negative = (1 - alpha) * prob**gamma * -(1 - prob + 1e-8).log()
    l1 = (boxes[..., None, :] - target_boxes[:, None]).abs().sum(-1)  # (D, B, Q, M)
    giou = generalized_iou(cxcywh_to_xyxy(boxes)[..., None, :], cxcywh_to_xyxy(target_boxes)[:, None])
    return weights.classes * (positive - negative) + weights.l1 * l1 - weights.giou * giou


def match(logits: Tensor, boxes: Tensor, targets: Targets, weights: CostWeights, alpha: float) -> Matches:
    """The cheapest one-to-one assignment of each layer and image; with more targets than queries, some stay unmatched.

    Args:
        logits, boxes: (D, B, Q, K) and (D, B, Q, 4), float32.
    Raises:
        ValueError: predictions that are not finite.
        ImportError: scipy is not installed.
    """
    if not is_scipy_available():
        raise ImportError("Matching predictions with targets needs scipy: pip install scipy.")
    device = logits.device
    cost = matching_cost(logits, boxes, targets, weights, alpha)  # (D, B, Q, M)
    is_finite = logits.isfinite().all(-1) & boxes.isfinite().all(-1)  # (D, B, Q)
    # The last column carries what is wrong with a query to the host, in the one copy that there is.
    cost = torch.cat([cost, torch.where(is_finite, 0.0, torch.nan)[..., None]], dim=-1).cpu()
    ends = torch.tensor(targets.counts).cumsum(0).tolist()
    rows = []
    for layer, layer_cost in enumerate(cost):
        for image, (image_cost, count, end) in enumerate(zip(layer_cost, targets.counts, ends, strict=True)):
            is_finite, image_cost = image_cost[:, -1].isfinite(), image_cost[:, :count]  # (Q), (Q, T_image)
            if not is_finite.all():
                raise ValueError(
                    f"The predictions of layer {layer} for image {image} are NaN or infinite, so they cannot be matched with "
                    "targets. Check pixel_values for NaN; if they are fine, training has diverged: lower the learning rate, clip "
                    "gradients at 0.1 as the paper does, and prefer bfloat16 to float16."
                )
            query, target = (torch.as_tensor(index) for index in linear_sum_assignment(image_cost.numpy()))
            place = torch.tensor([layer, image])[:, None].expand(-1, len(query))  # (2, M_image)
            rows.append(torch.cat([place, query[None], target[None] + end - count]))  # (4, M_image)
    index = torch.cat(rows, dim=1) if rows else torch.zeros(4, 0, dtype=torch.long)
    return Matches(*index.to(device, torch.long))


def repeat_matches(matches: Matches, num_layers: int) -> Matches:
    """The same matches in each of `num_layers` layers; their `layer` must be all zero."""
    layer = torch.arange(num_layers, device=matches.layer.device).repeat_interleave(len(matches.layer))
    return Matches(layer, *(index.repeat(num_layers) for index in matches[1:]))
