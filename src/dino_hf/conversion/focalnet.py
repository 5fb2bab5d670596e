"""FocalNet in detrex's checkpoints: names of its tensors, and its settings as the tensors show them.

The original release has no FocalNet. Its names here are detrex's, with the release's prefix of a backbone.
"""

from torch import Tensor

from .errors import ConversionError
from .rules import Rule, count_indices

MODEL_TYPE = "dino_detr_focalnet"
DROP_PATH_RATE = 0.2  # of FocalNet in detrex, which no configuration of a detector changes
_PREFIX, _OUR_PREFIX = "backbone.0.", "model.backbone.model."
_STAGE, _OUR_STAGE = _PREFIX + "layers.{i}.", _OUR_PREFIX + "encoder.stages.{i}."
MARK = _PREFIX + "layers.0.blocks.0.modulation.f.weight"  # no other backbone has this tensor

FOCALNET = [
    Rule(_PREFIX + "patch_embed.proj.{p}", _OUR_PREFIX + "embeddings.patch_embeddings.projection.{p}"),
    Rule(_PREFIX + "patch_embed.norm.{p}", _OUR_PREFIX + "embeddings.norm.{p}"),
    *(
        Rule(f"{_STAGE}blocks.{{j}}.{name}", f"{_OUR_STAGE}layers.{{j}}.{our_name}")
        for name, our_name in (
            ("norm{k}.{p}", "norm{k}.{p}"),
            ("gamma_{k}", "gamma_{k}"),
            ("mlp.{name}.{p}", "mlp.{name}.{p}"),
            ("modulation.f.{p}", "modulation.projection_in.{p}"),
            ("modulation.h.{p}", "modulation.projection_context.{p}"),
            ("modulation.proj.{p}", "modulation.projection_out.{p}"),
            ("modulation.focal_layers.{k}.0.weight", "modulation.focal_layers.{k}.0.weight"),
        )
    ),
    Rule(_STAGE + "downsample.proj.{p}", _OUR_STAGE + "downsample.projection.{p}"),
    Rule(_STAGE + "downsample.norm.{p}", _OUR_STAGE + "downsample.norm.{p}"),
]


def focalnet_settings(tensors: dict[str, Tensor]) -> dict:
    """`backbone_config` without `drop_path_rate`, which no tensor shows.

    Args:
        tensors: by the release's names.
    Raises:
        ConversionError: the FocalNet is of another kind than the published ones, so no tensor shows the place of its norms.
    """
    stem, block = tensors[_PREFIX + "patch_embed.proj.weight"], _PREFIX + "layers.{}.blocks.0."
    width, kernel = len(stem), stem.shape[-1]
    has_scale = "a" if block.format(0) + "gamma_1" in tensors else "no"
    if kernel != 7 or has_scale == "no":
        raise ConversionError(
            f"The FocalNet has a first convolution of {kernel} x {kernel} and {has_scale} layer scale. Only the "
            "kind of FocalNet-L is converted, with a first convolution of 7 x 7, a layer scale, and norms after the layers: no "
            "tensor shows where the norms are."
        )
    return {
        "model_type": MODEL_TYPE,
        "embed_dim": width,
        "hidden_sizes": [width * 2**stage for stage in range(4)],
        "depths": [count_indices(tensors, rf"backbone\.0\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(4)],
        "focal_levels": [
            count_indices(tensors, rf"backbone\.0\.layers\.{stage}\.blocks\.0\.modulation\.focal_layers\.(\d+)\.")
            for stage in range(4)
        ],
        "focal_windows": [
            tensors[block.format(stage) + "modulation.focal_layers.0.0.weight"].shape[-1] for stage in range(4)
        ],
        "mlp_ratio": len(tensors[block.format(0) + "mlp.fc1.weight"]) / width,
        "use_conv_embed": True,
        "use_layerscale": True,
        "use_post_layernorm": True,
    }
