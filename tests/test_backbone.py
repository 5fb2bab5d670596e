import pytest
import torch
from torch import nn
from transformers import AutoBackbone

from dino_hf import DinoDetrForObjectDetection
from dino_hf.model.backbone import DinoDetrBackbone
from dino_hf.model.frozen_batch_norm import FrozenBatchNorm2d, freeze_batch_norm
from helpers import (
    BIT,
    CONVNEXT,
    INTERNIMAGE,
    RESNET,
    SIZES,
    SWIN,
    TIMM,
    randomize,
    tiny_config,
    tiny_images,
    tiny_labels,
)

BACKBONES = {"resnet": RESNET, "swin": SWIN, "convnext": CONVNEXT, "timm": TIMM, "bit": BIT, "internimage": INTERNIMAGE}
LEVEL_SHAPES = [(8, 13), (4, 7), (2, 4), (1, 2)]  # of 64 x 104 pixels at strides 8, 16, 32, 64
CONVNEXT_SHAPES = [(8, 13), (4, 6), (2, 3), (1, 2)]  # it leaves out a last odd column


def make_backbone(name="resnet", **changes) -> DinoDetrBackbone:
    if name == "timm":
        pytest.importorskip("timm")
    return DinoDetrBackbone(tiny_config(backbone_config=dict(BACKBONES[name]), **changes))


def used_batch_norm(width=6) -> nn.BatchNorm2d:
    """Batch norm with values that differ from the initial ones."""
    norm = nn.BatchNorm2d(width, eps=1e-3)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


@pytest.mark.parametrize("training", [False, True])
def test_frozen_batch_norm_equals_batch_norm_in_evaluation(training):
    norm, x = used_batch_norm(), torch.randn(2, 6, 3, 5)
    model = nn.Sequential(norm)
    expected = norm.eval()(x).detach()
    freeze_batch_norm(model)
    assert isinstance(model[0], FrozenBatchNorm2d)
    torch.testing.assert_close(model.train(training)(x), expected)


