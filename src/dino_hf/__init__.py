"""DINO (DETR with Improved deNoising anchOr boxes) for Hugging Face Transformers.

Importing the package registers its classes with `AutoConfig`, `AutoModel`, `AutoModelForObjectDetection` and
`AutoImageProcessor`.
"""

from importlib import import_module
from importlib.metadata import version

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from .model.attention_backends import BackendUnavailable, use_backend
from .model.configuration_dino_detr import DinoDetrConfig
from .model.image_processing_dino_detr import DinoDetrImageProcessor
from .model.image_processing_pil_dino_detr import DinoDetrImageProcessorPil
from .model.modeling_dino_detr import (
    DinoDetrForObjectDetection,
    DinoDetrModel,
    DinoDetrModelOutput,
    DinoDetrObjectDetectionOutput,
    DinoDetrPreTrainedModel,
)
from .model.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused
from .runtime import kernel_loading as _kernel_loading  # noqa: F401  (registers the kernels as backends)
from .runtime.pipeline import register_pipeline

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
# The pipeline looks for the name of a model's class here, and prints the whole table as an error where it finds none.
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.setdefault(DinoDetrConfig.model_type, DinoDetrForObjectDetection.__name__)
register_pipeline()

# What needs more than a model does: imported when it is asked for.
_COMMANDS = {"train": ".run", "evaluate": ".evaluation", "predict": ".inference", "export_onnx": ".export"}
_PARTS = ("conversion", "data", "doctor", "evaluation", "export", "inference", "run", "training")


def __getattr__(name: str):
    if name in _PARTS:
        return import_module(f".{name}", __name__)
    if name not in _COMMANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_COMMANDS[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_COMMANDS, *_PARTS})


__all__ = [
    "BackendUnavailable",
    "DinoDetrConfig",
    "DinoDetrForObjectDetection",
    "DinoDetrImageProcessor",
    "DinoDetrImageProcessorPil",
    "DinoDetrModel",
    "DinoDetrModelOutput",
    "DinoDetrObjectDetectionOutput",
    "DinoDetrPreTrainedModel",
    "__version__",
    "evaluate",
    "export_onnx",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "predict",
    "train",
    "use_backend",
]
