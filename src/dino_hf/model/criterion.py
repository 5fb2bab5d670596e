"""The loss of DINO (sec. 3.3 to 3.5, app. C), computed for all layers at once by pure functions of tensors."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .box_ops import cxcywh_to_xyxy, generalized_iou
from .configuration_dino_detr import DinoDetrConfig
from .matcher import CostWeights, DenoisingTargets, Matches, finite_images, match, repeat_matches
from .quality_losses import CLASS_LOSSES, ClassLoss, class_losses, rank_weights, soft_targets
from .targets import Targets


class SetLosses(NamedTuple):
    """Raw (unweighted) losses of D layers, each (D,). The last three are for logs and are not part of the training loss."""

    loss_ce: Tensor
    loss_bbox: Tensor
    loss_giou: Tensor
    loss_xy: Tensor  # part of loss_bbox for centres
    loss_hw: Tensor  # part of loss_bbox for sizes
    cardinality_error: Tensor  # |number of predicted objects - number of targets|, averaged over images


class DenoisingPredictions(NamedTuple):
    """Predictions of the D decoder layers for the N denoising queries."""

    logits: Tensor  # (D, B, N, K)
    boxes: Tensor  # (D, B, N, 4)
    targets: DenoisingTargets


def box_losses(
    boxes: Tensor, target_boxes: Tensor, matches: Matches, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """L1 loss of centres, L1 loss of sizes and GIoU loss of each layer, summed.

    Args:
        boxes: (D, B, Q, 4), target_boxes: (T, 4), both cxcywh in [0, 1].
        weights: (M,) weight of each pair; None: 1.
    Returns:
        three tensors (D,)
    """
    predicted = boxes[matches.layer, matches.image, matches.query]  # (M, 4)
    expected = target_boxes[matches.target]  # (M, 4)
    distance = (predicted - expected).abs()
    giou = 1 - generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(expected))  # (M,)
    per_layer = boxes.new_zeros(len(boxes))
    parts = distance[:, :2].sum(-1), distance[:, 2:].sum(-1), giou
    if weights is not None:
        parts = tuple(weights * part for part in parts)
    return tuple(per_layer.index_add(0, matches.layer, part) for part in parts)


@torch.no_grad()
def cardinality_errors(logits: Tensor, counts: tuple[int, ...]) -> Tensor:
    """(D, B, Q, K) -> (D,). A query counts as an object unless its best class is the last class, as in DETR's log."""
    last = logits[..., -1]
    others = logits[..., :-1].amax(-1) if logits.shape[-1] > 1 else torch.full_like(last, -torch.inf)
    # If several classes are equal, the first counts. argmax has the same rule but takes longer.
    num_predicted = (others >= last).sum(-1).float()  # (D, B)
    # Created on the CPU: creating it on a GPU would synchronise.
    expected = torch.tensor(counts, device="cpu").to(logits.device, non_blocking=True)  # (B)
    return (num_predicted - expected).abs().mean(-1)


@torch.no_grad()
def class_error(logits: Tensor, labels: Tensor, matches: Matches) -> Tensor:
    """Percentage of the last layer's matched queries whose best class is wrong; 100 without matches. (D, B, Q, K) -> ()."""
    is_last = matches.layer == len(logits) - 1  # (M,); not used as an index: that would synchronise with a GPU
    best = logits[-1, matches.image, matches.query].argmax(-1)  # (M,)
    right = (is_last & (best == labels[matches.target])).sum()
    return 100 - 100 * right / is_last.sum().clamp(min=1)


def set_losses(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    matches: Matches,
    normalizer: Tensor,
    alpha: float,
    class_weights: Tensor | None = None,
    kind: ClassLoss = CLASS_LOSSES["focal"],
    is_ranked: bool = False,
) -> SetLosses:
    """All losses of D layers, each (D,).

    Args:
        logits, boxes: (D, B, Q, K) and (D, B, Q, 4)
        normalizer: () number by which the losses are divided.
        alpha: `focal_alpha`
        class_weights: see `DinoDetrLoss`.
        kind: the class loss.
        is_ranked: whether several queries may be matched with a box. Then each query is weighted by its rank.
    """
    soft, box = soft_targets(logits.detach(), boxes.detach(), targets, matches, kind, alpha)
    weights = rank_weights(soft, box, matches.query) if is_ranked else None
    center, size, giou = box_losses(boxes, targets.boxes, matches, weights)
    soft = soft if weights is None else weights * soft
    classes = class_losses(logits, targets.class_labels, matches, kind, alpha, soft, class_weights)
    return SetLosses(
        loss_ce=classes / normalizer,
        loss_bbox=(center + size) / normalizer,
        loss_giou=giou / normalizer,
        loss_xy=center.detach() / normalizer,
        loss_hw=size.detach() / normalizer,
        cardinality_error=cardinality_errors(logits, targets.counts),
    )


def silence(logits: Tensor, left_out: Tensor) -> Tensor:
    """Set the logits of left-out images to -100: every query predicts "nothing", with no loss and no gradient.

    Args:
        logits: (D, B, Q, K)
        left_out: (D, B)
    """
    return logits.masked_fill(left_out[..., None, None], -100.0)


