"""Parts for training with the stock `transformers.Trainer`, and `DinoDetrTrainer`, which uses all of them."""

from ..evaluation.evaluator import CocoEvaluator
from .augmentation import Augmentation
from .class_balance import RepeatFactorSampler, class_weights, repeat_factors
from .class_transfer import ClassTransfer, transfer_classes
from .coco_data import CocoData, DetectionCollator, DetectionTransform, load_coco
from .departures import find_departures
from .diagnosis import TrainingDoctor
from .freezing import freeze, unfreeze
from .lora import add_lora, lora_config
from .num_queries import set_num_queries
from .optimizer import make_optimizer, parameter_groups
from .recipe import Recipe
from .recipes import RECIPES, get_recipe
from .trainer import DinoDetrTrainer
from .training_record import record_training

__all__ = [
    "RECIPES",
    "Augmentation",
    "ClassTransfer",
    "CocoData",
    "CocoDetectionMetric",
    "CocoEvaluator",
    "DetectionCollator",
    "DetectionTransform",
    "DinoDetrTrainer",
    "Recipe",
    "RepeatFactorSampler",
    "TrainingDoctor",
    "add_lora",
    "class_weights",
    "find_departures",
    "freeze",
    "get_recipe",
    "load_coco",
    "lora_config",
    "make_optimizer",
    "parameter_groups",
    "record_training",
    "repeat_factors",
    "set_num_queries",
    "transfer_classes",
    "unfreeze",
]


def __getattr__(name: str):
    if name == "CocoDetectionMetric":  # imported at first use, because it needs the library `evaluate`
        from ..evaluation import CocoDetectionMetric

        return CocoDetectionMetric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
