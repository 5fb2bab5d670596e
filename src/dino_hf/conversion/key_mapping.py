"""Tensor names of the three projects, as tables that are read in both directions.

A rule says how a tensor is called there and how it is called here. Names are templates: `{i}`, `{j}`, `{k}` stand for a
number, any other field for one word (`weight`, `running_mean`). detrex and mmdetection are first renamed to the names of the
original release, whose table then leads to dino_hf. The tables are total: every name meets exactly one rule.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """theirs -> ours: a name; several, over which the tensor is split along its first axis; or None to drop it."""

    theirs: str
    ours: str | tuple[str, ...] | None
    reason: str = ""  # of dropping
    convert: Callable[[Tensor], Tensor] | None = None  # values, where the projects order them differently
    convert_back: Callable[[Tensor], Tensor] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Original release <-> dino_hf

_ENCODER, _DECODER = "transformer.encoder.layers.{i}.", "transformer.decoder.layers.{i}."
_OUR_ENCODER, _OUR_DECODER = "model.encoder.layers.{i}.", "model.decoder.layers.{i}."
_QKV = ("q_proj", "k_proj", "v_proj")

TRANSFORMER = [
    Rule("transformer.level_embed", "model.encoder.level_embed.weight"),
    *(
        Rule(theirs + name, ours + renamed)
        for theirs, ours in ((_ENCODER, _OUR_ENCODER), (_DECODER, _OUR_DECODER))
        for name, renamed in (("linear1.{p}", "mlp.fc1.{p}"), ("linear2.{p}", "mlp.fc2.{p}"))
    ),
    Rule(_ENCODER + "norm1.{p}", _OUR_ENCODER + "self_attn_norm.{p}"),
    Rule(_ENCODER + "norm2.{p}", _OUR_ENCODER + "mlp_norm.{p}"),
    Rule(_ENCODER + "self_attn.{name}.{p}", _OUR_ENCODER + "self_attn.{name}.{p}"),
    # The decoder counts its norms in the order of definition, not of use: norm1 belongs to cross-attention.
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

DECODER_COPIES = "heads of the decoder, which are saved a second time"
_SHARED = "one head for all decoder layers, saved again for each"


def heads(share: bool, num_layers: int) -> list[Rule]:
    """Heads of the decoder: one each, or one for all under several names."""
    kept = "0" if share else "{i}"
    rules = [
        Rule(f"class_embed.{kept}.{{p}}", f"model.decoder.heads.{kept}.class_head.{{p}}"),
        Rule(f"bbox_embed.{kept}.layers.{{k}}.{{p}}", f"model.decoder.heads.{kept}.box_head.layers.{{k}}.{{p}}"),
    ]
    if share:
        rules += [Rule(f"{{kind}}_embed.{layer}.{{tail}}", None, _SHARED) for layer in range(1, num_layers)]
    return rules


_BODY = "backbone.0.body."
_RESNET = "model.backbone.model."

RESNET = [
    Rule(_BODY + "conv1.weight", _RESNET + "embedder.embedder.convolution.weight"),
    Rule(_BODY + "bn1.{p}", _RESNET + "embedder.embedder.normalization.{p}"),
    *(
        Rule(
            f"{_BODY}layer{stage + 1}.{{i}}.{theirs}.{{p}}",
            f"{_RESNET}encoder.stages.{stage}.layers.{{i}}.{ours}.{{p}}",
        )
        for stage in range(4)
        for theirs, ours in (
            *((f"conv{part + 1}", f"layer.{part}.convolution") for part in range(3)),
            *((f"bn{part + 1}", f"layer.{part}.normalization") for part in range(3)),
            ("downsample.0", "shortcut.convolution"),
            ("downsample.1", "shortcut.normalization"),
        )
    ),
]

_BLOCK, _SWIN = "backbone.0.layers.{i}.blocks.{j}.", "model.backbone.model.swin."
_SWIN_BLOCK = _SWIN + "encoder.layers.{i}.blocks.{j}."

SWIN = [
    Rule("backbone.0.patch_embed.proj.{p}", _SWIN + "embeddings.patch_embeddings.projection.{p}"),
    Rule("backbone.0.patch_embed.norm.{p}", _SWIN + "embeddings.norm.{p}"),
    Rule(_BLOCK + "norm1.{p}", _SWIN_BLOCK + "layernorm_before.{p}"),
    Rule(_BLOCK + "norm2.{p}", _SWIN_BLOCK + "layernorm_after.{p}"),
    Rule(
        _BLOCK + "attn.relative_position_bias_table",
        _SWIN_BLOCK + "attention.relative_position_bias.relative_position_bias_table",
    ),
    Rule(_BLOCK + "attn.relative_position_index", None, "follow from the window size, no weights"),
    Rule(_BLOCK + "attn.qkv.{p}", tuple(f"{_SWIN_BLOCK}attention.{part}.{{p}}" for part in _QKV)),
    Rule(_BLOCK + "attn.proj.{p}", _SWIN_BLOCK + "attention.o_proj.{p}"),
    Rule(_BLOCK + "mlp.{name}.{p}", _SWIN_BLOCK + "mlp.{name}.{p}"),
    Rule("backbone.0.layers.{i}.downsample.{name}.{p}", _SWIN + "encoder.layers.{i}.downsample.{name}.{p}"),
]

_CONVNEXT = "model.backbone.model."
_CONVNEXT_BLOCK, _OUR_CONVNEXT_BLOCK = "backbone.0.stages.{i}.{j}.", _CONVNEXT + "encoder.stages.{i}.layers.{j}."

CONVNEXT = [
    Rule("backbone.0.downsample_layers.0.0.{p}", _CONVNEXT + "embeddings.patch_embeddings.{p}"),
    Rule("backbone.0.downsample_layers.0.1.{p}", _CONVNEXT + "embeddings.layernorm.{p}"),
    *(
        Rule(
            f"backbone.0.downsample_layers.{stage}.{{j}}.{{p}}",
            f"{_CONVNEXT}encoder.stages.{stage}.downsampling_layer.{{j}}.{{p}}",
        )
        for stage in (1, 2, 3)
    ),
    *(
        Rule(f"{_CONVNEXT_BLOCK}{name}.{{p}}", f"{_OUR_CONVNEXT_BLOCK}{name}.{{p}}")
        for name in ("dwconv", "pwconv1", "pwconv2")
    ),
    Rule(_CONVNEXT_BLOCK + "norm.{p}", _OUR_CONVNEXT_BLOCK + "layernorm.{p}"),
    Rule(_CONVNEXT_BLOCK + "gamma", _OUR_CONVNEXT_BLOCK + "layer_scale_parameter"),
]


def output_norms(stages: Iterable[int]) -> list[Rule]:
    """Norms of the backbone's output stages, which the release counts from 0 and transformers from 1."""
    stages = set(stages)
    return [
        Rule(f"backbone.0.norm{stage}.{{p}}", f"model.backbone.model.hidden_states_norms.stage{stage + 1}.{{p}}")
        if stage in stages
        else Rule(f"backbone.0.norm{stage}.{{p}}", None, "norm of a backbone stage that is not used")
        for stage in range(4)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# detrex <-> original release


def detrex(num_layers: int, num_maps: int) -> list[Rule]:
    """
    Args:
        num_layers: of the decoder; the head of that number is the encoder's.
        num_maps: feature maps of the backbone.
    """
    encoder, decoder = "transformer.encoder.layers.{i}.", "transformer.decoder.layers.{i}."
    rules = [
        Rule("transformer.level_embeds", "transformer.level_embed"),
        Rule(encoder + "attentions.0.{name}.{p}", encoder + "self_attn.{name}.{p}"),
        Rule(encoder + "norms.0.{p}", encoder + "norm1.{p}"),
        Rule(encoder + "norms.1.{p}", encoder + "norm2.{p}"),
        Rule(decoder + "attentions.0.attn.in_proj_{p}", decoder + "self_attn.in_proj_{p}"),
        Rule(decoder + "attentions.0.attn.out_proj.{p}", decoder + "self_attn.out_proj.{p}"),
        Rule(decoder + "attentions.1.{name}.{p}", decoder + "cross_attn.{name}.{p}"),
        Rule(decoder + "norms.0.{p}", decoder + "norm2.{p}"),
        Rule(decoder + "norms.1.{p}", decoder + "norm1.{p}"),
        Rule(decoder + "norms.2.{p}", decoder + "norm3.{p}"),
        *(
            Rule(side + theirs, side + ours)
            for side in (encoder, decoder)
            for theirs, ours in (("ffns.0.layers.0.0.{p}", "linear1.{p}"), ("ffns.0.layers.1.{p}", "linear2.{p}"))
        ),
        *(
            rule
            for number, class_head, box_head in _release_heads(num_layers)
            for rule in (
                Rule(f"class_embed.{number}.{{p}}", class_head + ".{p}"),
                Rule(f"bbox_embed.{number}.layers.{{k}}.{{p}}", box_head + ".layers.{k}.{p}"),
            )
        ),
        *_neck("norm", num_maps),
        *_unchanged("transformer.decoder.norm.{p}", "transformer.decoder.ref_point_head.layers.{i}.{p}"),
        *_unchanged("transformer.tgt_embed.weight", "transformer.enc_output.{p}", "transformer.enc_output_norm.{p}"),
        *_unchanged("label_enc.weight"),
        Rule("backbone.stem.conv1.weight", _BODY + "conv1.weight"),
        Rule("backbone.stem.conv1.norm.{p}", _BODY + "bn1.{p}"),
    ]
    for stage in range(1, 5):
        theirs, ours = f"backbone.res{stage + 1}.{{i}}.", f"{_BODY}layer{stage}.{{i}}."
        for part in (1, 2, 3):
            rules += [Rule(f"{theirs}conv{part}.weight", f"{ours}conv{part}.weight")]
            rules += [Rule(f"{theirs}conv{part}.norm.{{p}}", f"{ours}bn{part}.{{p}}")]
        rules += [Rule(theirs + "shortcut.weight", ours + "downsample.0.weight")]
        rules += [Rule(theirs + "shortcut.norm.{p}", ours + "downsample.1.{p}")]
    # Swin and ConvNeXt have the release's names, without its list around the backbone.
    return rules + [
        Rule(name, "backbone.0." + name.removeprefix("backbone."))
        for name in (
            *("backbone.patch_embed.{name}.{p}", "backbone.layers.{i}.downsample.{name}.{p}"),
            *("backbone.layers.{i}.blocks.{j}.attn.relative_position_bias_table", "backbone.norm{i}.{p}"),
            *(
                "backbone.layers.{i}.blocks.{j}.attn.relative_position_index",
                "backbone.layers.{i}.blocks.{j}.norm{k}.{p}",
            ),
            *("backbone.layers.{i}.blocks.{j}.attn.{name}.{p}", "backbone.layers.{i}.blocks.{j}.mlp.{name}.{p}"),
            *("backbone.downsample_layers.{i}.{j}.{p}", "backbone.stages.{i}.{j}.{name}.{p}"),
            "backbone.stages.{i}.{j}.gamma",
        )
    ]


# ---------------------------------------------------------------------------------------------------------------------
# mmdetection <-> original release


def mmdet(num_layers: int, num_maps: int) -> list[Rule]:
    """As `detrex`."""
    encoder, decoder = "encoder.layers.{i}.", "decoder.layers.{i}."
    block, release_block = "backbone.stages.{i}.blocks.{j}.", "backbone.0.layers.{i}.blocks.{j}."
    merging = "backbone.stages.{i}.downsample.", "backbone.0.layers.{i}.downsample."
    return [
        Rule("level_embed", "transformer.level_embed"),
        Rule("query_embedding.weight", "transformer.tgt_embed.weight"),
        Rule("memory_trans_fc.{p}", "transformer.enc_output.{p}"),
        Rule("memory_trans_norm.{p}", "transformer.enc_output_norm.{p}"),
        Rule("dn_query_generator.label_embedding.weight", "label_enc.weight"),
        Rule("decoder.norm.{p}", "transformer.decoder.norm.{p}"),
        Rule("decoder.ref_point_head.layers.{i}.{p}", "transformer.decoder.ref_point_head.layers.{i}.{p}"),
        Rule(encoder + "self_attn.{name}.{p}", f"transformer.{encoder}self_attn.{{name}}.{{p}}"),
        Rule(encoder + "norms.0.{p}", f"transformer.{encoder}norm1.{{p}}"),
        Rule(encoder + "norms.1.{p}", f"transformer.{encoder}norm2.{{p}}"),
        Rule(decoder + "self_attn.attn.in_proj_{p}", f"transformer.{decoder}self_attn.in_proj_{{p}}"),
        Rule(decoder + "self_attn.attn.out_proj.{p}", f"transformer.{decoder}self_attn.out_proj.{{p}}"),
        Rule(decoder + "cross_attn.{name}.{p}", f"transformer.{decoder}cross_attn.{{name}}.{{p}}"),
        Rule(decoder + "norms.0.{p}", f"transformer.{decoder}norm2.{{p}}"),
        Rule(decoder + "norms.1.{p}", f"transformer.{decoder}norm1.{{p}}"),
        Rule(decoder + "norms.2.{p}", f"transformer.{decoder}norm3.{{p}}"),
        *(
            Rule(side + theirs, f"transformer.{side}{ours}")
            for side in (encoder, decoder)
            for theirs, ours in (("ffn.layers.0.0.{p}", "linear1.{p}"), ("ffn.layers.1.{p}", "linear2.{p}"))
        ),
        *(
            rule
            for number, class_head, box_head in _release_heads(num_layers)
            for rule in (
                Rule(f"bbox_head.cls_branches.{number}.{{p}}", class_head + ".{p}"),
                *(  # a sequence, with activations at 1 and 3
                    Rule(f"bbox_head.reg_branches.{number}.{2 * part}.{{p}}", f"{box_head}.layers.{part}.{{p}}")
                    for part in range(3)
                ),
            )
        ),
        *_neck("gn", num_maps),
        Rule("backbone.conv1.weight", _BODY + "conv1.weight"),
        Rule("backbone.bn1.num_batches_tracked", None, _COUNTER),
        *(Rule(f"backbone.bn1.{p}", f"{_BODY}bn1.{p}") for p in _BATCH_NORM),
        *(
            rule
            for stage in range(1, 5)
            for theirs, ours in [(f"backbone.layer{stage}.{{i}}.", f"{_BODY}layer{stage}.{{i}}.")]
            for rule in (
                *(Rule(f"{theirs}conv{part}.weight", f"{ours}conv{part}.weight") for part in (1, 2, 3)),
                Rule(theirs + "downsample.0.weight", ours + "downsample.0.weight"),
                *(
                    rule
                    for norm in ("bn1", "bn2", "bn3", "downsample.1")
                    for rule in (
                        Rule(f"{theirs}{norm}.num_batches_tracked", None, _COUNTER),
                        *(Rule(f"{theirs}{norm}.{p}", f"{ours}{norm}.{p}") for p in _BATCH_NORM),
                    )
                ),
            )
        ),
        Rule("backbone.patch_embed.projection.{p}", "backbone.0.patch_embed.proj.{p}"),
        Rule("backbone.patch_embed.norm.{p}", "backbone.0.patch_embed.norm.{p}"),
        Rule("backbone.norm{i}.{p}", "backbone.0.norm{i}.{p}"),
        Rule(block + "norm{k}.{p}", release_block + "norm{k}.{p}"),
        Rule(block + "attn.w_msa.relative_position_bias_table", release_block + "attn.relative_position_bias_table"),
        Rule(block + "attn.w_msa.relative_position_index", release_block + "attn.relative_position_index"),
        Rule(block + "attn.w_msa.{name}.{p}", release_block + "attn.{name}.{p}"),
        Rule(block + "ffn.layers.0.0.{p}", release_block + "mlp.fc1.{p}"),
        Rule(block + "ffn.layers.1.{p}", release_block + "mlp.fc2.{p}"),
        Rule(
            merging[0] + "reduction.{p}",
            merging[1] + "reduction.{p}",
            convert=merging_from_unfold,
            convert_back=merging_to_unfold,
        ),
        Rule(
            merging[0] + "norm.{p}",
            merging[1] + "norm.{p}",
            convert=merging_from_unfold,
            convert_back=merging_to_unfold,
        ),
    ]


_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
_COUNTER = "counters of batches, which a frozen norm does not use"


def _unchanged(*names: str) -> list[Rule]:
    return [Rule(name, name) for name in names]


def _release_heads(num_layers: int) -> Iterator[tuple[int, str, str]]:
    """Number there, and the release's names of class and box head. The last of them is the encoder's."""
    for number in range(num_layers):
        yield number, f"class_embed.{number}", f"bbox_embed.{number}"
    yield num_layers, "transformer.enc_out_class_embed", "transformer.enc_out_bbox_embed"


def _neck(norm: str, num_maps: int) -> list[Rule]:
    """Projections, of which those of further levels are numbered on their own there."""
    rules = []
    for level in range(num_maps + _MOST_EXTRA_LEVELS):
        own = f"neck.convs.{level}" if level < num_maps else f"neck.extra_convs.{level - num_maps}"
        rules += [Rule(f"{own}.conv.{{p}}", f"input_proj.{level}.0.{{p}}")]
        rules += [Rule(f"{own}.{norm}.{{p}}", f"input_proj.{level}.1.{{p}}")]
    return rules


_MOST_EXTRA_LEVELS = 8


# Swin puts four neighbours side by side: first all channels of one, then of the next, going down each column (the release), or
# channel by channel, going along each row, as `torch.nn.functional.unfold` does (mmdetection).
_NEIGHBOURS = [0, 2, 1, 3]  # its own inverse


def merging_from_unfold(x: Tensor) -> Tensor:
    """(..., 4C) in the order of unfold -> in the order of the release."""
    return x.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., _NEIGHBOURS, :].flatten(-2)


