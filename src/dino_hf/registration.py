"""Register the model with transformers when its Auto classes and pipelines are imported, so `import dino_hf` stays cheap."""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module

_CONFIG = "dino_hf.model.configuration_dino_detr"
_MODEL = "dino_hf.model.modeling_dino_detr"
_PROCESSORS = ("dino_hf.model.image_processing_dino_detr", "dino_hf.model.image_processing_pil_dino_detr")
_BACKENDS = "dino_hf.model.attention_backends"
_KERNELS = "dino_hf.runtime.kernel_loading"
_PIPELINE = "dino_hf.runtime.pipeline"


# exist_ok in each registration: if transformers gets a model type of this name, the installed package still works.
def _register_config() -> None:
    from transformers import AutoConfig

    from .model.configuration_dino_detr import DinoDetrConfig

    AutoConfig.register(DinoDetrConfig.model_type, DinoDetrConfig, exist_ok=True)


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForObjectDetection
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

    from .model.modeling_dino_detr import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrModel

    AutoModel.register(DinoDetrConfig, DinoDetrModel, exist_ok=True)
    AutoModelForObjectDetection.register(DinoDetrConfig, DinoDetrForObjectDetection, exist_ok=True)
    # The pipeline checks the name of a model's class against this table. Without an entry it prints the table as an error.
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.setdefault(DinoDetrConfig.model_type, DinoDetrForObjectDetection.__name__)


def _register_image_processors() -> None:
    from transformers import AutoImageProcessor

    from .model.configuration_dino_detr import DinoDetrConfig
    from .model.image_processing_dino_detr import DinoDetrImageProcessor
    from .model.image_processing_pil_dino_detr import DinoDetrImageProcessorPil

    classes = {"torchvision": DinoDetrImageProcessor, "pil": DinoDetrImageProcessorPil}
    AutoImageProcessor.register(DinoDetrConfig, image_processor_classes=classes, exist_ok=True)


def _register_pipeline() -> None:
    import_module(_PIPELINE).register_pipeline()


# Module of transformers, our modules, and what to call when all of them are imported.
_REGISTRATIONS: tuple[tuple[tuple[str, ...], Callable[[], None]], ...] = (
    (("transformers.models.auto.configuration_auto", _CONFIG), cache(_register_config)),
    (("transformers.models.auto.modeling_auto", _MODEL), cache(_register_models)),
    (("transformers.models.auto.image_processing_auto", *_PROCESSORS), cache(_register_image_processors)),
    (("transformers.pipelines", _PIPELINE), cache(_register_pipeline)),
    ((_BACKENDS, _KERNELS), cache(lambda: None)),  # importing the second module registers the kernels
)
_WATCHED = frozenset(name for names, _ in _REGISTRATIONS for name in names)


class _AfterImport:
    """A finder for `sys.meta_path`. It finds modules as the other finders do, and acts when a watched one is imported."""

    def __init__(self):
        self._imported: set[str] = set()
        self._finding: set[str] = set()

    def find_spec(self, name, path=None, target=None):
        if name not in _WATCHED or name in self._finding:
            return None
        self._finding.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._finding.discard(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            self.imported(name)

        spec.loader.exec_module = execute_and_register
        return spec

    def imported(self, name: str) -> None:
        """Import our part of a registration whose first module is there, and register once every module is there."""
        self._imported.add(name)
        for names, register in _REGISTRATIONS:
            if name == names[0]:
                for ours in names[1:]:
                    import_module(
                        ours
                    )  # in a circular import it is there in part, and comes here again when it is whole
            if name in names and self._imported.issuperset(names):
                register()


def register_when_imported() -> None:
    """Register now what transformers has imported already, and the rest as soon as it is imported."""
    finder = _AfterImport()
    sys.meta_path.insert(0, finder)
    for name in _WATCHED & set(sys.modules):
        finder.imported(name)
