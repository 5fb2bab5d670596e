"""Settings of DINO."""

import copy
import operator
import warnings

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING

from .coco_classes import coco_id2label
from .config_checks import check_backbone_sizes, check_num_labels, check_sizes, warn_of_unknown_names
from .package_warning import DinoDetrWarning
from .sharing import CarriesCode

_MOST_STAGES = 8  # of a pyramid; plain vision transformers call each layer a stage
# How older configurations of sibling models set their backbone.
_OLD_BACKBONE_SETTINGS = ("backbone", "backbone_kwargs", "dilation", "use_pretrained_backbone", "use_timm_backbone")
_CLASS_SETTINGS = ("id2label", "label2id", "num_labels")


@strict
class DinoDetrConfig(CarriesCode, PreTrainedConfig):
    """Settings of a DINO detector (arXiv:2203.03605). Each field is a size, or differs between released models.

    The default is the R50 4-scale model of the original release, with its 91 outputs: raw COCO category ids.

    Args:
        backbone_config: configuration, or its dictionary, of any backbone that `AutoBackbone` builds; its `out_features`
            (finest first) are the feature maps to use. Default: ResNet-50 with stages 2 to 4. A dictionary without `out_features`
            gets the last three stages of a pyramid, or the last map of a plain vision transformer. It gives sizes, no weights:
            those of
            `published = AutoBackbone.from_pretrained(...)` go into a model that is built, by
            `model.model.backbone.model.load_state_dict(published.state_dict())`.
        num_frozen_backbone_stages: leading stages of a ResNet, Swin or ConvNeXt, the stem counting as the first, that are not
            trained. None: 2 for a ResNet (stem and stage 1), as in the release, and 0 for any other.
        num_feature_levels: feature maps L that the transformer sees: those of the backbone and then, for each further
            level, a 3x3 convolution of stride 2. 4, or 5 with a fourth backbone stage.
        num_queries: matching queries Q; 900.
        d_model: width C of the transformer; a multiple of 32 (group norm), at least 64, and of both numbers of heads.
        encoder_layers, decoder_layers: number of layers.
        encoder_attention_heads, decoder_attention_heads: heads of every attention.
        encoder_ffn_dim, decoder_ffn_dim: inner width of the feed-forward blocks.
        encoder_n_points, decoder_n_points: sampling points of deformable attention, per head and level.
        position_temperature: of the sine embedding of feature maps: 20 in the release, 10000 in detrex.
        position_offset: added to a cell's number in that embedding: 0 in the release, -0.5 in detrex.
        share_decoder_heads: one class head and one box head for all decoder layers (the release) or one each (detrex,
            mmdetection).
        projection_bias: whether the projections of feature maps have one; not in mmdetection.
        pred_boxes_eps: bound of the inverse sigmoid under `pred_boxes`: 1e-3 in the release and detrex, 1e-5 in mmdetection. From
            layer to layer it is 1e-3 in all of them.
        num_denoising: pairs of positive and negative denoising queries that are aimed at, in training, if at least 50. Below 50,
            by the release's rule, twice the number counts groups instead, each with a pair for every box: 49 gives 98
            groups, far more queries than 50 does. 0 turns contrastive denoising (sec. 3.3) off.
        max_denoising_queries: at most this many denoising queries N for each image, at least 2; None: no limit. Groups are given up
            first; where a single one is still too large, as many boxes of the image are drawn at random as fit. A limit leaves a
            batch that stays below it as it is.
        mask_denoising_padding: keep the queries that fill up images with fewer boxes out of the others' attention. In the release
            they are seen.
        num_extra_label_embeddings: rows that the label embedding of denoising has beyond one for each class; never looked up. 1
            in the release, 0 in detrex and mmdetection.
        label_noise_ratio: twice the share of denoising queries that get a random label; in [0, 2].
        box_noise_scale: noise of denoising boxes, in half box sizes. 1.0 is what the release's launch scripts set and its
            checkpoints were trained with; its configuration files and the paper's table say 0.4.
        class_cost, bbox_cost, giou_cost: weights of the matching cost.
        cls_loss_coefficient, bbox_loss_coefficient, giou_loss_coefficient: weights of the losses.
        focal_alpha: weight of positives in the focal loss and in the matching cost.
        mixed_query_selection: learnt content for all queries (sec. 3.4); False: the selected encoder tokens themselves (pure query
            selection). For ablations.
        look_forward_twice: whether the box loss of a layer also trains the layer before (sec. 3.5). For ablations.
        ms_deform_attn_backend: name of the implementation of deformable attention ("cpu", "triton", "torch", "reference" or
            "gather"); None chooses by device and dtype. It is a preference: where this backend cannot run, another one takes its
            place with a warning. `dino_hf.use_backend` and the environment variable DINO_HF_MS_DEFORM_ATTN go first, and are
            orders.
        num_labels, id2label, label2id: as in every configuration of transformers.
        category_ids: original category id of each class, in the order of `id2label`, as in the annotations that the model was
            trained on; None if there are none. Loading with another `id2label`, `label2id` or `num_labels` forgets them, unless
            new ones are given too.
        provenance: where the weights come from, as the model card tells it: `converted_from`, `base_model`, `license`, `training`
            (each optional, plain JSON).

    A name that is no setting has no effect and gives a warning with the closest setting.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a value of a wrong type, or sizes that do not fit each other; the message
            says which and what would fit.
        ValueError: a backbone that transformers does not know, or sizes that no machine has room for.
    """

    model_type = "dino_detr"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012  (an annotation would make it a field)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }
    # Evaluation keeps (loss_dict, logits, pred_boxes): with the rest, it would hoard gigabytes.
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
    class_cost: float | int = 2.0
    bbox_cost: float | int = 5.0
    giou_cost: float | int = 2.0
    cls_loss_coefficient: float | int = 1.0
    bbox_loss_coefficient: float | int = 5.0
    giou_loss_coefficient: float | int = 2.0
    focal_alpha: float | int = 0.25
    mixed_query_selection: bool = True
    look_forward_twice: bool = True
    ms_deform_attn_backend: str | None = None
    category_ids: list[int] | None = None
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
            self.backbone_config = _backbone_from_dict(self.backbone_config)
        _warn_of_one_coarse_map(self.backbone_config)
        if getattr(self.backbone_config, "use_pretrained_backbone", False):
            raise ValueError(
                "backbone_config has use_pretrained_backbone=True, but a configuration loads no weights: leave it out, build "
                "the model, and load them by model.model.backbone.model.load_state_dict(published.state_dict()), with "
                "published = AutoBackbone.from_pretrained(...)."
            )
        if self.num_frozen_backbone_stages is None:
            self.num_frozen_backbone_stages = 2 if self.backbone_config.model_type == "resnet" else 0
        if self.id2label is None and self.label2id:
            self.id2label = _inverse(self.label2id)
        if self.id2label is None and kwargs.get("num_labels") in (None, 91):
            self.id2label = coco_id2label()
            self.category_ids = list(self.id2label) if self.category_ids is None else self.category_ids
        category_ids = self.category_ids
        if self.id2label is not None:
            self.set_class_names()  # checked before the library reads it
        super().__post_init__(**kwargs)
        self.set_class_names()
        self.category_ids = category_ids  # checked by the library's call of validate_architecture, not forgotten

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in `PreTrainedConfig`, but classes that are given take the place of the saved ones as a whole: names, their
        inverse and category ids. None gives nothing, but as `category_ids` it takes the saved ones away.

        Raises:
            ValueError: see `set_classes`; or `num_labels` contradicts the names.
        """
        given = {name: kwargs.pop(name) for name in (*_CLASS_SETTINGS, "category_ids") if name in kwargs}
        loaded = super().from_dict(config_dict, **kwargs)
        if given:
            config = loaded[0] if isinstance(loaded, tuple) else loaded  # with return_unused_kwargs
            check_num_labels(given.get("num_labels"))
            names = _names_given(*(given.get(name) for name in _CLASS_SETTINGS), config.id2label)
            # The same classes as before keep their ids: `num_labels` is often given as it is.
            same = names == config.id2label
            config.set_classes(names, given.get("category_ids", config.category_ids if same else None))
        return loaded

    def to_diff_dict(self) -> dict:
        """As in `PreTrainedConfig`, with the classes always: the library leaves out LABEL_0 and LABEL_1, its own default, which
        is not ours."""
        return super().to_diff_dict() | {"id2label": copy.copy(self.id2label)}

    def set_classes(self, id2label: dict[int, str], category_ids: list[int] | None = None) -> None:
        """Other classes for a configuration: names, and original category ids where there are any. A model that is built
        changes with them by `dino_hf.training.transfer_classes`.

        Raises:
            ValueError: the names are no dictionary, or not numbered 0 to K - 1, or no strings; or the ids are not K different
                whole numbers. Nothing is changed then.
        """
        names = _checked_names(id2label)
        category_ids = _checked_category_ids(category_ids, names)
        self.id2label, self.category_ids = names, category_ids
        self.set_class_names()

    def set_class_names(self) -> None:
        """Make `label2id` the inverse of `id2label`, and forget category ids that are not one for each class. Models call it
        too, for names that were set after the configuration was made; where that can be helped, `set_classes` sets all three.

        Raises:
            ValueError: `id2label` is no dictionary, or the classes are not numbered 0 to K - 1, or their names no strings.
        """
        names = _checked_names(self.id2label)
        self.id2label = names
        self.label2id = {name: index for index, name in names.items() if name != "N/A"}
        if self.category_ids is not None and len(self.category_ids) != len(names):
            self.category_ids = None

    def validate_architecture(self):
        """Called by the library at construction and before saving."""
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
                f"d_model={self.d_model} cannot be split into the 32 groups of the projection's norm, of at least 2 each (of a map "
                f"of one cell, a group of 1 has no deviation to divide by); use {nearest}."
            )
        if not hasattr(self.backbone_config, "out_indices"):
            raise ValueError(
                f"backbone_config is a {type(self.backbone_config).__name__}, which AutoBackbone builds no backbone from; use "
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
            *(
                "num_denoising",
                "num_extra_label_embeddings",
                "num_frozen_backbone_stages",
                "class_cost",
                "bbox_cost",
                "giou_cost",
            ),
            *("cls_loss_coefficient", "bbox_loss_coefficient", "giou_loss_coefficient"),
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 turns it off.")
        if self.max_denoising_queries is not None and self.max_denoising_queries < 2:
            raise ValueError(
                f"max_denoising_queries={self.max_denoising_queries} must be at least 2, a positive and a negative; "
                "num_denoising=0 turns denoising off, None sets no limit."
            )
        if not 0 < self.pred_boxes_eps < 0.5:
            raise ValueError(f"pred_boxes_eps={self.pred_boxes_eps} must lie between 0 and 0.5; the release has 0.001.")
        _checked_category_ids(self.category_ids, self.id2label)
        if not 0 <= self.focal_alpha <= 1:
            raise ValueError(
                f"focal_alpha={self.focal_alpha} must lie in [0, 1]: it is the share of positives in the loss."
            )
        if self.position_temperature <= 0:
            raise ValueError(f"position_temperature={self.position_temperature} must be positive; the release has 20.")
        if not 0 <= self.label_noise_ratio <= 2:
            raise ValueError(
                f"label_noise_ratio={self.label_noise_ratio} must lie in [0, 2]: half of it is the share of labels redrawn."
            )
        if self.box_noise_scale < 0:
            raise ValueError(f"box_noise_scale={self.box_noise_scale} must not be negative; 0 means no noise.")


def _checked_names(id2label: dict[int, str]) -> dict[int, str]:
    """In the order of the classes, under whole numbers: json makes strings of them."""
    if not isinstance(id2label, dict):
        raise ValueError(
            f"id2label is a {type(id2label).__name__}, but must be a dictionary from class index to name; "
            "dict(enumerate(names)) makes one of a list of names."
        )
    try:
        names = {int(index): name for index, name in id2label.items()}
    except (TypeError, ValueError):
        raise ValueError(
            f"id2label has the keys {list(id2label)[:10]}, but must be a dictionary from class index to name; the other way "
            "around it is label2id."
        ) from None
    if sorted(names) != list(range(len(id2label))) or not names:
        raise ValueError(
            f"id2label has the keys {sorted(names)[:10]}, but the classes of a model are numbered 0 to K - 1; category ids "
            "with gaps are mapped by dino_hf.training.load_coco."
        )
    if others := [name for name in names.values() if not isinstance(name, str)]:
        raise ValueError(f"id2label has the names {others[:10]}, which are no strings.")
    return dict(sorted(names.items()))


def _checked_category_ids(category_ids: list[int] | None, id2label: dict[int, str]) -> list[int] | None:
    if category_ids is None:
        return None
    if len(category_ids) != len(id2label):
        raise ValueError(
            f"category_ids has {len(category_ids)} entries for {len(id2label)} classes; give one for each, in the order of "
            "id2label, or None."
        )
    try:
        category_ids = [operator.index(one) for one in category_ids]  # also NumPy's
    except TypeError:
        raise ValueError(f"category_ids={category_ids} must be whole numbers.") from None
    if largest := [one for one in category_ids if not -(2**63) <= one < 2**63]:
        raise ValueError(f"category_ids has {largest[0]!r:.30}, but an id has at most 63 bits.")
    if len(set(category_ids)) < len(category_ids):
        raise ValueError(f"category_ids={category_ids} has one id twice; each class has its own.")
    return category_ids


def _inverse(label2id: dict[str, int]) -> dict[int, str]:
    if not isinstance(label2id, dict):
        raise ValueError(
            f"label2id is a {type(label2id).__name__}, but must be a dictionary from name to class index; id2label is enough."
        )
    return {index: name for name, index in label2id.items()}


def _names_given(
    id2label: dict | None, label2id: dict | None, num_labels: int | None, saved: dict[int, str]
) -> dict[int, str]:
    """Names of the classes requested in one of three ways when a configuration with other classes is loaded."""
    if id2label is not None:
        names = _checked_names(id2label)
    elif label2id is not None:
        names = _checked_names(_inverse(label2id))
    elif num_labels in (None, len(saved)):
        return saved
    else:
        return {index: f"LABEL_{index}" for index in range(num_labels)}  # as the library has it
    if num_labels not in (None, len(names)):
        raise ValueError(
            f"num_labels={num_labels}, but there are names for {len(names)} classes; leave num_labels out."
        )
    return names


def _backbone_from_dict(settings: dict) -> PreTrainedConfig:
    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"backbone_config has model_type={model_type!r}, which transformers does not know; use 'resnet', 'swin', "
            "'convnext', 'timm_backbone' or another type that AutoBackbone builds."
        )
    check_backbone_sizes(settings)
    if not {"out_features", "out_indices"} & set(settings):
        settings |= _default_stages(model_type, settings)
    config = CONFIG_MAPPING[model_type](**settings)
    if isinstance(
        getattr(config, "hidden_sizes", None), tuple
    ):  # ConvNeXt's default, which its own backbone cannot add up
        config.hidden_sizes = list(config.hidden_sizes)
    return config


def _default_stages(model_type: str, settings: dict) -> dict:
    """What a DINO model gets from each kind of backbone when only its sizes are given: the last three stages of a pyramid; the
    last map of a plain vision transformer, all of whose maps have one stride."""
    if model_type == "timm_backbone":
        return {"out_indices": [-3, -2, -1]}
    stages = getattr(CONFIG_MAPPING[model_type](**settings), "stage_names", None) or []
    stages = [stage for stage in stages if stage != "stem"]
    if not stages:
        return {}
    return {"out_features": stages[-3:] if len(stages) <= _MOST_STAGES else stages[-1:]}


def _warn_of_one_coarse_map(backbone_config: PreTrainedConfig) -> None:
    """A configuration of a pyramid that was made without `out_features` has its last stage only."""
    stages, maps = (
        getattr(backbone_config, "stage_names", None) or [],
        getattr(backbone_config, "out_indices", None) or [],
    )
    if len(maps) == 1 and 2 < len(stages) <= _MOST_STAGES + 1 and maps[0] % len(stages) == len(stages) - 1:
        warnings.warn(
            f"backbone_config is a {type(backbone_config).__name__} with out_features={[stages[-1]]}: one coarse map, in which "
            f"small objects are lost. Give it out_features={stages[-3:]}.",
            DinoDetrWarning,
            stacklevel=4,
        )
