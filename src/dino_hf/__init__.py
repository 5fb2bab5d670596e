"""DINO (DETR with Improved deNoising anchOr boxes) for Hugging Face Transformers.

Importing the package registers its classes with `AutoConfig`, `AutoModel`, `AutoModelForObjectDetection` and
`AutoImageProcessor`.
"""

from importlib.metadata import version

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection

from .configuration_dino_detr import DinoDetrConfig
from .image_processing_dino_detr import DinoDetrImageProcessor
from .image_processing_pil_dino_detr import DinoDetrImageProcessorPil
from .modeling_dino_detr import (
    DinoDetrForObjectDetection,
    DinoDetrModel,
    DinoDetrModelOutput,
    DinoDetrObjectDetectionOutput,
    DinoDetrPreTrainedModel,
)
from .ms_deform_attn import ms_deform_attn

__version__ = version("dino_hf")

# exist_ok: should transformers ever bring a model type of this name, the installed package goes on working.
AutoConfig.register(DinoDetrConfig.model_type, DinoDetrConfig, exist_ok=True)
AutoModel.register(DinoDetrConfig, DinoDetrModel, exist_ok=True)
AutoModelForObjectDetection.register(DinoDetrConfig, DinoDetrForObjectDetection, exist_ok=True)
AutoImageProcessor.register(
    DinoDetrConfig,
    image_processor_classes={"torchvision": DinoDetrImageProcessor, "pil": DinoDetrImageProcessorPil},
    exist_ok=True,
)

__all__ = [
    "DinoDetrConfig",
    "DinoDetrForObjectDetection",
    "DinoDetrImageProcessor",
    "DinoDetrImageProcessorPil",
    "DinoDetrModel",
    "DinoDetrModelOutput",
    "DinoDetrObjectDetectionOutput",
    "DinoDetrPreTrainedModel",
    "__version__",
    "ms_deform_attn",
]
