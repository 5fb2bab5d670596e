import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, ResNetConfig, TimmBackboneConfig

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection
from dino_hf.coco_classes import COCO_CLASSES
from helpers import CONVNEXT, RESNET, SWIN, TIMM, tiny_config

THREE_STAGES = ["stage2", "stage3", "stage4"]


def test_the_default_is_the_model_of_the_release():
    config = DinoDetrConfig()
    assert config.backbone_config.model_type == "resnet"
    assert list(config.backbone_config.depths) == [3, 4, 6, 3]
    assert config.backbone_config.layer_type == "bottleneck"
    assert config.backbone_config.out_features == THREE_STAGES
    assert config.num_frozen_backbone_stages == 2
    assert (config.num_feature_levels, config.num_queries, config.d_model) == (4, 900, 256)
    assert (config.encoder_layers, config.encoder_attention_heads, config.encoder_ffn_dim) == (6, 8, 2048)
    assert (config.decoder_layers, config.decoder_attention_heads, config.decoder_ffn_dim) == (6, 8, 2048)
    assert (config.encoder_n_points, config.decoder_n_points) == (4, 4)
    assert (config.position_temperature, config.position_offset) == (20.0, 0.0)
    assert config.share_decoder_heads
    assert (config.num_denoising, config.label_noise_ratio, config.box_noise_scale) == (100, 0.5, 1.0)
    assert (config.class_cost, config.bbox_cost, config.giou_cost) == (2.0, 5.0, 2.0)
    loss_weights = (config.cls_loss_coefficient, config.bbox_loss_coefficient, config.giou_loss_coefficient)
    assert loss_weights == (1.0, 5.0, 2.0)
    assert config.focal_alpha == 0.25


@pytest.mark.parametrize("settings", [{}, {"num_labels": 91}])
def test_91_outputs_carry_the_names_of_coco(settings):
    config = DinoDetrConfig(**settings)
    assert config.num_labels == 91
    assert sorted(config.id2label) == list(range(91))
    assert (config.id2label[1], config.id2label[90], config.id2label[0]) == ("person", "toothbrush", "N/A")
    assert len(config.label2id) == len(COCO_CLASSES) == 80
    assert all(config.id2label[index] == name for name, index in config.label2id.items())


