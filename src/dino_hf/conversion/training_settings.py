"""Settings of a training, as the projects save them -> fields of the configuration."""

from .checkpoint_files import ConversionError

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
    "interm_loss_coef": [1.0],
    "no_interm_box_loss": [False],
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


def told_by_file(project: str, settings: dict) -> dict:
    """Fields of the configuration, and `drop_path_rate` of the backbone, that the settings in a file tell; of detrex none.

    Raises:
        ConversionError: the training computed what dino_hf does not.
    """
    if project == "original":
        return _from_args(settings)
    return _from_mmdet(settings) if project == "mmdet" else {}


def _from_args(args: dict) -> dict:
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
    "dn_cfg.group_cfg.dynamic": True,
}


def _from_mmdet(settings: dict) -> dict:
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
        if isinstance(scale, list) and len(scale) == 2 and all(type(side) is int and side > 0 for side in scale):
            return {"shortest_edge": min(scale), "longest_edge": max(scale)}
    return None


def _at(settings: dict, path: str):
    for name in path.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else None
    return settings
