"""Functions of boxes. Boxes are (cx, cy, w, h) in [0, 1] unless a name ends in `_xyxy`."""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre form -> (..., 4) corner form, in the same unit."""
    center, size = boxes.split(2, dim=-1)
    return torch.cat([center - size / 2, center + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) corner form -> (..., 4) centre form, in the same unit."""
    low, high = boxes_xyxy.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of pairs of xyxy boxes, in [0, 1]. a, b: (..., 4), broadcast against each other -> (...)."""
    overlap, union = _overlap_and_union(a.unbind(-1), b.unbind(-1))
    return overlap / union.clamp(min=torch.finfo(union.dtype).tiny)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized intersection over union (arXiv:1902.09630) of xyxy boxes, in [-1, 1].

    Matched pairs: `generalized_iou(a, b)`. All pairs: `generalized_iou(a[:, None], b)`.

    Args:
        a, b: (..., 4) corner form, broadcast against each other.
    Returns:
        (...)
    """
    # Coordinates are computed one by one: sums and products over an axis of two are several times slower.
    a, b = a.unbind(-1), b.unbind(-1)  # each x0, y0, x1, y1
    overlap, union = _overlap_and_union(a, b)
    hull = _area(*map(torch.minimum, a[:2], b[:2]), *map(torch.maximum, a[2:], b[2:]))  # smallest enclosing box
    # Two empty boxes at one position would give 0 / 0. A predicted and an annotated box can both be empty.
    tiny = torch.finfo(union.dtype).tiny
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def _area(x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor) -> Tensor:
    return (x1 - x0).clamp(min=0) * (y1 - y0).clamp(min=0)


def _overlap_and_union(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Areas of two boxes, each as (x0, y0, x1, y1)."""
    overlap = _area(*map(torch.maximum, a[:2], b[:2]), *map(torch.minimum, a[2:], b[2:]))
    return overlap, _area(*a) + _area(*b) - overlap


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:  # DINO: 1e-3 (its siblings in transformers use 1e-5)
    """Logit of x in [0, 1]. It is finite, because x and 1 - x are clamped to at least `eps`."""
    # One clamp each: the optimizer of an exporter merges successive clamps wrongly.
    return torch.log(x.clamp(eps, 1.0) / (1 - x).clamp(eps, 1.0))


def refine_boxes(boxes: Tensor, delta: Tensor, eps: float = 1e-3) -> Tensor:
    """Move boxes in logit space, in float32 at least: the result stays in [0, 1].

    Args:
        boxes: (..., 4) in [0, 1].
        delta: (..., 4) in logits.
        eps: lower bound in the inverse sigmoid.
    Returns:
        (..., 4) in [0, 1].
    """
    return (inverse_sigmoid(boxes, eps) + delta).sigmoid()
