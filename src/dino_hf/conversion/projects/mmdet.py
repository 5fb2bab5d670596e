"""mmdetection: https://github.com/open-mmlab/mmdetection"""

from typing import Any

import torch
from torch import Tensor

from ...common.values import is_number
from ...model.configuration_dino_detr import DinoDetrConfig
from ..backbones import BODY, position_indices
from ..errors import ConversionError
from ..release_names import neck_rules, numbered_heads
from ..release_tensors import cut_label_rows, separate_heads, without_projection_bias
from ..rules import Rule, count_indices, translate_back
from ..saved_settings import value_at
from .project import Project

# Field of the configuration -> path in mmdetection's configuration.
_SETTINGS = {
    "position_temperature": "positional_encoding.temperature",
    "position_offset": "positional_encoding.offset",
    "encoder_attention_heads": "encoder.layer_cfg.self_attn_cfg.num_heads",
    "encoder_n_points": "encoder.layer_cfg.self_attn_cfg.num_points",
    "decoder_attention_heads": "decoder.layer_cfg.cross_attn_cfg.num_heads",
    "decoder_n_points": "decoder.layer_cfg.cross_attn_cfg.num_points",
    "num_denoising": "dn_cfg.group_cfg.num_dn_queries",
    "label_noise_ratio": "dn_cfg.label_noise_scale",
    "box_noise_scale": "dn_cfg.box_noise_scale",
    "cls_loss_coefficient": "bbox_head.loss_cls.loss_weight",
    "bbox_loss_coefficient": "bbox_head.loss_bbox.loss_weight",
    "giou_loss_coefficient": "bbox_head.loss_iou.loss_weight",
    "focal_alpha": "bbox_head.loss_cls.alpha",
    "drop_path_rate": "backbone.drop_path_rate",
}
_COSTS = {"FocalLossCost": "class_cost", "BBoxL1Cost": "bbox_cost", "IoUCost": "giou_cost"}
_PAD_VALUES = ("pad_val.img.0", "pad_val.img", "pad_val.0", "pad_val")
_REQUIRED = {
    "type": "DINO",
    "with_box_refine": True,
    "as_two_stage": True,
    "positional_encoding.normalize": True,
    "bbox_head.loss_cls.gamma": 2.0,
    "bbox_head.loss_cls.use_sigmoid": True,
    "dn_cfg.group_cfg.dynamic": True,
}


class Mmdet(Project):
    """mmdetection has a head for each decoder layer and no bias in the neck. Its files contain the whole configuration."""

    name = "mmdet"
    marks = ("dn_query_generator.label_embedding.weight",)
    defaults = {"position_temperature": 20.0, "position_offset": 0.0}  # noqa: RUF012
    frozen_resnet_stages = 2
    pred_boxes_eps = 1e-5
    saves_class_names = True
    backbones = ("resnet", "swin")
    num_classes_setting = "bbox_head.num_classes"
    position_setting = "positional_encoding"

    def count_decoder_layers(self, names) -> int:
        return count_indices(names, r"decoder\.layers\.(\d+)\.")

    def rules(self, num_decoder_layers: int, num_maps: int) -> list[Rule]:
        return [
            *TRANSFORMER,
            *branch_rules("bbox_head", num_decoder_layers),
            *neck_rules("gn", num_maps),
            *RESNET,
            *SWIN,
        ]

    def fields_from_settings(self, settings: dict) -> dict[str, Any]:
        model = settings.get("model")
        if not isinstance(model, dict):
            return {}
        return read_fields(model, _REQUIRED, _SETTINGS, value_at(model, "train_cfg.assigner.match_costs"))

    def processor_settings(self, settings: dict) -> dict[str, Any]:
        scale, *_ = read_test_pipeline(settings)
        return {"size": {"shortest_edge": min(scale), "longest_edge": max(scale)}} if scale else {}

    def file_content(self, tensors: dict[str, Tensor], config: DinoDetrConfig) -> dict[str, Any]:
        tensors = separate_heads(tensors, config) | position_indices(config.backbone_config)
        tensors = without_projection_bias(cut_label_rows(tensors, config.num_labels), "mmdetection")
        rules = self.rules(config.decoder_layers, len(config.backbone_config.out_features))
        names = tuple(config.id2label[index] for index in range(config.num_labels))
        return {
            "state_dict": with_counters(translate_back(tensors, rules)),
            "meta": {"dataset_meta": {"classes": names}},
        }


