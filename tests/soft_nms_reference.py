"""Soft and hard non-maximum suppression, one box after the other, in plain Python: the rule that `nms.py` must agree with."""


def iou(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1); 0 for empty boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return overlap / union if union > 0 else 0.0


def soft_nms(scores, labels, boxes, iou_threshold: float, min_score: float) -> list[tuple[int, float]]:
    """Index and new score of each detection that is left, in the order in which they are taken.

    Take the best detection that is left. It multiplies the scores of all others of its class that overlap it by 1 - IoU. Then all
    detections with a score below `min_score` are dropped, also those of other classes. Repeat.
    """
    left, taken = dict(enumerate(scores)), []
    while left:
        best = max(left, key=lambda index: (left[index], -index))
        taken.append((best, left.pop(best)))
        for index in left:
            overlap = iou(boxes[best], boxes[index])
            if labels[index] == labels[best] and overlap >= iou_threshold:
                left[index] *= 1 - overlap
        left = {index: score for index, score in left.items() if score >= min_score}
    return taken


def hard_nms(scores, labels, boxes, iou_threshold: float) -> list[int]:
    """Indices of the detections that no better detection of their class overlaps, highest score first."""
    kept: list[int] = []
    for index in sorted(range(len(scores)), key=lambda index: (-scores[index], index)):
        same = [other for other in kept if labels[other] == labels[index]]
        if all(iou(boxes[other], boxes[index]) <= iou_threshold for other in same):
            kept.append(index)
    return kept
