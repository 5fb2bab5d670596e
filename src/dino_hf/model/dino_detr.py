"""The classes that a saved folder's `auto_map` names. This file imports every other shipped file, directly or not."""

from transformers.utils import is_torchvision_available

from .configuration_dino_detr import DinoDetrConfig
from .image_processing_pil_dino_detr import DinoDetrImageProcessorPil
from .modeling_dino_detr import DinoDetrForObjectDetection, DinoDetrModel

if is_torchvision_available():
    from .image_processing_dino_detr import DinoDetrImageProcessor

__all__ = [
    "DinoDetrConfig",
    "DinoDetrForObjectDetection",
    "DinoDetrImageProcessor",
    "DinoDetrImageProcessorPil",
    "DinoDetrModel",
]
