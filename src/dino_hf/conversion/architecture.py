"""The architecture of a checkpoint.

It is read from the names and shapes of the tensors. Settings that no tensor shows come from the file or from the user. The
remaining settings get the defaults of the project, which the user sees in a note.
"""

import math
from collections import Counter
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ..model.configuration_dino_detr import DinoDetrConfig
from .backbones import backbone_settings, check_supported
from .checkpoint_files import Checkpoint
from .errors import ConversionError
from .focalnet import DROP_PATH_RATE
from .focalnet import MODEL_TYPE as FOCALNET_TYPE
from .internimage import MODEL_TYPE as INTERNIMAGE_TYPE
from .internimage import internimage_defaults, known_offset_scale
from .projects.project import Project
from .projects.registry import PROJECTS, recognise
from .release_tensors import check_tensors, num_extra_label_rows
from .rules import UnknownName, count_indices
from .vitdet import MODEL_TYPE as VITDET_TYPE
from .vitdet import drop_path_rate

_BACKBONE_FIELDS = ("drop_path_rate", "offset_scale")  # settings of backbones that no tensor shows
_HEADS, _POINTS = 8, 4  # of attention, in all published models


def to_release_names(checkpoint: Checkpoint, project: Project) -> tuple[dict[str, Tensor], Counter]:
    """Rename the tensors of a checkpoint to the names of the original release.

    Returns:
        the tensors, and the number of dropped tensors by reason.
    Raises:
        ConversionError: the checkpoint is not a DINO of this project, or its backbone is not supported.
    """
    names, path = checkpoint.tensors, checkpoint.path
    for reason in (reason for one in PROJECTS.values() for name, reason in one.refused.items() if name in names):
        raise ConversionError(f"{path} is {reason}.")
    if not project.recognises(names):
        missing = next(mark for mark in project.marks if mark not in names)
        raise ConversionError(
            f"{path} is not a DINO of {project.name}: it has no tensor {missing!r} among its {len(names)} tensors (the first: "
            f"{sorted(names)[:3]}). {_describe_other_model(checkpoint)}"
        )
    check_supported(names)
    try:
        tensors, dropped = project.to_release(checkpoint.tensors)
    except UnknownName as error:
        raise ConversionError(
            f"{path} has the tensor {error.name!r}, which no DINO of {project.name} has: it is a variant or another model."
        ) from error
    check_tensors(tensors, path)
    return tensors, dropped


def _describe_other_model(checkpoint: Checkpoint) -> str:
    names = checkpoint.tensors
    if (found := recognise(names)) is not None:
        return f"It belongs to {found.name}: use --source {found.name}, or auto."
    if any(name.startswith("model.query_selection.") for name in names):
        return "It is a dino_hf model already: load its folder by from_pretrained."
    if any("cls_token" in name for name in names):
        return "It may be the self-supervised DINO, which is another model."
    return "Detectors of other kinds cannot be converted."


def build_config(
    tensors: dict[str, Tensor], project: Project, from_file: dict, from_user: dict, fallback: dict | None = None
) -> tuple[DinoDetrConfig, dict[str, Any]]:
    """Build the configuration of a checkpoint.

    Args:
        tensors: by the release's names.
        from_file: fields that the settings in the file contain, from `Project.fields_from_settings`.
        from_user: fields that the user sets.
        fallback: values to use instead of the project's defaults.
    Returns:
        the configuration, and its fields that come neither from the file nor from the user.
    Raises:
        ConversionError: the sizes or settings are invalid.
    """
    fallback = fallback or {}
    from_tensors = _fields_from_tensors(tensors, project)
    _check_user_fields(from_user, from_tensors)
    _check_counts(from_tensors)
    assumed = {**project.defaults, "num_denoising": 100, "box_noise_scale": 1.0}
    known = from_file | from_user
    backbone = from_tensors["backbone_config"]
    backbone_defaults = _backbone_defaults(backbone, project, known)
    assumed |= backbone_defaults
    fallback = fallback.get("backbone_config", {}) | fallback
    assumed |= {name: value for name, value in fallback.items() if name in assumed}
    assumed |= _attention_sizes(tensors, from_tensors["num_feature_levels"], known, fallback)
    values = {**assumed, **known, **from_tensors}
    given = {name: values.pop(name) for name in _BACKBONE_FIELDS if name in values}
    given = {name: value for name, value in given.items() if name in backbone_defaults}
    if backbone["model_type"] == VITDET_TYPE:
        given = {"backbone_config": backbone["backbone_config"] | given}
    values["backbone_config"] = backbone | given
    if project.counts_denoising_pairs and 0 < values["num_denoising"] < 50:
        raise ConversionError(
            f"num_denoising={values['num_denoising']} counts pairs of queries in {project.name}. In dino_hf, as in the original "
            "release, a value below 50 counts groups. The value matters only in training: set 0 or at least 50 by "
            "--set num_denoising=N."
        )
    try:
        config = DinoDetrConfig(**values)
    except StrictDataclassError as error:
        raise ConversionError(f"No model has the sizes and settings of this file: {error.__cause__}") from error
    if known_offset_scale(backbone) is not None:
        del assumed["offset_scale"]
    return config, {name: value for name, value in assumed.items() if name not in known}


