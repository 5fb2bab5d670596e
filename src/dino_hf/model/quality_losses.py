"""Class losses: the focal loss of DINO, and losses whose target is the quality of a predicted box instead of 1.

p: predicted probability. u: IoU of the predicted box with its box. t: target of a pair. All others have the target 0.
`bce(p, t) = -t log p - (1 - t) log(1 - p)`.

| name | target t of a pair | loss of a pair | loss of the others |
| --- | --- | --- | --- |
| focal | 1 | a (1 - p)^2 (-log p) | (1 - a) p^2 (-log(1 - p)) |
| quality_focal | u | (t - p)^2 bce(p, t) | p^2 (-log(1 - p)) |
| align_detr | p^a u^(1 - a), at least 0.01 | bce(p, t) | p^2 (-log(1 - p)) |
| stable_dino | u^2, scaled to a largest target of 1 in each image | a (t - p)^2 bce(p, t) | (1 - a) p^2 (-log(1 - p)) |
| varifocal | u | t bce(p, t) | 0.75 p^2 (-log(1 - p)) |
| matchability_aware | u^1.5 | bce(p, t) | p^1.5 (-log(1 - p)) |

a is `focal_alpha`. Targets have no gradient. In the last two rows, the factors before the logarithms have none either. Sources, row
by row: arXiv:1708.02002, arXiv:2006.04388 (in Co-DETR), arXiv:2304.07527, arXiv:2304.04742, arXiv:2008.13367 (in RT-DETR),
arXiv:2412.04234 (DEIM).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .box_ops import box_iou, cxcywh_to_xyxy
from .matcher import Matches
from .targets import Targets


class Pairs(NamedTuple):
    """The M matched pairs of a query and a box in D layers and B images."""

    prob: Tensor  # (M,) predicted probability of the class of the box
    iou: Tensor  # (M,) IoU of the predicted box with the box
    image: Tensor  # (M,) layer * B + image
    box: Tensor  # (M,) layer * T + box
    num_images: int  # D * B


def iou_target(pairs: Pairs, alpha: float) -> Tensor:
    """Target of Quality Focal Loss and of varifocal loss: the IoU."""
    return pairs.iou


def matchability_target(pairs: Pairs, alpha: float) -> Tensor:
    """Target of DEIM's matchability-aware loss."""
    return pairs.iou**1.5


def alignment_target(pairs: Pairs, alpha: float) -> Tensor:
    """Target of Align-DETR: a geometric mean of probability and IoU, with a lower bound."""
    return (pairs.prob**alpha * pairs.iou ** (1 - alpha)).clamp(min=0.01)


def position_target(pairs: Pairs, alpha: float) -> Tensor:
    """Target of Stable-DINO: the squared IoU, scaled so that the best pair of each layer and image has the target 1."""
    target = pairs.iou**2
    best = target.new_zeros(pairs.num_images).scatter_reduce(0, pairs.image, target, "amax")
    return target / (best + 1e-8).clamp(max=1)[pairs.image]


# The functions below return the loss of each pair and its derivative with respect to the logit, both (M,). `cost` is -log(1 - p).
# `alpha` is the weight of the pairs, a number or (M,).


def focal_positive(logit: Tensor, prob: Tensor, cost: Tensor, target: None, alpha: Tensor | float, gamma: float):
    """Loss of a pair with the target 1: alpha (1 - p)^gamma (-log p)."""
    positive, rest = cost - logit, 1 - prob
    return alpha * rest**gamma * positive, -alpha * rest**gamma * (gamma * prob * positive + rest)


def quality_focal_positive(
    logit: Tensor, prob: Tensor, cost: Tensor, target: Tensor, alpha: Tensor | float, gamma: float
):
    """Binary cross entropy of a pair, weighted by its squared error: alpha (t - p)^2 bce(p, t)."""
    error, gap = cost - target * logit, target - prob
    return alpha * gap**2 * error, -alpha * gap * (2 * prob * (1 - prob) * error + gap**2)


def cross_entropy_positive(
    logit: Tensor, prob: Tensor, cost: Tensor, target: Tensor, alpha: Tensor | float, gamma: float
):
    """Binary cross entropy of a pair: alpha bce(p, t)."""
    return alpha * (cost - target * logit), alpha * (prob - target)


def varifocal_positive(logit: Tensor, prob: Tensor, cost: Tensor, target: Tensor, alpha: Tensor | float, gamma: float):
    """Binary cross entropy of a pair, weighted by its target: alpha t bce(p, t)."""
    return alpha * target * (cost - target * logit), alpha * target * (prob - target)


def _unit_alphas(alpha: float) -> tuple[float, float]:
    return 1.0, 1.0


def _focal_alphas(alpha: float) -> tuple[float, float]:
    return alpha, 1 - alpha


def _varifocal_alphas(alpha: float) -> tuple[float, float]:
    return 1.0, 0.75


class ClassLoss(NamedTuple):
    """A class loss: a row of `CLASS_LOSSES`."""

    positive: Callable  # loss of pairs and its derivative
    target: Callable[[Pairs, float], Tensor] | None = None  # targets of pairs; None: 1
    alphas: Callable[[float], tuple[float, float]] = _unit_alphas  # weights of pairs and of the others
    gamma: float = 2.0  # exponent of p in the loss of the others
    factor_has_gradient: bool = True  # whether the factor p^gamma has a gradient
    cost_power: float = 0.0  # see `CostWeights.position_power`


