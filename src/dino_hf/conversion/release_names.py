"""Tensor names of the original release -> names of dino_hf.

The names of the original release are the common language of all projects. Each project has rules that lead to them.
"""

from collections.abc import Iterator

from ..model.configuration_dino_detr import DinoDetrConfig
from .backbones import backbone_rules
from .rules import Rule

_ENCODER, _DECODER = "transformer.encoder.layers.{i}.", "transformer.decoder.layers.{i}."
_OUR_ENCODER, _OUR_DECODER = "model.encoder.layers.{i}.", "model.decoder.layers.{i}."
_QKV = ("q_proj", "k_proj", "v_proj")

TRANSFORMER = [
    Rule("transformer.level_embed", "model.encoder.level_embed.weight"),
    *(
        Rule(source + name, target + our_name)
        for source, target in ((_ENCODER, _OUR_ENCODER), (_DECODER, _OUR_DECODER))
        for name, our_name in (("linear1.{p}", "mlp.fc1.{p}"), ("linear2.{p}", "mlp.fc2.{p}"))
    ),
    Rule(_ENCODER + "norm1.{p}", _OUR_ENCODER + "self_attn_norm.{p}"),
    Rule(_ENCODER + "norm2.{p}", _OUR_ENCODER + "mlp_norm.{p}"),
    Rule(_ENCODER + "self_attn.{name}.{p}", _OUR_ENCODER + "self_attn.{name}.{p}"),
    # Stable-DINO only. The release has no fusion, so these are the names of Stable-DINO.
    *(
        Rule(f"transformer.encoder.fusion_layer.{number}.{{p}}", f"model.encoder.fusion.{ours}.{{p}}")
        for number, ours in enumerate(("projection", "norm"))
    ),
    # The decoder numbers its norms in the order of definition, not of use: norm1 belongs to cross-attention.
    Rule(_DECODER + "norm1.{p}", _OUR_DECODER + "cross_attn_norm.{p}"),
    Rule(_DECODER + "norm2.{p}", _OUR_DECODER + "self_attn_norm.{p}"),
    Rule(_DECODER + "norm3.{p}", _OUR_DECODER + "mlp_norm.{p}"),
    Rule(_DECODER + "cross_attn.{name}.{p}", _OUR_DECODER + "cross_attn.{name}.{p}"),
    Rule(_DECODER + "self_attn.in_proj_{p}", tuple(f"{_OUR_DECODER}self_attn.{part}.{{p}}" for part in _QKV)),
    Rule(_DECODER + "self_attn.out_proj.{p}", _OUR_DECODER + "self_attn.o_proj.{p}"),
    Rule("transformer.decoder.norm.{p}", "model.decoder.norm.{p}"),
    Rule("transformer.decoder.ref_point_head.layers.{i}.{p}", "model.decoder.position_mlp.layers.{i}.{p}"),
    Rule("transformer.tgt_embed.weight", "model.query_selection.content.weight"),
    Rule("transformer.enc_output.{p}", "model.query_selection.memory_proj.{p}"),
    Rule("transformer.enc_output_norm.{p}", "model.query_selection.memory_norm.{p}"),
    Rule("transformer.enc_out_class_embed.{p}", "model.query_selection.head.class_head.{p}"),
    Rule("transformer.enc_out_bbox_embed.layers.{k}.{p}", "model.query_selection.head.box_head.layers.{k}.{p}"),
    Rule("label_enc.weight", "model.denoising.label_embedding.weight"),
    Rule("input_proj.{i}.0.{p}", "model.backbone.projections.{i}.{p}"),
    Rule("input_proj.{i}.1.{p}", "model.backbone.norms.{i}.{p}"),
]

_SHARED = "one head for all decoder layers, saved again for each layer"


def rules_for(config: DinoDetrConfig) -> list[Rule]:
    """Names of the original release -> names of dino_hf, for one architecture."""
    heads = _head_rules(config.share_decoder_heads, config.decoder_layers)
    return [*TRANSFORMER, *heads, *backbone_rules(config.backbone_config)]


def _head_rules(is_shared: bool, num_layers: int) -> list[Rule]:
    """Heads of the decoder layers. A shared head is saved under the names of all layers."""
    kept = "0" if is_shared else "{i}"
    rules = [
        Rule(f"class_embed.{kept}.{{p}}", f"model.decoder.heads.{kept}.class_head.{{p}}"),
        Rule(f"bbox_embed.{kept}.layers.{{k}}.{{p}}", f"model.decoder.heads.{kept}.box_head.layers.{{k}}.{{p}}"),
    ]
    if is_shared:
        rules += [Rule(f"{{kind}}_embed.{layer}.{{tail}}", None, _SHARED) for layer in range(1, num_layers)]
    return rules


# -- parts of the tables of other projects


def numbered_heads(num_layers: int) -> Iterator[tuple[int, str, str]]:
    """Yield the number of a head in other projects, and the names of its class and box part in the original release.

    Other projects number the decoder's heads first. The last head is the encoder's.
    """
    for number in range(num_layers):
        yield number, f"class_embed.{number}", f"bbox_embed.{number}"
    yield num_layers, "transformer.enc_out_class_embed", "transformer.enc_out_bbox_embed"


_MAX_EXTRA_LEVELS = 8


def neck_rules(norm: str, num_maps: int) -> list[Rule]:
    """Projections of the feature maps. Other projects number the levels beyond the backbone's maps separately.

    Args:
        norm: name of a projection's norm there.
        num_maps: feature maps of the backbone.
    """
    rules = []
    for level in range(num_maps + _MAX_EXTRA_LEVELS):
        source = f"neck.convs.{level}" if level < num_maps else f"neck.extra_convs.{level - num_maps}"
        rules += [Rule(f"{source}.conv.{{p}}", f"input_proj.{level}.0.{{p}}")]
        rules += [Rule(f"{source}.{norm}.{{p}}", f"input_proj.{level}.1.{{p}}")]
    return rules
