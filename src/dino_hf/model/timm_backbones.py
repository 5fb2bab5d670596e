"""Support for timm backbones: names of published weights, warnings about strides and pixel statistics, image sizes."""

import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from .backbone_trials import side_multiple, takes_size
from .package_warning import DinoDetrWarning

_PIXELS_OF_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_WRAPPER = "_backbone."


def prepare_timm_backbone(backbone: nn.Module) -> None:
    """Let a `TimmBackbone` load the state dict of timm's model. Warn of a single coarse map and of other pixel statistics."""
    backbone.register_load_state_dict_pre_hook(_take_names_of_timm)
    network = backbone._backbone
    strides = network.feature_info.reduction()
    name = backbone.config.backbone
    if min(strides) >= 32:
        _warn(
            f"The timm backbone {name!r} returns {len(strides)} feature map of stride {min(strides)}, which is too coarse for "
            "small objects. Set out_indices in backbone_config: [-3, -2, -1] selects the last three maps."
        )
    published = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None) or {}
    mean, std = published.get("mean"), published.get("std")
    if mean is not None and std is not None and not _is_near((mean, std), _PIXELS_OF_IMAGENET):
        _warn(
            f"The published weights of the timm backbone {name!r} need other pixel statistics than DinoDetrImageProcessor's: "
            f"use DinoDetrImageProcessor(image_mean={list(mean)}, image_std={list(std)}) with them."
        )


def timm_side_multiple(backbone: nn.Module) -> int | None:
    """The number that must divide the height and width of images, see `side_multiple`."""
    levels = backbone._backbone.feature_info.info  # all levels of the network, including those without an output
    return side_multiple(backbone, max(level["reduction"] for level in levels))


def refuse_size(backbone: nn.Module, pixel_values: Tensor, error: Exception) -> None:
    """Raise a ValueError if the network failed because of the size of the images."""
    height, width = pixel_values.shape[-2:]
    if takes_size(backbone, height, width):
        return
    network, name = backbone._backbone, backbone.config.backbone
    published = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None) or {}
    side = (published.get("input_size") or (3, 224, 224))[-1]
    raise ValueError(
        f"The timm backbone {name!r} refuses images of {height} x {width} pixels: {' '.join(str(error).split()):.200}. Resize all "
        f"images to one size that it accepts, such as DinoDetrImageProcessor(size={{'height': {side}, 'width': {side}}}), or use "
        "another backbone."
    ) from error


def _take_names_of_timm(module: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """Hook of `load_state_dict`: add the prefix of the wrapper to timm's names, and drop the weights of timm's class head."""
    given = [name for name in state_dict if name.startswith(prefix)]
    if any(name.startswith(prefix + _WRAPPER) for name in given):
        return
    parts = {name.removeprefix(_WRAPPER).split(".")[0] for name in module.state_dict()}
    if parts == {"model"}:  # timm's wrapper of vision transformers
        inner = {name.removeprefix(_WRAPPER + "model.").split(".")[0] for name in module.state_dict()}
        parts, wrapper = inner, _WRAPPER + "model."
    else:
        wrapper = _WRAPPER
    for name in given:
        value, rest = state_dict.pop(name), name.removeprefix(prefix)
        if rest.split(".")[0] in parts:
            state_dict[prefix + wrapper + rest] = value


def _is_near(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> bool:
    pairs = zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True)
    return all(abs(a - b) < 0.02 for a, b in pairs)


def _warn(sentence: str) -> None:
    warnings.warn(sentence, DinoDetrWarning, stacklevel=6)
