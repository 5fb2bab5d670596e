"""The classes of a saved detector on `DinoDetrFocalNetBackbone`, for the `auto_map` of its folder (own_backbones.py)."""

from .backbone_focalnet import DinoDetrFocalNetBackbone
from .configuration_focalnet import DinoDetrFocalNetConfig
from .dino_detr import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrModel

__all__ = [
    "DinoDetrConfig",
    "DinoDetrFocalNetBackbone",
    "DinoDetrFocalNetConfig",
    "DinoDetrForObjectDetection",
    "DinoDetrModel",
]
