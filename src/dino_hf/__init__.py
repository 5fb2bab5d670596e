"""DINO (DETR with Improved deNoising anchOr boxes) for Hugging Face Transformers.

Importing the package makes its classes known to `AutoConfig`, `AutoModel`, `AutoModelForObjectDetection`,
`AutoImageProcessor` and `pipeline`. Its own modules are imported when they are needed.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from .registration import register_when_imported

if TYPE_CHECKING:
    from .evaluation import evaluate
    from .export import export_onnx
    from .inference import predict
    from .inference.loading import from_published, pipeline
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
    from .run import train
    from .training import set_num_queries

__version__ = version("dino_hf")

register_when_imported()

# Where each public name is; the test of the package holds this table and the imports above together.
_NAMES = {
    "BackendUnavailable": "model.attention_backends",
    "DinoDetrConfig": "model.configuration_dino_detr",
    "DinoDetrForObjectDetection": "model.modeling_dino_detr",
    "DinoDetrImageProcessor": "model.image_processing_dino_detr",
    "DinoDetrImageProcessorPil": "model.image_processing_pil_dino_detr",
    "DinoDetrModel": "model.modeling_dino_detr",
    "DinoDetrModelOutput": "model.modeling_dino_detr",
    "DinoDetrObjectDetectionOutput": "model.modeling_dino_detr",
    "DinoDetrPreTrainedModel": "model.modeling_dino_detr",
    "evaluate": "evaluation",
    "export_onnx": "export",
    "from_published": "inference.loading",
    "ms_deform_attn": "model.ms_deform_attn",
    "ms_deform_attn_fused": "model.ms_deform_attn",
    "pipeline": "inference.loading",
    "predict": "inference",
    "set_num_queries": "training",
    "train": "run",
    "use_backend": "model.attention_backends",
}
_ROOMS = (
    "conversion",
    "data",
    "doctor",
    "evaluation",
    "export",
    "inference",
    "model",
    "run",
    "runtime",
    "training",
)


def __getattr__(name: str):
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_ROOMS})


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
    "from_published",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "pipeline",
    "predict",
    "set_num_queries",
    "train",
    "use_backend",
]
