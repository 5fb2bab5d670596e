"""Which model a checkpoint is of: from the names and shapes of its tensors and, for what they do not tell, from the settings
in the file; what is in neither is taken to be as the project publishes it, and said."""

import json
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_files import Checkpoint, ConversionError
from dino_hf import DinoDetrConfig
from dino_hf.coco_classes import coco_class_space
from key_mapping import (
    CONVNEXT,
    DECODER_COPY,
    RESNET,
    SWIN,
    TRANSFORMER,
    Rule,
    detrex,
    heads,
    mmdet,
    output_norms,
    translate,
)

PROJECTS = ("original", "detrex", "mmdet")
# A tensor that every DINO of a project has, and no other of them.
_MARK = {
    "original": "transformer.level_embed",
    "detrex": "transformer.level_embeds",
    "mmdet": "dn_query_generator.label_embedding.weight",
}
# What no tensor shows, as the projects publish it. Everything else is alike in all three.
_PUBLISHED = {
    "original": {"position_temperature": 20.0, "position_offset": 0.0},
    "detrex": {"position_temperature": 10000.0, "position_offset": -0.5},
    "mmdet": {"position_temperature": 20.0, "position_offset": 0.0},
}
_FROZEN_RESNET_STAGES = {"original": 2, "detrex": 1, "mmdet": 2}
_PRED_BOXES_EPS = {"original": 1e-3, "detrex": 1e-3, "mmdet": 1e-5}  # no setting of theirs
_HEADS, _POINTS = 8, 4

# The architecture is read from these; by their names in the release.
_REQUIRED_TENSORS = [
    "transformer.level_embed",
    "transformer.tgt_embed.weight",
    "transformer.encoder.layers.0.linear1.weight",
    "transformer.decoder.layers.0.linear1.weight",
    "class_embed.0.weight",
    "input_proj.0.0.weight",
]

# Parts of names that give a backbone away which cannot be expressed, and why.
_UNSUPPORTED_BACKBONES = {
    ".modulation.": "FocalNet: DINO takes the map of each stage before its downsampling and puts a norm on it, but the FocalNet "
    "of transformers gives maps after the downsampling, and the one of timm has no norms",
    "backbone.net.": "a plain ViT (ViTDet, EVA): DINO builds its levels from one map by a pyramid of transposed convolutions, "
    "which no backbone of transformers or timm has",
    "backbone.levels.": "InternImage: its deformable convolution (DCNv3) is neither in transformers nor in timm",
    ".attn.logit_scale": "Swin v2: no published DINO has it, so nothing shows that a conversion would be exact",
}


def recognise(names) -> str | None:
    """The project that a checkpoint with these tensors is of; None if it is no DINO of any."""
    return next((project for project, mark in _MARK.items() if mark in names), None)


def to_release_names(checkpoint: Checkpoint, project: str) -> tuple[dict[str, Tensor], Counter]:
    """Tensors by the names of the original release, heads once, and how many were dropped for which reason.

    Raises:
        ConversionError: it is not a DINO of this project, or has a backbone that cannot be expressed.
    """
    tensors = checkpoint.tensors
    found = recognise(tensors)
    if found != project:
        raise ConversionError(
            f"{checkpoint.path} is not a DINO of {project}: it has no tensor {_MARK[project]!r} among its {len(tensors)} (the "
            f"first: {sorted(tensors)[:3]}). {_other_model(tensors, found)}"
        )
    for part, reason in _UNSUPPORTED_BACKBONES.items():
        if any(part in name and name.startswith("backbone.") for name in tensors):
            raise ConversionError(f"The backbone is not supported, because it is {reason}.")
    dropped = Counter()
    try:
        if project == "detrex":
            tensors, dropped = _without_copies(tensors)
            layers, maps = (
                count(tensors, r"transformer\.decoder\.layers\.(\d+)\."),
                count(tensors, r"neck\.convs\.(\d+)\."),
            )
            tensors, more = translate(tensors.items(), detrex(layers, maps))
            dropped += more
        elif project == "mmdet":
            layers, maps = count(tensors, r"decoder\.layers\.(\d+)\."), count(tensors, r"neck\.convs\.(\d+)\.")
            tensors, dropped = translate(tensors.items(), mmdet(layers, maps))
        else:
            tensors, dropped = _without_copies(tensors)
    except KeyError as error:
        raise _of_another_model(error, checkpoint) from error
    if missing := [name for name in _REQUIRED_TENSORS if name not in tensors]:
        raise ConversionError(f"{checkpoint.path} lacks {missing} (release's names): it is cut off, or not of a DINO.")
    return tensors, dropped


