"""Which maps of a backbone are used if the user names none, and what is refused."""

import warnings

import pytest
from transformers import BeitConfig, ConvNextConfig, Dinov2Config, FocalNetConfig, ResNetConfig, SwinConfig

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection
from dino_hf.model.configuration_vit_pyramid import DinoDetrVitPyramidConfig
from dino_hf.model.package_warning import DinoDetrWarning
from helpers import RESNET, VIT_PYRAMID, tiny_config

LAST_THREE = ["stage2", "stage3", "stage4"]


@pytest.mark.parametrize(
    ("model_type", "stages"),
    [
        *((name, LAST_THREE) for name in ("resnet", "swin", "convnext", "pvt_v2", "hiera", "maskformer-swin")),
        ("focalnet", ["stage1", "stage2", "stage4"]),  # its maps follow the downsampling
        ("pp_lcnet", ["stage3", "stage4", "stage5"]),
    ],
)
@pytest.mark.parametrize("unset", [{}, {"out_features": None}, {"out_features": None, "out_indices": None}])
def test_a_pyramid_without_named_stages_gives_strides_8_16_and_32(model_type, stages, unset):
    config = DinoDetrConfig(backbone_config={"model_type": model_type, **unset})
    assert config.backbone_config.out_features == stages


@pytest.mark.parametrize("kind", [ResNetConfig, SwinConfig, ConvNextConfig, FocalNetConfig])
@pytest.mark.parametrize("named", [{}, {"out_features": ["stage4"]}, {"out_indices": [4]}], ids=str)
def test_the_librarys_default_of_the_last_stage_is_replaced_in_a_copy_with_a_warning(kind, named):
    """The library's objects are equal, whether the user names the last stage or nothing."""
    backbone, stages = kind(**named), LAST_THREE if kind is not FocalNetConfig else ["stage1", "stage2", "stage4"]
    with pytest.warns(
        DinoDetrWarning, match=rf"{kind.__name__} .*\['stage4'\].*uses .*{stages[0]}.*out_indices=\[-1\]"
    ):
        config = DinoDetrConfig(backbone_config=backbone)
    assert config.backbone_config.out_features == stages
    assert backbone.out_features == ["stage4"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DinoDetrConfig(**config.to_dict()).backbone_config.out_features == stages


def test_the_last_stage_alone_can_be_chosen_in_an_object():
    settings = {name: value for name, value in RESNET.items() if name != "model_type"}
    backbone = ResNetConfig(**settings, out_indices=[-1])
    with pytest.warns(DinoDetrWarning, match=r"ResNetConfig.*one map, too coarse"):
        config = tiny_config(backbone_config=backbone)
    assert config.backbone_config is backbone
    model = DinoDetrForObjectDetection(config)
    assert model.model.backbone.model.channels == RESNET["hidden_sizes"][-1:]


def test_a_pyramid_on_a_transformer_keeps_its_last_map():
    """Its own default is all maps, so the last map alone is the user's choice."""
    settings = {name: value for name, value in VIT_PYRAMID.items() if name != "model_type"}
    backbone = DinoDetrVitPyramidConfig(**settings, out_features=["stage4"])
    with pytest.warns(DinoDetrWarning, match="one map, too coarse"):
        assert DinoDetrConfig(backbone_config=backbone).backbone_config is backbone
    assert backbone.out_features == ["stage4"]


@pytest.mark.parametrize("stages", [["stage3"], ["stage3", "stage4"], ["stage1", *LAST_THREE]])
def test_stages_that_a_configuration_names_are_kept(stages):
    backbone = ResNetConfig(out_features=stages)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DinoDetrConfig(backbone_config=backbone).backbone_config is backbone
        named = DinoDetrConfig(backbone_config={"model_type": "resnet", "out_features": stages})
    assert named.backbone_config.out_features == stages


def test_a_dictionary_that_names_the_last_stage_is_kept_with_a_warning():
    with pytest.warns(DinoDetrWarning, match=r"ResNetConfig.*one map, too coarse.*'stage2', 'stage3', 'stage4'"):
        config = DinoDetrConfig(backbone_config={"model_type": "resnet", "out_features": ["stage4"]})
    assert config.backbone_config.out_features == ["stage4"]


@pytest.mark.parametrize("stages", [["stage4"], ["stage2", "stage4"]])
@pytest.mark.filterwarnings("ignore::dino_hf.model.package_warning.DinoDetrWarning")
def test_a_saved_model_has_its_own_stages_when_it_is_loaded(tmp_path, stages):
    DinoDetrForObjectDetection(tiny_config(backbone_config={**RESNET, "out_features": stages})).save_pretrained(
        tmp_path
    )
    model, info = DinoDetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert model.config.backbone_config.out_features == stages
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize(
    ("model_type", "last"),
    [("dinov2", "stage12"), ("vitdet", "stage12"), ("beit", "stage12"), ("pp_lcnet_v4", "stage4")],
)
def test_maps_without_a_default_must_be_named(model_type, last):
    with pytest.raises(ValueError, match=rf"'model_type': '{model_type}', 'out_features': \['{last}'\]"):
        DinoDetrConfig(backbone_config={"model_type": model_type})
    config = DinoDetrConfig(backbone_config={"model_type": model_type, "out_features": [last]})
    assert config.backbone_config.out_features == [last]
    config = DinoDetrConfig(backbone_config={"model_type": model_type, "out_indices": [-1]})
    assert config.backbone_config.out_features == [last]


@pytest.mark.parametrize("kind", [Dinov2Config, BeitConfig])
def test_an_object_of_a_plain_transformer_keeps_the_map_it_names(kind):
    for layers in (["stage12"], ["stage2", "stage12"]):
        backbone = kind(out_features=layers)
        assert DinoDetrConfig(backbone_config=backbone).backbone_config is backbone
        assert backbone.out_features == layers


def test_a_plain_transformer_of_four_layers_is_no_pyramid():
    with pytest.raises(ValueError, match=r"no out_features.*\['stage4'\]"):
        DinoDetrConfig(backbone_config={"model_type": "dinov2", "num_hidden_layers": 4})
