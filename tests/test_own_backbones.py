"""Backbones of this package: maps before FocalNet's downsampling, and the pyramid on plain vision transformers."""

import pytest
import torch
from transformers import AutoBackbone, AutoConfig

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection
from dino_hf.model.own_backbones import OWN_MODEL_TYPES
from dino_hf.training import freeze, parameter_groups
from helpers import FOCALNET, OWN_BACKBONES, VIT_PYRAMID, VITDET, randomize, tiny_config, tiny_images, tiny_labels

DINOV3 = {
    "model_type": "dinov3_vit",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_register_tokens": 3,
}
DINOV3_CONVNEXT = {"model_type": "dinov3_convnext", "depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32]}
PLAIN = {
    "vitdet": VITDET,
    "dinov3": DINOV3,
    "dinov3 without registers": DINOV3 | {"num_register_tokens": 0},
    "dinov3 with patches of 14": DINOV3 | {"patch_size": 14},
    "dinov2": {
        "model_type": "dinov2",
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
    },
    "dinov2 with registers": {
        "model_type": "dinov2_with_registers",
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_register_tokens": 2,
    },
}
every_own = pytest.mark.parametrize("name", OWN_BACKBONES)
every_plain = pytest.mark.parametrize("name", PLAIN)


def pyramid_on(inner, **settings):
    return {"model_type": "dino_detr_vit_pyramid", "backbone_config": dict(inner), "out_channels": 32, **settings}


def test_every_own_backbone_has_a_small_form_for_the_tests():
    assert set(OWN_BACKBONES) == set(OWN_MODEL_TYPES)


@every_own
def test_the_auto_classes_know_it(name):
    config = AutoConfig.for_model(**OWN_BACKBONES[name])
    backbone = AutoBackbone.from_config(config)
    assert type(backbone).__module__.startswith("dino_hf.model.")
    maps = backbone.eval()(torch.randn(2, 3, 72, 104)).feature_maps
    assert [level.shape[1] for level in maps] == backbone.channels


@every_own
def test_saved_and_loaded_it_gives_the_same(name, tmp_path):
    backbone = randomize(AutoBackbone.from_config(AutoConfig.for_model(**OWN_BACKBONES[name])), 0.1).eval()
    backbone.save_pretrained(tmp_path)
    loaded = type(backbone).from_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 72, 104)
    for ours, theirs in zip(loaded(pixel_values).feature_maps, backbone(pixel_values).feature_maps, strict=True):
        assert torch.equal(ours, theirs)


@every_own
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trainable_parameter_of_a_detector_gets_a_gradient(name, checkpointing):
    model = DinoDetrForObjectDetection(tiny_config(backbone_config=dict(OWN_BACKBONES[name]))).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*tiny_images(), tiny_labels(3, 0)).loss.backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every_own
def test_a_mask_of_ones_gives_the_outputs_without_a_mask(name):
    model = DinoDetrForObjectDetection(tiny_config(backbone_config=dict(OWN_BACKBONES[name]))).eval()
    pixel_values = torch.randn(2, 3, 75, 101)
    with torch.no_grad():
        unmasked = model(pixel_values).logits
        masked = model(pixel_values, torch.ones(2, 75, 101, dtype=torch.long)).logits
    torch.testing.assert_close(masked, unmasked)


def test_focalnet_gives_the_states_before_the_downsampling_after_a_norm():
    config = AutoConfig.for_model(**FOCALNET, out_features=["stage1", "stage3", "stage4"])
    backbone = randomize(AutoBackbone.from_config(config), 0.1).eval()
    states = {}
    for number, stage in enumerate(backbone.encoder.stages, 1):
        stage.layers[-1].register_forward_hook(lambda module, args, out, number=number: states.update({number: out}))
    maps = backbone(torch.randn(2, 3, 75, 101)).feature_maps
    assert [tuple(level.shape) for level in maps] == [(2, 8, 19, 26), (2, 32, 5, 7), (2, 64, 3, 4)]
    for number, level in zip((1, 3, 4), maps, strict=True):
        norm = backbone.hidden_states_norms[f"stage{number}"]
        torch.testing.assert_close(level.flatten(2).transpose(1, 2), norm(states[number]))


def test_stages_of_focalnet_can_be_frozen():
    model = DinoDetrForObjectDetection(tiny_config(backbone_config=dict(FOCALNET), num_frozen_backbone_stages=2))
    frozen = {key for key, p in model.model.backbone.model.named_parameters() if not p.requires_grad}
    assert {key.split(".")[0] for key in frozen} == {"embeddings", "encoder"}
    assert all(key.startswith(("embeddings.", "encoder.stages.0.")) for key in frozen)
    assert "encoder.stages.0.downsample.norm.weight" in frozen
    assert all(
        name.startswith("model.backbone.model.encoder.stages.1.") for name in freeze(model, "backbone.stage2").names
    )


def test_without_its_last_map_the_last_stage_of_focalnet_is_not_trained():
    settings = FOCALNET | {"out_features": ["stage2", "stage3"]}
    model = DinoDetrForObjectDetection(tiny_config(backbone_config=settings)).train()
    names = [key for key, p in model.model.backbone.model.named_parameters() if not p.requires_grad]
    assert "encoder.stages.3.layers.0.norm1.weight" in names
    assert "encoder.stages.2.downsample.projection.weight" in names
    assert not any(key.startswith("encoder.stages.2.layers") for key in names)