CLASS_LOSSES = {
    "focal": ClassLoss(focal_positive, alphas=_focal_alphas),
    "quality_focal": ClassLoss(quality_focal_positive, iou_target),
    "align_detr": ClassLoss(cross_entropy_positive, alignment_target),
    "stable_dino": ClassLoss(quality_focal_positive, position_target, _focal_alphas, cost_power=0.5),
    "varifocal": ClassLoss(varifocal_positive, iou_target, _varifocal_alphas, factor_has_gradient=False),
    "matchability_aware": ClassLoss(cross_entropy_positive, matchability_target, gamma=1.5, factor_has_gradient=False),
}


class _ClassLosses(torch.autograd.Function):
    """A class loss and its gradient in one pass. Autograd would keep one tensor of the size of the logits for each operation."""

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        place: tuple[Tensor, ...],
        kind: ClassLoss,
        alpha: float,
        target: Tensor | None,
        weights: Tensor | None,
    ) -> Tensor:
        """logits: (D, B, Q, K); place: positions of the pairs, as one index for each axis; target, weights: (M,) of the pairs."""
        positive_alpha, negative_alpha = kind.alphas(alpha)
        share = positive_alpha if weights is None else positive_alpha * weights
        # Only three tensors of the size of the logits are allocated: allocating more takes longer than the arithmetic.
        prob = logits.sigmoid()
        # Cost of a negative, -log(1 - p) = log(1 + exp(-abs(x))) + max(x, 0). For very negative x it rounds to 0, but there p to
        # the power of gamma makes it negligible. (softplus and log1p are not vectorised on CPUs.)
        cost = logits.abs().neg_().exp_().add_(1).log_()
        weight = logits.clamp(min=0)
        cost += weight
        pairs = logits[place], prob[place], cost[place], target
        loss_of_pairs, slope_of_pairs = kind.positive(*pairs, share, kind.gamma)
        torch.pow(prob, kind.gamma, out=weight)
        weight[place] = 0
        loss = cost.mul_(weight)
        result = loss.sum(dim=(1, 2, 3)).mul_(negative_alpha)
        result.index_add_(0, place[0], loss_of_pairs)
        if ctx.needs_input_grad[0]:
            # d/dx p = p (1 - p), d/dx -log(1 - p) = p
            slope = weight.mul_(prob)
            if kind.factor_has_gradient:
                slope = loss.addcmul_(loss, prob, value=-1).mul_(kind.gamma).add_(slope)
            slope.mul_(negative_alpha)
            slope[place] = slope_of_pairs
            ctx.save_for_backward(slope)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        return ctx.saved_tensors[0] * gradient[:, None, None, None], None, None, None, None, None


def class_losses(
    logits: Tensor,
    labels: Tensor,
    matches: Matches,
    kind: ClassLoss,
    alpha: float,
    target: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """A class loss of each layer, summed.

    Args:
        logits: (D, B, Q, K)
        labels: (T,) class of each box.
        alpha: `focal_alpha`
        target: (M,) target of each pair, see `soft_targets`; None if `kind` has none.
        class_weights: (K,) factors of the losses of pairs, by the class of their box. None: no factors.
    Returns:
        (D,)
    """
    classes = labels[matches.target]  # (M,)
    place = (matches.layer, matches.image, matches.query, classes)
    weights = None if class_weights is None else class_weights[classes]
    return _ClassLosses.apply(logits, place, kind, alpha, target, weights)


def focal_losses(
    logits: Tensor,
    labels: Tensor,
    matches: Matches,
    alpha: float,
    gamma: float = 2.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Sigmoid focal loss (arXiv:1708.02002) of each layer, summed. `class_losses` describes arguments and result."""
    kind = CLASS_LOSSES["focal"]._replace(gamma=gamma)
    return class_losses(logits, labels, matches, kind, alpha, None, class_weights)


@torch.no_grad()
def soft_targets(
    logits: Tensor, boxes: Tensor, targets: Targets, matches: Matches, kind: ClassLoss, alpha: float
) -> tuple[Tensor | None, Tensor]:
    """Targets of the class loss, and the layer and box of each pair.

    Args:
        logits, boxes: (D, B, Q, K) and (D, B, Q, 4)
    Returns:
        (M,) targets, or None if `kind` has none; and (M,) layer * T + box.
    """
    box = matches.layer * len(targets.boxes) + matches.target
    if kind.target is None:
        return None, box
    where = matches.layer, matches.image, matches.query
    predicted, expected = cxcywh_to_xyxy(boxes[where]), cxcywh_to_xyxy(targets.boxes[matches.target])  # (M, 4)
    num_layers, num_images = logits.shape[:2]
    pairs = Pairs(
        prob=logits[(*where, targets.class_labels[matches.target])].sigmoid(),
        iou=box_iou(predicted, expected),
        image=matches.layer * num_images + matches.image,
        box=box,
        num_images=num_layers * num_images,
    )
    return kind.target(pairs, alpha), box


@torch.no_grad()
def rank_weights(quality: Tensor, box: Tensor, query: Tensor, tau: float = 1.5) -> Tensor:
    """Weights exp(-rank / tau) of Align-DETR. Rank 0 is the best pair of a box, rank 1 the next.

    Args:
        quality: (M,) a larger value is better. If values are equal, the query with the lower index is better.
        box: (M,) index of the box of each pair.
        query: (M,) query of each pair.
    Returns:
        (M,)
    """
    order = query.argsort()
    order = order[quality[order].argsort(descending=True, stable=True)]
    order = order[box[order].argsort(stable=True)]  # sorted by box, the best pair of each box first
    sorted_box, place = box[order], torch.arange(len(box), device=box.device)
    is_first = torch.ones_like(sorted_box, dtype=torch.bool)
    is_first[1:] = sorted_box[1:] != sorted_box[:-1]
    first = torch.where(is_first, place, 0).cummax(0).values if len(box) else place
    rank = torch.empty_like(place).index_copy(0, order, place - first)
    return torch.exp(rank.to(quality.dtype) / -tau)