def test_frozen_batch_norm_has_state_that_training_does_not_touch_and_nothing_to_train():
    model = nn.Sequential(nn.Sequential(used_batch_norm()))
    names = set(model.state_dict()) - {"0.0.num_batches_tracked"}
    freeze_batch_norm(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set(before) == names
    assert list(model.parameters()) == []
    model.train()(torch.randn(2, 6, 3, 5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_frozen_batch_norm_passes_the_gradient_on():
    model = nn.Sequential(used_batch_norm())
    freeze_batch_norm(model)
    x = torch.randn(2, 6, 3, 5, requires_grad=True)
    model(x).sum().backward()
    scale = model[0].weight / (model[0].running_var + 1e-3).sqrt()
    torch.testing.assert_close(x.grad, scale[:, None, None].expand(2, 6, 3, 5))


def test_a_new_frozen_batch_norm_changes_almost_nothing():
    x = torch.randn(2, 6, 3, 5)
    # eps = 1e-5 below the root
    torch.testing.assert_close(FrozenBatchNorm2d(6, 1e-5)(x), x, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["resnet", "timm"])
def test_no_batch_norm_is_left(name):
    modules = list(make_backbone(name).modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in modules)
    assert any(isinstance(module, FrozenBatchNorm2d) for module in modules)


def test_freezing_keeps_the_activation_that_a_batch_norm_of_timm_contains():
    timm = pytest.importorskip("timm")
    model = nn.Sequential(timm.layers.BatchNormAct2d(6)).eval()
    x = torch.randn(2, 6, 3, 5)
    expected = model(x).detach()
    assert (expected >= 0).all()  # a ReLU
    freeze_batch_norm(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_weights_of_a_published_backbone_can_be_loaded(name):
    backbone = make_backbone(name).eval()
    published = randomize(AutoBackbone.from_config(backbone.model.config), scale=0.1).eval()
    for norm in (module for module in published.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    pixel_values = torch.randn(2, 3, *SIZES[0])
    before, expected = (model(pixel_values).feature_maps for model in (backbone.model, published))
    backbone.model.load_state_dict(published.state_dict())
    for other, got, wanted in zip(before, backbone.model(pixel_values).feature_maps, expected, strict=True):
        torch.testing.assert_close(got, wanted)
        assert not torch.allclose(other, wanted)


def test_a_key_of_another_model_is_still_an_error():
    backbone = make_backbone()
    with pytest.raises(RuntimeError, match=r"embedder\.embedder\.normalization\.momentum"):
        backbone.model.load_state_dict(
            backbone.model.state_dict() | {"embedder.embedder.normalization.momentum": torch.ones(1)}
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["resnet", "swin", "convnext", "bit"])
def test_a_backbone_takes_the_attention_that_is_asked_for_if_it_has_any(name, attention, tmp_path):
    DinoDetrForObjectDetection(tiny_config(backbone_config=dict(BACKBONES[name]))).save_pretrained(tmp_path)
    config = DinoDetrForObjectDetection.from_pretrained(tmp_path, attn_implementation=attention).config
    assert config._attn_implementation == attention
    assert config.backbone_config._attn_implementation == (attention if name == "swin" else "eager")


def test_an_image_without_a_valid_pixel_has_a_size_all_the_same():
    pixel_values, pixel_mask = tiny_images()
    pixel_mask[1] = 0
    _, masks = make_backbone()(pixel_values, pixel_mask.bool())
    assert all(mask[1].sum() == mask[1].numel() - 1 for mask in masks)
    model = DinoDetrForObjectDetection(tiny_config()).train()
    model(pixel_values, pixel_mask, tiny_labels(3, 0)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_gives_maps_of_one_width_and_their_masks(name):
    backbone = make_backbone(name)
    pixel_values, pixel_mask = tiny_images()
    maps, masks = backbone(pixel_values, pixel_mask.bool())
    shapes = CONVNEXT_SHAPES if name == "convnext" else LEVEL_SHAPES
    assert [tuple(level.shape) for level in maps] == [(2, 64, *shape) for shape in shapes]
    assert [tuple(mask.shape) for mask in masks] == [(2, *shape) for shape in shapes]
    assert all(level.isfinite().all() for level in maps)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_trainable_parameter_of_a_backbone_gets_a_gradient(name):
    backbone = make_backbone(name).train()
    pixel_values, pixel_mask = tiny_images()
    maps, _ = backbone(pixel_values, pixel_mask.bool())
    sum(level.square().sum() for level in maps).backward()
    without = [n for n, parameter in backbone.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("size", [SIZES[1], (33, 57)])
def test_masks_are_resized_to_the_nearest_pixel(size):
    pixel_mask = torch.zeros(2, *SIZES[0], dtype=torch.bool)
    pixel_mask[0], pixel_mask[1, : size[0], : size[1]] = True, True
    _, masks = make_backbone()(torch.randn(2, 3, *SIZES[0]), pixel_mask)
    for mask, (height, width) in zip(masks, LEVEL_SHAPES, strict=True):
        rows = torch.arange(height) * SIZES[0][0] // height
        columns = torch.arange(width) * SIZES[0][1] // width
        assert torch.equal(mask, ~pixel_mask[:, rows][:, :, columns])
        assert not mask[0].any()


def test_levels_are_projections_of_the_maps_and_the_extra_one_sees_the_last_map_itself():
    backbone = make_backbone(num_feature_levels=6).eval()
    pixel_values = torch.randn(2, 3, 128, 200)
    maps, masks = backbone(pixel_values, torch.ones(2, 128, 200, dtype=torch.bool))
    features = backbone.model(pixel_values).feature_maps
    sources = [*features, features[-1], maps[3], maps[4]]
    assert len(maps) == len(masks) == 6
    for level, source in enumerate(sources):
        torch.testing.assert_close(maps[level], backbone.norms[level](backbone.projections[level](source)))
    assert [projection.kernel_size for projection in backbone.projections] == [(1, 1)] * 3 + [(3, 3)] * 3
    assert [projection.stride for projection in backbone.projections] == [(1, 1)] * 3 + [(2, 2)] * 3
    assert [tuple(level.shape[2:]) for level in maps] == [(16, 25), (8, 13), (4, 7), (2, 4), (1, 2), (1, 1)]


def test_a_single_small_image_whose_last_map_is_one_cell_can_be_normalised():
    backbone = make_backbone().train()
    maps, _ = backbone(torch.randn(1, 3, 40, 60), torch.ones(1, 40, 60, dtype=torch.bool))
    assert maps[-1].shape == (1, 64, 1, 1)
    assert maps[-1].any()


def test_four_stages_and_one_extra_level_make_five():
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = tiny_config(backbone_config={**RESNET, "out_features": stages}, num_feature_levels=5)
    maps, _ = DinoDetrBackbone(config)(torch.randn(2, 3, *SIZES[0]), torch.ones(2, *SIZES[0], dtype=torch.bool))
    assert [tuple(level.shape[2:]) for level in maps] == [(16, 26), *LEVEL_SHAPES]


def test_no_extra_level_is_made_where_the_backbone_has_as_many_maps():
    assert len(make_backbone(num_feature_levels=3).projections) == 3


@pytest.mark.parametrize(
    ("num_stages", "frozen"),
    [
        (0, set()),
        (1, {"embedder"}),
        (None, {"embedder", "stages.0"}),  # the default of a ResNet
        (3, {"embedder", "stages.0", "stages.1"}),
        (5, {"embedder", "stages.0", "stages.1", "stages.2", "stages.3"}),
    ],
)
def test_leading_stages_of_a_resnet_are_frozen(num_stages, frozen):
    backbone = make_backbone(num_frozen_backbone_stages=num_stages)
    found = {True: set(), False: set()}
    for name, parameter in backbone.model.named_parameters():
        stage = "embedder" if name.startswith("embedder") else ".".join(name.split(".")[1:3])
        found[parameter.requires_grad].add(stage)
    assert found[False] == frozen
    assert found[True] == {"embedder", "stages.0", "stages.1", "stages.2", "stages.3"} - frozen
    assert all(parameter.requires_grad for parameter in backbone.projections.parameters())


@pytest.mark.parametrize(
    ("name", "num_stages", "message"),
    [("timm", 1, "does not work with TimmBackbone.*Use 0"), ("resnet", 6, "has 5 with its stem")],
)
def test_stages_that_are_not_known_cannot_be_frozen(name, num_stages, message):
    with pytest.raises(ValueError, match=f"num_frozen_backbone_stages={num_stages}.*{message}"):
        DinoDetrBackbone(tiny_config(backbone_config=BACKBONES[name], num_frozen_backbone_stages=num_stages))


@pytest.mark.parametrize("name", ["resnet", "swin", "convnext", "bit", "internimage"])
def test_nothing_trainable_is_left_without_a_gradient_when_the_last_stage_is_not_used(name):
    settings = {**BACKBONES[name], "out_features": ["stage1", "stage2", "stage3"]}
    backbone = DinoDetrBackbone(tiny_config(backbone_config=settings, num_frozen_backbone_stages=1))
    maps, _ = backbone(torch.randn(2, 3, 64, 104), torch.ones(2, 64, 104, dtype=torch.bool))
    sum((level * torch.randn_like(level)).sum() for level in maps).backward()
    waiting = [key for key, value in backbone.named_parameters() if value.requires_grad and value.grad is None]
    assert not waiting
    frozen = {key.split(".")[1] for key, value in backbone.named_parameters() if not value.requires_grad}
    assert frozen  # the stem, and what follows the last map


@pytest.mark.parametrize("name", ["resnet", "swin", "convnext", "bit", "internimage"])
def test_stages_that_are_counted_from_the_end_train_as_those_with_names(name):
    def trained(**maps):
        backbone = DinoDetrBackbone(tiny_config(backbone_config={**BACKBONES[name], **maps}))
        return [key for key, value in backbone.named_parameters() if value.requires_grad]

    assert trained(out_indices=[-3, -2, -1]) == trained(out_features=["stage2", "stage3", "stage4"])
    assert trained(out_indices=[-3, -2]) == trained(out_features=["stage2", "stage3"])


@pytest.mark.parametrize("name", ["swin", "convnext", "timm", "internimage"])
def test_nothing_else_is_frozen(name):
    assert all(parameter.requires_grad for parameter in make_backbone(name).parameters())


def test_projections_have_a_bias_only_if_the_config_says_so():
    with_bias, without = (make_backbone(projection_bias=flag) for flag in (True, False))
    assert all(projection.bias is not None for projection in with_bias.projections)
    assert all(projection.bias is None for projection in without.projections)
    without.load_state_dict(
        {
            name: x
            for name, x in with_bias.state_dict().items()
            if not name.startswith("projections") or "bias" not in name
        }
    )
    pixels, mask = torch.randn(2, 3, 96, 128), torch.ones(2, 96, 128, dtype=torch.bool)
    for one, other in zip(with_bias(pixels, mask)[0], without(pixels, mask)[0], strict=True):
        assert torch.equal(one, other)  # it starts at zero


def test_projections_start_xavier_uniform_without_bias():
    for projection in make_backbone().projections:
        fan = (projection.in_channels + projection.out_channels) * projection.kernel_size[0] ** 2
        bound = (6 / fan) ** 0.5
        assert 0.95 * bound < projection.weight.abs().max() <= bound
        assert not projection.bias.any()


def test_group_norms_get_maps_in_the_plain_layout():
    """In channels last, torch takes a difference of squares for the variance."""
    backbone, layouts = make_backbone(), []
    for norm in backbone.norms:
        norm.register_forward_pre_hook(lambda norm, inputs: layouts.append(inputs[0].is_contiguous()))
    backbone(torch.randn(2, 3, 128, 200), None)
    assert layouts == [True] * 4


def test_norms_can_be_trained_alone():
    """torch 2.11 crashed when they got maps without gradient whose channels come last."""
    backbone = make_backbone().requires_grad_(False)
    backbone.norms.requires_grad_(True)
    maps, _ = backbone(torch.randn(2, 3, 64, 104), None)
    sum(level.square().mean() for level in maps).backward()
    assert all(parameter.grad.any() for parameter in backbone.norms.parameters())
