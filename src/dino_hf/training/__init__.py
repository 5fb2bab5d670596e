"""What training with the stock `transformers.Trainer` needs: data, new classes, collator, COCO metric, parameter groups."""

from .class_transfer import ClassTransfer, transfer_classes
from .coco_data import CocoData, DetectionCollator, DetectionTransform, load_coco
from .coco_metric import CocoDetectionMetric, CocoEvaluator
from .model_card import record_training
from .parameter_groups import make_optimizer, parameter_groups

__all__ = [
    "ClassTransfer",
    "CocoData",
    "CocoDetectionMetric",
    "CocoEvaluator",
    "DetectionCollator",
    "DetectionTransform",
    "load_coco",
    "make_optimizer",
    "parameter_groups",
    "record_training",
    "transfer_classes",
]