def _of_another_model(error: KeyError, checkpoint: Checkpoint) -> ConversionError:
    return ConversionError(
        f"{checkpoint.path} has a tensor that DINO does not have, so it is of a variant or another model: {error.args[0]}"
    )


def _other_model(names, found: str | None) -> str:
    if found is not None:
        return f"It is one of {found}: use --source {found}, or auto."
    if any(name.startswith("model.query_selection.") for name in names):
        return "It is a dino_hf model already: load its folder by from_pretrained."
    if any("cls_token" in name for name in names):
        return "It may be of the self-supervised DINO, which is another model."
    return "Detectors of other kinds are not converted here."


def _without_copies(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Counter]:
    """Without the decoder's second set of heads. A file that keeps only one name of each tensor may have just that set."""
    plain, dropped = {}, Counter()
    for name, tensor in tensors.items():
        own = name.removeprefix("transformer.decoder.")
        if own == name or not re.match(r"(class|bbox)_embed\.", own):
            plain[name] = tensor
        elif own not in tensors:
            plain[own] = tensor
        elif torch.equal(tensor, tensors[own]):
            dropped[DECODER_COPY.reason] += 1
        else:
            raise ConversionError(f"{own!r} and {name!r} should be one tensor, but they differ.")
    return plain, dropped


def count(tensors, pattern: str) -> int:
    """Highest index that `pattern` finds at the beginning of a name, plus one."""
    return 1 + max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1)


def rules_for(config: DinoDetrConfig) -> list[Rule]:
    """The release's names of an architecture."""
    backbone = {"resnet": RESNET, "swin": SWIN, "convnext": CONVNEXT}[config.backbone_config.model_type]
    stages = [int(name.removeprefix("stage")) - 1 for name in config.backbone_config.out_features]
    return [*TRANSFORMER, *heads(config.share_decoder_heads, config.decoder_layers), *backbone, *output_norms(stages)]


def build_config(tensors: dict[str, Tensor], project: str, settings: dict, chosen: dict) -> tuple[DinoDetrConfig, dict]:
    """The architecture.

    Args:
        tensors: by the release's names.
        settings: of the training, as the file has them; may be empty.
        chosen: fields of the configuration that the user sets.
    Returns:
        the configuration, and those of its fields that neither the file nor the user told.
    """
    told = {"original": from_args, "mmdet": from_mmdet, "detrex": lambda _: {}}[project](settings)
    level_embed = tensors["transformer.level_embed"]
    if level_embed.ndim != 2:
        raise ConversionError(
            "'transformer.level_embed' should have two axes, levels and width; the checkpoint is damaged."
        )
    num_levels, d_model = level_embed.shape
    num_labels = len(tensors["class_embed.0.weight"])
    shown = {
        "backbone_config": backbone_settings(tensors, told.pop("drop_path_rate", 0.2)),
        "num_queries": len(tensors["transformer.tgt_embed.weight"]),
        "num_feature_levels": num_levels,
        "d_model": d_model,
        "encoder_layers": count(tensors, r"transformer\.encoder\.layers\.(\d+)\."),
        "decoder_layers": count(tensors, r"transformer\.decoder\.layers\.(\d+)\."),
        "encoder_ffn_dim": len(tensors["transformer.encoder.layers.0.linear1.weight"]),
        "decoder_ffn_dim": len(tensors["transformer.decoder.layers.0.linear1.weight"]),
        "share_decoder_heads": project == "original" and _heads_are_equal(tensors),
        "projection_bias": "input_proj.0.0.bias" in tensors,
        "pred_boxes_eps": _PRED_BOXES_EPS[project],
        "num_extra_label_embeddings": _extra_rows(tensors, num_labels),
    }
    if unknown := set(chosen) - set(DinoDetrConfig.__dataclass_fields__):
        raise ConversionError(f"The configuration has no field {sorted(unknown)}.")
    if contradicted := {name: shown[name] for name in chosen if name in shown and name != "backbone_config"}:
        raise ConversionError(f"The tensors tell {contradicted}; leave them out of --set.")
    assumed = {**_PUBLISHED[project], "num_denoising": 100, "box_noise_scale": 1.0}
    if shown["backbone_config"]["model_type"] == "resnet":
        assumed["num_frozen_backbone_stages"] = _FROZEN_RESNET_STAGES[project]
    assumed |= _attention_sizes(tensors, num_levels, {**told, **chosen})
    values = {**shown, **assumed, **told, **chosen, "num_labels": num_labels}
    assumed = {name: value for name, value in assumed.items() if name not in told and name not in chosen}
    return DinoDetrConfig(**values), assumed


