"""ViTDet in detrex's checkpoints: names of its tensors, and its settings as the tensors show them.

The original release has no ViTDet. Its names here are detrex's, with the release's prefix of a backbone.
"""

import math
import re
from typing import Any

from torch import Tensor

from .errors import ConversionError
from .release_tensors import count_backbone_maps
from .rules import Rule, count_indices

MODEL_TYPE = "dino_detr_vit_pyramid"
_PREFIX, _OUR_PREFIX = "backbone.0.", "model.backbone.model."
_NET, _OUR_NET = _PREFIX + "net.", _OUR_PREFIX + "backbone."
_BLOCK, _OUR_BLOCK = _NET + "blocks.{i}.", _OUR_NET + "encoder.layer.{i}."
MARK = _NET + "patch_embed.proj.weight"  # no other backbone has this tensor

_TRANSFORMER = [
    Rule(_NET + "pos_embed", _OUR_NET + "embeddings.position_embeddings"),
    Rule(_NET + "patch_embed.proj.{p}", _OUR_NET + "embeddings.projection.{p}"),
    Rule(_BLOCK + "norm{k}.{p}", _OUR_BLOCK + "norm{k}.{p}"),
    Rule(_BLOCK + "attn.{name}.{p}", _OUR_BLOCK + "attention.{name}.{p}"),
    Rule(_BLOCK + "attn.rel_pos_{p}", _OUR_BLOCK + "attention.rel_pos_{p}"),
    Rule(_BLOCK + "mlp.{name}.{p}", _OUR_BLOCK + "mlp.{name}.{p}"),
]
# Scale of a map -> layers that change its size and have weights. Their order is the same in both projects.
_RESIZING = {4: (0, 1, 3), 2: (0,), 1: (), 0.5: ()}
_FIRST_CONV = {4: 4, 2: 1, 1: 0, 0.5: 1}  # number of the 1 x 1 convolution in detrex


def vitdet_rules(config) -> list[Rule]:
    """Names of the release -> names of dino_hf.

    Args:
        config: `backbone_config` of a detector.
    """
    rules = list(_TRANSFORMER)
    for index, scale in enumerate(config.scale_factors):
        number = round(math.log2(config.backbone_config.patch_size / scale))
        source, target = f"{_PREFIX}simfp_{number}.", f"{_OUR_PREFIX}pyramid.{index}."
        rules += [Rule(f"{source}{layer}.{{p}}", f"{target}resize.{layer}.{{p}}") for layer in _RESIZING[scale]]
        for layer, name in enumerate(("reduce", "mix"), _FIRST_CONV[scale]):
            rules.append(Rule(f"{source}{layer}.weight", f"{target}{name}.weight"))
            rules.append(Rule(f"{source}{layer}.norm.{{p}}", f"{target}{name}_norm.{{p}}"))
    return rules


def vitdet_settings(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """`backbone_config` without `drop_path_rate`, which no tensor shows.

    Args:
        tensors: by the release's names.
    Raises:
        ConversionError: the tensors do not show which blocks attend to the whole image, or it is another pyramid.
    """
    patch_size = tensors[MARK].shape[-1]
    numbers = sorted({int(match[1]) for name in tensors if (match := re.match(r"backbone\.0\.simfp_(\d+)\.", name))})
    scales = [patch_size / 2**number for number in numbers]
    num_pooled = count_backbone_maps(tensors) - len(scales)
    if not scales or set(scales) - {*_RESIZING} or num_pooled not in (0, 1):
        raise ConversionError(
            f"The pyramid of the ViT has the scales {scales} and {num_pooled} further maps. Converted are scales of 4, 2, 1 and "
            "0.5, with at most one pooled map."
        )
    return {
        "model_type": MODEL_TYPE,
        "backbone_config": _transformer_settings(tensors, patch_size),
        "scale_factors": scales,
        "add_pooled_level": num_pooled == 1,
        "out_channels": len(tensors[f"{_PREFIX}simfp_{numbers[0]}.{_FIRST_CONV[scales[0]]}.weight"]),
        "out_features": [f"stage{number}" for number in range(1, len(scales) + num_pooled + 1)],
    }


def _transformer_settings(tensors: dict[str, Tensor], patch_size: int) -> dict[str, Any]:
    num_blocks = count_indices(tensors, r"backbone\.0\.net\.blocks\.(\d+)\.")
    first = _NET + "blocks.0."
    width = len(tensors[first + "norm1.weight"])
    tables = [
        tuple((len(tensors[f"{_NET}blocks.{block}.attn.rel_pos_{side}"]) + 1) // 2 for side in "hw")
        for block in range(num_blocks)
    ]  # in patches; a table has 2 * size - 1 rows
    # In every published model, the last block attends to the whole image.
    windowed = [block for block, size in enumerate(tables) if size != tables[-1]]
    windows = {side for block in windowed for side in tables[block]}
    side = math.isqrt(tensors[_NET + "pos_embed"].shape[1] - 1)  # the table has one more row for the class token
    if len(windows) != 1 or side**2 + 1 != tensors[_NET + "pos_embed"].shape[1]:
        raise ConversionError(
            f"The ViT has tables of relative positions for {sorted(set(tables))} patches. Expected are two sizes, one for windows "
            "and one for the whole image, and a square table of absolute positions. Otherwise no tensor shows which blocks "
            "attend to the whole image."
        )
    return {
        "model_type": "vitdet",
        "hidden_size": width,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": width // tensors[first + "attn.rel_pos_h"].shape[1],
        "mlp_ratio": len(tensors[first + "mlp.fc1.weight"]) // width,
        "qkv_bias": first + "attn.qkv.bias" in tensors,
        "patch_size": patch_size,
        "image_size": [patch_size * length for length in tables[-1]],
        "pretrain_image_size": patch_size * side,
        "use_relative_position_embeddings": True,
        "window_size": windows.pop(),
        "window_block_indices": windowed,
    }


def drop_path_rate(backbone: dict[str, Any]) -> float:
    """Stochastic depth of detrex's ViTDet-B and L; for another number of blocks, B's.

    Args:
        backbone: see `vitdet_settings`.
    """
    return 0.4 if backbone["backbone_config"]["num_hidden_layers"] == 24 else 0.1
