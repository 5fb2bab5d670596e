"""Every type of backbone that the library offers: strides of its maps, and gradients of its parameters."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoBackbone, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from dino_hf.model.backbone import DinoDetrBackbone
from dino_hf.model.backbone_trials import unused_parameters
from helpers import BIT, CONVNEXT, RESNET, SWIN, tiny_config

STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 40]}
PLAIN = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 64,
    "out_features": ["stage4"],
}
PYRAMIDS = {
    "bit": BIT,
    "convnext": CONVNEXT,
    "convnextv2": STAGES,
    "dinov3_convnext": STAGES,
    "focalnet": {"depths": [1, 1, 1, 1], "embed_dim": 8, "hidden_sizes": [16, 32, 64, 64]},
    "hgnet_v2": {
        "embedding_size": 8,
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 24, 32],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 24, 32, 40],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
        **STAGES,
    },
    "hiera": {
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 1, 1],
        "image_size": [64, 96],
        "masked_unit_attention": [True, True, False, False],
    },
    "maskformer-swin": SWIN,
    "pp_lcnet": {"scale": 0.25},
    "pp_lcnet_v3": {"scale": 0.25},
    "pvt_v2": {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 16, 16, 32],
        "num_attention_heads": [1, 1, 2, 2],
        "image_size": [64, 96],
    },
    "resnet": RESNET,
    "rt_detr_resnet": {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 128], "embedding_size": 8},
    "swin": SWIN,
    "swinv2": SWIN,
    "textnet": {"stem_out_channels": 8, "hidden_sizes": [8, 8, 16, 24, 32]},
}
PLAIN_TRANSFORMERS = {  # name -> settings and image size
    "beit": ({}, (64, 96)),
    "dinov2": ({"image_size": 70}, (112, 168)),
    "dinov2_with_registers": ({}, (64, 96)),
    "dinov3_vit": ({}, (64, 96)),
    "lw_detr_vit": ({"pretrain_image_size": 64, "num_windows": 4}, (64, 64)),
    "pixio": ({}, (64, 96)),
    "rf_detr_dinov2": ({"image_size": 112, "num_windows": 2}, (112, 112)),
    "sapiens2": ({}, (64, 96)),
    "tipsv2_vision_model": ({"image_size": 70}, (112, 168)),
    "vitdet": ({"pretrain_image_size": 64}, (64, 96)),
}
REFUSED = {  # name -> settings and part of the message
    "tipsv2": ({}, "Tipsv2Config.*AutoBackbone"),
    "uvdoc_backbone": ({"out_features": ["stage6"]}, "UVDocBackbone returns maps of the shapes"),
    "vitpose_backbone": (PLAIN | {"image_size": [64, 96]}, "VitPoseBackbone returns maps of the shapes"),
}
# DiNAT needs the package natten; timm has tests of its own; PP-LCNetV4 reads lines of text.
LEFT_OUT = {"dinat", "timm_backbone", "pp_lcnet_v4"}


def here(names) -> list[str]:
    """The types that the installed transformers has."""
    return sorted(set(names) & set(MODEL_FOR_BACKBONE_MAPPING_NAMES))


def gradients(backbone: DinoDetrBackbone, size: tuple[int, int]) -> tuple[list[tuple[int, int]], list[str]]:
    """Sizes of the maps, and the names of trainable parameters without a gradient."""
    maps, _ = backbone.train()(torch.randn(2, 3, *size), None)
    sum((level * torch.randn_like(level)).sum() for level in maps).backward()
    waiting = [name for name, value in backbone.named_parameters() if value.requires_grad and value.grad is None]
    return [tuple(level.shape[2:]) for level in maps], waiting


def test_every_type_of_the_library_is_tried():
    assert not set(MODEL_FOR_BACKBONE_MAPPING_NAMES) - {*PYRAMIDS, *PLAIN_TRANSFORMERS, *REFUSED, *LEFT_OUT}


@pytest.mark.parametrize("kind", here(PYRAMIDS))
def test_a_pyramid_gives_strides_8_16_and_32_and_every_trainable_parameter_a_gradient(kind):
    backbone = DinoDetrBackbone(tiny_config(backbone_config=PYRAMIDS[kind] | {"model_type": kind}))
    sizes, waiting = gradients(backbone, (64, 96))
    assert sizes == [(8, 12), (4, 6), (2, 3), (1, 2)]
    assert waiting == []
    assert any(parameter.requires_grad for parameter in backbone.model.parameters())


@pytest.mark.parametrize("kind", here(PLAIN_TRANSFORMERS))
def test_a_plain_transformer_gives_its_map_and_every_trainable_parameter_a_gradient(kind):
    settings, size = PLAIN_TRANSFORMERS[kind]
    config = tiny_config(backbone_config=PLAIN | settings | {"model_type": kind})
    sizes, waiting = gradients(DinoDetrBackbone(config), size)
    patch = config.backbone_config.patch_size
    assert sizes[0] == (size[0] // patch, size[1] // patch)
    assert waiting == []


@pytest.mark.parametrize("kind", here(REFUSED))
def test_a_type_that_gives_no_maps_is_refused(kind):
    settings, message = REFUSED[kind]
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        DinoDetrBackbone(tiny_config(backbone_config=settings | {"model_type": kind}))


def test_the_unused_parameters_are_those_that_a_backward_pass_leaves_out():
    for kind in ("dinov2", "maskformer-swin", "focalnet"):
        settings = PYRAMIDS.get(kind, PLAIN)
        config = AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if k != "model_type"})
        backbone = AutoBackbone.from_config(config)
        sum(level.square().sum() for level in backbone(torch.randn(2, 3, 112, 168)).feature_maps).backward()
        without = {name for name, parameter in backbone.named_parameters() if parameter.grad is None}
        assert unused_parameters(backbone, config) == without != set()