def _backbone_defaults(backbone: dict[str, Any], project: Project, known: dict[str, Any]) -> dict[str, Any]:
    """Fields that depend on the backbone and that no tensor shows, with the values of the published models."""
    if backbone["model_type"] == "resnet":
        return {"num_frozen_backbone_stages": project.frozen_resnet_stages}
    if backbone["model_type"] == "swin":
        return {"drop_path_rate": project.swin_drop_path_rate}
    if backbone["model_type"] == FOCALNET_TYPE:
        return {"drop_path_rate": DROP_PATH_RATE}
    if backbone["model_type"] == VITDET_TYPE:
        return {"drop_path_rate": drop_path_rate(backbone)}
    return internimage_defaults(backbone, known) if backbone["model_type"] == INTERNIMAGE_TYPE else {}


def _fields_from_tensors(tensors: dict[str, Tensor], project: Project) -> dict[str, Any]:
    num_levels, d_model = tensors["transformer.level_embed"].shape
    num_labels = len(tensors["class_embed.0.weight"])
    return {
        "backbone_config": backbone_settings(tensors),
        "num_labels": num_labels,
        "num_queries": len(tensors["transformer.tgt_embed.weight"]),
        "num_feature_levels": num_levels,
        "d_model": d_model,
        "encoder_layers": count_indices(tensors, r"transformer\.encoder\.layers\.(\d+)\."),
        "decoder_layers": count_indices(tensors, r"transformer\.decoder\.layers\.(\d+)\."),
        "encoder_ffn_dim": len(tensors["transformer.encoder.layers.0.linear1.weight"]),
        "decoder_ffn_dim": len(tensors["transformer.decoder.layers.0.linear1.weight"]),
        "encoder_fusion": "transformer.encoder.fusion_layer.0.weight" in tensors,
        "projection_bias": "input_proj.0.0.bias" in tensors,
        "num_extra_label_embeddings": num_extra_label_rows(tensors, num_labels),
        "pred_boxes_eps": project.pred_boxes_eps,
        **project.fields_from_tensors(tensors),
    }


_LARGEST = {
    "num_queries": 100_000,
    "num_labels": 100_000,
    "num_feature_levels": 20,
    "encoder_layers": 100,
    "decoder_layers": 100,
}
_MAX_BLOCKS = 1000  # of a backbone; the largest published one has 50


def _check_counts(from_tensors: dict[str, Any]) -> None:
    """
    Raises:
        ConversionError: the model has so many parts that building it would take hours.
    """
    for name, largest in _LARGEST.items():
        if from_tensors[name] > largest:
            raise ConversionError(f"The tensors show {name}={from_tensors[name]:,}; at most {largest:,} are converted.")
    backbone = from_tensors["backbone_config"]
    depths = backbone.get("depths") or [backbone["backbone_config"]["num_hidden_layers"]]
    if (blocks := sum(depths)) > _MAX_BLOCKS:
        raise ConversionError(f"The backbone has {blocks:,} blocks; at most {_MAX_BLOCKS:,} are converted.")


# Fields that no tensor shows.
_USER_FIELDS = [
    *("position_temperature", "position_offset", "num_frozen_backbone_stages"),
    *("encoder_attention_heads", "encoder_n_points", "decoder_attention_heads", "decoder_n_points"),
    "offset_scale",
    *("num_denoising", "label_noise_ratio", "box_noise_scale", "focal_alpha"),
    *("class_cost", "bbox_cost", "giou_cost"),
    *("cls_loss_coefficient", "bbox_loss_coefficient", "giou_loss_coefficient"),
    *("class_loss", "queries_per_box", "denoising_cls_loss_coefficient", "negative_noise_start"),
]


def _check_user_fields(from_user: dict[str, Any], from_tensors: dict[str, Any]) -> None:
    in_both = {name: from_tensors[name] for name in sorted(from_user) if name in from_tensors}
    in_both.pop("backbone_config", None)
    if in_both:
        raise ConversionError(f"The tensors show {in_both}; leave them out of --set.")
    if others := sorted(set(from_user) - set(_USER_FIELDS)):
        raise ConversionError(
            f"--set cannot set {others}, only fields that no tensor shows: {', '.join(_USER_FIELDS)}."
        )
    for name, value in from_user.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConversionError(f"{name}={value} is not finite.")


def _attention_sizes(tensors: dict[str, Tensor], num_levels: int, known: dict, fallback: dict) -> dict[str, int]:
    """Numbers of heads and points. The tensors show only their product.

    Args:
        known: fields from the file or from the user.
    """
    sizes = {}
    for side, attention in (("encoder", "self_attn"), ("decoder", "cross_attn")):
        name = f"transformer.{side}.layers.0.{attention}.attention_weights.bias"
        samples = len(tensors.get(name, ())) / num_levels
        given = known.get(f"{side}_attention_heads", fallback.get(f"{side}_attention_heads"))
        num_heads = _HEADS if given is None else given
        if not isinstance(num_heads, int) or num_heads < 1:
            raise ConversionError(f"{side}_attention_heads={num_heads!r} is not a number of heads.")
        points = samples / num_heads
        expected = known.get(f"{side}_n_points", _POINTS if given is None else points)
        if points != expected or points != int(points) or not points:
            raise ConversionError(
                f"{name!r} has {samples:g} sampling points in each level, but {num_heads} heads with {expected} points each are "
                f"expected; set the number of heads with --set {side}_attention_heads=N."
            )
        sizes |= {f"{side}_attention_heads": num_heads, f"{side}_n_points": int(points)}
    return sizes