def read_fields(model: dict, required: dict[str, Any], paths: dict[str, str], costs: Any) -> dict[str, Any]:
    """Fields of the configuration that mmdetection's configuration of a model contains.

    Args:
        required: path -> the only value that dino_hf supports.
        paths: field -> path.
        costs: dictionaries of the matching costs.
    Raises:
        ConversionError: a required value is another one.
    """
    for path, wanted in required.items():
        found = value_at(model, path)
        if found is not None and found != wanted:
            raise ConversionError(
                f"The checkpoint was trained with {path}={found!r}; dino_hf supports only {wanted!r}."
            )
    fields = {name: value for name, path in paths.items() if isinstance(value := value_at(model, path), int | float)}
    for cost in costs if isinstance(costs, list) else []:
        if isinstance(cost, dict) and cost.get("type") in _COSTS and isinstance(cost.get("weight"), int | float):
            fields[_COSTS[cost["type"]]] = cost["weight"]
    frozen = value_at(model, "backbone.frozen_stages")  # counted from the stem, which is 0; -1 for none
    if isinstance(frozen, int):
        fields["num_frozen_backbone_stages"] = frozen + 1
    return fields


def read_test_pipeline(settings: dict) -> tuple[list[int] | None, list[int] | None, float]:
    """Sizes in the test pipeline of mmdetection 2 or 3.

    Returns:
        the two limits of the sides of a resized image, and the sides to which every image is padded; None if they are unknown.
        Then the value of the padding.
    """
    scale, padded, value = None, None, 0
    waiting = settings.get("test_pipeline")
    waiting = list(waiting) if isinstance(waiting, list) else []
    while waiting:
        step = waiting.pop(0)
        if not isinstance(step, dict):
            continue
        if isinstance(inner := step.get("transforms"), list):  # mmdetection 2 has the steps inside another step
            scale = scale or _sides(step.get("img_scale"))
            waiting = inner + waiting
        elif step.get("type") in ("Resize", "FixScaleResize"):
            scale = scale or _sides(step.get("scale"))
        elif step.get("type") == "Pad":
            padded = padded or _sides(step.get("size"))
            value = next((value_at(step, path) for path in _PAD_VALUES if is_number(value_at(step, path))), 0)
    return scale, padded, value


def _sides(value: Any) -> list[int] | None:
    is_pair = isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)
    return value if is_pair else None


def with_counters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the batch counters of torch's batch norms. Frozen norms do not count, so they are 0."""
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for name in tensors
        if name.endswith("running_mean")
    }
    return tensors | counters


_ENCODER, _DECODER = "encoder.layers.{i}.", "decoder.layers.{i}."


def branch_rules(prefix: str, num_decoder_layers: int) -> list[Rule]:
    """Heads of the decoder layers and of the encoder, which mmdetection and Co-DETR call branches of a module `prefix`."""
    return [
        rule
        for number, class_head, box_head in numbered_heads(num_decoder_layers)
        for rule in (
            Rule(f"{prefix}.cls_branches.{number}.{{p}}", class_head + ".{p}"),
            *(  # a sequence, with activations at 1 and 3
                Rule(f"{prefix}.reg_branches.{number}.{2 * part}.{{p}}", f"{box_head}.layers.{part}.{{p}}")
                for part in range(3)
            ),
        )
    ]


TRANSFORMER = [
    Rule("level_embed", "transformer.level_embed"),
    Rule("query_embedding.weight", "transformer.tgt_embed.weight"),
    Rule("memory_trans_fc.{p}", "transformer.enc_output.{p}"),
    Rule("memory_trans_norm.{p}", "transformer.enc_output_norm.{p}"),
    Rule("dn_query_generator.label_embedding.weight", "label_enc.weight"),
    Rule("decoder.norm.{p}", "transformer.decoder.norm.{p}"),
    Rule("decoder.ref_point_head.layers.{i}.{p}", "transformer.decoder.ref_point_head.layers.{i}.{p}"),
    Rule(_ENCODER + "self_attn.{name}.{p}", f"transformer.{_ENCODER}self_attn.{{name}}.{{p}}"),
    Rule(_ENCODER + "norms.0.{p}", f"transformer.{_ENCODER}norm1.{{p}}"),
    Rule(_ENCODER + "norms.1.{p}", f"transformer.{_ENCODER}norm2.{{p}}"),
    Rule(_DECODER + "self_attn.attn.in_proj_{p}", f"transformer.{_DECODER}self_attn.in_proj_{{p}}"),
    Rule(_DECODER + "self_attn.attn.out_proj.{p}", f"transformer.{_DECODER}self_attn.out_proj.{{p}}"),
    Rule(_DECODER + "cross_attn.{name}.{p}", f"transformer.{_DECODER}cross_attn.{{name}}.{{p}}"),
    Rule(_DECODER + "norms.0.{p}", f"transformer.{_DECODER}norm2.{{p}}"),
    Rule(_DECODER + "norms.1.{p}", f"transformer.{_DECODER}norm1.{{p}}"),
    Rule(_DECODER + "norms.2.{p}", f"transformer.{_DECODER}norm3.{{p}}"),
    *(
        Rule(side + source, f"transformer.{side}{target}")
        for side in (_ENCODER, _DECODER)
        for source, target in (("ffn.layers.0.0.{p}", "linear1.{p}"), ("ffn.layers.1.{p}", "linear2.{p}"))
    ),
]


