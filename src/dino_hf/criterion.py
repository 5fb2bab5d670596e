"""The objective of DINO (sec. 3.3 to 3.5, app. C): losses of all output sets at once, as pure functions of tensors."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .box_ops import cxcywh_to_xyxy, generalized_iou
from .configuration_dino_detr import DinoDetrConfig
from .matcher import CostWeights, Matches, match, repeat_matches
from .targets import Targets


class SetLosses(NamedTuple):
    """Raw (unweighted) losses of D output sets, each (D,), and figures that are only logged."""

    loss_ce: Tensor
    loss_bbox: Tensor
    loss_giou: Tensor
    loss_xy: Tensor  # the part of loss_bbox that centres have
    loss_hw: Tensor  # and the part of sizes
    cardinality_error: Tensor  # |number of predicted objects - number of targets|, averaged over images


class DenoisingPredictions(NamedTuple):
    """What the D decoder layers say of the N denoising queries."""

    logits: Tensor  # (D, B, N, K)
    boxes: Tensor  # (D, B, N, 4)
    matches: Matches  # of one layer
    num_groups: int


def focal_losses(logits: Tensor, labels: Tensor, matches: Matches, alpha: float, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss (arXiv:1708.02002) of each layer, summed. logits: (D, B, Q, K), labels: (T,) -> (D,)."""
    target = torch.zeros_like(logits)
    target[matches.layer, matches.image, matches.query, labels[matches.target]] = 1.0
    prob = logits.sigmoid()
    error = (prob - target).abs()  # 1 - p_t
    weight = (alpha * target + (1 - alpha) * (1 - target)) * error**gamma
    loss = weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return loss.sum(dim=(1, 2, 3))


def box_losses(boxes: Tensor, target_boxes: Tensor, matches: Matches) -> tuple[Tensor, Tensor, Tensor]:
    """L1 loss of centres, L1 loss of sizes and GIoU loss of each layer, summed.

    Args:
        boxes: (D, B, Q, 4), target_boxes: (T, 4), both cxcywh in [0, 1].
    Returns:
        three times (D,)
    """
    predicted = boxes[matches.layer, matches.image, matches.query]  # (M, 4)
    expected = target_boxes[matches.target]  # (M, 4)
    distance = (predicted - expected).abs()
    giou = 1 - generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(expected))  # (M,)
    per_layer = boxes.new_zeros(len(boxes))
    return tuple(
        per_layer.index_add(0, matches.layer, part) for part in (distance[:, :2].sum(-1), distance[:, 2:].sum(-1), giou)
    )


@torch.no_grad()
def cardinality_errors(logits: Tensor, counts: tuple[int, ...]) -> Tensor:
    """(D, B, Q, K) -> (D,). A query counts as an object unless its best class is the last: a rule of DETR, kept for its log."""
    num_predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1).float()  # (D, B)
    return (num_predicted - torch.tensor(counts, device=logits.device)).abs().mean(-1)


@torch.no_grad()
def class_error(logits: Tensor, labels: Tensor, matches: Matches) -> Tensor:
    """Share, in percent, of the last layer's matched queries whose best class is wrong; 100 without any. (D, B, Q, K) -> ()."""
    last = matches.layer == len(logits) - 1
    best = logits[-1, matches.image[last], matches.query[last]].argmax(-1)  # (M,)
    right = (best == labels[matches.target[last]]).float().sum()
    return 100 - 100 * right / last.sum().clamp(min=1)


def set_losses(
    logits: Tensor, boxes: Tensor, targets: Targets, matches: Matches, normalizer: Tensor, alpha: float
) -> SetLosses:
    """All losses of D stacked output sets; (D, B, Q, K) and (D, B, Q, 4) -> (D,) each."""
    center, size, giou = box_losses(boxes, targets.boxes, matches)
    focal = focal_losses(logits, targets.class_labels, matches, alpha)
    return SetLosses(
        loss_ce=focal / normalizer,
        loss_bbox=(center + size) / normalizer,
        loss_giou=giou / normalizer,
        loss_xy=center.detach() / normalizer,
        loss_hw=size.detach() / normalizer,
        cardinality_error=cardinality_errors(logits, targets.counts),
    )


def mean_over_processes(count: int, device) -> Tensor:
    """A count averaged over the processes of a distributed run, at least 1. Every process must call it in every step."""
    total = torch.tensor(float(count), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        total = total / torch.distributed.get_world_size()
    return total.clamp(min=1)


class DinoDetrLoss:
    """The weighted sum of all losses, and each of them by the original's name. Holds settings only.

    Args:
        config: weights and alpha of loss and matching cost.
    """

    def __init__(self, config: DinoDetrConfig):
        self.alpha = config.focal_alpha
        self.cost = CostWeights(config.class_cost, config.bbox_cost, config.giou_cost)
        self.weights = {
            "loss_ce": config.cls_loss_coefficient,
            "loss_bbox": config.bbox_loss_coefficient,
            "loss_giou": config.giou_loss_coefficient,
        }

    @torch.compiler.disable
    def __call__(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Targets,
        denoising: DenoisingPredictions | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            logits, boxes: (1 + D, B, Q, K) and (1 + D, B, Q, 4), the encoder's proposals first: they have the form of a
                decoder layer and are matched and scored like one.
            denoising: predictions for the denoising queries, in training.
        Returns:
            the loss (), and raw losses and figures for logs, each () and detached.
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits, boxes = logits.float(), boxes.float()
            num_boxes = mean_over_processes(len(targets.boxes), logits.device)
            matches = match(logits.detach(), boxes.detach(), targets, self.cost, self.alpha)
            losses = set_losses(logits, boxes, targets, matches, num_boxes, self.alpha)
            last = len(logits) - 2
            names = ["_interm", *(f"_{layer}" for layer in range(last)), ""]
            loss, logs = self._weighted_sum(losses), name_losses(losses, names)
            logs["class_error"] = class_error(logits, targets.class_labels, matches)
            if denoising is not None:
                matches = repeat_matches(denoising.matches, len(denoising.logits))
                normalizer = num_boxes * denoising.num_groups
                losses = set_losses(
                    denoising.logits.float(), denoising.boxes.float(), targets, matches, normalizer, self.alpha
                )
                loss = loss + self._weighted_sum(losses)
                logs |= name_losses(losses, [*(f"_dn_{layer}" for layer in range(last)), "_dn"])
        return loss, logs

    def _weighted_sum(self, losses: SetLosses) -> Tensor:
        return sum(weight * getattr(losses, name).sum() for name, weight in self.weights.items())


def name_losses(losses: SetLosses, suffixes: list[str]) -> dict[str, Tensor]:
    """The original's names, from the layer axis: `loss_ce` is the last layer's, `loss_ce_0` the first's."""
    return {
        name + suffix: values[layer].detach()
        for name, values in losses._asdict().items()
        for layer, suffix in enumerate(suffixes)
    }
