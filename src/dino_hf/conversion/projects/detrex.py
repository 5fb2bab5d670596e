"""detrex: https://github.com/IDEA-Research/detrex"""

from collections import Counter
from typing import Any

from torch import Tensor

from ...model.configuration_dino_detr import DinoDetrConfig
from ..backbones import BODY, position_indices
from ..focalnet import MODEL_TYPE as FOCALNET_TYPE
from ..internimage import MODEL_TYPE as INTERNIMAGE_TYPE
from ..release_names import neck_rules, numbered_heads
from ..release_tensors import (
    cut_label_rows,
    separate_heads,
    with_decoder_copies,
    with_projection_bias,
    without_decoder_copies,
)
from ..rules import Rule, translate, translate_back
from ..vitdet import MODEL_TYPE as VITDET_TYPE
from .project import Project


class Detrex(Project):
    """detrex has a head for each decoder layer and saves no settings.

    The default position temperature and offset are detrex's. Some models were trained with the release's values instead,
    and no tensor shows which.
    """

    name = "detrex"
    marks = ("transformer.level_embeds",)
    defaults = {"position_temperature": 10000.0, "position_offset": -0.5}  # noqa: RUF012
    frozen_resnet_stages = 1
    saves_settings = False
    num_classes_setting = "model.num_classes"
    position_setting = "position_embedding"
    backbones = (*Project.backbones, FOCALNET_TYPE, VITDET_TYPE, INTERNIMAGE_TYPE)

    def rules(self, num_decoder_layers: int, num_maps: int) -> list[Rule]:
        return [
            Rule("transformer.level_embeds", "transformer.level_embed"),
            *layer_rules("transformer."),
            *(
                rule
                for number, class_head, box_head in numbered_heads(num_decoder_layers)
                for rule in (
                    Rule(f"class_embed.{number}.{{p}}", class_head + ".{p}"),
                    Rule(f"bbox_embed.{number}.layers.{{k}}.{{p}}", box_head + ".layers.{k}.{p}"),
                )
            ),
            *neck_rules("norm", num_maps),
            *(Rule(name, name) for name in _UNCHANGED),
            *RESNET,
            # The other backbones have the release's names, without its list around the backbone.
            *SWIN,
            *(Rule(name, "backbone.0." + name.removeprefix("backbone.")) for name in _OTHER_BACKBONES),
        ]

    def to_release(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Counter]:
        tensors, dropped = without_decoder_copies(tensors)
        tensors, more = translate(tensors.items(), self.rules_for_names(tensors))
        return tensors, dropped + more

    def setting_lines(self, config: DinoDetrConfig) -> list[str]:
        lines = super().setting_lines(config)
        backbone = config.backbone_config
        if backbone.model_type == FOCALNET_TYPE:
            lines.append(
                f"backbone: embed_dim={backbone.embed_dim}, focal_levels={list(backbone.focal_levels)}, "
                f"focal_windows={list(backbone.focal_windows)}, use_conv_embed=True, use_postln=True, use_layerscale=True"
            )
        if backbone.model_type == VITDET_TYPE:
            net = backbone.backbone_config
            lines.append(
                f"backbone.net: img_size={net.image_size}, embed_dim={net.hidden_size}, num_heads={net.num_attention_heads}, "
                f"window_size={net.window_size}, window_block_indexes={list(net.window_block_indices)}"
            )
        if backbone.model_type == INTERNIMAGE_TYPE:
            scale = backbone.layer_scale_init_value
            lines.append(
                f"backbone: channels={backbone.embed_dim}, groups={backbone.num_groups}, mlp_ratio={backbone.mlp_ratio:g}, "
                f"post_norm={backbone.post_norm}, layer_scale={scale}, offset_scale={backbone.offset_scale:g}"
            )
        return lines

    def file_content(self, tensors: dict[str, Tensor], config: DinoDetrConfig) -> dict[str, Any]:
        tensors = separate_heads(tensors, config) | position_indices(config.backbone_config)
        tensors = with_projection_bias(cut_label_rows(tensors, config.num_labels), config)
        rules = self.rules(config.decoder_layers, len(config.backbone_config.out_features))
        return {"model": with_decoder_copies(translate_back(tensors, rules))}


