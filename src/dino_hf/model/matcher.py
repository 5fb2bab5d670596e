"""Hungarian matching of predictions and targets, for all layers and images at once."""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import is_scipy_available

from .box_ops import cxcywh_to_xyxy, generalized_iou
from .targets import Targets

if is_scipy_available():
    from scipy.optimize import linear_sum_assignment


_LARGEST_COST = 2**22  # pairs computed at once: 16 MiB for each of a dozen temporary tensors


class Matches(NamedTuple):
    """Matched queries and targets of all layers and images, as four index vectors of length M."""

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor  # index into the T targets of the whole batch


@dataclass(eq=False)
class DenoisingTargets:
    """The target of each denoising query. Not a tuple, for the same reason as `Targets`."""

    matches: Matches  # matches of one layer
    num_groups: int
    share: float = 1.0  # share of boxes with queries; below 1 if `max_denoising_queries` left out boxes

    def to(self, device: torch.device) -> "DenoisingTargets":
        return DenoisingTargets(Matches(*(index.to(device) for index in self.matches)), self.num_groups, self.share)


class CostWeights(NamedTuple):
    """Weights of the matching cost."""

    classes: float
    l1: float
    giou: float
    # Above 0, the class cost of a pair uses its probability times v to this power, where v is its relative GIoU, see
    # `_position_by_class`: Stable-DINO's position-modulated cost (arXiv:2304.04742), with the power 0.5.
    position_power: float = 0.0


class NonFinitePredictionsError(ValueError):
    """Predictions are NaN or infinite. `layer`: 0 for the encoder's proposals. `image`: index in the batch."""

    def __init__(self, layer: int, image: int):
        super().__init__(
            f"The predictions of layer {layer} for image {image} are NaN or infinite, so they cannot be matched with targets. "
            "Check pixel_values for NaN; if they are fine, training has diverged: lower the learning rate, clip gradients at "
            "0.1 as the paper does, and prefer bfloat16 to float16."
        )
        self.layer, self.image = layer, image


def finite_images(logits: Tensor, boxes: Tensor) -> Tensor:
    """(D, B, Q, K), (D, B, Q, 4) -> (D, B) True where all predictions of a layer and image are finite."""
    # A sum is the fastest check: it keeps NaN and infinity. Predictions whose sum overflows are unusable as well.
    return (logits.detach().sum(dim=(2, 3)) + boxes.detach().sum(dim=(2, 3))).isfinite()


