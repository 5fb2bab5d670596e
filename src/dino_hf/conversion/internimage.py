"""InternImage in detrex's checkpoints: names of its tensors, and its settings as the tensors show them.

The original release has no InternImage. Its names here are detrex's, with the release's prefix of a backbone.
"""

from torch import Tensor

from .rules import Rule, count_indices

MODEL_TYPE = "dino_detr_internimage"
_PREFIX, _OUR_PREFIX = "backbone.0.", "model.backbone.model."
_LAYER, _OUR_LAYER = _PREFIX + "levels.{i}.blocks.{j}.", _OUR_PREFIX + "encoder.stages.{i}.layers.{j}."
_STAGE, _OUR_STAGE = _PREFIX + "levels.{i}.", _OUR_PREFIX + "encoder.stages.{i}."
MARK = _PREFIX + "patch_embed.conv1.weight"  # no other backbone has this tensor

INTERNIMAGE = [
    Rule(_PREFIX + "patch_embed.conv{i}.{p}", _OUR_PREFIX + "embeddings.conv{i}.{p}"),
    Rule(_PREFIX + "patch_embed.norm{i}.1.{p}", _OUR_PREFIX + "embeddings.norm{i}.{p}"),
    *(
        Rule(_LAYER + name, _OUR_LAYER + our_name)
        for name, our_name in (
            ("gamma1", "conv_scale"),
            ("gamma2", "mlp_scale"),
            ("norm1.0.{p}", "conv_norm.{p}"),
            ("norm2.0.{p}", "mlp_norm.{p}"),
            ("mlp.{name}.{p}", "mlp.{name}.{p}"),
            ("dcn.dw_conv.0.{p}", "conv.local_conv.{p}"),
            ("dcn.dw_conv.1.1.{p}", "conv.local_norm.{p}"),
            ("dcn.offset.{p}", "conv.offsets.{p}"),
            ("dcn.mask.{p}", "conv.weights.{p}"),
            ("dcn.input_proj.{p}", "conv.input_proj.{p}"),
            ("dcn.output_proj.{p}", "conv.output_proj.{p}"),
        )
    ),
    Rule(_STAGE + "downsample.conv.weight", _OUR_STAGE + "downsample.conv.weight"),
    Rule(_STAGE + "downsample.norm.1.{p}", _OUR_STAGE + "downsample.norm.{p}"),
    Rule(_STAGE + "norm.0.{p}", _OUR_STAGE + "norm.{p}"),
]

# Width of the first stage -> offset_scale, in the models T, S, B and L of detrex and of InternImage's authors.
_OFFSET_SCALES = {64: 1.0, 80: 1.0, 112: 1.0, 160: 2.0}


def internimage_settings(tensors: dict[str, Tensor]) -> dict:
    """`backbone_config` without the settings that no tensor shows.

    Args:
        tensors: by the release's names.
    """
    first = _PREFIX + "levels.{}.blocks.0."
    width = len(tensors[_PREFIX + "patch_embed.conv2.weight"])
    return {
        "model_type": MODEL_TYPE,
        "embed_dim": width,
        "depths": [count_indices(tensors, rf"backbone\.0\.levels\.{stage}\.blocks\.(\d+)\.") for stage in range(4)],
        "num_groups": [len(tensors[first.format(stage) + "dcn.mask.bias"]) // 9 for stage in range(4)],
        "mlp_ratio": len(tensors[first.format(0) + "mlp.fc1.bias"]) / width,
        "post_norm": _PREFIX + "levels.0.norm.0.weight" not in tensors,
        "layer_scale_init_value": 1.0 if first.format(0) + "gamma1" in tensors else None,
    }


def known_offset_scale(backbone: dict) -> float | None:
    """`offset_scale` of an InternImage of a published width; None for another width or backbone. No tensor shows it.

    Args:
        backbone: `backbone_config`, see `internimage_settings`.
    """
    return _OFFSET_SCALES.get(backbone["embed_dim"]) if backbone["model_type"] == MODEL_TYPE else None


def internimage_defaults(backbone: dict, known: dict) -> dict[str, float]:
    """Values of `offset_scale` and `drop_path_rate`, which no tensor shows.

    For a published width, these are the values of the published model. For another width, they are a guess from detrex's
    configurations: L has post-norm, offset_scale 2 and drop_path_rate 0.4, and only T has norms before its layers.

    Args:
        backbone: see `internimage_settings`.
        known: settings from the user, which may include `offset_scale`.
    """
    scale = known_offset_scale(backbone) or (2.0 if backbone["post_norm"] else 1.0)
    return {"offset_scale": scale, "drop_path_rate": 0.4 if known.get("offset_scale", scale) == 2 else 0.1}
