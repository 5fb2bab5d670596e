"""Turn a checkpoint of the original DINO release into a folder that `from_pretrained` loads.

    python convert_scripts/convert_checkpoint.py --checkpoint checkpoint0011_4scale.pth --output-dir dino-r50-4scale

The architecture is read from the shapes of the tensors; what they cannot tell (position temperature, noise, loss weights)
from the `args` that the release stores in the file.
"""

import argparse
import pickle
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor
from key_mapping import (
    CONVNEXT,
    RESNET,
    SEPARATE_HEADS,
    SHARED_HEADS,
    SWIN,
    TRANSFORMER,
    Rule,
    find_rule,
    output_norms,
    renamed,
)


class ConversionError(ValueError):
    """The file cannot be converted; the message says why and what to do."""


# What every checkpoint has, and the architecture is read from.
REQUIRED_TENSORS = [
    "transformer.level_embed",
    "transformer.tgt_embed.weight",
    "transformer.encoder.layers.0.linear1.weight",
    "transformer.decoder.layers.0.linear1.weight",
    "class_embed.0.weight",
    "input_proj.0.0.weight",
]

# What the release can be told to compute differently and dino_hf does not: name in `args` -> the values that are fine.
REQUIRED_SETTINGS = {
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

# Setting of dino_hf <- name in `args`, for what no tensor shows.
FROM_ARGS = {
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


def load_checkpoint(path: Path, ema: bool = False) -> tuple[dict[str, Tensor], dict]:
    """Read tensors and settings. Nothing in the file is run: of all classes, only `argparse.Namespace` is let in.

    Args:
        path: a `.pth` of the release, with `model` and `args`; or the bare dictionary of tensors.
        ema: take the averaged weights, `ema_model`.
    Returns:
        tensors by their original name, and the settings (empty when the file has none).
    """
    if not path.is_file():
        raise ConversionError(f"There is no file {path}.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is damaged or made up can trip the reader with
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if not isinstance(error, pickle.UnpicklingError):
            raise ConversionError(f"{path} is truncated or damaged ({reason[0][:200]}). Download it again.") from error
        detail = next((line for line in reason if "GLOBAL" in line or "Unsupported" in line), reason[0])
        raise ConversionError(
            f"{path} was refused, and nothing in it was run: it is not a PyTorch checkpoint, or it holds more than tensors, "
            f"plain values and argparse.Namespace ({detail.strip()[:200]}). Download it again, or ask its "
            "author for a file of tensors only."
        ) from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a dictionary with 'model'.")
    if not content:
        raise ConversionError(f"{path} holds nothing.")
    part = "ema_model" if ema else "model"
    if ema and part not in content:
        raise ConversionError(f"{path} has no 'ema_model' (its parts: {sorted(map(str, content))}); leave --ema out.")
    settings = content.get("args")
    tensors = content[part] if part in content else {key: content[key] for key in content if key != "args"}
    if not isinstance(tensors, dict):
        raise ConversionError(f"{path} has a {type(tensors).__name__} under {part!r}, not a dictionary of tensors.")
    if settings is not None and not isinstance(settings, argparse.Namespace | dict):
        raise ConversionError(f"{path} has a {type(settings).__name__} under 'args', not the settings of a training.")
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else dict(settings or {})
    tensors = {str(key).removeprefix("module."): value for key, value in tensors.items()}
    if "transformer.level_embed" not in tensors:
        raise ConversionError(
            f"{path} is not a DINO checkpoint of the original release: it has no tensor 'transformer.level_embed' among its "
            f"{len(tensors)} (the first: {sorted(tensors)[:3]})."
        )
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ConversionError(
                f"{key!r} is a {type(value).__name__}, where only tensors belong; if it is no weight, save the file without it."
            )
        if not value.isfinite().all():
            raise ConversionError(
                f"{key!r} has values that are NaN or infinite: the training had diverged; take an earlier checkpoint."
            )
    return tensors, settings


def build_config(tensors: dict[str, Tensor], settings: dict) -> DinoDetrConfig:
    """The architecture, from shapes; and from `args` what shapes do not show."""
    for name, allowed in REQUIRED_SETTINGS.items():
        if name in settings and settings[name] not in allowed:
            raise ConversionError(
                f"The checkpoint was trained with {name}={settings[name]!r}; dino_hf computes DINO with "
                f"{name}={allowed[0]!r} only, as in every published checkpoint."
            )
    if settings.get("pe_temperatureH") != settings.get("pe_temperatureW", settings.get("pe_temperatureH")):
        raise ConversionError(
            f"The position temperatures differ (pe_temperatureH={settings['pe_temperatureH']}, "
            f"pe_temperatureW={settings['pe_temperatureW']}); dino_hf has one for both axes."
        )
    from_args = {name: settings[key] for name, key in FROM_ARGS.items() if settings.get(key) is not None}
    if settings.get("use_dn") is False:
        from_args["num_denoising"] = 0

    if missing := [name for name in REQUIRED_TENSORS if name not in tensors]:
        raise ConversionError(
            f"The checkpoint lacks {missing}: it is cut off, or not of a DINO of the original release."
        )
    if tensors["transformer.level_embed"].ndim != 2:
        raise ConversionError(
            "'transformer.level_embed' should have two axes, levels and width; the checkpoint is damaged."
        )
    num_levels, d_model = tensors["transformer.level_embed"].shape
    if not settings:
        print(
            "  no settings of its training: heads, sampling points, temperature and noise are taken to be the release's"
        )
        for layer in ("encoder.layers.0.self_attn", "decoder.layers.0.cross_attn"):
            samples = len(tensors.get(f"transformer.{layer}.attention_weights.bias", ())) / num_levels
            if samples != 8 * 4:
                raise ConversionError(
                    f"The checkpoint has no 'args', so 8 heads of 4 sampling points per level are assumed, 32 in all, but "
                    f"'transformer.{layer}' has {samples:g}; add the settings of its training, with nheads, enc_n_points and "
                    "dec_n_points, under 'args'."
                )
    ffn_dim = {side: len(tensors[f"transformer.{side}.layers.0.linear1.weight"]) for side in ("encoder", "decoder")}
    return DinoDetrConfig(
        backbone_config=backbone_settings(tensors),
        num_labels=len(tensors["class_embed.0.weight"]),
        num_queries=len(tensors["transformer.tgt_embed.weight"]),
        num_feature_levels=num_levels,
        d_model=d_model,
        encoder_layers=count(tensors, r"transformer\.encoder\.layers\.(\d+)\."),
        decoder_layers=count(tensors, r"transformer\.decoder\.layers\.(\d+)\."),
        encoder_ffn_dim=ffn_dim["encoder"],
        decoder_ffn_dim=ffn_dim["decoder"],
        share_decoder_heads=heads_are_shared(tensors),
        **from_args,
    )


def count(tensors: dict[str, Tensor], pattern: str) -> int:
    """Highest index that `pattern` finds, plus one."""
    return 1 + max((int(match[1]) for key in tensors if (match := re.match(pattern, key))), default=-1)


def backbone_settings(tensors: dict[str, Tensor]) -> dict:
    """`backbone_config` from the backbone's tensors and the widths of the maps that the neck projects."""
    widths = []  # of the backbone's maps: their projections are 1x1, the one of the extra level 3x3
    while (weight := tensors.get(f"input_proj.{len(widths)}.0.weight")) is not None and weight.shape[-1] == 1:
        widths.append(weight.shape[1])
    stages = [f"stage{stage}" for stage in range(5 - len(widths), 5)]
    if "backbone.0.body.conv1.weight" in tensors:
        depths = [count(tensors, rf"backbone\.0\.body\.layer{stage}\.(\d+)\.") for stage in range(1, 5)]
        hidden_sizes = [len(tensors[f"backbone.0.body.layer{stage}.0.conv3.weight"]) for stage in range(1, 5)]
        return {"model_type": "resnet", "depths": depths, "hidden_sizes": hidden_sizes, "out_features": stages}
    if "backbone.0.patch_embed.proj.weight" in tensors:
        depths = [count(tensors, rf"backbone\.0\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(4)]
        tables = [
            tensors[f"backbone.0.layers.{stage}.blocks.0.attn.relative_position_bias_table"] for stage in range(4)
        ]
        window = (round(len(tables[0]) ** 0.5) + 1) // 2  # a table has (2 * window - 1) ** 2 rows
        return {
            "model_type": "swin",
            "embed_dim": len(tensors["backbone.0.patch_embed.proj.weight"]),
            "depths": depths,
            "num_heads": [table.shape[1] for table in tables],
            "window_size": window,
            "image_size": 384 if window == 12 else 224,
            "drop_path_rate": 0.2,  # of the release's training
            "out_features": stages,
        }
    if "backbone.0.downsample_layers.0.0.weight" in tensors:
        depths = [count(tensors, rf"backbone\.0\.stages\.{stage}\.(\d+)\.") for stage in range(4)]
        hidden_sizes = [len(tensors[f"backbone.0.stages.{stage}.0.dwconv.weight"]) for stage in range(4)]
        return {"model_type": "convnext", "depths": depths, "hidden_sizes": hidden_sizes, "out_features": stages}
    raise ConversionError(
        "The backbone is none of ResNet, Swin and ConvNeXt; its tensors begin with "
        f"{sorted(key for key in tensors if key.startswith('backbone.'))[:3]}."
    )


def heads_are_shared(tensors: dict[str, Tensor]) -> bool:
    """Whether all decoder layers have equal heads. Also checks that the second copy of each is equal to the first."""
    shared = True
    for key, tensor in tensors.items():
        if match := re.match(r"(class_embed|bbox_embed)\.\d+(\..*)", key):
            shared &= torch.equal(tensor, tensors[f"{match[1]}.0{match[2]}"])
            copy = tensors.get(f"transformer.decoder.{key}")
            if copy is not None and not torch.equal(tensor, copy):
                raise ConversionError(f"{key!r} and 'transformer.decoder.{key}' should be one tensor, but they differ.")
    return shared


def rules_for(config: DinoDetrConfig) -> list[Rule]:
    """The rename table of an architecture."""
    heads = SHARED_HEADS if config.share_decoder_heads else SEPARATE_HEADS
    backbone = {"resnet": RESNET, "swin": SWIN, "convnext": CONVNEXT}[config.backbone_config.model_type]
    stages = [int(name.removeprefix("stage")) - 1 for name in config.backbone_config.out_features]
    return [*TRANSFORMER, *heads, *backbone, *output_norms(stages)]


def convert_tensors(tensors: dict[str, Tensor], config: DinoDetrConfig) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Rename and split. Returns the new state dictionary, and how many tensors were dropped for which reason."""
    rules, state, dropped = rules_for(config), {}, {}
    for key, tensor in tensors.items():
        rule = find_rule(key, rules)
        names = renamed(key, rule)
        if not names:
            dropped[rule.reason] = dropped.get(rule.reason, 0) + 1
        elif len(names) == 1:
            state[names[0]] = tensor
        else:
            # clone: views of one fused tensor would be saved as shared memory
            state |= {name: part.clone() for name, part in zip(names, tensor.chunk(len(names)), strict=True)}
    if not config.num_denoising and state.pop("model.denoising.label_embedding.weight", None) is not None:
        dropped["label embedding of denoising, which is off"] = 1
    return state, dropped


def convert(checkpoint: Path, output_dir: Path, ema: bool = False) -> DinoDetrForObjectDetection:
    """Convert one file and write the folder, wholly or not at all.

    Args:
        checkpoint: `.pth` of the release.
        output_dir: new or empty folder.
        ema: take the averaged weights.
    Raises:
        ConversionError: what is wrong with the file or the folder.
    """
    output_dir = output_dir.resolve()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir()) or output_dir == Path.cwd()):
        raise ConversionError(
            f"{output_dir} exists and is not an empty folder of its own; choose another --output-dir."
        )
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=output_dir.parent, prefix=f".{output_dir.name}."))
    except OSError as error:
        raise ConversionError(f"{output_dir} cannot be written ({error}); choose another --output-dir.") from error
    try:
        return _convert_into(scratch, checkpoint, output_dir, ema)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert_into(scratch: Path, checkpoint: Path, output_dir: Path, ema: bool) -> DinoDetrForObjectDetection:
    tensors, settings = load_checkpoint(checkpoint, ema)
    print(f"{checkpoint}: {len(tensors)} tensors, {'with' if settings else 'without'} the settings of its training")
    config = build_config(tensors, settings)
    state, dropped = convert_tensors(tensors, config)
    model = DinoDetrForObjectDetection(config)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ConversionError(f"The converted tensors do not fit the model: {error}") from error
    for reason, number in dropped.items():
        print(f"  dropped {number}: {reason}")
    backbone = config.backbone_config
    print(
        f"  {backbone.model_type} {backbone.depths}, {config.num_feature_levels} levels, {config.num_queries} queries, "
        f"{config.num_labels} classes, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
    )
    model.save_pretrained(scratch)
    DinoDetrImageProcessor().save_pretrained(scratch)
    scratch.chmod(0o755)
    scratch.replace(output_dir)  # an empty folder may be replaced
    print(f"  written to {output_dir}")
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="file of the original release, .pth")
    parser.add_argument("--output-dir", type=Path, required=True, help="new or empty folder for the converted model")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights ('ema_model')")
    arguments = parser.parse_args()
    try:
        convert(arguments.checkpoint, arguments.output_dir, arguments.ema)
    except (ConversionError, StrictDataclassError, KeyError) as error:
        sys.exit(f"error: {error.args[0]}")


if __name__ == "__main__":
    main()
