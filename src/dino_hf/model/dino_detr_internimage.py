"""The classes of a saved detector on `DinoDetrInternImageBackbone`, for the `auto_map` of its folder (own_backbones.py)."""

from .backbone_internimage import DinoDetrInternImageBackbone
from .configuration_internimage import DinoDetrInternImageConfig
from .dino_detr import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrModel

__all__ = [
    "DinoDetrConfig",
    "DinoDetrForObjectDetection",
    "DinoDetrInternImageBackbone",
    "DinoDetrInternImageConfig",
    "DinoDetrModel",
]
