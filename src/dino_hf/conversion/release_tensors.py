"""Changes to the tensors of a model, all by the names of the original release."""

import re
from collections import Counter

import torch
from torch import Tensor

from ..model.configuration_dino_detr import DinoDetrConfig
from .errors import ConversionError

_DECODER_COPIES = "heads of the decoder, which are saved a second time"
_LABELS = "label_enc.weight"


def count_backbone_maps(tensors: dict[str, Tensor]) -> int:
    """Number of the backbone's maps. Their projections are 1 x 1, the projections of extra levels 3 x 3."""
    number = 0
    while (weight := tensors.get(f"input_proj.{number}.0.weight")) is not None and weight.shape[-1] == 1:
        number += 1
    return number


def without_decoder_copies(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Counter]:
    """Drop the second copy of the decoder's heads. A file without duplicates may have only the second copy, which is kept.

    Returns:
        the tensors, and the number of dropped tensors by reason.
    Raises:
        ConversionError: the copies differ.
    """
    plain, dropped = {}, Counter()
    for name, tensor in tensors.items():
        first = name.removeprefix("transformer.decoder.")
        if first == name or not re.match(r"(class|bbox)_embed\.", first):
            plain[name] = tensor
        elif first not in tensors:
            plain[first] = tensor
        elif torch.equal(tensor, tensors[first]):
            dropped[_DECODER_COPIES] += 1
        else:
            raise ConversionError(f"{first!r} and {name!r} should be one tensor, but they differ.")
    return plain, dropped


def with_decoder_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the second copy of the decoder's heads."""
    heads = {name: tensor for name, tensor in tensors.items() if name.startswith(("class_embed.", "bbox_embed."))}
    return tensors | {f"transformer.decoder.{name}": tensor for name, tensor in heads.items()}


def heads_are_equal(tensors: dict[str, Tensor]) -> bool:
    """Whether all decoder layers have the same head."""
    return all(
        torch.equal(tensor, tensors[f"{match[1]}.0{match[2]}"])
        for name, tensor in tensors.items()
        if (match := re.match(r"(class_embed|bbox_embed)\.\d+(\..*)", name)) and f"{match[1]}.0{match[2]}" in tensors
    )


def separate_heads(tensors: dict[str, Tensor], config: DinoDetrConfig) -> dict[str, Tensor]:
    """Add a shared head under the names of all decoder layers."""
    if not config.share_decoder_heads:
        return tensors
    copies = {
        f"{kind}_embed.{layer}.{tail}": tensor
        for name, tensor in tensors.items()
        if name.startswith(("class_embed.0.", "bbox_embed.0."))
        for kind, tail in [(name.split("_", 1)[0], name.split(".", 2)[2])]
        for layer in range(1, config.decoder_layers)
    }
    return tensors | copies


def with_projection_bias(tensors: dict[str, Tensor], config: DinoDetrConfig) -> dict[str, Tensor]:
    """Add a bias of zero to the projections of the feature maps, if the model has none."""
    levels = range(0 if config.projection_bias else config.num_feature_levels)
    return tensors | {f"input_proj.{i}.0.bias": torch.zeros_like(tensors[f"input_proj.{i}.1.bias"]) for i in levels}


def without_projection_bias(tensors: dict[str, Tensor], project: str) -> dict[str, Tensor]:
    """Remove the bias of the projections of feature maps.

    Args:
        project: name of a project whose neck has no bias, for the error.
    Raises:
        ConversionError: the bias is not zero.
    """
    bias = {name for name in tensors if name.startswith("input_proj.") and name.endswith(".0.bias")}
    if largest := max((tensors[name].abs().max().item() for name in bias), default=0):
        raise ConversionError(
            f"The projections of feature maps have a bias (up to {largest:.2g}), which the neck of {project} does not have. "
            "detrex and the original release have it."
        )
    return {name: tensor for name, tensor in tensors.items() if name not in bias}


def num_extra_label_rows(tensors: dict[str, Tensor], num_labels: int) -> int:
    """Number of rows of the label embedding beyond one for each class. See `fill_label_rows` for missing rows."""
    if _LABELS not in tensors:
        return 1
    return max(0, len(tensors[_LABELS]) - num_labels)


def fill_label_rows(tensors: dict[str, Tensor], num_labels: int) -> tuple[dict[str, Tensor], int]:
    """Add rows to the label embedding until each class has one. A new row is the mean of the others.

    Only training uses these rows (`dn_labelbook_size` of the release may be too small), so detections do not change.

    Returns:
        the tensors, and the number of added rows.
    """
    rows = tensors.get(_LABELS)
    if rows is None or len(rows) >= num_labels:
        return tensors, 0
    num_missing = num_labels - len(rows)
    mean = rows.float().mean(0, keepdim=True).to(rows.dtype).expand(num_missing, -1)
    return {**tensors, _LABELS: torch.cat([rows, mean])}, num_missing


def cut_label_rows(tensors: dict[str, Tensor], num_labels: int) -> dict[str, Tensor]:
    """Keep only one row of the label embedding for each class."""
    return {**tensors, _LABELS: tensors[_LABELS][:num_labels].contiguous()}


# Number of axes of the tensors that sizes are read from.
_NUM_AXES = [
    (r"transformer\.level_embed$", 2),
    (r"(transformer\.tgt_embed|label_enc|.*\.linear1|class_embed\.\d+)\.weight$", 2),
    (r".*\.in_proj_weight$", 2),
    (r".*\.attention_weights\.bias$", 1),
    (r".*\.relative_position_bias_table$", 2),
    (r"(input_proj\.\d+\.0|.*\.body\.conv1|.*\.conv3|.*\.patch_embed\.proj|.*\.dwconv)\.weight$", 4),
]
_REQUIRED = [
    "transformer.level_embed",
    "transformer.tgt_embed.weight",
    "transformer.encoder.layers.0.linear1.weight",
    "transformer.decoder.layers.0.linear1.weight",
    "class_embed.0.weight",
    "input_proj.0.0.weight",
]


def check_tensors(tensors: dict[str, Tensor], path) -> None:
    """Check that the architecture can be read from the tensors.

    Raises:
        ConversionError: a required tensor is missing, is empty, or has the wrong number of axes.
    """
    if missing := [name for name in _REQUIRED if name not in tensors]:
        raise ConversionError(f"{path} lacks {missing} (release's names): it is incomplete, or is not a DINO.")
    for name, tensor in tensors.items():
        axes = next((axes for pattern, axes in _NUM_AXES if re.match(pattern, name)), tensor.ndim)
        if tensor.ndim != axes or (not tensor.numel() and tensor.ndim):
            raise ConversionError(
                f"{name!r} (release's name) in {path} has the shape {tuple(tensor.shape)}, but must have {axes} axes and not "
                "be empty; the checkpoint is damaged."
            )
