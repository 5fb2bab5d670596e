"""Pretrained backbones by name: configuration, weights and pixel statistics, from a folder, the Hub or timm."""

import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, ImageProcessingMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, is_timm_available, logging

from ..common.hub_access import reach_hub
from ..common.paths import expand_home
from ..common.regular_files import check_model_folder
from ..common.text import first_line
from ..model.backbone_stages import default_stages, may_be_default
from ..model.own_backbones import PYRAMID_TYPE, build_backbone, fits_pyramid
from ..model.package_warning import DinoDetrWarning

_STRIDES = (8, 16, 32)
_PIXEL_SETTINGS = ("image_mean", "image_std", "rescale_factor", "do_normalize")


class PretrainedBackbone(NamedTuple):
    """The parts of a published backbone that a detector takes."""

    config: PreTrainedConfig  # for `DinoDetrConfig.backbone_config`
    state_dict: dict[str, Tensor]  # for `model.model.backbone.model`


def load_pretrained_backbone(
    name: str | Path, out_features: list[str] | None = None, out_indices: list[int] | None = None
) -> PretrainedBackbone:
    """Load a backbone of `AutoBackbone` or of timm with its weights. No code of a repository is run.

    Args:
        name: a folder; an id on the Hub, such as "microsoft/resnet-50"; or a timm name, such as "resnet50.a1_in1k" or
            "timm/resnet50.a1_in1k". A folder goes first, then a timm name.
        out_features, out_indices: maps to use. None: the maps of strides 8, 16 and 32. A plain vision transformer, such as
            DINOv3, has one map; without named maps, it gets a pyramid with initial weights (`DinoDetrVitPyramidConfig`).
    Raises:
        OSError: there is no backbone of this name, or it cannot be downloaded.
        ImportError: the backbone needs timm, which is not installed.
        ValueError: the name is empty or no text, or the model is no backbone, has no maps of these strides, or lacks weights.
    """
    maps = {"out_features": out_features, "out_indices": out_indices}
    maps = {key: list(value) for key, value in maps.items() if value is not None}
    timm_name = _find_timm_name(name)
    return _load_from_transformers(name, maps) if timm_name is None else _load_from_timm(name, timm_name, maps)


def pixel_settings(name: str | Path) -> dict[str, Any]:
    """Settings of an image processor that give a backbone the pixels it was trained with; {} if nothing is published.

    Args:
        name: see `load_pretrained_backbone`.
    Raises:
        OSError, ImportError: see `load_pretrained_backbone`.
    """
    timm_name = _find_timm_name(name)
    if timm_name is not None:
        published = _timm_record(timm_name)
        return {f"image_{key}": list(published[key]) for key in ("mean", "std") if published.get(key)}
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(expand_home(name))
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{name} has no readable {IMAGE_PROCESSOR_NAME} ({type(error).__name__}). Images are normalised with ImageNet's mean "
            "and standard deviation.",
            DinoDetrWarning,
            stacklevel=3,
        )
        return {}
    return {key: found[key] for key in _PIXEL_SETTINGS if found.get(key) is not None}


