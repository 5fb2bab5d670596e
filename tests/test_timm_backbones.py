"""Backbones of timm: which maps, which names of weights, which pixels."""

import warnings

import pytest
import torch

from dino_hf import DinoDetrForObjectDetection
from dino_hf.package_warning import DinoDetrWarning
from helpers import tiny_config, tiny_images

timm = pytest.importorskip("timm")


def make_model(name: str, **settings) -> DinoDetrForObjectDetection:
    return DinoDetrForObjectDetection(
        tiny_config(backbone_config={"model_type": "timm_backbone", "backbone": name, **settings})
    )


def test_without_indices_the_last_three_maps_are_taken():
    model = make_model("resnet18")
    assert model.model.backbone.model.channels == [128, 256, 512]
    assert model.eval()(*tiny_images()).logits.isfinite().all()


def test_a_single_coarse_map_is_warned_of():
    with pytest.warns(DinoDetrWarning, match=r"'resnet18' gives 1 map of stride 32.*out_indices, as \[-3, -2, -1\]"):
        make_model("resnet18", out_indices=[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_model("resnet18", out_indices=[2, 3])


def test_other_pixels_are_told_of():
    with pytest.warns(DinoDetrWarning, match=r"image_mean=\[0.0, 0.0, 0.0\], image_std=\[1.0, 1.0, 1.0\]"):
        make_model("mobilevitv2_050")


def test_the_state_dict_of_timms_own_model_can_be_loaded_as_it_is():
    published, model = timm.create_model("resnet18"), make_model("resnet18")
    state = published.state_dict()
    for value in state.values():
        value.copy_(torch.rand(value.shape) if value.is_floating_point() else value)
    backbone = model.model.backbone.model
    backbone.load_state_dict(dict(state))
    loaded = backbone.state_dict()
    assert torch.equal(loaded["_backbone.layer4.1.bn2.running_var"], state["layer4.1.bn2.running_var"])
    assert torch.equal(loaded["_backbone.conv1.weight"], state["conv1.weight"])
    backbone.load_state_dict(loaded)  # and its own again
    del state["layer1.0.conv1.weight"]
    with pytest.raises(RuntimeError, match=r"_backbone\.layer1\.0\.conv1\.weight"):
        backbone.load_state_dict(state)
