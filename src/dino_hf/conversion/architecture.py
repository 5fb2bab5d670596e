"""Which model a checkpoint is of: from the names and shapes of its tensors and, for what they do not tell, from the settings
in the file; what is in neither is taken to be as the project publishes it, and said."""

import math
import re
from collections import Counter

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ..model.configuration_dino_detr import DinoDetrConfig
from .checkpoint_files import Checkpoint, ConversionError
from .key_mapping import (
    CONVNEXT,
    DECODER_COPIES,
    RESNET,
    SWIN,
    TRANSFORMER,
    Rule,
    UnknownName,
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
        if project != "mmdet":
            tensors, dropped = _without_copies(tensors)
        if project != "original":
            tensors, more = translate(tensors.items(), rules_to_release(project, tensors))
            dropped += more
    except UnknownName as error:
        raise ConversionError(
            f"{checkpoint.path} has the tensor {error.name!r}, which no DINO of {project} has: it is of a variant or another model."
        ) from error
    if missing := [name for name in _REQUIRED_TENSORS if name not in tensors]:
        raise ConversionError(f"{checkpoint.path} lacks {missing} (release's names): it is cut off, or not of a DINO.")
    _check_shapes(tensors, checkpoint)
    return tensors, dropped


def rules_to_release(project: str, names) -> list[Rule]:
    """detrex's or mmdetection's names -> the release's, for a checkpoint with tensors of these names."""
    maps = count(names, r"neck\.convs\.(\d+)\.")
    if project == "detrex":
        return detrex(count(names, r"transformer\.decoder\.layers\.(\d+)\."), maps)
    return mmdet(count(names, r"decoder\.layers\.(\d+)\."), maps)


# Axes of the tensors that sizes are read from; by the release's names.
_AXES = [
    (r"transformer\.level_embed$", 2),
    (r"(transformer\.tgt_embed|label_enc|.*\.linear1|class_embed\.\d+)\.weight$", 2),
    (r".*\.in_proj_weight$", 2),
    (r".*\.attention_weights\.bias$", 1),
    (r".*\.relative_position_bias_table$", 2),
    (r"(input_proj\.\d+\.0|.*\.body\.conv1|.*\.conv3|.*\.patch_embed\.proj|.*\.dwconv)\.weight$", 4),
]


def _check_shapes(tensors: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    """
    Raises:
        ConversionError: a tensor has another number of axes than it must have, or one that is empty.
    """
    for name, tensor in tensors.items():
        axes = next((axes for pattern, axes in _AXES if re.match(pattern, name)), tensor.ndim)
        if tensor.ndim != axes or (not tensor.numel() and tensor.ndim):
            raise ConversionError(
                f"{name!r} (release's name) in {checkpoint.path} has the shape {tuple(tensor.shape)}, but must have {axes} axes "
                "and not be empty; the checkpoint is damaged."
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
            dropped[DECODER_COPIES] += 1
        else:
            raise ConversionError(f"{own!r} and {name!r} should be one tensor, but they differ.")
    return plain, dropped


def count(tensors, pattern: str) -> int:
    """How many indices `pattern` finds at the beginning of names.

    Raises:
        ConversionError: they are not 0, 1, 2 and so on.
    """
    found = {int(match[1]) for name in tensors if (match := re.match(pattern, name))}
    if found and max(found) >= len(found):
        raise ConversionError(
            f"The numbers of {pattern!r} in the names of the tensors have gaps; the checkpoint is not whole."
        )
    return len(found)


def rules_for(config: DinoDetrConfig) -> list[Rule]:
    """The release's names of an architecture."""
    backbone = {"resnet": RESNET, "swin": SWIN, "convnext": CONVNEXT}[config.backbone_config.model_type]
    stages = [int(name.removeprefix("stage")) - 1 for name in config.backbone_config.out_features]
    return [*TRANSFORMER, *heads(config.share_decoder_heads, config.decoder_layers), *backbone, *output_norms(stages)]


def build_config(
    tensors: dict[str, Tensor], project: str, told: dict, chosen: dict, instead: dict | None = None
) -> tuple[DinoDetrConfig, dict]:
    """The architecture.

    Args:
        tensors: by the release's names.
        told: what the settings in the file tell, from `told_by_file`.
        chosen: fields of the configuration that the user sets.
        instead: values to take instead of those that the project publishes.
    Returns:
        the configuration, and those of its fields that neither the file nor the user told.
    """
    level_embed = tensors["transformer.level_embed"]
    num_levels, d_model = level_embed.shape
    num_labels = len(tensors["class_embed.0.weight"])
    shown = {
        "backbone_config": backbone_settings(tensors),
        "num_labels": num_labels,
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
    _check_chosen(chosen, shown)
    _check_counts(shown)
    assumed = {**_PUBLISHED[project], "num_denoising": 100, "box_noise_scale": 1.0}
    kind = shown["backbone_config"]["model_type"]
    if kind == "resnet":
        assumed["num_frozen_backbone_stages"] = _FROZEN_RESNET_STAGES[project]
    if kind == "swin":
        assumed["drop_path_rate"] = 0.2
    assumed |= {name: value for name, value in (instead or {}).items() if name in assumed}
    assumed |= _attention_sizes(tensors, num_levels, {**told, **chosen}, instead or {})
    values = {**assumed, **told, **chosen, **shown}
    drop_path_rate = values.pop("drop_path_rate", None)
    if kind == "swin":
        values["backbone_config"]["drop_path_rate"] = drop_path_rate
    if project != "original" and 0 < values["num_denoising"] < 50:
        raise ConversionError(
            f"num_denoising={values['num_denoising']} counts pairs of queries in {project}; below 50, it counts groups in dino_hf, "
            "as in the release. It bears on training only: set another by --set num_denoising=N, 0 or at least 50."
        )
    try:
        config = DinoDetrConfig(**values)
    except StrictDataclassError as error:
        raise ConversionError(
            f"No model is built with the sizes and settings of this file: {error.__cause__}"
        ) from error
    return config, {name: assumed[name] for name in assumed if name not in told and name not in chosen}


_MOST = {
    "num_queries": 100_000,
    "num_labels": 100_000,
    "num_feature_levels": 20,
    "encoder_layers": 100,
    "decoder_layers": 100,
}
_MOST_BLOCKS = 1000  # of a backbone; the largest published one has 50


def _check_counts(shown: dict) -> None:
    """
    Raises:
        ConversionError: a number of parts is so large that building the model would take hours.
    """
    for name, most in _MOST.items():
        if shown[name] > most:
            raise ConversionError(f"The tensors show {name}={shown[name]:,}; at most {most:,} are converted.")
    if (blocks := sum(shown["backbone_config"]["depths"])) > _MOST_BLOCKS:
        raise ConversionError(f"The backbone has {blocks:,} blocks; at most {_MOST_BLOCKS:,} are converted.")


# Fields that no tensor tells.
_TO_CHOOSE = [
    *("position_temperature", "position_offset", "num_frozen_backbone_stages"),
    *("encoder_attention_heads", "encoder_n_points", "decoder_attention_heads", "decoder_n_points"),
    *("num_denoising", "label_noise_ratio", "box_noise_scale", "focal_alpha"),
    *("class_cost", "bbox_cost", "giou_cost"),
    *("cls_loss_coefficient", "bbox_loss_coefficient", "giou_loss_coefficient"),
]


def _check_chosen(chosen: dict, shown: dict) -> None:
    if shown_too := {name: shown[name] for name in sorted(chosen) if name in shown and name != "backbone_config"}:
        raise ConversionError(f"The tensors tell {shown_too}; leave them out of --set.")
    if others := sorted(set(chosen) - set(_TO_CHOOSE)):
        raise ConversionError(f"--set cannot set {others}, only what no tensor tells: {', '.join(_TO_CHOOSE)}.")
    for name, value in chosen.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConversionError(f"{name}={value} is not finite.")


def _extra_rows(tensors: dict[str, Tensor], num_labels: int) -> int:
    """Rows of the label embedding beyond one for each class. A smaller one is filled up, see `filled_label_rows`."""
    if "label_enc.weight" not in tensors:
        return 1
    return max(0, len(tensors["label_enc.weight"]) - num_labels)


def filled_label_rows(tensors: dict[str, Tensor], num_labels: int) -> tuple[dict[str, Tensor], int]:
    """The tensors with at least one row of the label embedding for each class, and how many rows were added.

    A label book smaller than the number of classes (`dn_labelbook_size` of the release) is used only in training, so detections
    do not change. New rows are the mean of the others.
    """
    rows = tensors.get("label_enc.weight")
    if rows is None or len(rows) >= num_labels:
        return tensors, 0
    num_missing = num_labels - len(rows)
    mean = rows.float().mean(0, keepdim=True).to(rows.dtype).expand(num_missing, -1)
    return {**tensors, "label_enc.weight": torch.cat([rows, mean])}, num_missing


def _attention_sizes(tensors: dict[str, Tensor], num_levels: int, known: dict, instead: dict) -> dict:
    """Heads and points, whose product the tensors tell."""
    sizes = {}
    for side, attention in (("encoder", "self_attn"), ("decoder", "cross_attn")):
        name = f"transformer.{side}.layers.0.{attention}.attention_weights.bias"
        samples = len(tensors.get(name, ())) / num_levels
        given = known.get(f"{side}_attention_heads", instead.get(f"{side}_attention_heads"))
        num_heads = _HEADS if given is None else given
        if not isinstance(num_heads, int) or num_heads < 1:
            raise ConversionError(f"{side}_attention_heads={num_heads!r} is no number of heads.")
        points = samples / num_heads
        wanted = known.get(f"{side}_n_points", _POINTS if given is None else points)
        if points != wanted or points != int(points) or not points:
            raise ConversionError(
                f"{name!r} has {samples:g} sampling points for all heads together at each level, which is not {num_heads} heads of "
                f"{wanted}; set the number of heads by --set {side}_attention_heads=N."
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


def backbone_settings(tensors: dict[str, Tensor]) -> dict:
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
                "embedding_size": len(tensors["backbone.0.body.conv1.weight"]),
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