def _extra_rows(tensors: dict[str, Tensor], num_labels: int) -> int:
    if "label_enc.weight" not in tensors:
        return 1
    extra = len(tensors["label_enc.weight"]) - num_labels
    if extra < 0:
        raise ConversionError(
            f"The label embedding of denoising has {num_labels + extra} rows for {num_labels} classes; it needs one for each."
        )
    return extra


def _attention_sizes(tensors: dict[str, Tensor], num_levels: int, known: dict) -> dict:
    """Heads and points, whose product the tensors tell."""
    sizes = {}
    for side, attention in (("encoder", "self_attn"), ("decoder", "cross_attn")):
        name = f"transformer.{side}.layers.0.{attention}.attention_weights.bias"
        samples = len(tensors.get(name, ())) / num_levels
        given = known.get(f"{side}_attention_heads")
        num_heads = _HEADS if given is None else given
        points = samples / num_heads
        wanted = known.get(f"{side}_n_points", _POINTS if given is None else points)
        if points != wanted or points != int(points) or not points:
            raise ConversionError(
                f"{name!r} has {samples:g} sampling points for all heads together at each level, which is not {num_heads} heads of "
                f"{wanted:g}; set the number of heads by --set {side}_attention_heads=N."
            )
        sizes |= {f"{side}_attention_heads": num_heads, f"{side}_n_points": int(points)}
    return sizes


def _heads_are_equal(tensors: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(tensor, tensors[f"{match[1]}.0{match[2]}"])
        for name, tensor in tensors.items()
        if (match := re.match(r"(class_embed|bbox_embed)\.\d+(\..*)", name)) and f"{match[1]}.0{match[2]}" in tensors
    )


# ---------------------------------------------------------------------------------------------------------------------
# Backbones