_UNCHANGED = (
    "transformer.decoder.norm.{p}",
    "transformer.decoder.ref_point_head.layers.{i}.{p}",
    "transformer.tgt_embed.weight",
    "transformer.enc_output.{p}",
    "transformer.enc_output_norm.{p}",
    "label_enc.weight",
)

RESNET = [
    Rule("backbone.stem.conv1.weight", BODY + "conv1.weight"),
    Rule("backbone.stem.conv1.norm.{p}", BODY + "bn1.{p}"),
    *(
        Rule(f"backbone.res{stage + 1}.{{i}}.{source}", f"{BODY}layer{stage}.{{i}}.{target}")
        for stage in range(1, 5)
        for source, target in (
            *((f"conv{part}.weight", f"conv{part}.weight") for part in (1, 2, 3)),
            *((f"conv{part}.norm.{{p}}", f"bn{part}.{{p}}") for part in (1, 2, 3)),
            ("shortcut.weight", "downsample.0.weight"),
            ("shortcut.norm.{p}", "downsample.1.{p}"),
        )
    ),
]

SWIN = [
    Rule(name, "backbone.0." + name.removeprefix("backbone."))
    for name in (
        "backbone.patch_embed.{name}.{p}",
        "backbone.layers.{i}.downsample.{name}.{p}",
        "backbone.layers.{i}.blocks.{j}.attn.relative_position_bias_table",
        "backbone.norm{i}.{p}",
        "backbone.layers.{i}.blocks.{j}.attn.relative_position_index",
        "backbone.layers.{i}.blocks.{j}.norm{k}.{p}",
        "backbone.layers.{i}.blocks.{j}.attn.{name}.{p}",
        "backbone.layers.{i}.blocks.{j}.mlp.{name}.{p}",
    )
]

_OTHER_BACKBONES = (
    "backbone.downsample_layers.{i}.{j}.{p}",
    "backbone.stages.{i}.{j}.{name}.{p}",
    "backbone.stages.{i}.{j}.gamma",
    *("backbone.patch_embed.{name}.1.{p}", "backbone.levels.{tail}"),  # InternImage
    *("backbone.layers.{i}.blocks.{j}.gamma_{k}", "backbone.layers.{i}.blocks.{j}.modulation.{tail}"),  # FocalNet
    *("backbone.net.{tail}", "backbone.simfp_{tail}"),  # ViTDet
)


def layer_rules(prefix: str) -> list[Rule]:
    """Layers of the encoder and decoder, whose names in detrex and Co-DETR differ only by the prefix of the transformer."""
    encoder, decoder = "encoder.layers.{i}.", "decoder.layers.{i}."
    names = [
        (encoder + "attentions.0.{name}.{p}", encoder + "self_attn.{name}.{p}"),
        (encoder + "norms.0.{p}", encoder + "norm1.{p}"),
        (encoder + "norms.1.{p}", encoder + "norm2.{p}"),
        (decoder + "attentions.0.attn.in_proj_{p}", decoder + "self_attn.in_proj_{p}"),
        (decoder + "attentions.0.attn.out_proj.{p}", decoder + "self_attn.out_proj.{p}"),
        (decoder + "attentions.1.{name}.{p}", decoder + "cross_attn.{name}.{p}"),
        # The original release numbers the norms of the decoder in the order of definition, detrex in the order of use.
        (decoder + "norms.0.{p}", decoder + "norm2.{p}"),
        (decoder + "norms.1.{p}", decoder + "norm1.{p}"),
        (decoder + "norms.2.{p}", decoder + "norm3.{p}"),
        *((side + "ffns.0.layers.0.0.{p}", side + "linear1.{p}") for side in (encoder, decoder)),
        *((side + "ffns.0.layers.1.{p}", side + "linear2.{p}") for side in (encoder, decoder)),
    ]
    return [Rule(prefix + source, "transformer." + target) for source, target in names]
