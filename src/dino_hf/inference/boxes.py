"""Overlap of boxes, for tiles and test-time augmentation."""

import numpy as np


def overlap(box: np.ndarray, boxes: np.ndarray, over_smaller: bool = False) -> np.ndarray:
    """Intersection over union, or intersection over the smaller of the two areas. 0 for boxes without area.

    Args:
        box: (4,) or (N, 4) xyxy.
        boxes: (N, 4) xyxy.
    Returns:
        (N,)
    """
    sides = np.minimum(box[..., 2:], boxes[:, 2:]) - np.maximum(box[..., :2], boxes[:, :2])  # (N, 2)
    intersection = sides.clip(min=0).prod(axis=1)
    areas = [(each[..., 2:] - each[..., :2]).clip(min=0).prod(axis=-1) for each in (box, boxes)]
    over = np.minimum(*areas) if over_smaller else areas[0] + areas[1] - intersection
    return intersection / np.maximum(over, 1e-9)
