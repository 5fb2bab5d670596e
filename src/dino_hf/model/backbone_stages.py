"""Which feature maps of a backbone a detector uses, if the user names none."""

import copy
import warnings

from transformers import PreTrainedConfig

from .config_checks import check_backbone_sizes
from .own_backbones import OWN_MODEL_TYPES, PYRAMID_TYPE, backbone_config_class, fits_pyramid
from .package_warning import DinoDetrWarning

# Pyramids whose last three maps do not have the strides 8, 16 and 32. FocalNet returns maps after the downsampling of a stage, and
# its last stage has none. The maps of PP-LCNetV4 and UVDoc are made for text lines and pages.
_STAGES = {"focalnet": ["stage1", "stage2", "stage4"], "pp_lcnet_v4": None, "uvdoc_backbone": None}


def backbone_from_dict(settings: dict) -> PreTrainedConfig:
    """The configuration of a backbone from its dictionary. Without `out_features` and `out_indices`, it gets the default stages.

    Raises:
        ValueError: transformers does not know the type, a size is far too large, or there are no default stages.
        ImportError: the type is one of this package, but its code is not beside the model.
    """
    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    config_class = backbone_config_class(model_type)
    if config_class is None:
        raise ValueError(
            f"backbone_config has model_type={model_type!r}, which transformers does not know; use 'resnet', 'swin', "
            f"'convnext', 'timm_backbone', another type that AutoBackbone builds, or one of {', '.join(OWN_MODEL_TYPES)}."
        )
    check_backbone_sizes(settings)
    names_maps = any(settings.get(name) is not None for name in ("out_features", "out_indices"))
    if model_type == "timm_backbone" and not names_maps:
        settings["out_indices"] = [-3, -2, -1]
    config = config_class(**settings)
    if isinstance(getattr(config, "hidden_sizes", None), tuple):  # ConvNeXt's default; its backbone needs a list
        config.hidden_sizes = list(config.hidden_sizes)
    if names_maps or getattr(config, "stage_names", None) is None:
        return config
    stages = default_stages(config)
    if stages is None:
        pyramid = f"{{'model_type': {PYRAMID_TYPE!r}, 'backbone_config': {{'model_type': {model_type!r}, ...}}}}"
        raise ValueError(
            f"backbone_config has no out_features, and the maps of {model_type!r} have no default: they do not have the strides "
            "8, 16 and 32. "
            + (
                f"Write backbone_config={pyramid} for maps of several strides, or "
                if fits_pyramid(config)
                else "Write "
            )
            + f"backbone_config={{'model_type': {model_type!r}, 'out_features': {config.stage_names[-1:]}, ...}} "
            "to use the last map, or name other stages."
        )
    config.out_features = stages
    return config


def with_default_stages(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy with the default stages if a pyramid may name its last stage only by default; otherwise the same object."""
    default = default_stages(config)
    if default is None or not may_be_default(config):
        return config
    kind, last = type(config).__name__, list(config.out_features)
    warnings.warn(
        f"backbone_config is a {kind} with out_features={last}, which transformers also sets if you name no stage. The detector "
        f"uses {default}. Name these stages in the {kind} to avoid this warning. To use only {last[0]}, give it out_indices=[-1].",
        DinoDetrWarning,
        stacklevel=5,
    )
    config = copy.deepcopy(config)
    config.out_features = default
    return config


def may_be_default(config: PreTrainedConfig) -> bool:
    """Whether the maps of a configuration may be the library's default, the last stage, and not the user's choice.

    `ResNetConfig()` and `ResNetConfig(out_features=["stage4"])` are equal, so the user's choice of the last stage is not seen,
    except as `out_indices=[-1]`, which the library keeps as it is. A class with `default_out_features` names these by itself, so
    its last map alone is the user's choice.
    """
    has_own_default = getattr(config, "default_out_features", None) is not None
    return not has_own_default and list(config.out_indices) == [len(config.stage_names) - 1]


def default_stages(config: PreTrainedConfig) -> list[str] | None:
    """The stages that a detector uses by default. None: there are none, as in a plain transformer.

    These are the stages of strides 8, 16 and 32 of a pyramid, or what the configuration of one of our backbones names.
    """
    if (named := getattr(config, "default_out_features", None)) is not None:
        return list(named)
    stages = [stage for stage in getattr(config, "stage_names", None) or [] if stage != "stem"]
    is_pyramid = getattr(config, "depths", None) is not None and 3 < len(stages) < 6
    return _STAGES.get(config.model_type, stages[-3:]) if is_pyramid else None


def warn_of_one_coarse_map(config: PreTrainedConfig) -> None:
    """Warn of a pyramid whose dictionary names only the last stage."""
    stages, default = getattr(config, "stage_names", None), default_stages(config)
    if default is not None and list(config.out_features) == stages[-1:]:
        warnings.warn(
            f"backbone_config is a {type(config).__name__} with out_features={stages[-1:]}: one map, too coarse for small "
            f"objects. Give it out_features={default}.",
            DinoDetrWarning,
            stacklevel=5,
        )