def _batch_norm(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.num_batches_tracked", None, "batch counters, which a frozen norm does not use"),
        *(Rule(f"{source}.{part}", f"{target}.{part}") for part in ("weight", "bias", "running_mean", "running_var")),
    ]


RESNET = [
    Rule("backbone.conv1.weight", BODY + "conv1.weight"),
    *_batch_norm("backbone.bn1", BODY + "bn1"),
    *(
        rule
        for stage in range(1, 5)
        for source, target in [(f"backbone.layer{stage}.{{i}}.", f"{BODY}layer{stage}.{{i}}.")]
        for rule in (
            *(
                Rule(f"{source}{name}.weight", f"{target}{name}.weight")
                for name in ("conv1", "conv2", "conv3", "downsample.0")
            ),
            *(
                rule
                for norm in ("bn1", "bn2", "bn3", "downsample.1")
                for rule in _batch_norm(source + norm, target + norm)
            ),
        )
    ),
]

# Swin's patch merging concatenates the channels of 2 x 2 neighbours. The release concatenates all channels of a neighbour, then of
# the next, column by column. mmdetection uses `torch.nn.functional.unfold`: channel by channel, neighbours row by row.
_NEIGHBOURS = [0, 2, 1, 3]  # its own inverse


def merging_from_unfold(x: Tensor) -> Tensor:
    """(..., 4C) in the order of unfold -> in the order of the release."""
    return x.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., _NEIGHBOURS, :].flatten(-2)


def merging_to_unfold(x: Tensor) -> Tensor:
    """The inverse of `merging_from_unfold`."""
    return x.unflatten(-1, (4, -1))[..., _NEIGHBOURS, :].transpose(-1, -2).flatten(-2)


_BLOCK, _RELEASE_BLOCK = "backbone.stages.{i}.blocks.{j}.", "backbone.0.layers.{i}.blocks.{j}."

SWIN = [
    Rule("backbone.patch_embed.projection.{p}", "backbone.0.patch_embed.proj.{p}"),
    Rule("backbone.patch_embed.norm.{p}", "backbone.0.patch_embed.norm.{p}"),
    Rule("backbone.norm{i}.{p}", "backbone.0.norm{i}.{p}"),
    Rule(_BLOCK + "norm{k}.{p}", _RELEASE_BLOCK + "norm{k}.{p}"),
    Rule(_BLOCK + "attn.w_msa.relative_position_bias_table", _RELEASE_BLOCK + "attn.relative_position_bias_table"),
    Rule(_BLOCK + "attn.w_msa.relative_position_index", _RELEASE_BLOCK + "attn.relative_position_index"),
    Rule(_BLOCK + "attn.w_msa.{name}.{p}", _RELEASE_BLOCK + "attn.{name}.{p}"),
    Rule(_BLOCK + "ffn.layers.0.0.{p}", _RELEASE_BLOCK + "mlp.fc1.{p}"),
    Rule(_BLOCK + "ffn.layers.1.{p}", _RELEASE_BLOCK + "mlp.fc2.{p}"),
    *(
        Rule(
            f"backbone.stages.{{i}}.downsample.{name}.{{p}}",
            f"backbone.0.layers.{{i}}.downsample.{name}.{{p}}",
            convert=merging_from_unfold,
            convert_back=merging_to_unfold,
        )
        for name in ("reduction", "norm")
    ),
]