def test_names_of_the_user_win_over_those_of_coco():
    config = DinoDetrConfig(id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    assert config.num_labels == 2
    assert config.id2label == {0: "cat", 1: "dog"}


def test_another_number_of_labels_has_no_names_of_coco():
    config = DinoDetrConfig(num_labels=5)
    assert config.num_labels == 5
    assert "person" not in config.id2label.values()


@pytest.mark.parametrize(
    "backbone", [RESNET, SWIN, CONVNEXT, {"model_type": "resnet", "depths": [3, 4, 23, 3]}, {"model_type": "convnext"}]
)
def test_a_backbone_is_built_from_its_dictionary_with_the_last_three_stages(backbone):
    config = tiny_config(backbone_config=dict(backbone))
    for name, value in backbone.items():
        assert getattr(config.backbone_config, name) == value
    assert config.backbone_config.out_features == THREE_STAGES
    assert config.num_frozen_backbone_stages == (2 if backbone["model_type"] == "resnet" else 0)


@pytest.mark.parametrize(
    "stages",
    [{"out_features": ["stage1", "stage2", "stage3", "stage4"]}, {"out_indices": [1, 2, 3, 4]}],
)
def test_four_stages_and_an_extra_level_make_five(stages):
    config = tiny_config(backbone_config={**RESNET, **stages}, num_feature_levels=5)
    assert config.backbone_config.out_features == ["stage1", *THREE_STAGES]


def test_a_backbone_config_is_taken_as_it_is():
    backbone = ResNetConfig(depths=[1, 1, 1, 1], out_features=["stage3", "stage4"])
    assert tiny_config(backbone_config=backbone).backbone_config is backbone


def test_the_dictionary_of_a_backbone_is_not_changed():
    backbone = dict(CONVNEXT)
    tiny_config(backbone_config=backbone)
    assert backbone == CONVNEXT


def test_the_sizes_of_a_bare_convnext_can_be_added_up():
    """Its own default can be a tuple, to which AutoBackbone's ConvNext adds a list."""
    sizes = DinoDetrConfig(backbone_config={"model_type": "convnext"}).backbone_config.hidden_sizes
    assert type(sizes) is list
    assert sizes == [96, 192, 384, 768]


def test_a_timm_backbone_is_accepted():
    pytest.importorskip("timm")
    config = tiny_config(backbone_config=dict(TIMM))
    assert config.backbone_config.model_type == "timm_backbone"
    assert list(config.backbone_config.out_indices) == [2, 3, 4]
    assert config.num_frozen_backbone_stages == 0


@pytest.mark.parametrize("backbone", [RESNET, SWIN, CONVNEXT], ids=["resnet", "swin", "convnext"])
def test_a_saved_config_is_the_same_again(tmp_path, backbone):
    config = tiny_config(
        backbone_config=dict(backbone), position_offset=-0.5, share_decoder_heads=False, num_denoising=0
    )
    config.save_pretrained(tmp_path)
    loaded = DinoDetrConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert type(loaded.backbone_config) is type(config.backbone_config)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "dino_detr"
    assert type(AutoConfig.from_pretrained(tmp_path)) is DinoDetrConfig


def test_the_names_of_coco_survive_saving(tmp_path):
    DinoDetrConfig().save_pretrained(tmp_path)
    loaded = DinoDetrConfig.from_pretrained(tmp_path)
    assert loaded.id2label == DinoDetrConfig().id2label
    assert loaded.label2id == DinoDetrConfig().label2id


def test_names_that_every_model_of_transformers_has_are_understood():
    config = tiny_config()
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (64, 4, 2)


WRONG = {
    "encoder heads": ({"encoder_attention_heads": 5}, "d_model=64 cannot be split over encoder_attention_heads=5"),
    "decoder heads": ({"decoder_attention_heads": 7}, "d_model=64 cannot be split over decoder_attention_heads=7"),
    "no heads": ({"decoder_attention_heads": 0}, "decoder_attention_heads=0"),
    "groups": ({"d_model": 72}, "d_model=72 cannot be split into the 32 groups .* use 64"),
    "small": ({"d_model": 8}, "d_model=8 cannot be split into the 32 groups .* use 64"),
    "one per group": ({"d_model": 32}, "d_model=32 .*groups of the projection's norm, of at least 2 each .*use 64"),
    "levels": ({"num_feature_levels": 2}, "num_feature_levels=2 is fewer than the 3 feature maps .*use at least 3"),
    "queries": ({"num_queries": 0}, "num_queries=0 must be at least 1"),
    "encoder layers": ({"encoder_layers": 0}, "encoder_layers=0 must be at least 1"),
    "decoder layers": ({"decoder_layers": -1}, "decoder_layers=-1 must be at least 1"),
    "encoder points": ({"encoder_n_points": 0}, "encoder_n_points=0 must be at least 1"),
    "decoder points": ({"decoder_n_points": 0}, "decoder_n_points=0 must be at least 1"),
    "denoising": ({"num_denoising": -1}, "num_denoising=-1 must not be negative; 0 turns it off"),
    "label noise": ({"label_noise_ratio": 2.5}, r"label_noise_ratio=2.5 must lie in \[0, 2\]"),
    "negative label noise": ({"label_noise_ratio": -0.1}, r"label_noise_ratio=-0.1 must lie in \[0, 2\]"),
    "box noise": ({"box_noise_scale": -1}, "box_noise_scale=-1 must not be negative"),
    "type": ({"num_queries": "many"}, "'num_queries' expected int, got str"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_sizes_that_do_not_fit_are_refused_with_the_value(changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize("backbone", [{"model_type": "resnext"}, {"depths": [1, 1]}])
def test_an_unknown_backbone_is_refused_with_known_names(backbone):
    with pytest.raises(
        ValueError, match=f"model_type={backbone.get('model_type')!r}.*use 'resnet', 'swin', 'convnext'"
    ):
        tiny_config(backbone_config=backbone)


def test_a_value_set_wrongly_later_is_refused_when_saving(tmp_path):
    config = tiny_config()
    config.num_feature_levels = 1
    with pytest.raises(StrictDataclassError, match="num_feature_levels=1"):
        config.save_pretrained(tmp_path)


def test_label2id_follows_id2label_also_when_a_checkpoint_gets_other_classes(tmp_path):
    config = tiny_config(num_labels=91)
    DinoDetrForObjectDetection(config).save_pretrained(tmp_path)
    names = {"0": "disc", "1": "box"}
    model = DinoDetrForObjectDetection.from_pretrained(tmp_path, id2label=names, ignore_mismatched_sizes=True)
    assert model.config.id2label == {0: "disc", 1: "box"}
    assert model.config.label2id == {"disc": 0, "box": 1}
    assert model.model.decoder.heads[0].class_head.out_features == 2


def test_label2id_alone_gives_the_classes():
    config = DinoDetrConfig(label2id={"disc": 1, "box": 0})
    assert config.num_labels == 2
    assert config.id2label == {0: "box", 1: "disc"}
    assert config.label2id == {"disc": 1, "box": 0}
    assert DinoDetrConfig(label2id={"cat": 0}).id2label == {0: "cat"}
    with pytest.raises(ValueError, match=r"id2label has the keys \[3, 7\]"):
        DinoDetrConfig(label2id={"disc": 3, "box": 7})


@pytest.mark.parametrize("names", [["disc", "box"], ("disc", "box")])
def test_a_list_of_names_is_refused_with_the_dictionary_to_make_of_it(names, tmp_path):
    # older versions of transformers check the type first, in words of their own
    ours, theirs = rf"id2label is a {type(names).__name__}, .*dict\(enumerate\(names\)\)", "id2label.*expected a dict"
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){ours}|{theirs}"):
        DinoDetrConfig(id2label=names)
    DinoDetrForObjectDetection(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){ours}|{theirs}"):
        DinoDetrForObjectDetection.from_pretrained(tmp_path, id2label=names)


@pytest.mark.parametrize(
    "settings",
    [
        {"backbone": "resnet101"},
        {"backbone": "resnet50", "use_timm_backbone": True, "use_pretrained_backbone": True},
        {"use_timm_backbone": False},
        {"dilation": True},
        {"backbone_kwargs": {"out_indices": [2, 3, 4]}},
    ],
)
def test_the_old_way_to_set_a_backbone_is_refused_with_the_new(settings):
    with pytest.raises(ValueError, match=r"have no effect here: the backbone is set by backbone_config, .*'resnet101'"):
        DinoDetrConfig(**settings)
    assert DinoDetrConfig(**dict.fromkeys(settings)).backbone_config.model_type == "resnet"  # None sets nothing


@pytest.mark.parametrize("wrap", [dict, lambda settings: TimmBackboneConfig(**settings)])
def test_weights_that_a_configuration_cannot_load_are_refused(wrap):
    settings = {"backbone": "resnet18", "out_indices": [2, 3, 4], "use_pretrained_backbone": True}
    if wrap is dict:
        settings["model_type"] = "timm_backbone"
    with pytest.raises(
        ValueError, match=r"use_pretrained_backbone=True, .*model\.model\.backbone\.model\.load_state_dict"
    ):
        tiny_config(backbone_config=wrap(settings))


def test_classes_with_gaps_in_their_numbers_are_refused():
    with pytest.raises(ValueError, match=r"id2label has the keys \[3, 7\].*mapped by dino_hf.training.load_coco"):
        DinoDetrConfig(id2label={3: "disc", 7: "box"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frozen_backbone_stages": -1}, "num_frozen_backbone_stages=-1 must not be negative"),
        ({"encoder_ffn_dim": 0}, "encoder_ffn_dim=0 must be at least 1"),
        ({"focal_alpha": 2}, r"focal_alpha=2 must lie in \[0, 1\]"),
        ({"position_temperature": 0}, "position_temperature=0 must be positive"),
        ({"class_cost": -1}, "class_cost=-1 must not be negative"),
        ({"backbone_config": {"model_type": "bert"}}, "BertConfig, which AutoBackbone builds no backbone from"),
    ],
)
def test_values_without_sense_are_refused(changes, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        DinoDetrConfig(**changes)
