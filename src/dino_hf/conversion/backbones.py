"""Backbones: names of their tensors in the original release, and their settings as the tensors show them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .errors import ConversionError
from .focalnet import FOCALNET, focalnet_settings
from .focalnet import MARK as FOCALNET_MARK
from .focalnet import MODEL_TYPE as FOCALNET_TYPE
from .internimage import INTERNIMAGE, internimage_settings
from .internimage import MARK as INTERNIMAGE_MARK
from .internimage import MODEL_TYPE as INTERNIMAGE_TYPE
from .release_tensors import count_backbone_maps
from .rules import Rule, count_indices
from .vitdet import MARK as VITDET_MARK
from .vitdet import MODEL_TYPE as VITDET_TYPE
from .vitdet import vitdet_rules, vitdet_settings

_PREFIX, _OUR_PREFIX = "backbone.0.", "model.backbone.model."
_QKV = ("q_proj", "k_proj", "v_proj")
BODY = _PREFIX + "body."

RESNET = [
    Rule(BODY + "conv1.weight", _OUR_PREFIX + "embedder.embedder.convolution.weight"),
    Rule(BODY + "bn1.{p}", _OUR_PREFIX + "embedder.embedder.normalization.{p}"),
    *(
        Rule(
            f"{BODY}layer{stage + 1}.{{i}}.{name}.{{p}}",
            f"{_OUR_PREFIX}encoder.stages.{stage}.layers.{{i}}.{our_name}.{{p}}",
        )
        for stage in range(4)
        for name, our_name in (
            *((f"conv{part + 1}", f"layer.{part}.convolution") for part in range(3)),
            *((f"bn{part + 1}", f"layer.{part}.normalization") for part in range(3)),
            ("downsample.0", "shortcut.convolution"),
            ("downsample.1", "shortcut.normalization"),
        )
    ),
]

_BLOCK, _SWIN = _PREFIX + "layers.{i}.blocks.{j}.", _OUR_PREFIX + "swin."
_SWIN_BLOCK = _SWIN + "encoder.layers.{i}.blocks.{j}."

SWIN = [
    Rule(_PREFIX + "patch_embed.proj.{p}", _SWIN + "embeddings.patch_embeddings.projection.{p}"),
    Rule(_PREFIX + "patch_embed.norm.{p}", _SWIN + "embeddings.norm.{p}"),
    Rule(_BLOCK + "norm1.{p}", _SWIN_BLOCK + "layernorm_before.{p}"),
    Rule(_BLOCK + "norm2.{p}", _SWIN_BLOCK + "layernorm_after.{p}"),
    Rule(
        _BLOCK + "attn.relative_position_bias_table",
        _SWIN_BLOCK + "attention.relative_position_bias.relative_position_bias_table",
    ),
    Rule(_BLOCK + "attn.relative_position_index", None, "computed from the window size, no weights"),
    Rule(_BLOCK + "attn.qkv.{p}", tuple(f"{_SWIN_BLOCK}attention.{part}.{{p}}" for part in _QKV)),
    Rule(_BLOCK + "attn.proj.{p}", _SWIN_BLOCK + "attention.o_proj.{p}"),
    Rule(_BLOCK + "mlp.{name}.{p}", _SWIN_BLOCK + "mlp.{name}.{p}"),
    Rule(_PREFIX + "layers.{i}.downsample.{name}.{p}", _SWIN + "encoder.layers.{i}.downsample.{name}.{p}"),
]

_CONVNEXT_BLOCK, _OUR_CONVNEXT_BLOCK = _PREFIX + "stages.{i}.{j}.", _OUR_PREFIX + "encoder.stages.{i}.layers.{j}."

CONVNEXT = [
    Rule(_PREFIX + "downsample_layers.0.0.{p}", _OUR_PREFIX + "embeddings.patch_embeddings.{p}"),
    Rule(_PREFIX + "downsample_layers.0.1.{p}", _OUR_PREFIX + "embeddings.layernorm.{p}"),
    *(
        Rule(
            f"{_PREFIX}downsample_layers.{stage}.{{j}}.{{p}}",
            f"{_OUR_PREFIX}encoder.stages.{stage}.downsampling_layer.{{j}}.{{p}}",
        )
        for stage in (1, 2, 3)
    ),
    *(
        Rule(f"{_CONVNEXT_BLOCK}{name}.{{p}}", f"{_OUR_CONVNEXT_BLOCK}{name}.{{p}}")
        for name in ("dwconv", "pwconv1", "pwconv2")
    ),
    Rule(_CONVNEXT_BLOCK + "norm.{p}", _OUR_CONVNEXT_BLOCK + "layernorm.{p}"),
    Rule(_CONVNEXT_BLOCK + "gamma", _OUR_CONVNEXT_BLOCK + "layer_scale_parameter"),
]


def backbone_rules(backbone_config) -> list[Rule]:
    """Names of the original release -> names of dino_hf."""
    if backbone_config.model_type == VITDET_TYPE:
        return vitdet_rules(backbone_config)
    tables = {
        "resnet": RESNET,
        "swin": SWIN,
        "convnext": CONVNEXT,
        INTERNIMAGE_TYPE: INTERNIMAGE,
        FOCALNET_TYPE: FOCALNET,
    }
    rules = tables[backbone_config.model_type]
    stages = [int(name.removeprefix("stage")) - 1 for name in backbone_config.out_features]
    return [*rules, *output_norms(stages)]


def output_norms(stages: Iterable[int]) -> list[Rule]:
    """Norms of the output stages. The release numbers stages from 0, transformers from 1."""
    stages = set(stages)
    return [
        Rule(f"{_PREFIX}norm{stage}.{{p}}", f"{_OUR_PREFIX}hidden_states_norms.stage{stage + 1}.{{p}}")
        if stage in stages
        else Rule(f"{_PREFIX}norm{stage}.{{p}}", None, "norm of an unused backbone stage")
        for stage in range(4)
    ]


# Part of a tensor name -> why this backbone cannot be converted.
_UNSUPPORTED = {
    "backbone.blocks.": "a plain ViT with rotary positions (EVA-02, as in Co-DETR with ViT-L). Neither transformers nor timm has "
    "it with Co-DETR's pyramid",
    ".attn.q_bias": "EVA. Of the plain ViTs with a feature pyramid, only ViTDet is converted",
    ".attn.q_proj.": "EVA-02. Of the plain ViTs with a feature pyramid, only ViTDet is converted",
    ".attn.rope.": "EVA-02. Of the plain ViTs with a feature pyramid, only ViTDet is converted",
    ".attn.logit_scale": "Swin v2. No published DINO has it, so an exact conversion cannot be tested",
}


def check_supported(names: Iterable[str]) -> None:
    """Check that the converter supports the backbone.

    Args:
        names: names of the tensors, in any project.
    Raises:
        ConversionError: it does not.
    """
    names = [name for name in names if name.startswith("backbone.")]
    for part, reason in _UNSUPPORTED.items():
        if any(part in name for name in names):
            raise ConversionError(f"The backbone is not supported, because it is {reason}.")


def backbone_settings(tensors: dict[str, Tensor]) -> dict:
    """`backbone_config`, read from the shapes of the backbone and of the neck.

    Args:
        tensors: by the release's names.
    Raises:
        ConversionError: it is an unknown backbone, or a tensor is missing.
    """
    stages = [f"stage{stage}" for stage in range(5 - count_backbone_maps(tensors), 5)]
    for mark, read in _READERS.items():
        if mark in tensors:
            try:
                return {"out_features": stages} | read(tensors)
            except KeyError as error:
                raise ConversionError(f"The backbone lacks the tensor {error.args[0]!r} (release's name).") from error
    raise ConversionError(
        "The backbone is not a ResNet, Swin, ConvNeXt, FocalNet, ViTDet or InternImage; its first tensors are "
        f"{sorted(name for name in tensors if name.startswith('backbone.'))[:3]}."
    )


def _resnet_settings(tensors: dict[str, Tensor]) -> dict:
    last = 3 if f"{BODY}layer1.0.conv3.weight" in tensors else 2  # blocks of ResNet-18 and 34 have two convolutions
    return {
        "model_type": "resnet",
        "embedding_size": len(tensors[BODY + "conv1.weight"]),
        "depths": [count_indices(tensors, rf"backbone\.0\.body\.layer{stage}\.(\d+)\.") for stage in range(1, 5)],
        "hidden_sizes": [len(tensors[f"{BODY}layer{stage}.0.conv{last}.weight"]) for stage in range(1, 5)],
        "layer_type": "bottleneck" if last == 3 else "basic",
    }


def _swin_settings(tensors: dict[str, Tensor]) -> dict:
    depths = [count_indices(tensors, rf"backbone\.0\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(4)]
    name = _PREFIX + "layers.{}.blocks.0.attn.relative_position_bias_table"
    tables = [tensors[name.format(stage)] for stage in range(4)]
    window = (round(len(tables[0]) ** 0.5) + 1) // 2  # a table has (2 * window - 1) ** 2 rows
    return {
        "model_type": "swin",
        "embed_dim": len(tensors[_PREFIX + "patch_embed.proj.weight"]),
        "depths": depths,
        "num_heads": [table.shape[1] for table in tables],
        "window_size": window,
        "image_size": 384 if window == 12 else 224,
    }


def _convnext_settings(tensors: dict[str, Tensor]) -> dict:
    return {
        "model_type": "convnext",
        "depths": [count_indices(tensors, rf"backbone\.0\.stages\.{stage}\.(\d+)\.") for stage in range(4)],
        "hidden_sizes": [len(tensors[f"{_PREFIX}stages.{stage}.0.dwconv.weight"]) for stage in range(4)],
    }


# A tensor that only this backbone has -> function that reads its settings.
_READERS = {
    FOCALNET_MARK: focalnet_settings,  # before Swin, whose mark it has too
    VITDET_MARK: vitdet_settings,
    BODY + "conv1.weight": _resnet_settings,
    _PREFIX + "patch_embed.proj.weight": _swin_settings,
    _PREFIX + "downsample_layers.0.0.weight": _convnext_settings,
    INTERNIMAGE_MARK: internimage_settings,
}

# Settings of a backbone that change its outputs.
_COMPUTING = [
    *("model_type", "depths", "hidden_sizes", "out_features", "hidden_act", "layer_norm_eps", "num_channels"),
    *("embedding_size", "layer_type", "downsample_in_first_stage", "downsample_in_bottleneck"),
    *("embed_dim", "num_heads", "window_size", "patch_size", "mlp_ratio", "qkv_bias", "use_absolute_embeddings"),
    *("layer_scale_init_value", "num_groups", "post_norm"),
    *("focal_levels", "focal_windows", "use_conv_embed", "use_layerscale", "normalize_modulator"),
    *("use_post_layernorm", "use_post_layernorm_in_modulation"),
    *("scale_factors", "add_pooled_level", "out_channels"),
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "pretrain_image_size", "window_block_indices"),
    *("residual_block_indices", "use_absolute_position_embeddings", "use_relative_position_embeddings"),
]


def unusual_settings(ours, usual) -> tuple[dict, dict]:
    """Settings in which two backbone configurations compute differently: the values of `ours` and of `usual`."""
    one, other = ours.to_dict(), usual.to_dict()
    for settings in (one, other):  # a tuple and a list, and a size once and twice, mean the same
        settings |= settings.pop("backbone_config", None) or {}
        for name, value in settings.items():
            settings[name] = list(value) if isinstance(value, tuple) else value
    names = [name for name in _COMPUTING if one.get(name) != other.get(name)]
    return {name: one.get(name) for name in names}, {name: other.get(name) for name in names}


def position_indices(backbone_config) -> dict[str, Tensor]:
    """Index tensors that Swin saves beside its weights: the row of the bias table for each pair of cells of a window.

    Returns:
        (w * w, w * w) for each block, by the release's names; nothing for other backbones.
    """
    if backbone_config.model_type != "swin":
        return {}
    window = backbone_config.window_size
    cells = torch.cartesian_prod(torch.arange(window), torch.arange(window))  # (w * w, 2)
    distance = cells[:, None] - cells + window - 1
    index = distance[..., 0] * (2 * window - 1) + distance[..., 1]
    return {
        f"{_PREFIX}layers.{stage}.blocks.{block}.attn.relative_position_index": index
        for stage, depth in enumerate(backbone_config.depths)
        for block in range(depth)
    }
