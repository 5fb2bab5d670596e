"""Parameter names of the original release -> names of dino_hf. The tables are total: every key meets exactly one rule.

A rule is (pattern, replacement, reason). The replacement is a name; or a tuple of names, over which the tensor is split
along its first axis; or None to drop the tensor, with the reason.
"""

import re
from typing import NamedTuple


class Rule(NamedTuple):
    pattern: str
    replacement: str | tuple[str, ...] | None
    reason: str = ""


def _split(prefix: str, suffix: str, names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")) -> tuple[str, ...]:
    return tuple(f"{prefix}{name}{suffix}" for name in names)


_LAYER = r"^transformer\.(encoder|decoder)\.layers\.(\d+)\."

TRANSFORMER = [
    Rule(r"^transformer\.level_embed$", "model.encoder.level_embed.weight"),
    Rule(_LAYER + r"linear1\.", r"model.\1.layers.\2.mlp.fc1."),
    Rule(_LAYER + r"linear2\.", r"model.\1.layers.\2.mlp.fc2."),
    Rule(r"^transformer\.encoder\.layers\.(\d+)\.norm1\.", r"model.encoder.layers.\1.self_attn_norm."),
    Rule(r"^transformer\.encoder\.layers\.(\d+)\.norm2\.", r"model.encoder.layers.\1.mlp_norm."),
    Rule(r"^transformer\.encoder\.layers\.(\d+)\.self_attn\.", r"model.encoder.layers.\1.self_attn."),
    # The decoder counts its norms in the order of definition, not of use: norm1 belongs to cross-attention.
    Rule(r"^transformer\.decoder\.layers\.(\d+)\.norm1\.", r"model.decoder.layers.\1.cross_attn_norm."),
    Rule(r"^transformer\.decoder\.layers\.(\d+)\.norm2\.", r"model.decoder.layers.\1.self_attn_norm."),
    Rule(r"^transformer\.decoder\.layers\.(\d+)\.norm3\.", r"model.decoder.layers.\1.mlp_norm."),
    Rule(r"^transformer\.decoder\.layers\.(\d+)\.cross_attn\.", r"model.decoder.layers.\1.cross_attn."),
    Rule(
        r"^transformer\.decoder\.layers\.(\d+)\.self_attn\.in_proj_(weight|bias)$",
        _split(r"model.decoder.layers.\1.self_attn.", r".\2"),
    ),
    Rule(r"^transformer\.decoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"model.decoder.layers.\1.self_attn.o_proj."),
    Rule(r"^transformer\.decoder\.norm\.", "model.decoder.norm."),
    Rule(r"^transformer\.decoder\.ref_point_head\.", "model.decoder.position_mlp."),
    Rule(r"^transformer\.tgt_embed\.", "model.query_selection.content."),
    Rule(r"^transformer\.enc_output\.", "model.query_selection.memory_proj."),
    Rule(r"^transformer\.enc_output_norm\.", "model.query_selection.memory_norm."),
    Rule(r"^transformer\.enc_out_class_embed\.", "model.query_selection.head.class_head."),
    Rule(r"^transformer\.enc_out_bbox_embed\.", "model.query_selection.head.box_head."),
    Rule(r"^transformer\.decoder\.(bbox|class)_embed\.", None, "the decoder's heads, saved a second time"),
    Rule(r"^label_enc\.", "model.denoising.label_embedding."),
    Rule(r"^input_proj\.(\d+)\.0\.", r"model.backbone.projections.\1."),
    Rule(r"^input_proj\.(\d+)\.1\.", r"model.backbone.norms.\1."),
]

SHARED_HEADS = [
    Rule(r"^class_embed\.0\.", "model.decoder.heads.0.class_head."),
    Rule(r"^bbox_embed\.0\.", "model.decoder.heads.0.box_head."),
    Rule(r"^(bbox|class)_embed\.[1-9]\d*\.", None, "one head for all decoder layers, saved again for each"),
]

SEPARATE_HEADS = [
    Rule(r"^class_embed\.(\d+)\.", r"model.decoder.heads.\1.class_head."),
    Rule(r"^bbox_embed\.(\d+)\.", r"model.decoder.heads.\1.box_head."),
]

_BODY = r"^backbone\.0\.body\."
_RESNET = "model.backbone.model."

RESNET = [
    Rule(_BODY + r"conv1\.", _RESNET + "embedder.embedder.convolution."),
    Rule(_BODY + r"bn1\.", _RESNET + "embedder.embedder.normalization."),
    *(
        rule
        for stage in range(4)
        for rule in (
            *(
                Rule(
                    _BODY + rf"layer{stage + 1}\.(\d+)\.{kind}{part + 1}\.",
                    _RESNET + rf"encoder.stages.{stage}.layers.\1.layer.{part}.{name}.",
                )
                for part in range(3)
                for kind, name in (("conv", "convolution"), ("bn", "normalization"))
            ),
            Rule(
                _BODY + rf"layer{stage + 1}\.(\d+)\.downsample\.0\.",
                _RESNET + rf"encoder.stages.{stage}.layers.\1.shortcut.convolution.",
            ),
            Rule(
                _BODY + rf"layer{stage + 1}\.(\d+)\.downsample\.1\.",
                _RESNET + rf"encoder.stages.{stage}.layers.\1.shortcut.normalization.",
            ),
        )
    ),
]

_BLOCK = r"^backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\."
_SWIN = "model.backbone.model.swin."
_SWIN_BLOCK = _SWIN + r"encoder.layers.\1.blocks.\2."

SWIN = [
    Rule(r"^backbone\.0\.patch_embed\.proj\.", _SWIN + "embeddings.patch_embeddings.projection."),
    Rule(r"^backbone\.0\.patch_embed\.norm\.", _SWIN + "embeddings.norm."),
    Rule(_BLOCK + r"norm1\.", _SWIN_BLOCK + "layernorm_before."),
    Rule(_BLOCK + r"norm2\.", _SWIN_BLOCK + "layernorm_after."),
    Rule(
        _BLOCK + r"attn\.relative_position_bias_table$",
        _SWIN_BLOCK + "attention.relative_position_bias.relative_position_bias_table",
    ),
    Rule(_BLOCK + r"attn\.relative_position_index$", None, "follows from the window size, not a weight"),
    Rule(_BLOCK + r"attn\.qkv\.(weight|bias)$", _split(_SWIN_BLOCK + "attention.", r".\3")),
    Rule(_BLOCK + r"attn\.proj\.", _SWIN_BLOCK + "attention.o_proj."),
    Rule(_BLOCK + r"mlp\.(fc1|fc2)\.", _SWIN_BLOCK + r"mlp.\3."),
    Rule(r"^backbone\.0\.layers\.(\d+)\.downsample\.(reduction|norm)\.", _SWIN + r"encoder.layers.\1.downsample.\2."),
]

_CONVNEXT = "model.backbone.model."
_CONVNEXT_BLOCK = _CONVNEXT + r"encoder.stages.\1.layers.\2."

CONVNEXT = [
    Rule(r"^backbone\.0\.downsample_layers\.0\.0\.", _CONVNEXT + "embeddings.patch_embeddings."),
    Rule(r"^backbone\.0\.downsample_layers\.0\.1\.", _CONVNEXT + "embeddings.layernorm."),
    Rule(
        r"^backbone\.0\.downsample_layers\.([1-3])\.([01])\.", _CONVNEXT + r"encoder.stages.\1.downsampling_layer.\2."
    ),
    Rule(r"^backbone\.0\.stages\.(\d+)\.(\d+)\.(dwconv|pwconv1|pwconv2)\.", _CONVNEXT_BLOCK + r"\3."),
    Rule(r"^backbone\.0\.stages\.(\d+)\.(\d+)\.norm\.", _CONVNEXT_BLOCK + "layernorm."),
    Rule(r"^backbone\.0\.stages\.(\d+)\.(\d+)\.gamma$", _CONVNEXT_BLOCK + "layer_scale_parameter"),
]


def output_norms(stages: list[int]) -> list[Rule]:
    """Norms of the backbone's output stages, which the release counts from 0 and transformers from 1."""
    return [
        Rule(rf"^backbone\.0\.norm{stage}\.", f"model.backbone.model.hidden_states_norms.stage{stage + 1}.")
        if stage in stages
        else Rule(rf"^backbone\.0\.norm{stage}\.", None, "norm of a backbone stage that is not used")
        for stage in range(4)
    ]


def find_rule(key: str, rules: list[Rule]) -> Rule:
    """The one rule for a key.

    Raises:
        KeyError: no rule fits, or more than one.
    """
    fitting = [rule for rule in rules if re.search(rule.pattern, key)]
    if len(fitting) != 1:
        found = ", ".join(rule.pattern for rule in fitting) or "none"
        raise KeyError(
            f"{key!r} must meet exactly one rule of convert_scripts/key_mapping.py, but meets: {found}. Add a rule, or one "
            "with None and the reason to drop it."
        )
    return fitting[0]


def renamed(key: str, rule: Rule) -> tuple[str, ...]:
    """New names of a key: one, several when its tensor is split, or none."""
    if rule.replacement is None:
        return ()
    replacements = (rule.replacement,) if isinstance(rule.replacement, str) else rule.replacement
    return tuple(re.sub(rule.pattern, replacement, key) for replacement in replacements)