@every_plain
def test_the_pyramid_is_built_from_the_last_map_of_the_transformer(name):
    backbone = randomize(AutoBackbone.from_config(AutoConfig.for_model(**pyramid_on(PLAIN[name]))), 0.1).eval()
    alone = AutoBackbone.from_config(AutoConfig.for_model(**PLAIN[name])).eval()
    alone.load_state_dict(backbone.backbone.state_dict())
    pixel_values = torch.randn(2, 3, 112, 84)
    with torch.no_grad():
        (inside,), (outside,) = backbone.backbone(pixel_values).feature_maps, alone(pixel_values).feature_maps
        maps = backbone(pixel_values).feature_maps
    assert torch.equal(inside, outside)
    patch = backbone.config.backbone_config.patch_size
    height, width = 112 // patch, 84 // patch
    sizes = [(2 * height, 2 * width), (height, width), (height // 2, width // 2)]
    sizes.append((-(-sizes[2][0] // 2), -(-sizes[2][1] // 2)))
    assert [tuple(level.shape[-2:]) for level in maps] == sizes
    assert torch.equal(maps[3], maps[2][..., ::2, ::2])


@every_plain
def test_a_detector_on_a_pyramid_trains_all_but_tokens_for_masked_images(name):
    model = DinoDetrForObjectDetection(tiny_config(backbone_config=pyramid_on(PLAIN[name]))).train()
    model(*tiny_images(), tiny_labels(3, 0)).loss.backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = {key.split(".")[-1] for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen <= {"mask_token"}


def test_a_detector_on_the_convnext_of_dinov3_needs_no_pyramid():
    config = tiny_config(backbone_config=dict(DINOV3_CONVNEXT))
    assert config.backbone_config.out_features == ["stage2", "stage3", "stage4"]
    model = DinoDetrForObjectDetection(config).train()
    model(*tiny_images(), tiny_labels(3, 0)).loss.backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("settings", "strides"),
    [
        ({}, [8, 16, 32, 64]),
        ({"add_pooled_level": False}, [8, 16, 32]),
        ({"scale_factors": [4, 1]}, [4, 16, 32]),
        ({"scale_factors": [4, 2, 1, 0.5]}, [4, 8, 16, 32, 64]),
        ({"out_features": ["stage2", "stage3"]}, [16, 32]),
        ({"out_indices": [0, 2]}, [8, 32]),
    ],
)
def test_maps_have_the_strides_of_the_scale_factors(settings, strides):
    config = AutoConfig.for_model(**pyramid_on(DINOV3, **settings))
    maps = AutoBackbone.from_config(config)(torch.randn(1, 3, 128, 192)).feature_maps
    assert [(128 // level.shape[2], 192 // level.shape[3]) for level in maps] == [
        (stride, stride) for stride in strides
    ]
    assert [config.map_strides[name] for name in config.out_features] == strides


def test_the_default_is_the_transformer_of_published_detectors():
    config = DinoDetrConfig(backbone_config={"model_type": "dino_detr_vit_pyramid"}).backbone_config
    inner = config.backbone_config
    assert (inner.model_type, inner.hidden_size, inner.num_hidden_layers, inner.window_size) == ("vitdet", 768, 12, 14)
    assert len(config.out_features) == 4


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        (pyramid_on({"model_type": "resnet"}), ["ResNetConfig", "one map"]),
        (pyramid_on({"model_type": "nothing"}), ["'nothing'", "vitdet"]),
        (pyramid_on(VIT_PYRAMID), ["'dino_detr_vit_pyramid'", "vitdet"]),
        (pyramid_on(DINOV3 | {"out_features": ["stage1", "stage2"]}), ["DINOv3ViTConfig", "stage1"]),
        (pyramid_on(DINOV3, scale_factors=[1, 3]), ["scale_factors", "3"]),
        (pyramid_on(DINOV3, scale_factors=[]), ["scale_factors", "[]"]),
        (pyramid_on(DINOV3 | {"num_hidden_layers": 10**7}), ["num_hidden_layers", "10000000"]),
        (pyramid_on(DINOV3 | {"hidden_size": 10**7}), ["hidden_size", "10000000"]),
        (pyramid_on(DINOV3, out_channels=10**7), ["out_channels", "10000000"]),
    ],
)
def test_other_pyramids_are_refused_in_words(settings, facts):
    with pytest.raises(Exception) as raised:  # noqa: PT011  (the library wraps what a configuration raises)
        tiny_config(backbone_config=settings)
    text = f"{raised.value} {raised.value.__cause__}"
    assert all(fact in text for fact in facts), text


def test_an_image_that_is_too_small_is_refused_in_words():
    model = DinoDetrForObjectDetection(tiny_config(backbone_config=pyramid_on(DINOV3)))
    with pytest.raises(ValueError, match=r"20 x 50 .* 1 x 3 patches"):
        model(torch.randn(2, 3, 20, 50))


def test_the_pyramid_learns_at_the_rate_of_new_weights():
    model = DinoDetrForObjectDetection(tiny_config(backbone_config=dict(VIT_PYRAMID)))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group["name"]: [names[id(p)] for p in group["params"]] for group in parameter_groups(model, 1e-4)}
    assert all(name.startswith("model.backbone.model.backbone.") for name in groups["backbone"])
    assert any(name.startswith("model.backbone.model.pyramid.") for name in groups["transformer"])