@torch.no_grad()
def matching_cost(
    logits: Tensor, boxes: Tensor, targets: Targets, weights: CostWeights, alpha: float, gamma: float = 2.0
) -> Tensor:
    """Cost of every pair of a prediction and a target of its image (arXiv:2010.04159, app. A.2).

    Args:
        logits, boxes: (D, B, Q, K) and (D, B, Q, 4), float32.
        alpha, gamma: settings of the focal loss. The class cost is its positive term minus its negative term.
    Returns:
        (D, B, M + 1, Q), where M is the largest number of targets of an image. Rows beyond an image's number of targets are
        undefined. The last row is NaN if a prediction of the layer and image is not finite. So one copy to the host is enough for
        the costs and this check.
    """
    num_layers, batch_size, num_queries, _ = logits.shape
    largest = max(targets.counts, default=0)
    where = targets.image, targets.position
    labels = targets.class_labels.new_zeros(batch_size, largest)  # (B, M)
    labels[where] = targets.class_labels
    target_boxes = targets.boxes.new_zeros(batch_size, largest, 4)  # (B, M, 4)
    target_boxes[where] = targets.boxes
    labels = labels[None, :, :, None].expand(num_layers, -1, -1, num_queries)  # (D, B, M, Q)
    # Queries are the last axis: this makes inner loops long, and scipy is faster with fewer rows than columns.
    class_logits, columns = logits.transpose(-1, -2), boxes.transpose(-1, -2)  # (D, B, K, Q), (D, B, 4, Q)
    corners = cxcywh_to_xyxy(boxes).transpose(-1, -2).contiguous()
    rows = target_boxes[..., None]  # (B, M, 4, 1)
    target_corners = cxcywh_to_xyxy(target_boxes)[:, :, None]  # (B, M, 1, 4)

    # With many pairs, layers are computed one by one: temporary tensors would need gigabytes.
    num_columns = max(largest, class_logits.shape[-2] if weights.position_power else 0)
    num_at_once = max(1, _LARGEST_COST // max(1, batch_size * num_queries * num_columns))
    cost = boxes.new_empty(num_layers, batch_size, largest + 1, num_queries)
    for start in range(0, num_layers, num_at_once):
        layers = slice(start, start + num_at_once)
        giou = generalized_iou(corners[layers, :, None].movedim(-2, -1), target_corners)  # (D, B, M, Q)
        prob = class_logits[layers].gather(-2, labels[layers]).sigmoid_()  # (D, B, M, Q)
        if weights.position_power and largest:
            position = _position_by_class(corners[layers], class_logits.shape[-2], targets)  # (D, B, K, Q)
            prob *= position.gather(-2, labels[layers]) ** weights.position_power
        rest = 1 - prob
        pairs = cost[layers, :, :largest]
        torch.mul((prob + 1e-8).log_(), (rest**gamma).mul_(-alpha * weights.classes), out=pairs)
        pairs += (rest + 1e-8).log_().mul_(prob**gamma).mul_((1 - alpha) * weights.classes)
        for side in range(4):
            pairs.add_((columns[layers, :, None, side] - rows[:, :, side]).abs_(), alpha=weights.l1)
        pairs.sub_(giou, alpha=weights.giou)
    cost[:, :, -1] = torch.where(finite_images(logits, boxes), 0.0, torch.nan)[..., None]
    return cost


def _position_by_class(corners: Tensor, num_classes: int, targets: Targets) -> Tensor:
    """The position factor v of Stable-DINO's class cost, exactly as in its code.

    For each class, v uses the last box of the class in the whole batch, also for other boxes of the class and for other images.

    Args:
        corners: (D, B, 4, Q) predicted boxes as xyxy.
    Returns:
        (D, B, K, Q) (GIoU + 1) / 2, divided by the largest value of each layer and image; 0 for classes without boxes.
    """
    labels, boxes = targets.class_labels, cxcywh_to_xyxy(targets.boxes)
    number = torch.arange(1, len(labels) + 1, device=labels.device)
    last = number.new_zeros(num_classes).scatter_reduce(0, labels, number, "amax")  # (K,) 0: no box
    box_of_class = torch.cat([boxes.new_zeros(1, 4), boxes])[last]  # (K, 4)
    giou = generalized_iou(corners[:, :, None].movedim(-2, -1), box_of_class[:, None])  # (D, B, K, Q)
    # Rounding can make a GIoU smaller than -1.
    position = ((giou + 1) / 2).clamp(min=0).masked_fill((last == 0)[:, None], 0)
    return position / (position.amax((-2, -1), keepdim=True) + 1e-8).clamp(max=1)


def match(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    weights: CostWeights,
    alpha: float,
    is_finite: Tensor | None = None,
    skip_non_finite: bool = False,
    queries_per_box: int = 1,
) -> tuple[Matches, Tensor]:
    """Match queries and targets at minimal cost, for each layer and image. Excess targets stay unmatched.

    The last layer matches one query with each target. The others match `queries_per_box`, or fewer where an image has so many
    targets that more than half of its queries would be matched. As in the code of Align-DETR, the lower number then also holds for
    the images after it in the batch. One case differs. If an image has more targets than half of the queries, that code divides to
    zero queries for each target: the image and all images after it have no matches, and their queries are trained as background.
    This is no part of the paper, so here each target still gets a query, and so do the targets of the images after it.

    Args:
        logits, boxes: (D, B, Q, K) and (D, B, Q, 4), float32.
        is_finite: (D, B) False where predictions of the denoising queries are NaN or infinite.
        skip_non_finite: leave out predictions that are not finite instead of raising an error.
        queries_per_box: number of queries for each target in all layers but the last, as in Align-DETR (arXiv:2304.07527).
    Returns:
        the matches, and (D, B) on the host, True for layers of images that were left out and have no matches.
    Raises:
        NonFinitePredictionsError: predictions are not finite.
        ImportError: scipy is not installed.
    """
    if not is_scipy_available():
        raise ImportError("Matching predictions with targets needs scipy: pip install scipy.")
    device = logits.device
    cost = matching_cost(logits, boxes, targets, weights, alpha)  # (D, B, M + 1, Q)
    if is_finite is not None:
        cost[:, :, -1].masked_fill_(~is_finite[..., None], torch.nan)
    cost = cost.cpu().numpy()
    ends = list(itertools.accumulate(targets.counts))
    rows, left_out = [], torch.zeros(cost.shape[:2], dtype=torch.bool, device="cpu")
    for layer, layer_cost in enumerate(cost):
        repeats = queries_per_box if layer + 1 < len(cost) else 1
        for image, (image_cost, count, end) in enumerate(zip(layer_cost, targets.counts, ends, strict=True)):
            if math.isnan(image_cost[-1, 0]):
                if not skip_non_finite:
                    raise NonFinitePredictionsError(layer, image)
                left_out[layer, image] = True
                continue
            if count:
                repeats = max(1, min(repeats, image_cost.shape[-1] // (2 * count)))
            row_of_cost, query = linear_sum_assignment(image_cost[:count].repeat(repeats, axis=0))
            row = torch.empty(4, len(query), dtype=torch.long, device="cpu")  # (4, M_image)
            row[0], row[1] = layer, image
            row[2], row[3] = torch.from_numpy(query), torch.from_numpy(row_of_cost // repeats) + end - count
            rows.append(row)
    index = torch.cat(rows, dim=1) if rows else torch.zeros(4, 0, dtype=torch.long, device="cpu")
    return Matches(*index.to(device, non_blocking=True)), left_out


def repeat_matches(matches: Matches, num_layers: int) -> Matches:
    """Repeat matches of one layer, numbered 0, for `num_layers` layers."""
    layer = torch.arange(num_layers, device=matches.layer.device).repeat_interleave(len(matches.layer))
    return Matches(layer, *(index.repeat(num_layers) for index in matches[1:]))
