"""A dino_hf folder -> a checkpoint for the original release, detrex or mmdetection."""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from ..common.regular_files import check_model_folder
from ..model.configuration_dino_detr import DinoDetrConfig
from ..model.modeling_dino_detr import DinoDetrForObjectDetection
from .architecture import backbone_settings, rules_for
from .checkpoint_files import ConversionError, save_checkpoint
from .key_mapping import UnknownName, detrex, mmdet, translate_back
from .training_settings import ARGS


def convert_back(folder: Path, project: str, output: Path, force: bool = False) -> list[str]:
    """Write the checkpoint.

    Returns:
        settings that the other project's configuration must have, and what its reader should know.
    Raises:
        ConversionError: the folder is no DINO, or the other project cannot compute it.
    """
    if folder.resolve() in output.resolve().parents:
        raise ConversionError(f"{output} lies in {folder}, which it is written from; choose another --output.")
    model = load_folder(folder)
    config = model.config
    check_expressible(config, project)
    try:
        tensors = to_release(model.state_dict(), config)
        check_architecture(tensors, config)
        content = content_for(project, tensors, config)
    except UnknownName as error:
        raise ConversionError(f"{project} has no name for the tensor {error.name!r} of this model.") from error
    save_checkpoint(content, output, force)
    return settings_to_make(config, project)


def content_for(project: str, tensors: dict[str, Tensor], config: DinoDetrConfig) -> dict:
    """What a file of the project holds, from tensors by the release's names, heads once."""
    if project == "original":
        content = {"model": with_copies(tensors, config), "args": argparse.Namespace(**to_args(config))}
    else:
        tensors = separate_heads(tensors, config) | position_indices(config)
        tensors["label_enc.weight"] = tensors["label_enc.weight"][: config.num_labels].contiguous()
        num_maps = len(config.backbone_config.out_features)
        if project == "detrex":
            tensors = translate_back(with_bias(tensors, config), detrex(config.decoder_layers, num_maps))
            content = {"model": with_decoder_copies(tensors)}
        else:
            tensors = translate_back(without_bias(tensors), mmdet(config.decoder_layers, num_maps))
            names = tuple(config.id2label[index] for index in range(config.num_labels))
            content = {"state_dict": with_counters(tensors), "meta": {"dataset_meta": {"classes": names}}}
    return content


def check_architecture(tensors: dict[str, Tensor], config: DinoDetrConfig) -> None:
    """What the tensors show must be what the configuration says: other settings the projects cannot be told.

    Raises:
        ConversionError: a setting of the backbone that they compute otherwise.
    """
    plain = DinoDetrConfig(backbone_config=backbone_settings(tensors)).backbone_config.to_dict()
    ours = config.backbone_config.to_dict()
    if others := {name: ours.get(name) for name in _OF_THE_BACKBONE if ours.get(name) != plain.get(name)}:
        usual = {name: plain.get(name) for name in others}
        raise ConversionError(f"The backbone has {others}, where the other projects have {usual}.")


# Settings of a backbone that change what it computes.
_OF_THE_BACKBONE = [
    *("model_type", "depths", "hidden_sizes", "out_features", "hidden_act", "layer_norm_eps", "num_channels"),
    *("embedding_size", "layer_type", "downsample_in_first_stage", "downsample_in_bottleneck"),
    *("embed_dim", "num_heads", "window_size", "patch_size", "mlp_ratio", "qkv_bias", "use_absolute_embeddings"),
    "layer_scale_init_value",
]


def load_folder(folder: Path) -> DinoDetrForObjectDetection:
    """A model from a folder of ours.

    Raises:
        ConversionError: there is none.
    """
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} is no folder with a model of dino_hf: it has no config.json.")
    try:
        check_model_folder(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config, DinoDetrConfig):
            raise ConversionError(
                f"{folder} holds a model of type {config.model_type!r}, not {DinoDetrConfig.model_type!r}."
            )
        model, report = DinoDetrForObjectDetection.from_pretrained(folder, config=config, output_loading_info=True)
    except ConversionError:
        raise
    except Exception as error:  # the library's, of many kinds
        if "trust_remote_code" in str(error):
            raise ConversionError(
                f"{folder} names code of its own for its model, which is never run here; only models of dino_hf are converted."
            ) from error
        raise ConversionError(
            f"{folder} cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0][:300]}"
        ) from error
    for what, kind in (("lacks", "missing_keys"), ("has, beside those of a DINO,", "unexpected_keys")):
        if names := sorted(report[kind]):
            raise ConversionError(f"{folder} {what} {len(names)} tensors, e.g. {names[:3]}.")
    return model.eval()


def check_expressible(config: DinoDetrConfig, project: str) -> None:
    """
    Raises:
        ConversionError: what the other project cannot be told to compute.
    """
    kind = config.backbone_config.model_type
    known = ("resnet", "swin") if project == "mmdet" else ("resnet", "swin", "convnext")
    if kind not in known:
        raise ConversionError(f"The backbone is a {kind!r}; for {project}, {' or '.join(known)} can be written.")
    stages = config.backbone_config.out_features
    if stages != [f"stage{stage}" for stage in range(5 - len(stages), 5)]:
        raise ConversionError(
            f"The model uses the stages {stages}; the other projects use the last ones, without a gap."
        )
    for one, other in (("encoder_attention_heads", "decoder_attention_heads"), ("encoder_ffn_dim", "decoder_ffn_dim")):
        values = getattr(config, one), getattr(config, other)
        if project == "original" and values[0] != values[1]:
            raise ConversionError(
                f"{one}={values[0]} and {other}={values[1]}, but the original release has one for both."
            )
    if project == "original" and config.position_offset != 0:
        raise ConversionError(
            f"The model has position_offset={config.position_offset}, and the original release has no such setting: it would "
            "compute something else. detrex and mmdet have one."
        )
    if config.num_denoising == 0:
        raise ConversionError(
            "The model was converted or trained without denoising (num_denoising=0), so it has no label embedding, which the "
            "checkpoints of the other projects have."
        )