def mean_over_processes(count: int, device) -> Tensor:
    """A count averaged over the processes of a distributed run, at least 1. All processes must call it in every step."""
    total = torch.full((), float(count), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        total = total / torch.distributed.get_world_size()
    return total.clamp(min=1)


class DinoDetrLoss:
    """The weighted sum of all losses, and each loss by the name of the original release.

    Args:
        config: gives the class loss, `focal_alpha`, and the weights of the losses and of the matching cost.
    """

    def __init__(self, config: DinoDetrConfig):
        self.configure(config)

    def configure(self, config: DinoDetrConfig) -> None:
        """Take the weights of losses and costs from a configuration."""
        self.alpha = config.focal_alpha
        self.kind = CLASS_LOSSES[config.class_loss]
        self.queries_per_box = config.queries_per_box
        self.cost = CostWeights(config.class_cost, config.bbox_cost, config.giou_cost, self.kind.cost_power)
        self.weights = {
            "loss_ce": config.cls_loss_coefficient,
            "loss_bbox": config.bbox_loss_coefficient,
            "loss_giou": config.giou_loss_coefficient,
        }
        denoising_weight = config.denoising_cls_loss_coefficient
        self.denoising_weights = self.weights | ({} if denoising_weight is None else {"loss_ce": denoising_weight})

    @torch.compiler.disable(reason="scipy computes the assignment, and every shape depends on the number of boxes")
    def __call__(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Targets,
        denoising: DenoisingPredictions | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_non_finite: bool = False,
        class_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Match predictions and targets, and compute all losses.

        Args:
            logits, boxes: (1 + D, B, Q, K) and (1 + D, B, Q, 4). Layer 0 holds the encoder's proposals, which are matched and
                scored like a decoder layer.
            denoising: predictions for the denoising queries, in training.
            num_items_in_batch: number of boxes by which losses are divided; values below 1 count as 1. None: the boxes of
                this batch, averaged over processes, as in the release. With gradient accumulation, pass the boxes of all
                batches of a step in all processes. The sum of the losses then equals the loss of one large batch.
            skip_non_finite: how to treat NaN and infinite predictions. False: raise `NonFinitePredictionsError`. True: leave
                this layer of this image out of the logged losses, and return a loss of NaN. Then all gradients are NaN in
                every process, and `dino_hf.training.DinoDetrTrainer` or a gradient scaler skips the step.
            class_weights: (K,) factors of the class loss of matched and denoising queries, by the class of their target. None:
                all are 1. The loss of unmatched queries is not weighted.
        Returns:
            the loss (), and raw losses and values for logs, each () and detached.
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits, boxes = logits.float(), boxes.float()
            if class_weights is not None:
                class_weights = class_weights.to(logits.device, non_blocking=True)
            is_finite = None
            if denoising is not None:
                denoising = denoising._replace(logits=denoising.logits.float(), boxes=denoising.boxes.float())
                is_finite = F.pad(
                    finite_images(denoising.logits, denoising.boxes), (0, 0, 1, 0), value=True
                )  # (1 + D, B)
            if num_items_in_batch is None:
                num_boxes = mean_over_processes(len(targets.boxes), logits.device)
            elif isinstance(num_items_in_batch, Tensor):
                num_boxes = num_items_in_batch.to(logits.device, non_blocking=True).float().clamp(min=1)
            else:
                num_boxes = torch.full((), max(1.0, float(num_items_in_batch)), device=logits.device)
            matches, is_left_out = match(
                logits.detach(),
                boxes.detach(),
                targets,
                self.cost,
                self.alpha,
                is_finite,
                skip_non_finite,
                self.queries_per_box,
            )
            skips = bool(is_left_out.any())  # no synchronisation: it is on the host
            if skips:
                is_left_out = is_left_out.to(logits.device, non_blocking=True)
                logits = silence(logits, is_left_out)
            settings = self.alpha, class_weights, self.kind
            losses = set_losses(logits, boxes, targets, matches, num_boxes, *settings, self.queries_per_box > 1)
            last = len(logits) - 2
            names = ["_interm", *(f"_{layer}" for layer in range(last)), ""]
            loss, logs = weighted_sum(losses, self.weights), name_losses(losses, names)
            logs["class_error"] = class_error(logits, targets.class_labels, matches)
            if denoising is not None:
                matches = repeat_matches(denoising.targets.matches, len(denoising.logits))
                logits = denoising.logits
                if skips:
                    logits = silence(logits, is_left_out[1:])
                    kept = ~is_left_out[1:][matches.layer, matches.image]
                    matches = Matches(*(index[kept] for index in matches))
                normalizer = num_boxes * denoising.targets.num_groups * denoising.targets.share
                losses = set_losses(logits, denoising.boxes, targets, matches, normalizer, *settings)
                loss = loss + weighted_sum(losses, self.denoising_weights)
                logs |= name_losses(losses, [*(f"_dn_{layer}" for layer in range(last)), "_dn"])
            if skips:
                loss = loss * torch.nan
        return loss, logs


def weighted_sum(losses: SetLosses, weights: dict[str, float]) -> Tensor:
    """Sum of the losses of all layers, each (D,), with the weights of `DinoDetrLoss` -> ()."""
    return sum(weight * getattr(losses, name).sum() for name, weight in weights.items())


def name_losses(losses: SetLosses, suffixes: list[str]) -> dict[str, Tensor]:
    """Losses of each layer by the names of the original release: `loss_ce` for the last layer, `loss_ce_0` for the first."""
    return {
        name + suffix: values[layer].detach()
        for name, values in losses._asdict().items()
        for layer, suffix in enumerate(suffixes)
    }
