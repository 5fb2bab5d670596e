"""Backbones of timm: which maps, which names of weights, which pixels."""

import warnings

import pytest
import torch

from dino_hf import DinoDetrForObjectDetection
from dino_hf.model.package_warning import DinoDetrWarning
from helpers import tiny_config, tiny_images, tiny_labels

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
    with pytest.warns(
        DinoDetrWarning, match=r"'resnet18' returns 1 feature map of stride 32.*out_indices .*\[-3, -2, -1\]"
    ):
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


@pytest.mark.parametrize("name", ["hrnet_w18_small", "dla34"])
def test_images_are_padded_for_a_network_whose_maps_must_fit_each_other(name):
    """Its own words were "The size of tensor a (5) must match the size of tensor b (6)"."""
    torch.manual_seed(0)
    model = make_model(name, out_indices=[-3, -2, -1]).eval()
    images, mask = torch.randn(2, 3, 75, 101), torch.ones(2, 75, 101, dtype=torch.long)
    mask[1, 60:], mask[1, :, 90:] = 0, 0
    images = images * mask[:, None]
    padded, padded_mask = (torch.nn.functional.pad(part, (0, 27, 0, 21)) for part in (images, mask))
    for sent in (mask, None):
        whole = padded_mask.clone()
        if sent is None:
            whole[:, :75, :101] = 1
        with torch.inference_mode():
            found, expected = model(images, sent), model(padded, whole)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.pred_boxes, expected.pred_boxes)
    model.train()(images, mask, labels=tiny_labels(2, 0)).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


def test_images_of_a_fitting_size_are_not_padded_and_need_no_mask():
    model = make_model("hrnet_w18_small", out_indices=[-3, -2, -1]).eval()
    backbone = model.model.backbone
    assert backbone._side_multiple == 32
    maps, masks = backbone(torch.randn(2, 3, 64, 96), None)
    assert masks is None
    assert [tuple(level.shape[2:]) for level in maps][:3] == [(8, 12), (4, 6), (2, 3)]
    _, masks = backbone(torch.randn(2, 3, 64, 97), None)
    assert [int((~mask[0, 0]).sum()) for mask in masks[:3]] == [13, 7, 4]  # cells that begin on the image


def test_a_network_that_takes_any_size_is_left_alone():
    assert make_model("resnet18").model.backbone._side_multiple == 1


def test_a_network_of_one_size_refuses_others_in_a_sentence():
    model = make_model("levit_128s", out_indices=[-3, -2, -1]).eval()
    with pytest.raises(ValueError, match="The timm backbone 'levit_128s' refuses images of 96 x 224 pixels") as raised:
        model(torch.randn(2, 3, 96, 224))
    assert "such as DinoDetrImageProcessor(size={'height': 224, 'width': 224}), or use another" in str(raised.value)
    assert ": The size of tensor a" in str(raised.value)
    with torch.inference_mode():
        assert model(torch.randn(2, 3, 224, 224)).logits.isfinite().all()


def test_another_error_of_a_network_of_one_size_keeps_its_words(monkeypatch):
    model = make_model("levit_128s", out_indices=[-3, -2, -1]).eval()
    backbone = model.model.backbone

    def fail(pixel_values):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(backbone, "_run", fail)
    with pytest.raises(RuntimeError, match=r"^DefaultCPUAllocator: not enough memory$"):
        backbone(torch.randn(2, 3, 224, 224), None)
