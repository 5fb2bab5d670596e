"""Backbones of this package that transformers does not have: their classes, and the files that a saved detector needs.

The backbone `x` has `model_type="dino_detr_x"` in `DinoDetrConfig.backbone_config`. It has three files here:

- `configuration_x.py`: the configuration class, without torch. It derives from `BackboneConfigMixin` and `PreTrainedConfig`, or
  from a configuration of transformers. `out_features` and `out_indices` select maps, as in all backbones. Without them a
  detector uses `default_out_features` if the class has this attribute, and otherwise the last three stages of a class with
  `depths`.
- `backbone_x.py`: the module, a `BackboneMixin` and `PreTrainedModel`. `forward(pixel_values)` returns a `BackboneOutput` with
  the `feature_maps` (B, C, h, w). Its parts `embeddings` and `encoder.stages` (or `encoder.layers`), if it has them, can be
  frozen by `num_frozen_backbone_stages` and by `dino_hf.training.freeze`. A trial run at construction finds and freezes
  parameters that no map depends on.
- `dino_detr_x.py`: imports the two files and the classes of `dino_detr.py`. The `auto_map` of a detector on this backbone names
  this file. So a folder or repository has the code of only its own backbone, and loads it with `trust_remote_code=True`.

An entry of `_CLASSES` below makes a backbone known: to configurations and models here, to `AutoConfig` and `AutoBackbone` where
the package is installed (registration.py), and to saving (sharing.py). No other file imports a backbone of ours by name: the
loader of the Hub follows import lines, and would ask every repository for the code. Remotely loaded code does not register its
classes, so two repositories with different versions of a backbone do not disturb each other.
"""

from importlib import import_module

from transformers import PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING

_PREFIX = "dino_detr_"
# Name of the backbone -> its configuration class and its module.
_CLASSES = {
    "focalnet": ("DinoDetrFocalNetConfig", "DinoDetrFocalNetBackbone"),
    "vit_pyramid": ("DinoDetrVitPyramidConfig", "DinoDetrVitPyramidBackbone"),
    "internimage": ("DinoDetrInternImageConfig", "DinoDetrInternImageBackbone"),
}
PYRAMID_TYPE = "dino_detr_vit_pyramid"
# Plain vision transformers that take only images of a few sizes.
_FIXED_SIZE_TYPES = ("lw_detr_vit", "rf_detr_dinov2", "vitpose_backbone")
OWN_MODEL_TYPES = tuple(_PREFIX + name for name in _CLASSES)


def top_file(model_type: str | None) -> str:
    """Name of the file, without `.py`, that imports all code of a detector on a backbone of this type."""
    return model_type if model_type in OWN_MODEL_TYPES else "dino_detr"


def backbone_config_class(model_type: str | None) -> type[PreTrainedConfig] | None:
    """The configuration class of a backbone, ours or of transformers. None: the type is unknown.

    Raises:
        ImportError: the type is ours, but its code is not beside this file.
    """
    if model_type in OWN_MODEL_TYPES:
        return _own_class(model_type, "configuration", 0)
    if model_type not in CONFIG_MAPPING:  # its `get` finds nothing: it loads its entries when they are read
        return None
    return CONFIG_MAPPING[model_type]


def fits_pyramid(config: PreTrainedConfig) -> bool:
    """Whether a backbone is a plain vision transformer with one map, for images of any size. Then a pyramid can use it."""
    has_one_width = isinstance(getattr(config, "hidden_size", None), int) and getattr(config, "depths", None) is None
    has_one_map = len(getattr(config, "out_features", None) or []) == 1 and hasattr(config, "patch_size")
    return has_one_width and has_one_map and config.model_type not in _FIXED_SIZE_TYPES


def own_backbone_class(model_type: str) -> type:
    """The module of one of our backbones.

    Raises:
        ImportError: its code is not beside this file.
    """
    return _own_class(model_type, "backbone", 1)


def build_backbone(config: PreTrainedConfig):
    """A backbone (nn.Module) with its initial weights.

    Raises:
        ImportError: the backbone is one of ours, but its code is not beside this file.
    """
    from transformers import AutoBackbone  # imports torch, which a configuration can do without

    # A backbone that supports "sdpa" uses it by default. A backbone without attention refuses the name.
    attention = None if config._attn_implementation == "sdpa" else config._attn_implementation
    if config.model_type in OWN_MODEL_TYPES:
        return own_backbone_class(config.model_type)._from_config(config, attn_implementation=attention)
    return AutoBackbone.from_config(config, attn_implementation=attention)


def _own_class(model_type: str, kind: str, index: int) -> type:
    name = model_type.removeprefix(_PREFIX)
    module = f"{__package__}.{kind}_{name}"
    try:
        return getattr(import_module(module), _CLASSES[name][index])
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ImportError(
            f"backbone_config has model_type={model_type!r}, but its code ({kind}_{name}.py) is not beside this model. Install the "
            "package (pip install dino_hf), or use a folder that save_pretrained wrote for a detector on this backbone."
        ) from None
