"""What training with the stock `transformers.Trainer` needs: data, collator, COCO metric, parameter groups."""

from .coco_data import CocoData, DetectionCollator, DetectionTransform, load_coco
from .coco_metric import CocoDetectionMetric, CocoEvaluator
from .parameter_groups import make_optimizer, parameter_groups

__all__ = [
    "CocoData",
    "CocoDetectionMetric",
    "CocoEvaluator",
    "DetectionCollator",
    "DetectionTransform",
    "load_coco",
    "make_optimizer",
    "parameter_groups",
]