def _load_from_transformers(name: str | Path, maps: dict[str, list]) -> PretrainedBackbone:
    config = _read_config(name)
    stages = getattr(config, "stage_names", None)
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING or not stages:
        raise ValueError(
            f"{name} is a model of type {config.model_type!r}, which is no backbone. Use a ResNet, Swin, ConvNeXt or another type "
            "of AutoBackbone, or a timm model."
        )
    has_default = not maps and may_be_default(config)
    default = default_stages(config) if has_default else None
    needs_pyramid = has_default and default is None and fits_pyramid(config)
    if has_default and not needs_pyramid:
        if default is None:
            raise ValueError(
                f"{_no_default(name)} Name a map: from_backbone({str(name)!r}, out_features={stages[-1:]})."
            )
        maps = {"out_features": default}
    for key, value in maps.items():
        setattr(config, key, value)
    if maps and may_be_default(config):
        config.out_indices = [-1]  # the user's choice, not the library's default
    if isinstance(getattr(config, "hidden_sizes", None), tuple):  # ConvNeXt's backbone needs a list
        config.hidden_sizes = list(config.hidden_sizes)
    kind = MODEL_FOR_BACKBONE_MAPPING[type(config)]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # otherwise the library reports the weights of the class head, which are not used
    try:
        backbone, loading = kind.from_pretrained(
            expand_home(name),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except OSError as error:
        raise _not_loaded(name, error) from error
    finally:
        logging.set_verbosity(verbosity)
    # A classifier has no norms for the maps of Swin or ConvNeXt. They start as in a new backbone.
    if missing := sorted(key for key in loading["missing_keys"] if "norm" not in key):
        raise ValueError(f"{name} lacks {len(missing)} weights of a {kind.__name__}, for example {missing[0]}.")
    # Of a path, only the last part is saved: the rest is private.
    backbone.config._name_or_path = Path(name).name if expand_home(name).exists() else str(name)
    return _with_pyramid(backbone) if needs_pyramid else PretrainedBackbone(backbone.config, backbone.state_dict())


def _with_pyramid(transformer: PreTrainedModel) -> PretrainedBackbone:
    """A pyramid with initial weights on a plain vision transformer."""
    config = AutoConfig.for_model(PYRAMID_TYPE, backbone_config=transformer.config)
    backbone = build_backbone(config)
    backbone.backbone.load_state_dict(transformer.state_dict())
    return PretrainedBackbone(config, backbone.state_dict())


def _load_from_timm(name: str | Path, timm_name: str, maps: dict[str, list]) -> PretrainedBackbone:
    import timm

    if "out_features" in maps:
        raise ValueError(f"{name} is a timm backbone: name its maps by out_indices, not by out_features.")
    try:
        network = timm.create_model(timm_name, pretrained=True, features_only=True, **maps)
    except OSError as error:
        raise _not_loaded(name, error) from error
    except (
        RuntimeError,
        ValueError,
        AttributeError,
    ) as error:  # no network, no feature maps or no weights of this name
        raise ValueError(f"timm has no pretrained feature maps of {name}: {first_line(error)}") from error
    indices = maps.get("out_indices")
    if indices is None:
        strides = [level["reduction"] for level in network.feature_info.info]
        if not set(_STRIDES) <= set(strides):
            raise ValueError(f"{_no_default(name)} Name a map: from_backbone({str(name)!r}, out_indices=[-1]).")
        indices = [max(index for index, one in enumerate(strides) if one == stride) for stride in _STRIDES]
    # A saved detector is built from this name without a network.
    architecture = timm_name if ":" not in timm_name else network.pretrained_cfg["architecture"]
    config = AutoConfig.for_model("timm_backbone", backbone=architecture, out_indices=indices)
    return PretrainedBackbone(config, network.state_dict())


def _find_timm_name(name: str | Path) -> str | None:
    """The name by which `timm.create_model` knows a backbone. None: it is not a timm model."""
    if not (isinstance(name, str | Path) and str(name).strip()):
        raise ValueError(
            f"The name of a backbone is {name!r:.100}; give a folder, an id on the Hub such as 'microsoft/resnet-50', or a timm "
            "name."
        )
    folder, text = expand_home(name), str(name)
    if folder.is_dir():
        if not (folder / CONFIG_NAME).is_file():
            raise FileNotFoundError(f"The folder {name} has no readable backbone: it has no {CONFIG_NAME}.")
        check_model_folder(folder)
        return f"local-dir:{folder}" if _is_timm_config(folder) else None
    if re.match(r"hf[-_]hub:", text):
        return text
    short = text.removeprefix("timm/")
    if "/" in short:
        return f"hf-hub:{text}" if _is_timm_config(text) else None
    if not is_timm_available():
        if short == text:
            return None
        raise ImportError(f"The backbone {text} needs timm: pip install timm.")
    import timm

    if timm.is_model(short):
        return short
    if short == text:
        return None
    raise FileNotFoundError(f"timm has no model {short!r}; timm.list_models(pretrained=True) lists its names.")


def _is_timm_config(name: str | Path) -> bool:
    """Whether config.json is timm's. A classifier of transformers names `architectures`, timm an `architecture`."""
    try:
        _check_reachable(name)
        settings, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        raise _not_loaded(name, error) from error
    if "architecture" not in settings or settings.get("model_type") not in (None, "timm_wrapper"):
        return False
    if not is_timm_available():
        raise ImportError(f"The backbone {name} needs timm: pip install timm.")
    return True


def _timm_record(timm_name: str) -> dict[str, Any]:
    """timm's record of published weights, with `mean` and `std` of the pixels."""
    source, _, place = timm_name.rpartition(":")
    if not source:
        from timm.models import get_pretrained_cfg

        return get_pretrained_cfg(timm_name).to_dict()
    settings, _ = PreTrainedConfig.get_config_dict(place)
    return settings.get("pretrained_cfg") or settings


def _read_config(name: str | Path) -> PreTrainedConfig:
    try:
        _check_reachable(name)
        return AutoConfig.from_pretrained(expand_home(name), trust_remote_code=False)
    except OSError as error:
        raise _not_loaded(name, error) from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"The {CONFIG_NAME} of {name} is not one of a backbone: {first_line(error)}") from error


def _check_reachable(name: str | Path) -> None:
    """Raise ConnectionError if the Hub is needed and does not answer."""
    if not expand_home(name).is_dir():
        reach_hub(str(name))


def _no_default(name: str | Path) -> str:
    return f"{name} does not have maps of the strides 8, 16 and 32, so there are no default maps."


def _not_loaded(name: str | Path, error: OSError) -> OSError:
    if expand_home(name).is_dir():
        return FileNotFoundError(f"The folder {name} has no readable backbone: {first_line(error)}")
    return OSError(
        f"There is no folder {name}, and the Hub gives no backbone of this name ({type(error).__name__}). Check the name and the "
        "network, or give a folder with a backbone that save_pretrained wrote."
    )
