import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForObjectDetection, ResNetConfig, TimmBackboneConfig

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrModel
from dino_hf.model.coco_classes import COCO_CLASSES
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


@pytest.mark.parametrize("classes", [{"num_labels": 2}, {"num_labels": 1}, {"id2label": {0: "LABEL_0", 1: "LABEL_1"}}])
def test_classes_named_as_the_library_names_them_survive_saving(tmp_path, classes):
    """Two of them are the library's default, which it does not save."""
    config = tiny_config(**classes)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.id2label, loaded.category_ids) == (config.id2label, None)


def test_names_that_every_model_of_transformers_has_are_understood():
    config = tiny_config()
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (64, 4, 2)


WRONG = {
    "encoder heads": ({"encoder_attention_heads": 5}, "d_model=64 cannot be split over encoder_attention_heads=5"),
    "decoder heads": ({"decoder_attention_heads": 7}, "d_model=64 cannot be split over decoder_attention_heads=7"),
    "no heads": ({"decoder_attention_heads": 0}, "decoder_attention_heads=0"),
    "groups": ({"d_model": 72}, "d_model=72 .*32 groups .* use 64"),
    "small": ({"d_model": 8}, "d_model=8 .*32 groups .* use 64"),
    "one per group": ({"d_model": 32}, "d_model=32 .*groups of at least 2 channels.*use 64"),
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


LOADERS = {
    "config": DinoDetrConfig.from_pretrained,
    "AutoConfig": AutoConfig.from_pretrained,
    "from_dict": lambda folder, **given: DinoDetrConfig.from_dict(DinoDetrConfig.get_config_dict(folder)[0], **given),
    "base": DinoDetrModel.from_pretrained,
    "detector": DinoDetrForObjectDetection.from_pretrained,
    "AutoModel": AutoModel.from_pretrained,
    "AutoModelForObjectDetection": AutoModelForObjectDetection.from_pretrained,
}
SAVED, SAVED_IDS = {0: "disc", 1: "box", 2: "star"}, [3, 17, 90]
OTHER, TWO = {0: "cat", 1: "dog", 2: "cow"}, {0: "cat", 1: "dog"}
GIVEN = {  # what is asked for -> names and category ids then
    "nothing": ({}, SAVED, SAVED_IDS),
    "nothing, at length": (dict.fromkeys(["id2label", "label2id", "num_labels"]), SAVED, SAVED_IDS),
    "the same names": ({"id2label": {"0": "disc", "1": "box", "2": "star"}}, SAVED, SAVED_IDS),
    "the same number": ({"num_labels": 3}, SAVED, SAVED_IDS),
    "the same inverse": ({"label2id": {"star": 2, "disc": 0, "box": 1}}, SAVED, SAVED_IDS),
    "other names": ({"id2label": OTHER}, OTHER, None),
    "another order": ({"id2label": {0: "box", 1: "disc", 2: "star"}}, {0: "box", 1: "disc", 2: "star"}, None),
    "fewer names": ({"id2label": TWO}, TWO, None),
    "other names and ids": ({"id2label": OTHER, "category_ids": [5, 1, 7]}, OTHER, [5, 1, 7]),
    "fewer names and ids": ({"category_ids": [5, 1], "id2label": TWO}, TWO, [5, 1]),
    "all": (
        {"num_labels": 2, "label2id": {"cat": 0, "dog": 1}, "id2label": TWO, "category_ids": [8, 6]},
        TWO,
        [8, 6],
    ),
    "inverse": ({"label2id": {"cat": 0, "cow": 2, "dog": 1}}, OTHER, None),
    "inverse and ids": ({"label2id": {"dog": 1, "cat": 0}, "category_ids": [8, 6]}, TWO, [8, 6]),
    "number": ({"num_labels": 2}, {0: "LABEL_0", 1: "LABEL_1"}, None),
    "number and ids": ({"num_labels": 2, "category_ids": [8, 6]}, {0: "LABEL_0", 1: "LABEL_1"}, [8, 6]),
    "ids": ({"category_ids": [8, 6, 4]}, SAVED, [8, 6, 4]),
    "no ids": ({"category_ids": None}, SAVED, None),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    config = tiny_config(num_labels=3, id2label=SAVED, category_ids=SAVED_IDS, provenance={"license": "apache-2.0"})
    DinoDetrForObjectDetection(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("case", GIVEN)
def test_classes_are_loaded_or_replaced_as_a_whole(saved, case, loader):
    given, names, category_ids = GIVEN[case]
    if "odel" in loader or loader in ("base", "detector"):
        config = LOADERS[loader](saved, ignore_mismatched_sizes=True, **given).config
    else:
        config = LOADERS[loader](saved, **given)
    assert list(config.id2label.items()) == list(names.items())
    assert config.label2id == {name: index for index, name in names.items()}
    assert config.num_labels == len(names)
    assert config.category_ids == category_ids
    assert config.provenance == {"license": "apache-2.0"}


@pytest.mark.parametrize("loader", ["config", "AutoConfig", "detector", "AutoModelForObjectDetection"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"id2label": OTHER, "category_ids": [5, 1]}, "category_ids has 2 entries for 3 classes; give one for each"),
        ({"num_labels": 2, "category_ids": [5, 1, 7]}, "category_ids has 3 entries for 2 classes"),
        ({"category_ids": [5]}, "category_ids has 1 entries for 3 classes"),
        ({"category_ids": [5, 6, 5]}, r"category_ids=\[5, 6, 5\] has one id twice"),
        ({"category_ids": [5, 6, 7.5]}, r"category_ids=\[5, 6, 7.5\] must be whole numbers"),
        ({"id2label": OTHER, "num_labels": 2}, "num_labels=2, but there are names for 3 classes; leave num_labels out"),
        ({"label2id": ["cat", "dog"]}, "label2id is a list, but must be a dictionary from name to class index"),
        ({"label2id": {"cat": 1, "dog": 2}}, r"id2label has the keys \[1, 2\]"),
        (
            {"id2label": {"cat": 0, "dog": 1}},
            r"id2label has the keys \['cat', 'dog'\], .* the other way around it is label2id",
        ),
    ],
    ids=str,
)
def test_classes_that_do_not_fit_each_other_are_refused_when_they_are_given(saved, given, message, loader):
    with pytest.raises(ValueError, match=message):
        LOADERS[loader](saved, **given)


def test_a_config_that_leaves_its_classes_out_forgets_its_ids_for_others_too(tmp_path):
    """The default class space is not written; 91 other classes have its length, but not its ids."""
    DinoDetrConfig().save_pretrained(tmp_path)
    assert DinoDetrConfig.from_pretrained(tmp_path).category_ids == list(range(91))
    assert DinoDetrConfig.from_pretrained(tmp_path, num_labels=91).category_ids == list(range(91))
    names = {index: f"class {index}" for index in range(91)}
    assert DinoDetrConfig.from_pretrained(tmp_path, id2label=names).category_ids is None
    config, unused = AutoConfig.from_pretrained(tmp_path, id2label=names, colour="red", return_unused_kwargs=True)
    assert (config.id2label, config.category_ids, unused) == (names, None, {"colour": "red"})


def test_the_dictionary_that_a_config_is_made_of_keeps_its_classes():
    settings = tiny_config(num_labels=3, id2label=SAVED, category_ids=SAVED_IDS).to_dict()
    DinoDetrConfig.from_dict(settings, id2label=TWO)
    assert (settings["id2label"], settings["category_ids"]) == (SAVED, SAVED_IDS)


@pytest.mark.parametrize(
    ("category_ids", "message"),
    [
        ([1, 2], "category_ids has 2 entries for 3 classes"),
        ([1, 2, 3, 4], "category_ids has 4 entries for 3 classes"),
        ([1, 2, 2], r"category_ids=\[1, 2, 2\] has one id twice"),
        (["1", "2", "3"], "category_ids"),
    ],
)
def test_category_ids_that_do_not_fit_are_refused(tmp_path, category_ids, message):
    with pytest.raises(StrictDataclassError, match=message):
        DinoDetrConfig(id2label=SAVED, category_ids=category_ids)
    config = tiny_config(num_labels=3, id2label=SAVED)

    def set_and_save():  # a wrong type is refused by the first, a wrong value by the second
        config.category_ids = category_ids
        config.save_pretrained(tmp_path)

    with pytest.raises(StrictDataclassError, match=message):
        set_and_save()


def test_category_ids_of_the_user_win_over_those_of_coco():
    ids = list(range(100, 191))
    assert DinoDetrConfig(category_ids=ids).category_ids == ids
    with pytest.raises(StrictDataclassError, match="category_ids has 2 entries for 91 classes"):
        DinoDetrConfig(category_ids=[1, 2])


def test_a_model_forgets_ids_of_classes_that_its_config_had_before():
    config = tiny_config(num_labels=3, id2label=SAVED, category_ids=SAVED_IDS)
    config.id2label = TWO
    model = DinoDetrForObjectDetection(config)
    assert (model.config.label2id, model.config.category_ids) == ({"cat": 0, "dog": 1}, None)


def test_set_classes_sets_all_three_or_nothing():
    config = tiny_config(num_labels=3, id2label=SAVED, category_ids=SAVED_IDS)
    before = config.to_dict()
    wrong = [(["cat"], None), ({1: "cat"}, None), ({0: 7}, None), (TWO, [1]), (TWO, [1, 1]), (TWO, ["a", "b"])]
    for names, category_ids in wrong:
        with pytest.raises(ValueError, match=r"^(id2label|category_ids)"):
            config.set_classes(names, category_ids)
        assert config.to_dict() == before
    config.set_classes({"1": "dog", "0": "cat"}, (8, 6))
    assert (config.id2label, config.label2id, config.category_ids) == (TWO, {"cat": 0, "dog": 1}, [8, 6])
    config.set_classes(OTHER)
    assert (config.num_labels, config.category_ids) == (3, None)


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
        ({"class_loss": "align"}, r"class_loss='align' must be one of focal, .*align_detr.*mean 'align_detr'"),
        ({"queries_per_box": 0, "class_loss": "align_detr"}, "queries_per_box=0 must be at least 1"),
        ({"queries_per_box": 2}, "queries_per_box=2 needs class_loss='align_detr'.*class_loss='focal'"),
        ({"negative_noise_start": -1}, "negative_noise_start=-1 must not be negative"),
        ({"denoising_cls_loss_coefficient": -1}, "denoising_cls_loss_coefficient=-1 must not be negative"),
        ({"class_cost": -1}, "class_cost=-1 must not be negative"),
        ({"backbone_config": {"model_type": "bert"}}, "BertConfig.*AutoBackbone"),
    ],
)
def test_values_without_sense_are_refused(changes, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        DinoDetrConfig(**changes)


def test_settings_of_losses_are_saved_only_where_they_are_not_those_of_dino(tmp_path):
    tiny_config().save_pretrained(tmp_path / "dino")
    saved = json.loads((tmp_path / "dino" / "config.json").read_text())
    fields = {
        "class_loss",
        "queries_per_box",
        "encoder_fusion",
        "negative_noise_start",
        "denoising_cls_loss_coefficient",
    }
    assert not fields & set(saved)
    settings = {"class_loss": "stable_dino", "encoder_fusion": True, "negative_noise_start": 0.0}
    tiny_config(**settings, denoising_cls_loss_coefficient=1.0).save_pretrained(tmp_path / "other")
    saved = json.loads((tmp_path / "other" / "config.json").read_text())
    assert {name: saved.get(name) for name in settings} == settings
    assert DinoDetrConfig.from_pretrained(tmp_path / "other").denoising_cls_loss_coefficient == 1


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        ("num_queries", 100_000),
        ("encoder_layers", 200),
        ("decoder_layers", 200),
        ("encoder_ffn_dim", 131_072),
        ("num_feature_levels", 32),
        ("queries_per_box", 100),
    ],
)
def test_sizes_that_no_machine_has_room_for_are_refused_before_anything_is_built(name, largest):
    loss = {"class_loss": "align_detr"} if name == "queries_per_box" else {}
    assert getattr(tiny_config(**{name: largest}, **loss), name) == largest
    with pytest.raises(StrictDataclassError, match=f"{name}={largest + 1} is larger than"):
        tiny_config(**{name: largest + 1}, **loss)


@pytest.mark.parametrize(
    "changes",
    [{"depths": [1, 1, 1, 10**6]}, {"hidden_sizes": [16, 24, 32, 10**9]}, {"embedding_size": -5}, {"num_channels": 4}],
    ids=str,
)
def test_a_backbone_of_absurd_sizes_is_refused(changes):
    with pytest.raises((ValueError, StrictDataclassError), match="backbone_config has"):
        tiny_config(backbone_config=RESNET | changes)
