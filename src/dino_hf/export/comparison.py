"""Compare the detections of two versions of a model."""

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..model.box_ops import cxcywh_to_xyxy

# Allowed differences of scores, and of box corners relative to the image's side. Measured: in float32, another order of summation
# changes them by 1e-6, or by 0.003 if it changes the last of 900 queries of an untrained model. Float16 changed the best detections
# of 60 images by at most 0.13 (median 0.001), and the AP of 200 images by 0.02 points. Wrong graphs differed by at least 0.09.
TOLERANCES = {torch.float32: 0.01, torch.float16: 0.25}
_MIN_SCORE = 0.3  # detections with this score or more are always compared
_NUM_BEST = 10  # detections compared in each image, of any score
_NUM_CANDIDATES = 300  # best detections of the other version that may be matched


class Difference(NamedTuple):
    """Differences between the detections of two versions of a model."""

    score: float  # largest difference of a score; 1 if a detection is missing
    box: float  # largest difference of a corner's coordinate, relative to the image's side; 1 if a detection is missing
    num_detections: int
    num_images: int

    def __add__(self, other: "Difference") -> "Difference":
        worst = max(self.score, other.score), max(self.box, other.box)
        return Difference(*worst, self.num_detections + other.num_detections, self.num_images + other.num_images)


class _Found(NamedTuple):
    """The best detections of one image, highest score first."""

    scores: Tensor  # (N,)
    labels: Tensor  # (N,)
    boxes: Tensor  # (N, 4) as (x0, y0, x1, y1) in [0, 1]

    @property
    def num_certain(self) -> int:
        return max(int((self.scores >= _MIN_SCORE).sum()), min(_NUM_BEST, len(self.scores)))


def compare_predictions(expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> Difference:
    """Match the detections of two versions of a model, and return the largest differences.

    Detections with a score of at least 0.3 are compared, and at least the 10 best of an image. Queries cannot be compared by index:
    if two encoder tokens have nearly equal scores, rounding decides their order, and which of them becomes the last query. So each
    detection is matched with a detection of its class among the 300 best of the other version.

    Args:
        expected, found: logits (B, Q, K) and boxes (B, Q, 4), cxcywh in [0, 1].
    Raises:
        ValueError: an expected value is NaN or infinite.
    """
    if not all(part.isfinite().all() for part in expected):
        raise ValueError("The model returns NaN or infinite values, so it cannot be compared. Its weights are damaged.")
    worst = Difference(0.0, 0.0, 0, 0)
    for first, second in zip(_detections(*expected), _detections(*found), strict=True):
        (score, box), (score_back, box_back) = _differences(first, second), _differences(second, first)
        worst += Difference(max(score, score_back), max(box, box_back), first.num_certain, 1)
    return worst


def _detections(logits: Tensor, boxes: Tensor) -> list[_Found]:
    found = []
    for image_logits, image_boxes in zip(logits.cpu().double(), cxcywh_to_xyxy(boxes.cpu().double()), strict=True):
        scores, index = image_logits.sigmoid().flatten().nan_to_num(-1).sort(descending=True, stable=True)
        scores, index = scores[:_NUM_CANDIDATES], index[:_NUM_CANDIDATES]
        num_labels = logits.shape[-1]
        found.append(_Found(scores, index % num_labels, image_boxes.nan_to_num(-1)[index // num_labels]))
    return found


def _differences(expected: _Found, candidates: _Found) -> tuple[float, float]:
    """The largest differences of score and box between the best detections of one version and their matches in the other."""
    count = expected.num_certain
    scores = (expected.scores[:count, None] - candidates.scores).abs()  # (M, N)
    boxes = (expected.boxes[:count, None] - candidates.boxes).abs().amax(-1)  # (M, N)
    is_other_class = expected.labels[:count, None] != candidates.labels
    scores, boxes = scores.masked_fill(is_other_class, 1.0), boxes.masked_fill(is_other_class, 1.0)
    pairs = linear_sum_assignment((scores + boxes).numpy())
    return scores[pairs].max().item(), boxes[pairs].max().item()


def check_difference(difference: Difference, tolerance: float, name: str) -> None:
    """Raises ValueError if a difference is larger than `tolerance`, or NaN."""
    if not (difference.score <= tolerance and difference.box <= tolerance):  # written so that NaN fails too
        raise ValueError(
            f"{name} differs from the model by {difference.score:.2g} in scores and {difference.box:.2g} of an image's side in "
            f"boxes, among {difference.num_detections} detections in {difference.num_images} images; {tolerance:g} is allowed."
        )