def backbone_settings(tensors: dict[str, Tensor], drop_path_rate: float) -> dict:
    """`backbone_config` from the backbone's tensors and the widths of the maps that the neck projects."""
    widths = []  # of the backbone's maps: their projections are 1x1, the one of the extra level 3x3
    while (weight := tensors.get(f"input_proj.{len(widths)}.0.weight")) is not None and weight.shape[-1] == 1:
        widths.append(weight.shape[1])
    stages = [f"stage{stage}" for stage in range(5 - len(widths), 5)]
    prefix = r"backbone\.0\."
    try:
        if "backbone.0.body.conv1.weight" in tensors:
            depths = [count(tensors, rf"{prefix}body\.layer{stage}\.(\d+)\.") for stage in range(1, 5)]
            last = 3 if "backbone.0.body.layer1.0.conv3.weight" in tensors else 2  # ResNet-18 and 34 have blocks of two
            return {
                "model_type": "resnet",
                "depths": depths,
                "hidden_sizes": [len(tensors[f"backbone.0.body.layer{i}.0.conv{last}.weight"]) for i in range(1, 5)],
                "layer_type": "bottleneck" if last == 3 else "basic",
                "out_features": stages,
            }
        if "backbone.0.patch_embed.proj.weight" in tensors:
            depths = [count(tensors, rf"{prefix}layers\.{stage}\.blocks\.(\d+)\.") for stage in range(4)]
            name = "backbone.0.layers.{}.blocks.0.attn.relative_position_bias_table"
            tables = [tensors[name.format(stage)] for stage in range(4)]
            window = (round(len(tables[0]) ** 0.5) + 1) // 2  # a table has (2 * window - 1) ** 2 rows
            return {
                "model_type": "swin",
                "embed_dim": len(tensors["backbone.0.patch_embed.proj.weight"]),
                "depths": depths,
                "num_heads": [table.shape[1] for table in tables],
                "window_size": window,
                "image_size": 384 if window == 12 else 224,
                "drop_path_rate": drop_path_rate,
                "out_features": stages,
            }
        if "backbone.0.downsample_layers.0.0.weight" in tensors:
            depths = [count(tensors, rf"{prefix}stages\.{stage}\.(\d+)\.") for stage in range(4)]
            hidden_sizes = [len(tensors[f"backbone.0.stages.{stage}.0.dwconv.weight"]) for stage in range(4)]
            return {"model_type": "convnext", "depths": depths, "hidden_sizes": hidden_sizes, "out_features": stages}
    except KeyError as error:
        raise ConversionError(f"The backbone lacks the tensor {error.args[0]!r} (release's name).") from error
    raise ConversionError(
        "The backbone is none of ResNet, Swin and ConvNeXt; its tensors begin with "
        f"{sorted(name for name in tensors if name.startswith('backbone.'))[:3]}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Settings of a training -> fields of the configuration

# What the release can be told to compute differently and dino_hf does not: name in `args` -> the values that are fine.
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
}

