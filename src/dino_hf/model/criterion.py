"""The objective of DINO (sec. 3.3 to 3.5, app. C): losses of all output sets at once, as pure functions of tensors."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .box_ops import cxcywh_to_xyxy, generalized_iou
from .configuration_dino_detr import DinoDetrConfig
from .matcher import CostWeights, DenoisingAnswers, Matches, finite_images, match, repeat_matches
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
    answers: DenoisingAnswers


class _FocalLosses(torch.autograd.Function):
    """Loss and gradient in one sweep: autograd would keep a tensor of the size of the logits for each operation, where one is
    enough."""

    @staticmethod
    def forward(ctx, logits: Tensor, place: tuple[Tensor, ...], alpha: float, gamma: float) -> Tensor:
        """logits: (D, B, Q, K); place: where the target is 1, as one index for each axis."""
        # Everything in three tensors of the size of the logits: making more takes longer than the arithmetic.
        prob = logits.sigmoid()
        # What saying no costs, -log(1 - p), as log(1 + exp(-|x|)) + max(x, 0). To a rounding of numbers near 1: far below that it
        # is 0, but there it is weighted by p to the power of gamma. (softplus and log1p are not vectorised on CPUs.)
        cost = logits.abs().neg_().exp_().add_(1).log_()
        weight = logits.clamp(min=0)
        cost += weight
        matched_prob = prob[place]
        yes, rest = cost[place] - logits[place], 1 - matched_prob  # yes: what saying yes costs, -log(p)
        torch.pow(prob, gamma, out=weight)
        weight[place] = 0
        loss = cost.mul_(weight)
        result = loss.sum(dim=(1, 2, 3)).mul_(1 - alpha)
        result.index_add_(0, place[0], alpha * rest**gamma * yes)
        if ctx.needs_input_grad[0]:
            # d/dx p = p (1 - p), d/dx -log(1 - p) = p
            slope = loss.addcmul_(loss, prob, value=-1).mul_(gamma).add_(weight.mul_(prob)).mul_(1 - alpha)
            slope[place] = -alpha * rest**gamma * (gamma * matched_prob * yes + rest)
            ctx.save_for_backward(slope)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * gradient[:, None, None, None], None, None, None


def focal_losses(logits: Tensor, labels: Tensor, matches: Matches, alpha: float, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss (arXiv:1708.02002) of each layer, summed. logits: (D, B, Q, K), labels: (T,) -> (D,)."""
    place = (matches.layer, matches.image, matches.query, labels[matches.target])
    return _FocalLosses.apply(logits, place, alpha, gamma)


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
    last = logits[..., -1]
    others = logits[..., :-1].amax(-1) if logits.shape[-1] > 1 else torch.full_like(last, -torch.inf)
    # Of equal classes the first counts, as in argmax, which takes longer.
    num_predicted = (others >= last).sum(-1).float()  # (D, B)
    expected = torch.tensor(counts, device="cpu").to(
        logits.device, non_blocking=True
    )  # (B); made on a GPU, it would wait for it
    return (num_predicted - expected).abs().mean(-1)


@torch.no_grad()
def class_error(logits: Tensor, labels: Tensor, matches: Matches) -> Tensor:
    """Share, in percent, of the last layer's matched queries whose best class is wrong; 100 without any. (D, B, Q, K) -> ()."""
    is_last = matches.layer == len(logits) - 1  # (M,); to take these only, the host would have to know how many
    best = logits[-1, matches.image, matches.query].argmax(-1)  # (M,)
    right = (is_last & (best == labels[matches.target])).sum()
    return 100 - 100 * right / is_last.sum().clamp(min=1)


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


def without(logits: Tensor, left_out: Tensor) -> Tensor:
    """(D, B, Q, K), (D, B) -> a sure no of every query where an image of a layer is left out: no cost and no gradient."""
    return logits.masked_fill(left_out[..., None, None], -100.0)


def mean_over_processes(count: int, device) -> Tensor:
    """A count averaged over the processes of a distributed run, at least 1. Every process must call it in every step."""
    total = torch.full((), float(count), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        total = total / torch.distributed.get_world_size()
    return total.clamp(min=1)


class DinoDetrLoss:
    """The weighted sum of all losses, and each of them by the original's name.

    Args:
        config: weights and alpha of loss and matching cost.

    Attributes:
        skip_non_finite: what to do about NaN and infinite predictions. False: raise `NonFinitePredictionsError`. True: leave that
            layer of that image out of the logged losses, and return a loss of NaN. All gradients are then NaN in every process.
            `dino_hf.training.DinoDetrTrainer` drops such a step, and so does a gradient scaler.
        last_matches: matches of the last call, over 1 + D layers (0: the encoder's proposals), for tools that watch training.
    """

    def __init__(self, config: DinoDetrConfig):
        self.alpha = config.focal_alpha
        self.cost = CostWeights(config.class_cost, config.bbox_cost, config.giou_cost)
        self.weights = {
            "loss_ce": config.cls_loss_coefficient,
            "loss_bbox": config.bbox_loss_coefficient,
            "loss_giou": config.giou_loss_coefficient,
        }
        self.skip_non_finite = False
        self.last_matches: Matches | None = None

    @torch.compiler.disable(reason="the assignment is scipy's, and every shape is a number of boxes")
    def __call__(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Targets,
        denoising: DenoisingPredictions | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            logits, boxes: (1 + D, B, Q, K) and (1 + D, B, Q, 4), the encoder's proposals first: they have the form of a
                decoder layer and are matched and scored like one.
            denoising: predictions for the denoising queries, in training.
            num_items_in_batch: boxes to divide the losses by, at least 1 is taken. None: those of this batch, averaged over
                processes, as in the release. With gradient accumulation, those of all batches of a step, of all processes:
                then the sum of their losses is that of one large batch.
        Returns:
            the loss (), and raw losses and figures for logs, each () and detached.
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits, boxes = logits.float(), boxes.float()
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
                logits.detach(), boxes.detach(), targets, self.cost, self.alpha, is_finite, self.skip_non_finite
            )
            self.last_matches = matches
            skips = bool(is_left_out.any())  # the host knows
            if skips:
                is_left_out = is_left_out.to(logits.device, non_blocking=True)
                logits = without(logits, is_left_out)
            losses = set_losses(logits, boxes, targets, matches, num_boxes, self.alpha)
            last = len(logits) - 2
            names = ["_interm", *(f"_{layer}" for layer in range(last)), ""]
            loss, logs = self._weighted_sum(losses), name_losses(losses, names)
            logs["class_error"] = class_error(logits, targets.class_labels, matches)
            if denoising is not None:
                matches = repeat_matches(denoising.answers.matches, len(denoising.logits))
                logits = denoising.logits
                if skips:
                    logits = without(logits, is_left_out[1:])
                    kept = ~is_left_out[1:][matches.layer, matches.image]
                    matches = Matches(*(index[kept] for index in matches))
                normalizer = num_boxes * denoising.answers.num_groups * denoising.answers.share
                losses = set_losses(logits, denoising.boxes, targets, matches, normalizer, self.alpha)
                loss = loss + self._weighted_sum(losses)
                logs |= name_losses(losses, [*(f"_dn_{layer}" for layer in range(last)), "_dn"])
            if skips:
                loss = loss * torch.nan
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