def to_release(state: dict[str, Tensor], config: DinoDetrConfig) -> dict[str, Tensor]:
    """Our tensors by the release's names, heads once."""
    return {name: tensor.contiguous() for name, tensor in translate_back(state, rules_for(config)).items()}


def with_copies(tensors: dict[str, Tensor], config: DinoDetrConfig) -> dict[str, Tensor]:
    """What the release saves besides: heads again for each layer and below the decoder, what is computed, unused norms; and
    the bias and the label row that other projects do without."""
    tensors = with_bias(separate_heads(tensors, config), config) | position_indices(config)
    if not config.num_extra_label_embeddings:
        rows = tensors["label_enc.weight"]
        tensors["label_enc.weight"] = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    if config.backbone_config.model_type == "convnext":
        for stage, width in enumerate(config.backbone_config.hidden_sizes):
            weight = torch.ones(width, dtype=tensors["transformer.level_embed"].dtype)
            tensors.setdefault(f"backbone.0.norm{stage}.weight", weight)
            tensors.setdefault(f"backbone.0.norm{stage}.bias", torch.zeros_like(weight))
    return with_decoder_copies(tensors)


def with_bias(tensors: dict[str, Tensor], config: DinoDetrConfig) -> dict[str, Tensor]:
    """With the bias of the projections, which is zero in a model that has none."""
    levels = range(0 if config.projection_bias else config.num_feature_levels)
    return tensors | {f"input_proj.{i}.0.bias": torch.zeros_like(tensors[f"input_proj.{i}.1.bias"]) for i in levels}


def without_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the bias of the projections, which mmdetection does not have.

    Raises:
        ConversionError: it is not zero.
    """
    bias = {name for name in tensors if name.startswith("input_proj.") and name.endswith(".0.bias")}
    if largest := max((tensors[name].abs().max().item() for name in bias), default=0):
        raise ConversionError(
            f"The projections of feature maps have a bias (up to {largest:.2g}), which mmdetection's neck does not; detrex and the "
            "original have one."
        )
    return {name: tensor for name, tensor in tensors.items() if name not in bias}


def with_decoder_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    copies = {
        f"transformer.decoder.{name}": tensor
        for name, tensor in tensors.items()
        if name.startswith(("class_embed.", "bbox_embed."))
    }
    return tensors | copies


def separate_heads(tensors: dict[str, Tensor], config: DinoDetrConfig) -> dict[str, Tensor]:
    """With the one head of a model that shares it under the names of all layers."""
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


def position_indices(config: DinoDetrConfig) -> dict[str, Tensor]:
    """Of Swin: for each pair of cells of a window, the row of the bias table. (w * w, w * w), as every Swin defines it."""
    backbone = config.backbone_config
    if backbone.model_type != "swin":
        return {}
    window = backbone.window_size
    cells = torch.cartesian_prod(torch.arange(window), torch.arange(window))  # (w * w, 2)
    distance = cells[:, None] - cells + window - 1
    index = distance[..., 0] * (2 * window - 1) + distance[..., 1]
    return {
        f"backbone.0.layers.{stage}.blocks.{block}.attn.relative_position_index": index
        for stage, depth in enumerate(backbone.depths)
        for block in range(depth)
    }


def with_counters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the counters of batches that torch's batch norm saves; frozen norms do not count."""
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for name in tensors
        if name.endswith("running_mean")
    }
    return tensors | counters


def to_args(config: DinoDetrConfig) -> dict:
    """The release's `args`, as far as our configuration has them."""
    args = {key: getattr(config, name) for name, key in ARGS.items()}
    return args | {
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


def settings_to_make(config: DinoDetrConfig, project: str) -> list[str]:
    """What the other project's configuration must say so that it computes this model, and what it computes differently."""
    backbone = config.backbone_config
    sizes = f"{backbone.model_type} of depths {list(backbone.depths)}, maps {', '.join(backbone.out_features)}"
    position = f"temperature={config.position_temperature:g}, offset={config.position_offset:g}"
    if project == "original":
        lines = [f"backbone: {sizes}", *(f"{name} = {value!r}" for name, value in to_args(config).items())]
    else:
        is_detrex = project == "detrex"
        lines = [
            f"backbone: {sizes}",
            f"{'model' if is_detrex else 'bbox_head'}.num_classes = {config.num_labels}",
            f"num_queries = {config.num_queries}, num_feature_levels = {config.num_feature_levels}, width {config.d_model}",
            *(
                f"{side}: {getattr(config, f'{side}_layers')} layers, {getattr(config, f'{side}_attention_heads')} heads, "
                f"{getattr(config, f'{side}_n_points')} points, feed-forward {getattr(config, f'{side}_ffn_dim')}"
                for side in ("encoder", "decoder")
            ),
            f"{'position_embedding' if is_detrex else 'positional_encoding'}: normalize=True, {position}",
        ]
    if project != "mmdet":
        lines.append(f"note: files of {project} have no class names or category ids; --label-names gives them again")
    eps = 1e-5 if project == "mmdet" else 1e-3
    if config.pred_boxes_eps != eps:
        lines.append(
            f"note: {project} bounds the inverse sigmoid under predicted boxes by {eps:g}, not by {config.pred_boxes_eps:g}; "
            "only boxes with a side this close to 0 or 1 differ"
        )
    return lines