def merging_to_unfold(x: Tensor) -> Tensor:
    """The inverse of `merging_from_unfold`."""
    return x.unflatten(-1, (4, -1))[..., _NEIGHBOURS, :].transpose(-1, -2).flatten(-2)


# ---------------------------------------------------------------------------------------------------------------------
# Reading the tables

_FIELD = {"i": r"\d+", "j": r"\d+", "k": r"\d+", "kind": "class|bbox", "tail": ".+"}


@cache
def _compiled(template: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", template)
    pieces = [
        f"(?P<{part}>{_FIELD.get(part, '[A-Za-z_][A-Za-z_0-9]*')})" if number % 2 else re.escape(part)
        for number, part in enumerate(parts)
    ]
    return re.compile("".join(pieces))


class UnknownName(KeyError):
    """A name that meets no rule, or several. `name`: which."""

    def __init__(self, name: str, fitting: str):
        self.name = name
        super().__init__(
            f"{name!r} must meet exactly one rule of dino_hf/conversion/key_mapping.py, but meets: {fitting}. Add a rule, or one "
            "with None and the reason to drop it."
        )


def _fitting(name: str, rules: list[Rule], templates: Callable[[Rule], tuple[str, ...]]) -> tuple[Rule, int, dict]:
    """The one rule for a name, which of its templates fits, and the values of its fields."""
    found = [
        (rule, number, match.groupdict())
        for rule in rules
        for number, template in enumerate(templates(rule))
        if (match := _compiled(template).fullmatch(name))
    ]
    if len(found) != 1:
        raise UnknownName(name, ", ".join(rule.theirs for rule, _, _ in found) or "none")
    return found[0]


def _ours(rule: Rule) -> tuple[str, ...]:
    return (rule.ours,) if isinstance(rule.ours, str) else rule.ours or ()


def renamed(name: str, rules: list[Rule]) -> tuple[str, ...]:
    """Our names for a tensor of theirs: one, several when it is split, or none.

    Raises:
        UnknownName: no rule fits, or more than one.
    """
    rule, _, fields = _fitting(name, rules, lambda rule: (rule.theirs,))
    return tuple(template.format(**fields) for template in _ours(rule))


def translate(tensors: Iterable[tuple[str, Tensor]], rules: list[Rule]) -> tuple[dict[str, Tensor], Counter]:
    """Their tensors, with their names, under our names, and how many were dropped for which reason."""
    state, dropped = {}, Counter()
    for name, tensor in tensors:
        rule, _, fields = _fitting(name, rules, lambda rule: (rule.theirs,))
        names = [template.format(**fields) for template in _ours(rule)]
        if not names:
            dropped[rule.reason] += 1
            continue
        tensor = rule.convert(tensor) if rule.convert else tensor
        # clone: views of one fused tensor would be saved as shared memory
        parts = [tensor] if len(names) == 1 else [part.clone() for part in tensor.chunk(len(names))]
        state |= dict(zip(names, parts, strict=True))
    return state, dropped


def translate_back(state: dict[str, Tensor], rules: list[Rule]) -> dict[str, Tensor]:
    """Our tensors under their names; what `translate` dropped is missing.

    Raises:
        UnknownName: no rule leads to a name, or more than one does.
        KeyError: parts of a tensor are missing.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    back = {}
    for name, tensor in state.items():
        rule, number, fields = _fitting(name, rules, _ours)
        theirs = rule.theirs.format(**fields)
        parts.setdefault(theirs, {})[number] = rule.convert_back(tensor) if rule.convert_back else tensor
        if len(parts[theirs]) == len(_ours(rule)):
            whole = parts.pop(theirs)
            back[theirs] = whole[0] if len(whole) == 1 else torch.cat([whole[i] for i in sorted(whole)])
    if parts:
        raise KeyError(f"parts are missing of {sorted(parts)[:3]}")
    return back
