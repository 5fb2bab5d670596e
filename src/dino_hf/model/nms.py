"""Non-maximum suppression: the detections of a class that overlap a better detection lose their score (soft) or go (hard)."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import is_torchvision_available

from .box_ops import box_iou
from .config_checks import is_number

if is_torchvision_available():
    from torchvision.ops import batched_nms

_USUAL_TOP_K = 300  # detections per image, in the papers of DINO and Co-DINO
_BLOCK = 2048  # number of detections compared at the same time; more are compared class by class


class NmsSettings(NamedTuple):
    """What happens to overlapping detections of one class. Co-DINO and Stable-DINO use the default values."""

    method: str  # "soft": overlapping detections get a lower score (arXiv:1704.04503, linear); "hard": they are dropped
    iou_threshold: float = 0.8  # in (0, 1]: detections with this IoU (soft) or a higher IoU (soft, hard) overlap
    min_score: float = 1e-3  # in [0, 1]: soft NMS drops detections with a lower score, except the best of the image
    candidates: int | None = (
        None  # number of best pairs of query and class before suppression; None: the number of queries
    )


def read_nms(setting: Mapping | bool | None) -> NmsSettings | None:
    """Check a setting of non-maximum suppression.

    Args:
        setting: the fields of `NmsSettings` as a dictionary, such as {"method": "soft", "iou_threshold": 0.8}. Only "method" is
            needed. None or False: no suppression.
    Raises:
        ValueError: the setting is not a dictionary, has unknown fields, or a value is out of range.
    """
    if setting is None or setting is False:
        return None
    if not isinstance(setting, Mapping):
        raise ValueError(
            f'nms={setting!r:.100} must be a dictionary, such as {{"method": "soft", "iou_threshold": 0.8}}.'
        )
    if unknown := sorted(map(str, setting.keys() - set(NmsSettings._fields))):
        raise ValueError(
            f"nms has the unknown fields {unknown!s:.200}; its fields are {', '.join(NmsSettings._fields)}."
        )
    if setting.get("method") not in ("soft", "hard"):
        raise ValueError(f'nms has method={setting.get("method")!r:.50}; it must be "soft" or "hard".')
    if setting["method"] == "hard" and "min_score" in setting:
        raise ValueError('nms has min_score, which only method="soft" uses, because only soft NMS changes scores.')
    found = NmsSettings(**setting)
    if not (is_number(found.iou_threshold) and 0 < found.iou_threshold <= 1):
        raise ValueError(
            f"nms has iou_threshold={found.iou_threshold!r:.50}; it must be a number above 0 and at most 1."
        )
    if not (is_number(found.min_score) and 0 <= found.min_score <= 1):
        raise ValueError(f"nms has min_score={found.min_score!r:.50}; it must be a number in [0, 1].")
    if found.candidates is not None and not (type(found.candidates) is int and found.candidates >= 1):
        raise ValueError(f"nms has candidates={found.candidates!r:.50}; it must be a whole number above 0, or null.")
    return found


def with_candidates(setting: Mapping | bool | None, top_k: int, num_queries: int) -> dict | None:
    """The setting with at least `top_k` candidates, for users who ask for more than the usual 300 detections.

    Returns:
        None if the setting can stay as it is.
    """
    nms = read_nms(setting)
    if nms is None or top_k <= max(_USUAL_TOP_K, nms.candidates or num_queries):
        return None
    return {**setting, "candidates": top_k}


def suppress(settings: NmsSettings, scores: Tensor, labels: Tensor, boxes_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Apply non-maximum suppression to the detections of one image. Only detections of the same class suppress each other.

    Args:
        scores: (N,) highest first. A NaN is kept and suppresses nothing.
        labels: (N,)
        boxes_xyxy: (N, 4) float32, in any unit.
    Returns:
        index (M,) of the detections that are kept, and their new scores (M,), highest first.
    Raises:
        ImportError: hard suppression without torchvision.
    """
    if settings.method == "hard":
        if not is_torchvision_available():
            raise ImportError(
                'Hard NMS needs torchvision: pip install torchvision. Soft NMS, {"method": "soft"}, does not.'
            )
        # torchvision separates classes by moving their boxes apart. In float32 this would cost the last digits of the boxes.
        exact = torch.float32 if boxes_xyxy.device.type == "mps" else torch.float64
        kept = batched_nms(boxes_xyxy.to(exact), scores.to(exact), labels, settings.iou_threshold)
        return kept, scores[kept]
    scores = soft_scores(scores, labels, boxes_xyxy, settings.iou_threshold, settings.min_score)
    scores, order = scores.sort(descending=True, stable=True)
    is_kept = ~(scores < settings.min_score)
    is_kept[:1] = True
    return order[is_kept], scores[is_kept]


def soft_scores(scores: Tensor, labels: Tensor, boxes_xyxy: Tensor, iou_threshold: float, min_score: float) -> Tensor:
    """Scores after linear soft NMS (arXiv:1704.04503), in the order of the input.

    In order of falling score, each detection multiplies the scores of all worse detections that overlap it by 1 - IoU. A
    detection whose score falls below `min_score` no longer takes part. All classes are treated at the same time.

    Args:
        scores: (N,)
        labels: (N,)
        boxes_xyxy: (N, 4)
        iou_threshold: detections of one class with at least this IoU overlap.
    Returns:
        (N,)
    """
    scores = scores.clone()
    if len(scores) <= _BLOCK:
        groups = [torch.arange(len(scores), device=scores.device)]
    else:
        groups = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    for group in groups:
        pairs = group[(labels[group] == labels[group, None]).triu(1).nonzero()]  # (P, 2) detections of one class
        overlap = box_iou(boxes_xyxy[pairs[:, 0]], boxes_xyxy[pairs[:, 1]])  # (P,)
        is_high = overlap >= iou_threshold
        involved, places = pairs[is_high].unique(return_inverse=True)  # (m,), usually few; (p, 2)
        factors = scores.new_ones(len(involved), len(involved))
        for row, column in (places.T, places.T.flip(0)):
            factors[row, column] = 1 - overlap[is_high]
        factors[:, scores[involved].isnan()] = 1
        scores[involved] = _decay(scores[involved], factors, min_score)
    return scores


def _decay(scores: Tensor, factors: Tensor, min_score: float) -> Tensor:
    """Multiply scores by the factors of all better detections that overlap.

    Scores only fall. So a detection that is better than all others that overlap it and still wait has its final score. All
    these detections are finished in one round, instead of one detection after the other.

    Args:
        scores: (m,); of equal scores, the first counts as better.
        factors: (m, m) of the row's score, if the column is better; 1 if they do not overlap.
    """
    index = torch.arange(len(scores), device=scores.device)
    is_earlier = index < index[:, None]  # (m, m): the column comes before the row
    waits = ~(scores < min_score)
    while waits.any():
        is_better = (scores > scores[:, None]) | ((scores == scores[:, None]) & is_earlier)
        is_blocked = ((factors < 1) & waits & is_better).any(dim=1)
        done = waits & ~is_blocked
        waits &= is_blocked
        scores = torch.where(waits, scores * torch.where(done, factors, 1.0).prod(dim=1), scores)
        waits &= ~(scores < min_score)
    return scores
