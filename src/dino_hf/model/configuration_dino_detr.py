"""The configuration of a DINO detector."""

import copy

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .backbone_stages import backbone_from_dict, warn_of_one_coarse_map, with_default_stages
from .coco_classes import coco_id2label
from .config_checks import (
    check_backbone_sizes,
    check_loss,
    check_num_labels,
    check_sizes,
    check_thresholds,
    checked_category_ids,
    checked_names,
    invert_names,
    requested_names,
    warn_of_unknown_names,
)
from .sharing import CarriesCode

# Backbone settings of older configurations of similar models.
_OLD_BACKBONE_SETTINGS = ("backbone", "backbone_kwargs", "dilation", "use_pretrained_backbone", "use_timm_backbone")
# Variants of DINO set these fields. A detector without them is saved as before they existed.
_SETTINGS_OF_VARIANTS = (
    *("class_loss", "queries_per_box", "denoising_cls_loss_coefficient"),
    *("negative_noise_start", "encoder_fusion"),
)
_THRESHOLDS = (
    "score_threshold",
    "class_score_thresholds",
)  # of a detector that was evaluated; saved only if they are set
_CLASS_SETTINGS = ("id2label", "label2id", "num_labels")


@strict
class DinoDetrConfig(CarriesCode, PreTrainedConfig):
    """Configuration of a DINO detector (arXiv:2203.03605). Each field is a size, or differs between released models.

    The defaults give the R50 4-scale model of the original release. It has 91 outputs, one for each raw COCO category id.

    Args:
        backbone_config: configuration, or its dictionary, of any backbone that `AutoBackbone` builds; its `out_features`
            (finest first) are the feature maps to use. Default: ResNet-50 with stages 2 to 4. A pyramid (ResNet, Swin, ConvNeXt)
            without `out_features` gets its maps of strides 8, 16 and 32. An object of the library always names a stage, by
            default the last one, so its last stage alone counts as not named, with a warning. To use only the last stage, give a
            dictionary with `out_features`, or an object with `out_indices=[-1]`. All layers of a plain vision transformer have one
            stride, so its dictionary must name `out_features`. A configuration loads no weights;
            `DinoDetrForObjectDetection.from_backbone` does.
        num_frozen_backbone_stages: number of leading stages of a ResNet, Swin or ConvNeXt that are not trained. The stem counts
            as the first stage. None: 2 for a ResNet (stem and stage 1), as in the release, otherwise 0.
        num_feature_levels: number L of feature maps that enter the transformer: the maps of the backbone, then one 3x3
            convolution of stride 2 for each further level. 4, or 5 with a fourth backbone stage.
        num_queries: number Q of matching queries.
        d_model: width C of the transformer. It is at least 64, a multiple of 32 (group norm), and a multiple of both numbers of
            attention heads.
        encoder_layers, decoder_layers: number of layers.
        encoder_fusion: whether the result of the encoder is a normalised linear function of its input and of the outputs of all its
            layers, as in Stable-DINO, instead of the output of the last layer.
        encoder_attention_heads, decoder_attention_heads: heads of every attention.
        encoder_ffn_dim, decoder_ffn_dim: inner width of the feed-forward blocks.
        encoder_n_points, decoder_n_points: sampling points of deformable attention, per head and level.
        position_temperature: temperature of the sine embedding of feature maps: 20 in the release, 10000 in detrex.
        position_offset: number added to the cell index in the sine embedding: 0 in the release, -0.5 in detrex.
        share_decoder_heads: True: one class head and one box head for all decoder layers, as in the release. False: a class head
            and a box head for each layer, as in detrex and mmdetection.
        projection_bias: whether the projections of feature maps have a bias; False in mmdetection.
        pred_boxes_eps: bound of the inverse sigmoid for `pred_boxes`: 1e-3 in the release and detrex, 1e-5 in mmdetection. Between
            layers, all three use 1e-3.
        num_denoising: from 50 on, the target number of pairs of positive and negative denoising queries in training. Below 50,
            twice this number is the number of groups, and each group has a pair for every box. So 49 gives 98 groups, and far
            more queries than 50. This is the rule of the release. 0 turns contrastive denoising (sec. 3.3) off.
        max_denoising_queries: largest number N of denoising queries of an image, at least 2; None: no limit. First the number of
            groups is reduced. If one group is still too large, a random part of the boxes is used. A batch below the limit is
            not changed.
        mask_denoising_padding: whether queries that pad images with fewer boxes are masked in attention. False in the release.
        num_extra_label_embeddings: number of unused rows in the label embedding of denoising, after the rows of the classes: 1 in
            the release, 0 in detrex and mmdetection.
        label_noise_ratio: twice the share of denoising queries that get a random label; in [0, 2].
        box_noise_scale: noise of denoising boxes, in half box sizes. The release's launch scripts set 1.0, and its checkpoints
            were trained with it. Its configuration files and the paper's table say 0.4.
        negative_noise_start: smallest noise of denoising negatives, in half box sizes times `box_noise_scale`. The largest is 1
            more. 1 in DINO: negatives are noisier than positives, whose noise is 0 to 1. 0 in Stable-DINO: both
            have the same noise.
        class_loss: class loss and its matching, see `quality_losses.py`: "focal" (DINO), "quality_focal" (Co-DINO), "align_detr",
            "stable_dino", "varifocal" (RT-DETR) or "matchability_aware" (DEIM).
        queries_per_box: for "align_detr": number of queries matched with each box by the encoder and all decoder layers except the
            last, which always matches one. 2 in Align-DETR.
        class_cost, bbox_cost, giou_cost: weights of the matching cost.
        cls_loss_coefficient, bbox_loss_coefficient, giou_loss_coefficient: weights of the losses.
        denoising_cls_loss_coefficient: weight of the class loss of denoising queries. None: `cls_loss_coefficient`.
        focal_alpha: weight of positives in the focal loss, in the class loss "stable_dino" and in the matching cost.
        mixed_query_selection: True: the content of queries is learnt (sec. 3.4). False: it is the selected encoder tokens (pure
            query selection). For ablations.
        look_forward_twice: whether the box loss of a layer also trains the layer before (sec. 3.5). For ablations.
        ms_deform_attn_backend: name of the implementation of deformable attention ("cpu", "triton", "torch", "reference" or
            "gather"); None: automatic choice by device and dtype. If this backend cannot run, another one is used with a warning.
            `dino_hf.use_backend` and the environment variable DINO_HF_MS_DEFORM_ATTN take precedence; a backend named there
            must run, or an error is raised.
        num_labels, id2label, label2id: as in every configuration of transformers.
        category_ids: category id of each class in the training annotations, in the order of `id2label`, or None. Loading with
            another `id2label`, `label2id` or `num_labels` removes them, unless new ids are given too.
        score_threshold: the score threshold of these weights, in [0, 1], that `dino_hf.predict` uses by default. `dino_hf.train`
            sets it to the threshold with the best F1 on held-out images. None: not known. Changed classes and further training
            remove it. The pipeline and `post_process_object_detection` keep the default of the library, 0.5.
        class_score_thresholds: class name -> score threshold in [0, 1], for classes with a threshold of their own; None: no class.
        provenance: record of the weights, from which the model card is written: `converted_from`, `base_model`, `license`,
            `training` (each optional, plain JSON).

    An unknown name has no effect and gives a warning that suggests the closest setting.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a value has a wrong type, or sizes do not match; the message names the value
            and the cure.
        ValueError: transformers does not know the backbone, or sizes are too large for any machine.
    """

    model_type = "dino_detr"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012  (an annotation would make it a field)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }
    # Trainer's evaluation collects all other outputs: loss_dict, logits, pred_boxes. The outputs below would take gigabytes.
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "intermediate_logits",
        "intermediate_pred_boxes",
        "enc_topk_logits",
        "enc_topk_bboxes",
        "last_hidden_state",
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "encoder_attentions",
        "decoder_hidden_states",
        "decoder_attentions",
        "cross_attentions",
        "encoder_sampling_locations",
        "cross_sampling_locations",
    ]

    backbone_config: dict | PreTrainedConfig | None = None
    num_frozen_backbone_stages: int | None = None
    num_feature_levels: int = 4
    num_queries: int = 900
    d_model: int = 256
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    encoder_n_points: int = 4
    encoder_fusion: bool = False
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 2048
    decoder_n_points: int = 4
    position_temperature: float | int = 20.0
    position_offset: float | int = 0.0
    share_decoder_heads: bool = True
    projection_bias: bool = True
    pred_boxes_eps: float = 1e-3
    num_denoising: int = 100
    max_denoising_queries: int | None = None
    mask_denoising_padding: bool = False
    num_extra_label_embeddings: int = 1
    label_noise_ratio: float | int = 0.5
    box_noise_scale: float | int = 1.0
    negative_noise_start: float | int = 1.0
    class_loss: str = "focal"
    queries_per_box: int = 1
    class_cost: float | int = 2.0
    bbox_cost: float | int = 5.0
    giou_cost: float | int = 2.0
    cls_loss_coefficient: float | int = 1.0
    bbox_loss_coefficient: float | int = 5.0
    giou_loss_coefficient: float | int = 2.0
    denoising_cls_loss_coefficient: float | int | None = None
    focal_alpha: float | int = 0.25
    mixed_query_selection: bool = True
    look_forward_twice: bool = True
    ms_deform_attn_backend: str | None = None
    category_ids: list[int] | None = None
    score_threshold: float | int | None = None
    class_score_thresholds: dict | None = None
    provenance: dict | None = None

    def __post_init__(self, **kwargs):
        if old := {name: kwargs[name] for name in _OLD_BACKBONE_SETTINGS if kwargs.get(name) is not None}:
            raise ValueError(
                f"{old} have no effect here: the backbone is set by backbone_config, e.g. "
                "{'model_type': 'resnet', 'depths': [3, 4, 23, 3]} for a ResNet-101, or {'model_type': 'timm_backbone', "
                "'backbone': 'resnet101', 'out_indices': [2, 3, 4]}."
            )
        check_num_labels(kwargs.get("num_labels"))
        known = {*dir(type(self)), *_OLD_BACKBONE_SETTINGS}
        warn_of_unknown_names((name for name in kwargs if name not in known), type(self).__dataclass_fields__)
        if self.backbone_config is None:
            self.backbone_config = {"model_type": "resnet"}
        if isinstance(self.backbone_config, dict):
            self.backbone_config = backbone_from_dict(self.backbone_config)
        else:
            self.backbone_config = with_default_stages(self.backbone_config)
        warn_of_one_coarse_map(self.backbone_config)
        if getattr(self.backbone_config, "use_pretrained_backbone", False):
            raise ValueError(
                "backbone_config has use_pretrained_backbone=True, but a configuration loads no weights: leave it out, build "
                "the model, and load them by model.model.backbone.model.load_state_dict(published.state_dict()), with "
                "published = AutoBackbone.from_pretrained(...)."
            )
        if self.num_frozen_backbone_stages is None:
            self.num_frozen_backbone_stages = 2 if self.backbone_config.model_type == "resnet" else 0
        if self.id2label is None and self.label2id:
            self.id2label = invert_names(self.label2id)
        if self.id2label is None and kwargs.get("num_labels") in (None, 91):
            self.id2label = coco_id2label()
            self.category_ids = list(self.id2label) if self.category_ids is None else self.category_ids
        by_class = {name: getattr(self, name) for name in ("category_ids", *_THRESHOLDS)}
        if self.id2label is not None:
            self.set_class_names()  # checked before the library reads the names
        super().__post_init__(**kwargs)
        self.set_class_names()
        for name, value in by_class.items():  # kept, because the library's call of validate_architecture checks them
            setattr(self, name, value)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in `PreTrainedConfig`, but if classes are given, they replace all saved names, their inverse and category ids.

        None is ignored, except `category_ids=None`, which removes the saved ids.

        Raises:
            ValueError: see `set_classes`; or `num_labels` contradicts the names.
        """
        given = {name: kwargs.pop(name) for name in (*_CLASS_SETTINGS, "category_ids") if name in kwargs}
        loaded = super().from_dict(config_dict, **kwargs)
        if given:
            config = loaded[0] if isinstance(loaded, tuple) else loaded  # with return_unused_kwargs
            check_num_labels(given.get("num_labels"))
            names = requested_names(*(given.get(name) for name in _CLASS_SETTINGS), config.id2label)
            # Unchanged classes keep their ids: `num_labels` is often passed with its saved value.
            same = names == config.id2label
            config.set_classes(names, given.get("category_ids", config.category_ids if same else None))
        return loaded

    def to_diff_dict(self) -> dict:
        """As in `PreTrainedConfig`, but always with the classes, and without unused settings of variants and score thresholds.

        The library would leave out LABEL_0 and LABEL_1, its default classes.
        """
        settings = super().to_diff_dict() | {"id2label": copy.copy(self.id2label)}
        optional = (*_SETTINGS_OF_VARIANTS, *_THRESHOLDS)
        is_default = {name: getattr(self, name) == getattr(type(self), name) for name in optional}
        return {name: value for name, value in settings.items() if not is_default.get(name)}

    def set_classes(self, id2label: dict[int, str], category_ids: list[int] | None = None) -> None:
        """Set names and category ids of the classes. To change the classes of a model, use `dino_hf.training.transfer_classes`.

        Other names remove the score thresholds, which were measured with the old classes.

        Raises:
            ValueError: the names are not a dictionary of strings, numbered 0 to K - 1; or the ids are not K different whole
                numbers. The configuration is then unchanged.
        """
        names = checked_names(id2label)
        category_ids = checked_category_ids(category_ids, names)
        if names != self.id2label:
            self.set_thresholds(None)
        self.id2label, self.category_ids = names, category_ids
        self.set_class_names()

    def set_thresholds(self, score_threshold: float | None, by_class: dict[str, float] | None = None) -> None:
        """Set the default score thresholds of `dino_hf.predict`.

        Args:
            score_threshold: for all classes, in [0, 1]. None: no threshold is known.
            by_class: class name -> its own threshold.
        Raises:
            ValueError: a threshold is not in [0, 1], or a name is unknown. The configuration is then unchanged.
        """
        by_class = dict(by_class or {}) or None
        check_thresholds(score_threshold, by_class, self.id2label)
        self.score_threshold, self.class_score_thresholds = score_threshold, by_class

    def set_class_names(self) -> None:
        """Set `label2id` to the inverse of `id2label`. Remove category ids and score thresholds that do not fit the classes.

        Models call this when they are built, because `id2label` may have been assigned before. Prefer `set_classes`.

        Raises:
            ValueError: see `checked_names`.
        """
        names = checked_names(self.id2label)
        self.id2label = names
        self.label2id = {name: index for index, name in names.items() if name != "N/A"}
        if self.category_ids is not None and len(self.category_ids) != len(names):
            self.category_ids = None
        if isinstance(self.class_score_thresholds, dict) and not set(self.class_score_thresholds) <= set(
            names.values()
        ):
            self.score_threshold = self.class_score_thresholds = None

    def validate_architecture(self):
        """Check all settings. The library calls this at construction and before saving."""
        check_sizes(self)
        if (channels := getattr(self.backbone_config, "num_channels", 3)) != 3:
            raise ValueError(f"backbone_config has num_channels={channels}, but a DINO detector takes 3 channels, RGB.")
        check_backbone_sizes(self.backbone_config.to_dict())
        for side in ("encoder", "decoder"):
            heads = getattr(self, f"{side}_attention_heads")
            if heads < 1 or self.d_model % heads:
                raise ValueError(
                    f"d_model={self.d_model} cannot be split over {side}_attention_heads={heads}; use a number of heads "
                    "that divides d_model."
                )
        if self.d_model < 64 or self.d_model % 32:
            nearest = max(64, round(self.d_model / 32) * 32)
            raise ValueError(
                f"d_model={self.d_model} does not work with group normalisation, which needs 32 groups of at least 2 channels; "
                f"use {nearest}."
            )
        if not hasattr(self.backbone_config, "out_indices"):
            raise ValueError(
                f"backbone_config is a {type(self.backbone_config).__name__}, for which AutoBackbone has no backbone; use "
                "'resnet', 'swin', 'convnext', 'bit' or 'timm_backbone'."
            )
        maps = list(self.backbone_config.out_indices)  # timm has no out_features
        if self.num_feature_levels < len(maps):
            raise ValueError(
                f"num_feature_levels={self.num_feature_levels} is fewer than the {len(maps)} feature maps of the backbone "
                f"(out_indices={maps}); use at least {len(maps)}, or fewer out_features."
            )
        for name in (
            *("num_queries", "encoder_layers", "decoder_layers", "encoder_n_points", "decoder_n_points"),
            *("encoder_ffn_dim", "decoder_ffn_dim"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in (
            *("num_denoising", "num_extra_label_embeddings", "num_frozen_backbone_stages"),
            *("class_cost", "bbox_cost", "giou_cost", "denoising_cls_loss_coefficient"),
            *("cls_loss_coefficient", "bbox_loss_coefficient", "giou_loss_coefficient"),
        ):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 turns it off.")
        if self.max_denoising_queries is not None and self.max_denoising_queries < 2:
            raise ValueError(
                f"max_denoising_queries={self.max_denoising_queries} must be at least 2, a positive and a negative; "
                "num_denoising=0 turns denoising off, None sets no limit."
            )
        if not 0 < self.pred_boxes_eps < 0.5:
            raise ValueError(f"pred_boxes_eps={self.pred_boxes_eps} must lie between 0 and 0.5; the release has 0.001.")
        checked_category_ids(self.category_ids, self.id2label)
        check_thresholds(self.score_threshold, self.class_score_thresholds, self.id2label)
        check_loss(self)
        if self.position_temperature <= 0:
            raise ValueError(f"position_temperature={self.position_temperature} must be positive; the release has 20.")
