"""The classes of a saved detector on `DinoDetrVitPyramidBackbone`, for the `auto_map` of its folder (own_backbones.py)."""

from .backbone_vit_pyramid import DinoDetrVitPyramidBackbone
from .configuration_vit_pyramid import DinoDetrVitPyramidConfig
from .dino_detr import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrModel

__all__ = [
    "DinoDetrConfig",
    "DinoDetrForObjectDetection",
    "DinoDetrModel",
    "DinoDetrVitPyramidBackbone",
    "DinoDetrVitPyramidConfig",
]
