"""Make the model known to transformers without importing it, so that `import dino_hf` stays cheap.

A mapping of the Auto classes gets our entries when something is first looked up in it. Our modules are then imported at a moment
when no import of transformers is in progress, so there is no circular import.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType


# exist_ok in each registration: if transformers gets a model type of this name, the installed package still works.
@cache
def _register_config() -> None:
    from transformers import AutoConfig

    from .model.configuration_dino_detr import DinoDetrConfig
    from .model.own_backbones import OWN_MODEL_TYPES, backbone_config_class

    AutoConfig.register(DinoDetrConfig.model_type, DinoDetrConfig, exist_ok=True)
    for model_type in OWN_MODEL_TYPES:
        AutoConfig.register(model_type, backbone_config_class(model_type), exist_ok=True)


@cache
def _register_models() -> None:
    from transformers import AutoModel, AutoModelForObjectDetection

    from .model.configuration_dino_detr import DinoDetrConfig
    from .model.modeling_dino_detr import DinoDetrForObjectDetection, DinoDetrModel

    AutoModel.register(DinoDetrConfig, DinoDetrModel, exist_ok=True)
    AutoModelForObjectDetection.register(DinoDetrConfig, DinoDetrForObjectDetection, exist_ok=True)


@cache
def _register_backbones() -> None:
    from transformers import AutoBackbone

    from .model.own_backbones import OWN_MODEL_TYPES, backbone_config_class, own_backbone_class

    for model_type in OWN_MODEL_TYPES:
        AutoBackbone.register(backbone_config_class(model_type), own_backbone_class(model_type), exist_ok=True)


@cache
def _register_image_processors() -> None:
    from transformers import AutoImageProcessor

    from .model.configuration_dino_detr import DinoDetrConfig
    from .model.image_processing_dino_detr import DinoDetrImageProcessor
    from .model.image_processing_pil_dino_detr import DinoDetrImageProcessorPil

    classes = {"torchvision": DinoDetrImageProcessor, "pil": DinoDetrImageProcessorPil}
    AutoImageProcessor.register(DinoDetrConfig, image_processor_classes=classes, exist_ok=True)


class _FilledWhenRead(dict):
    """The registered entries of one mapping of transformers. The first access registers ours."""

    def __init__(self, mapping, register: Callable[[], None]):
        super().__init__(mapping._extra_content)
        self._mapping, self._register = mapping, register

    def _filled(self) -> dict:
        if self._mapping._extra_content is self:
            self._mapping._extra_content = dict(super().items())  # registering writes to this one
            self._register()
        return self._mapping._extra_content

    def __len__(self):
        return len(self._filled())

    def __iter__(self):
        return iter(self._filled())

    def __getitem__(self, key):
        return self._filled()[key]

    def __contains__(self, key):
        return key in self._filled()

    def get(self, key, default=None):
        return self._filled().get(key, default)

    def keys(self):
        return self._filled().keys()

    def values(self):
        return self._filled().values()

    def items(self):
        return self._filled().items()

    def __setitem__(self, key, value):
        self._filled()[key] = value


def _fill_when_read(mapping, register: Callable[[], None]) -> None:
    if hasattr(mapping, "_extra_content"):
        mapping._extra_content = _FilledWhenRead(mapping, register)
    else:  # another version of transformers keeps registered entries elsewhere
        register()


def _prepare_configs(module: ModuleType) -> None:
    _fill_when_read(module.CONFIG_MAPPING, _register_config)


def _prepare_models(module: ModuleType) -> None:
    _fill_when_read(module.MODEL_MAPPING, _register_models)
    _fill_when_read(module.MODEL_FOR_OBJECT_DETECTION_MAPPING, _register_models)
    _fill_when_read(module.MODEL_FOR_BACKBONE_MAPPING, _register_backbones)
    # The pipeline checks the name of a model's class against this table. Without an entry it prints the table as an error.
    module.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.setdefault("dino_detr", "DinoDetrForObjectDetection")


def _prepare_image_processors(module: ModuleType) -> None:
    _fill_when_read(module.IMAGE_PROCESSOR_MAPPING, _register_image_processors)


def _prepare_pipelines(module: ModuleType) -> None:
    import_module("dino_hf.runtime.pipeline")  # registers the pipeline


def _prepare_kernels(module: ModuleType) -> None:
    import_module("dino_hf.runtime.kernel_loading")  # registers the kernels as backends


def _prepare_additions(module: ModuleType) -> None:
    import_module("dino_hf.runtime.model_card")  # saved models get a card
    loader = import_module("dino_hf.runtime.pretrained_backbones").load_pretrained_backbone
    module.DinoDetrForObjectDetection.backbone_loader = staticmethod(loader)
    cpu_speed = "dino_hf.runtime.cpu_speed"
    if importlib.util.find_spec(cpu_speed) is not None:  # without this file, models give the same results, but slower
        import_module(cpu_speed)  # built models get faster layers


def _prepare_pixels(module: ModuleType) -> None:
    reader = import_module("dino_hf.runtime.pretrained_backbones").pixel_settings
    module.DinoDetrProcessingMixin.pixel_reader = staticmethod(reader)


# Module -> the function to call after its import.
_AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _prepare_configs,
    "transformers.models.auto.modeling_auto": _prepare_models,
    "transformers.models.auto.image_processing_auto": _prepare_image_processors,
    "transformers.pipelines": _prepare_pipelines,
    "dino_hf.model.attention_backends": _prepare_kernels,
    "dino_hf.model.modeling_dino_detr": _prepare_additions,
    "dino_hf.model.image_processing_mixin": _prepare_pixels,
}


class _Finder:
    """A finder for `sys.meta_path`. It finds modules as the other finders do, and adds a call after the import of some."""

    def __init__(self):
        self._finding: set[str] = set()

    def find_spec(self, name, path=None, target=None):
        if name not in _AFTER_IMPORT or name in self._finding:
            return None
        self._finding.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._finding.discard(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_prepare(module):
            execute(module)
            _AFTER_IMPORT[name](module)

        spec.loader.exec_module = execute_and_prepare
        return spec


def register_when_imported() -> None:
    """Prepare each module of `_AFTER_IMPORT` now if it is imported already, and otherwise when it is."""
    sys.meta_path.insert(0, _Finder())
    for name in _AFTER_IMPORT.keys() & sys.modules.keys():
        _AFTER_IMPORT[name](sys.modules[name])
