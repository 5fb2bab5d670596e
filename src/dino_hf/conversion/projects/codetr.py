"""Co-DINO of Co-DETR (https://github.com/Sense-X/Co-DETR), which mmdetection also has as a project."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ...common.values import short_repr
from ...model.configuration_dino_detr import DinoDetrConfig
from ...model.image_processing_dino_detr import DinoDetrImageProcessor
from ...model.nms import read_nms
from ..backbones import position_indices
from ..messages import say
from ..release_names import neck_rules
from ..release_tensors import cut_label_rows, separate_heads, without_projection_bias
from ..rules import Rule, count_indices, translate_back
from ..saved_settings import value_at
from .detrex import SWIN as SWIN_OF_SENSE_X
from .detrex import layer_rules
from .mmdet import RESNET, branch_rules, read_fields, read_test_pipeline, with_counters
from .mmdet import SWIN as SWIN_OF_MMDET
from .project import Project

_TRANSFORMER = "query_head.transformer."
_LABELS_OF_MMDET = "query_head.dn_generator.label_embedding.weight"
_MMDET_SWIN = "backbone.patch_embed.projection.weight"

# Field of the configuration -> path in Sense-X's configuration of Co-DETR.
_SETTINGS = {
    "position_temperature": "query_head.positional_encoding.temperature",
    "position_offset": "query_head.positional_encoding.offset",
    "encoder_attention_heads": "query_head.transformer.encoder.transformerlayers.attn_cfgs.num_heads",
    "encoder_n_points": "query_head.transformer.encoder.transformerlayers.attn_cfgs.num_points",
    "decoder_attention_heads": "query_head.transformer.decoder.transformerlayers.attn_cfgs.1.num_heads",
    "decoder_n_points": "query_head.transformer.decoder.transformerlayers.attn_cfgs.1.num_points",
    "num_denoising": "query_head.dn_cfg.group_cfg.num_dn_queries",
    "label_noise_ratio": "query_head.dn_cfg.noise_scale.label",
    "box_noise_scale": "query_head.dn_cfg.noise_scale.box",
    "cls_loss_coefficient": "query_head.loss_cls.loss_weight",
    "bbox_loss_coefficient": "query_head.loss_bbox.loss_weight",
    "giou_loss_coefficient": "query_head.loss_iou.loss_weight",
    "drop_path_rate": "backbone.drop_path_rate",
}
_SETTINGS_OF_MMDET = _SETTINGS | {
    "label_noise_ratio": "query_head.dn_cfg.label_noise_scale",
    "box_noise_scale": "query_head.dn_cfg.box_noise_scale",
}
_REQUIRED = {
    "type": "CoDETR",
    "eval_module": "detr",
    "query_head.type": "CoDINOHead",
    "query_head.as_two_stage": True,
    "query_head.with_box_refine": True,
    "query_head.mixed_selection": True,
    "query_head.positional_encoding.normalize": True,
    "query_head.loss_cls.use_sigmoid": True,
    "query_head.dn_cfg.group_cfg.dynamic": True,
}
_CLASS_LOSSES = {"QualityFocalLoss": "quality_focal", "FocalLoss": "focal"}
_NMS_METHODS = {"soft_nms": "soft", "nms": "hard"}
# Settings of mmcv's NMS that are read or change nothing here, and the values that others must have.
_NMS_SETTINGS = {"type", "iou_threshold", "iou_thr", "min_score", "sigma", "split_thr"}
_OTHER_NMS_SETTINGS = {"method": "linear", "class_agnostic": False, "offset": 0}

# Names of tensors that only training uses -> reason for dropping them.
_AUXILIARY = {
    "rpn_head.{tail}": "auxiliary region proposal network, for training only",
    "roi_head.{tail}": "auxiliary two-stage heads (Faster R-CNN), for training only",
    "bbox_head.{tail}": "auxiliary one-stage heads (ATSS), for training only",
    "query_head.downsample.{tail}": "sixth feature level for the auxiliary heads, for training only",
    _TRANSFORMER + "aux_pos_trans.{tail}": "queries made from boxes of the auxiliary heads, for training only",
    _TRANSFORMER + "aux_pos_trans_norm.{tail}": "queries made from boxes of the auxiliary heads, for training only",
    _TRANSFORMER + "pos_feats_trans.{tail}": "queries made from boxes of the auxiliary heads, for training only",
    _TRANSFORMER + "pos_feats_norm.{tail}": "queries made from boxes of the auxiliary heads, for training only",
    "query_head.loss_cls.fed_loss_weight": "weights of the federated loss of LVIS, for training only",
}


class CoDetr(Project):
    """Co-DINO computes mmdetection's DINO with other names, and its detections go through soft NMS.

    The files have auxiliary heads, which training needs and detection does not. They are dropped. Files have the names of Sense-X
    or those of mmdetection. mmdetection's copies of Sense-X's files may have both. All are read; the names of Sense-X are written.
    """

    name = "codetr"
    marks = (_TRANSFORMER + "level_embeds", _TRANSFORMER + "query_embed.weight")
    defaults = {"position_temperature": 20.0, "position_offset": 0.0, "class_loss": "quality_focal"}  # noqa: RUF012
    frozen_resnet_stages = 2
    swin_drop_path_rate = 0.3
    has_fixed_positions = True
    processor = {"nms": {"method": "soft", "iou_threshold": 0.8}}  # noqa: RUF012
    refused = dict.fromkeys(
        (_TRANSFORMER + "head_pos_embed.weight", _TRANSFORMER + "pos_trans.weight"),
        "a Co-Deformable-DETR. It computes Deformable DETR and not DINO. Of Co-DETR, only Co-DINO is converted",
    )
    saves_class_names = True
    backbones = ("resnet", "swin")
    num_classes_setting = "query_head.num_classes"
    position_setting = "query_head.positional_encoding"
    labels = "query_head.label_embedding.weight"
    swin = SWIN_OF_SENSE_X
    canvas_setting = "with_attn_mask=False"
    masked_setting = "with_attn_mask=True"

    def count_decoder_layers(self, names) -> int:
        return count_indices(names, r"query_head\.transformer\.decoder\.layers\.(\d+)\.")

    def rules(self, num_decoder_layers: int, num_maps: int) -> list[Rule]:
        return [
            Rule(_TRANSFORMER + "level_embeds", "transformer.level_embed"),
            Rule(_TRANSFORMER + "query_embed.weight", "transformer.tgt_embed.weight"),
            *(
                Rule(_TRANSFORMER + name + ".{p}", f"transformer.{name}.{{p}}")
                for name in ("decoder.norm", "enc_output", "enc_output_norm")
            ),
            *(  # a sequence, with an activation at 1
                Rule(
                    f"{_TRANSFORMER}decoder.ref_point_head.{2 * part}.{{p}}",
                    f"transformer.decoder.ref_point_head.layers.{part}.{{p}}",
                )
                for part in range(2)
            ),
            *layer_rules(_TRANSFORMER),
            *branch_rules("query_head", num_decoder_layers),
            Rule(self.labels, "label_enc.weight"),
            *neck_rules("gn", num_maps),
            *RESNET,
            *self.swin,
            *(Rule(name, None, reason) for name, reason in _AUXILIARY.items()),
        ]

    def rules_for_names(self, names: Iterable[str]) -> list[Rule]:
        names = set(names)
        rules = super().rules_for_names(names)
        if _LABELS_OF_MMDET in names:
            rules = [rule._replace(source=_LABELS_OF_MMDET) if rule.source == self.labels else rule for rule in rules]
            rules.append(Rule(self.labels, None, "label embedding of Sense-X beside mmdetection's, for training only"))
        if _MMDET_SWIN in names:
            rules = [*(rule for rule in rules if rule not in self.swin), *SWIN_OF_MMDET]
        return rules

    def fields_from_settings(self, settings: dict) -> dict[str, Any]:
        model = settings.get("model")
        if not isinstance(model, dict):
            return {}
        assigner = value_at(model, "train_cfg.0.assigner")
        costs = value_at(assigner, "match_costs") or [
            value_at(assigner, name) for name in ("cls_cost", "reg_cost", "iou_cost")
        ]
        has_scales = value_at(model, "query_head.dn_cfg.noise_scale") is not None
        fields = read_fields(model, _REQUIRED, _SETTINGS if has_scales else _SETTINGS_OF_MMDET, costs)
        if (loss := value_at(model, "query_head.loss_cls.type")) in _CLASS_LOSSES:
            fields["class_loss"] = _CLASS_LOSSES[loss]
        return fields

    def processor_settings(self, settings: dict) -> dict[str, Any]:
        model, found = settings.get("model"), {}
        scale, padded, value = read_test_pipeline(settings)
        is_image_in_padding = value_at(model, "with_attn_mask") is False or value_at(model, "use_lsj") is True
        if is_image_in_padding and padded and padded[0] == padded[1]:
            found |= square_canvas(padded[0], value)
        elif scale:
            found |= {"size": {"shortest_edge": min(scale), "longest_edge": max(scale)}}
        if isinstance(test := value_at(model, "test_cfg.0"), dict):
            found |= {"nms": self.nms_settings(model, test)}
        return found

    def nms_settings(self, model: dict, test: dict) -> dict[str, Any] | None:
        """`nms` of the image processor, from the settings of the model and of its test in a file. None: no suppression."""
        given = value_at(test, "nms")
        if given is None:
            return None
        settings = given if isinstance(given, dict) else {"type": given}
        # mmcv has these defaults for the type and for the threshold of soft NMS. Hard NMS has no default threshold there.
        kind = str(settings.get("type", "nms"))
        threshold = settings.get("iou_threshold", settings.get("iou_thr", 0.3 if kind == "soft_nms" else None))
        others = {name: value for name, value in settings.items() if name not in _NMS_SETTINGS}
        is_known = kind in _NMS_METHODS and others.items() <= _OTHER_NMS_SETTINGS.items()
        if not is_known or not isinstance(threshold, int | float):
            say(
                f"warning: the settings in the file have nms={short_repr(given)} for tests, which dino_hf does not have, so the "
                "image processor has no NMS; set its nms yourself"
            )
            return None
        found = self.processor["nms"] | {"method": _NMS_METHODS[kind], "iou_threshold": threshold}
        if found["method"] == "soft" and isinstance(min_score := value_at(test, "nms.min_score"), int | float):
            found["min_score"] = min_score
        # mmdetection 3 cuts to `max_per_img` before NMS. Sense-X, on mmdetection 2, keeps as many as queries until then.
        number, is_mmdet_3 = value_at(test, "max_per_img"), value_at(model, "data_preprocessor") is not None
        return found | ({"candidates": number} if is_mmdet_3 and type(number) is int and number > 0 else {})

    def file_content(self, tensors: dict[str, Tensor], config: DinoDetrConfig) -> dict[str, Any]:
        tensors = separate_heads(tensors, config) | position_indices(config.backbone_config)
        tensors = without_projection_bias(cut_label_rows(tensors, config.num_labels), self.name)
        rules = self.rules(config.decoder_layers, len(config.backbone_config.out_features))
        names = tuple(config.id2label[index] for index in range(config.num_labels))
        return {"state_dict": with_counters(translate_back(tensors, rules)), "meta": self.meta(names)}

    def meta(self, names: tuple[str, ...]) -> dict[str, Any]:
        """`meta` of a file, with the names of the classes."""
        return {"CLASSES": names}

    def settings_to_make(self, config: DinoDetrConfig) -> list[str]:
        return [
            *super().settings_to_make(config),
            "note: the file has no auxiliary heads, because a model of dino_hf has none. Co-DETR reports them as missing, and "
            "detects without them. To train with them, take them from the published file",
        ]

    def test_settings(self, processor: DinoDetrImageProcessor) -> list[str]:
        size, side, nms = dict(processor.size), processor.canvas_side, read_nms(processor.nms)
        lines = [f"model: {self.masked_setting if side is None else self.canvas_setting}"]
        if side is not None:
            value = (processor.canvas_value,) * 3
            lines.append(f"test_pipeline: Resize to {(side, side)}, Pad to {(side, side)} with pad_val={value}")
        elif size.keys() == {"shortest_edge", "longest_edge"}:
            lines.append(f"test_pipeline: Resize to {(size['longest_edge'], size['shortest_edge'])}")
        if nms is None:
            return [*lines, "model.test_cfg[0]: no nms"]
        kind = next(kind for kind, method in _NMS_METHODS.items() if method == nms.method)
        score = f", min_score={nms.min_score:g}" if nms.method == "soft" else ""
        return [*lines, f"model.test_cfg[0]: nms=dict(type='{kind}', iou_threshold={nms.iou_threshold:g}{score})"]


class CoDetrMmdet(CoDetr):
    """Co-DINO in mmdetection 3, which names the label embedding and Swin in its own way, and keeps 300 detections before NMS."""

    name = "codetr_mmdet"
    processor = {"nms": CoDetr.processor["nms"] | {"candidates": 300}}  # noqa: RUF012
    labels = _LABELS_OF_MMDET
    swin = SWIN_OF_MMDET
    canvas_setting = "use_lsj=True"
    masked_setting = "use_lsj=False"

    def recognises(self, names: Iterable[str]) -> bool:
        names = set(names)
        return super().recognises(names) and not names.isdisjoint((_LABELS_OF_MMDET, _MMDET_SWIN))

    def rules_for_names(self, names: Iterable[str]) -> list[Rule]:
        return CoDetr().rules_for_names(names)

    def meta(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {"dataset_meta": {"classes": names}}


def square_canvas(side: int, value: float = 114) -> dict[str, Any]:
    """Settings of the image processor of models trained with large-scale jittering.

    The longest side of an image gets `side` pixels. Before normalisation, the image is padded to a square at the right and bottom
    with the value, in [0, 255]. The padding is not masked.
    """
    return {"size": {"shortest_edge": side, "longest_edge": side}, "canvas_value": value}
