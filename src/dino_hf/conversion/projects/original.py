"""The original release: https://github.com/IDEA-Research/DINO"""

import argparse
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ...model.configuration_dino_detr import DinoDetrConfig
from ..backbones import position_indices
from ..errors import ConversionError
from ..release_tensors import (
    heads_are_equal,
    separate_heads,
    with_decoder_copies,
    with_projection_bias,
    without_decoder_copies,
)
from .project import Project

# Settings of the release that dino_hf does not have: name in `args` -> supported values.
_REQUIRED_ARGS = {
    "two_stage_type": ["standard"],
    "two_stage_learn_wh": [False],
    "two_stage_default_hw": [0.05],
    "two_stage_pat_embed": [0],
    "two_stage_add_query_num": [0],
    "two_stage_bbox_embed_share": [False],
    "two_stage_class_embed_share": [False],
    "two_stage_keep_all_tokens": [False],
    "num_patterns": [0],
    "embed_init_tgt": [True],
    "query_dim": [4],
    "position_embedding": ["sine"],
    "pre_norm": [False],
    "transformer_activation": ["relu"],
    "dilation": [False],
    "unic_layers": [0],
    "dec_layer_number": [None],
    "decoder_sa_type": ["sa"],
    "decoder_module_seq": [["sa", "ca", "ffn"]],
    "decoder_layer_noise": [False],
    "add_channel_attention": [False],
    "add_pos_value": [False],
    "use_deformable_box_attn": [False],
    "random_refpoints_xy": [False],
    "masks": [False],
    "use_detached_boxes_dec_out": [False],
    "interm_loss_coef": [1.0],
    "no_interm_box_loss": [False],
}

# Field of the configuration -> name in `args`.
_ARGS = {
    "position_temperature": "pe_temperatureH",
    "encoder_attention_heads": "nheads",
    "decoder_attention_heads": "nheads",
    "encoder_n_points": "enc_n_points",
    "decoder_n_points": "dec_n_points",
    "num_denoising": "dn_number",
    "label_noise_ratio": "dn_label_noise_ratio",
    "box_noise_scale": "dn_box_noise_scale",
    "class_cost": "set_cost_class",
    "bbox_cost": "set_cost_bbox",
    "giou_cost": "set_cost_giou",
    "cls_loss_coefficient": "cls_loss_coef",
    "bbox_loss_coefficient": "bbox_loss_coef",
    "giou_loss_coefficient": "giou_loss_coef",
    "focal_alpha": "focal_alpha",
}


class Original(Project):
    """The release has one head for all decoder layers, which it saves for each layer. Its `args` have nearly all settings."""

    name = "original"
    marks = ("transformer.level_embed",)
    defaults = {"position_temperature": 20.0, "position_offset": 0.0}  # noqa: RUF012
    frozen_resnet_stages = 2
    counts_denoising_pairs = False

    def to_release(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Counter]:
        return without_decoder_copies(tensors)

    def fields_from_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {"share_decoder_heads": heads_are_equal(tensors)}

    def fields_from_settings(self, settings: dict) -> dict[str, Any]:
        for name, allowed in _REQUIRED_ARGS.items():
            if name in settings and settings[name] not in allowed:
                raise ConversionError(
                    f"The checkpoint was trained with {name}={settings[name]!r}; dino_hf supports only "
                    f"{name}={allowed[0]!r}, as in every published checkpoint."
                )
        if settings.get("pe_temperatureH") != settings.get("pe_temperatureW", settings.get("pe_temperatureH")):
            raise ConversionError(
                f"The position temperatures differ (pe_temperatureH={settings['pe_temperatureH']}, "
                f"pe_temperatureW={settings['pe_temperatureW']}); dino_hf has one for both axes."
            )
        fields = {name: settings[key] for name, key in _ARGS.items() if settings.get(key) is not None}
        if settings.get("use_dn") is False:
            fields["num_denoising"] = 0
        if settings:
            fields["position_offset"] = 0.0  # the release has no offset
        return fields

    def data_set(self, settings: dict) -> str | None:
        return settings.get("dataset_file")

    def check_expressible(self, config: DinoDetrConfig) -> None:
        super().check_expressible(config)
        for one, other in (
            ("encoder_attention_heads", "decoder_attention_heads"),
            ("encoder_ffn_dim", "decoder_ffn_dim"),
        ):
            if getattr(config, one) != getattr(config, other):
                raise ConversionError(
                    f"{one}={getattr(config, one)} and {other}={getattr(config, other)}, but the original release has one "
                    "value for both."
                )
        if config.position_offset != 0:
            raise ConversionError(
                f"The model has position_offset={config.position_offset}, and the original release has no such setting. It "
                "would compute other positions. detrex and mmdet have this setting."
            )

    def file_content(self, tensors: dict[str, Tensor], config: DinoDetrConfig) -> dict[str, Any]:
        tensors = with_projection_bias(separate_heads(tensors, config), config)
        tensors |= position_indices(config.backbone_config)
        if not config.num_extra_label_embeddings:  # the release always has one extra row
            rows = tensors["label_enc.weight"]
            tensors["label_enc.weight"] = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        if config.backbone_config.model_type == "convnext":  # the release has norms for unused stages too
            for stage, width in enumerate(config.backbone_config.hidden_sizes):
                weight = torch.ones(width, dtype=tensors["transformer.level_embed"].dtype)
                tensors.setdefault(f"backbone.0.norm{stage}.weight", weight)
                tensors.setdefault(f"backbone.0.norm{stage}.bias", torch.zeros_like(weight))
        return {"model": with_decoder_copies(tensors), "args": argparse.Namespace(**_to_args(config))}

    def setting_lines(self, config: DinoDetrConfig) -> list[str]:
        return [f"{name} = {value!r}" for name, value in _to_args(config).items()]


def _to_args(config: DinoDetrConfig) -> dict[str, Any]:
    """The release's `args`, as far as the configuration has them."""
    return {key: getattr(config, name) for name, key in _ARGS.items()} | {
        "pe_temperatureW": config.position_temperature,
        "num_queries": config.num_queries,
        "num_feature_levels": config.num_feature_levels,
        "num_classes": config.num_labels,
        "dn_labelbook_size": config.num_labels + max(config.num_extra_label_embeddings, 1) - 1,
        "enc_layers": config.encoder_layers,
        "dec_layers": config.decoder_layers,
        "hidden_dim": config.d_model,
        "dim_feedforward": config.encoder_ffn_dim,
        "return_interm_indices": [int(name[-1]) - 1 for name in config.backbone_config.out_features],
        "dec_pred_class_embed_share": config.share_decoder_heads,
        "dec_pred_bbox_embed_share": config.share_decoder_heads,
    }