# Field of the configuration -> name in `args`.
ARGS = {
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


def from_args(args: dict) -> dict:
    """Fields of the configuration from the release's `args`.

    Raises:
        ConversionError: the training computed what dino_hf does not.
    """
    for name, allowed in _REQUIRED_ARGS.items():
        if name in args and args[name] not in allowed:
            raise ConversionError(
                f"The checkpoint was trained with {name}={args[name]!r}; dino_hf computes DINO with "
                f"{name}={allowed[0]!r} only, as in every published checkpoint."
            )
    if args.get("pe_temperatureH") != args.get("pe_temperatureW", args.get("pe_temperatureH")):
        raise ConversionError(
            f"The position temperatures differ (pe_temperatureH={args['pe_temperatureH']}, "
            f"pe_temperatureW={args['pe_temperatureW']}); dino_hf has one for both axes."
        )
    told = {name: args[key] for name, key in ARGS.items() if args.get(key) is not None}
    if args.get("use_dn") is False:
        told["num_denoising"] = 0
    if args:
        told["position_offset"] = 0.0  # the release has none
    return told


# Field of the configuration -> where mmdetection's configuration has it.
_MMDET = {
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
_MMDET_COSTS = {"FocalLossCost": "class_cost", "BBoxL1Cost": "bbox_cost", "IoUCost": "giou_cost"}
_REQUIRED_MMDET = {
    "type": "DINO",
    "with_box_refine": True,
    "as_two_stage": True,
    "positional_encoding.normalize": True,
    "bbox_head.loss_cls.gamma": 2.0,
    "bbox_head.loss_cls.use_sigmoid": True,
}


def from_mmdet(settings: dict) -> dict:
    """As `from_args`, from mmdetection's configuration."""
    model = settings.get("model")
    if not isinstance(model, dict):
        return {}
    for path, wanted in _REQUIRED_MMDET.items():
        found = _at(model, path)
        if found is not None and found != wanted:
            raise ConversionError(
                f"The checkpoint was trained with {path}={found!r}; dino_hf computes {wanted!r} only."
            )
    told = {name: value for name, path in _MMDET.items() if isinstance(value := _at(model, path), int | float)}
    costs = _at(model, "train_cfg.assigner.match_costs")
    for cost in costs if isinstance(costs, list) else []:
        if isinstance(cost, dict) and cost.get("type") in _MMDET_COSTS and isinstance(cost.get("weight"), int | float):
            told[_MMDET_COSTS[cost["type"]]] = cost["weight"]
    frozen = _at(model, "backbone.frozen_stages")  # counted from the stem, which is 0; -1 for none
    if isinstance(frozen, int):
        told["num_frozen_backbone_stages"] = frozen + 1
    return told


def image_size(project: str, settings: dict) -> dict[str, int] | None:
    """Size at evaluation, if the file tells it: shortest and longest edge."""
    if project != "mmdet":
        return None
    pipeline = settings.get("test_pipeline")
    for step in pipeline if isinstance(pipeline, list) else []:
        scale = (
            step.get("scale") if isinstance(step, dict) and step.get("type") in ("Resize", "FixScaleResize") else None
        )
        if isinstance(scale, list) and len(scale) == 2 and all(isinstance(side, int) for side in scale):
            return {"shortest_edge": min(scale), "longest_edge": max(scale)}
    return None


def _at(settings: dict, path: str):
    for name in path.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else None
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# Class space


def class_space(
    num_labels: int, names_in_file: list[str] | None, label_file: Path | None
) -> tuple[dict[int, str] | None, list[int] | None, str]:
    """Names and original category ids, and in words where they are from. No names: None."""
    if label_file is not None:
        return (*read_label_names(label_file, num_labels), f"from {label_file.name}")
    coco = coco_class_space(num_labels)
    if names_in_file is not None and len(names_in_file) == num_labels:
        is_coco = coco is not None and list(coco[0].values()) == names_in_file
        return dict(enumerate(names_in_file)), coco[1] if is_coco else None, "from the file"
    if coco is not None:
        return (*coco, f"taken to be COCO's, because there are {num_labels}")
    return None, None, "not known; --label-names FILE gives them"


def read_label_names(path: Path, num_labels: int) -> tuple[dict[int, str], list[int] | None]:
    """Class names from a file: a COCO json (its categories; also gives the ids), a json list or dictionary of index to name,
    or a text file with one name per line.

    Raises:
        ConversionError: it cannot be read, or is not for this number of classes.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"The label names cannot be read: {error}.") from error
    category_ids = None
    try:
        content = json.loads(text)
    except ValueError:
        content = [line.strip() for line in text.splitlines() if line.strip()]
    try:
        if isinstance(content, dict) and "categories" in content:
            by_id = {int(category["id"]): str(category["name"]) for category in content["categories"]}
            if len(by_id) == num_labels:
                names, category_ids = dict(enumerate(by_id[i] for i in sorted(by_id))), sorted(by_id)
            elif by_id and min(by_id) >= 0 and max(by_id) < num_labels:  # outputs are the raw ids
                names = {index: by_id.get(index, "N/A") for index in range(num_labels)}
                category_ids = list(range(num_labels))
            else:
                names = by_id
        elif isinstance(content, dict):
            names = {int(index): str(name) for index, name in content.items()}
        else:
            names = dict(enumerate(map(str, content)))
    except (TypeError, KeyError, ValueError) as error:
        raise ConversionError(
            f"{path} is neither a COCO json, nor a json list or dictionary of names, nor one name per line ({error!r})."
        ) from error
    if sorted(names) != list(range(num_labels)):
        raise ConversionError(
            f"{path} names {len(names)} classes (indices {sorted(names)[:3]} to {max(names, default=None)}), but the checkpoint "
            f"has {num_labels}, numbered from 0."
        )
    return {index: names[index] for index in range(num_labels)}, category_ids
