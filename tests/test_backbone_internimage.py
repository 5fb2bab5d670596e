import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor, use_backend
from dino_hf.common.scenes import make_scenes
from dino_hf.model.backbone_internimage import (
    DinoDetrInternImageBackbone,
    InternImageConv,
    InternImageLayer,
    cell_centers,
    kernel_grid,
)
from dino_hf.model.configuration_internimage import DinoDetrInternImageConfig
from dino_hf.training import load_coco
from helpers import INTERNIMAGE, needs_compiler, randomize, small_trainer, tiny_config, tiny_images

BACKENDS = ["reference", "torch", "gather", pytest.param("cpu", marks=needs_compiler)]


def tiny(**changes) -> DinoDetrInternImageBackbone:
    """All parameters are random, the learnt offsets of a cell or so."""
    settings = {name: value for name, value in INTERNIMAGE.items() if name != "model_type"}
    config = DinoDetrInternImageConfig(**settings | {"out_features": ["stage2", "stage3", "stage4"]} | changes)
    model = DinoDetrInternImageBackbone(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = 1 if name.endswith("offsets.bias") else 0.3
            parameter.normal_(1 if "norm" in name and name.endswith("weight") else 0, wide)
    return model


def deformable_convolution(value, offsets, weights, scale):
    """DCNv3 (arXiv:2211.05778, eq. 2) from its formula, in dense bilinear weights: each sample is a sum over all cells.

    Args:
        value: (B, h, w, G, D)
        offsets: (B, h, w, G, 9, 2) as (x, y), in cells; the nine points are columns of a kernel, from left to right.
        weights: (B, h, w, G, 9)
    Returns:
        (B, h, w, G, D)
    """
    height, width = value.shape[1:3]
    out = []
    for point in range(9):
        x = torch.arange(width)[None, None, :, None] + (point // 3 - 1 + offsets[..., point, 0]) * scale  # (B, h, w, G)
        y = torch.arange(height)[None, :, None, None] + (point % 3 - 1 + offsets[..., point, 1]) * scale
        columns = (1 - (x[..., None] - torch.arange(width)).abs()).clamp(min=0)  # (B, h, w, G, w)
        rows = (1 - (y[..., None] - torch.arange(height)).abs()).clamp(min=0)  # (B, h, w, G, h)
        sample = torch.einsum("bijgr,bijgc,brcgd->bijgd", rows, columns, value)
        out.append(weights[..., point, None] * sample)
    return sum(out)


def slow_conv(conv: InternImageConv, x):
    """The whole layer around the formula."""
    groups = conv.num_groups
    local = conv.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    local = F.gelu(conv.local_norm(local))
    offsets = conv.offsets(local).unflatten(-1, (groups, 9, 2))
    weights = conv.weights(local).unflatten(-1, (groups, 9)).softmax(-1)
    value = conv.input_proj(x).unflatten(-1, (groups, -1))
    return conv.output_proj(deformable_convolution(value, offsets, weights, conv.offset_scale).flatten(-2))


def make_conv(width, groups, scale):
    conv = randomize(InternImageConv(width, groups, scale, 1e-6))
    nn.init.normal_(conv.offsets.bias)
    return conv


def run_conv(conv, x):
    centers = cell_centers(x)
    return conv(x, centers, kernel_grid(centers))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("width", "groups", "scale"), [(48, 3, 1.0), (32, 2, 2.0), (6, 3, 2.0), (5, 1, 1.0), (64, 64, 1.5)]
)
def test_the_convolution_and_its_gradients_are_those_of_the_formula(backend, width, groups, scale):
    """Groups of 16 channels, as published, and of 1, 2 and 5."""
    conv, x = make_conv(width, groups, scale), torch.randn(2, 5, 8, width, requires_grad=True)
    exact, exact_x = make_conv(width, groups, scale).double(), x.detach().double().requires_grad_()
    exact.load_state_dict(conv.state_dict())
    with use_backend(backend):
        out = run_conv(conv, x)
        grad = torch.randn(out.shape)
        grads = torch.autograd.grad(out, [x, *conv.parameters()], grad)
    want = slow_conv(exact, exact_x)
    wanted = torch.autograd.grad(want, [exact_x, *exact.parameters()], grad.double())
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-5)
    for (name, _), found, correct in zip([("x", x), *conv.named_parameters()], grads, wanted, strict=True):
        largest = correct.abs().max()  # sums of float32 over 80 cells
        torch.testing.assert_close(
            found.double() / largest,
            correct / largest,
            rtol=0,
            atol=2e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_the_gradients_are_those_of_differences():
    conv, x = make_conv(4, 2, 2.0).double(), torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: run_conv(conv, x), (x, *conv.parameters()), atol=1e-4)


def test_new_offsets_and_weights_average_the_neighbours():
    """At the initial values, the convolution is a mean over 3 x 3 cells, zero outside of the map."""
    conv, x = InternImageConv(6, 3, 1.0, 1e-6), torch.randn(2, 4, 7, 6)
    expected = conv.output_proj(F.avg_pool2d(conv.input_proj(x).permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1))
    # centres of cells are rounded to float32
    torch.testing.assert_close(run_conv(conv, x), expected, rtol=0, atol=1e-5)


def slow_stages(model, pixel_values):
    """The backbone as a plain list of operations, on the formula."""
    config, embeddings = model.config, model.embeddings

    def last(conv, x):
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    x = F.gelu(embeddings.norm1(embeddings.conv1(pixel_values).permute(0, 2, 3, 1)))
    x = embeddings.norm2(last(embeddings.conv2, x))
    maps = []
    for stage in model.encoder.stages:
        for layer in stage.layers:
            one, two = (1, 1) if layer.conv_scale is None else (layer.conv_scale, layer.mlp_scale)
            if config.post_norm:
                x = x + one * layer.conv_norm(slow_conv(layer.conv, x))
                x = x + two * layer.mlp_norm(layer.mlp.fc2(F.gelu(layer.mlp.fc1(x))))
            else:
                x = x + one * slow_conv(layer.conv, layer.conv_norm(x))
                x = x + two * layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.mlp_norm(x))))
        x = x if config.post_norm else stage.norm(x)
        maps.append(x.permute(0, 3, 1, 2))
        x = x if stage.downsample is None else stage.downsample.norm(last(stage.downsample.conv, x))
    return maps


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("settings", [{}, {"post_norm": True, "offset_scale": 2.0}, {"layer_scale_init_value": None}])
def test_the_backbone_agrees_with_the_formula(settings, backend):
    model, pixel_values = tiny(**settings), torch.randn(2, 3, 45, 70)
    with torch.no_grad(), use_backend(backend) if backend else nullcontext():
        maps = model(pixel_values).feature_maps
        expected = slow_stages(model.double(), pixel_values.double())[1:]
    assert [tuple(level.shape) for level in maps] == [(2, 32, 6, 9), (2, 64, 3, 5), (2, 128, 2, 3)]
    for level, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(level.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stages", [["stem"], ["stage1"], ["stage1", "stage3"], ["stem", "stage4"]])
def test_any_stages_are_feature_maps(stages):
    model, pixel_values = tiny(out_features=stages), torch.randn(2, 3, 45, 70)
    outputs = model(pixel_values, output_hidden_states=True)
    assert [level.shape[1] for level in outputs.feature_maps] == model.channels
    assert [level.is_contiguous() for level in outputs.feature_maps] == [True] * len(stages)
    names = model.stage_names[: len(outputs.hidden_states)]
    by_name = dict(zip(names, outputs.hidden_states, strict=True))
    assert all(torch.equal(level, by_name[name]) for level, name in zip(outputs.feature_maps, stages, strict=True))
    assert model(pixel_values).hidden_states is None


def test_an_image_without_offsets_to_learn_is_padded_without_effect():
    """Outside of the map, samples are zero: a point far outside adds nothing."""
    conv = make_conv(6, 3, 1.0)
    nn.init.zeros_(conv.offsets.weight)
    nn.init.constant_(conv.offsets.bias, 100.0)
    x = torch.randn(2, 4, 7, 6)
    torch.testing.assert_close(run_conv(conv, x), conv.output_proj.bias.expand(2, 4, 7, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    model, pixel_values = tiny(post_norm=True), torch.randn(2, 3, 45, 70)
    with torch.no_grad():
        expected = model(pixel_values).feature_maps
        for maps in (autocast_maps(model, pixel_values, dtype), model.to(dtype)(pixel_values.to(dtype)).feature_maps):
            for level, wanted in zip(maps, expected, strict=True):
                difference = (level.float() - wanted).norm() / wanted.norm()
                assert difference < (0.1 if dtype == torch.bfloat16 else 0.02)


def autocast_maps(model, pixel_values, dtype):
    with torch.autocast("cpu", dtype):
        return model(pixel_values).feature_maps


def test_offsets_of_a_cell_and_a_bit_keep_their_bit_in_bfloat16(monkeypatch):
    """The kernel gets float32 offsets: on the grid of integers, bfloat16 has steps of a 128th of a cell."""
    from dino_hf.model import backbone_internimage

    seen = {}
    fused = backbone_internimage.ms_deform_attn_fused

    def spy(value, shapes, references, offsets, logits, backend):
        seen.update(value=value.dtype, references=references, offsets=offsets)
        return fused(value, shapes, references, offsets, logits, backend)

    monkeypatch.setattr(backbone_internimage, "ms_deform_attn_fused", spy)
    conv = InternImageConv(6, 3, 2.0, 1e-6)
    nn.init.constant_(conv.offsets.bias, 2**-10)
    run_conv(conv.to(torch.bfloat16), torch.randn(2, 4, 7, 6, dtype=torch.bfloat16))
    assert seen["value"] == torch.bfloat16
    assert seen["references"].dtype == seen["offsets"].dtype == torch.float32
    assert torch.equal(seen["offsets"] % 1, torch.full_like(seen["offsets"], 2**-9))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, pixel_values = tiny().train(), torch.randn(2, 3, 45, 70, requires_grad=True)
    sum(level.square().mean() for level in model(pixel_values).feature_maps).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    assert all(layer.gradient_checkpointing for layer in model.modules() if isinstance(layer, InternImageLayer))
    sum(level.square().mean() for level in model(pixel_values).feature_maps).backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(found) == len(expected) == len(list(model.parameters()))
    for grad, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


def test_stochastic_depth_skips_branches_of_images_and_keeps_their_mean():
    layer = InternImageLayer(tiny().config, 16, 1, 0.5).train()
    branch = torch.ones(1000, 1, 1, 16)
    kept = layer._scaled(branch, None)
    assert set(kept.flatten(1).unique(dim=1).flatten().tolist()) == {0.0, 2.0}
    assert 0.9 < kept.mean() < 1.1
    assert torch.equal(layer.eval()._scaled(branch, None), branch)


def test_stochastic_depth_grows_from_layer_to_layer():
    model = tiny(drop_path_rate=0.4)
    rates = [layer.drop_rate for layer in model.modules() if isinstance(layer, InternImageLayer)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_initial_values():
    model = DinoDetrInternImageBackbone(tiny(layer_scale_init_value=0.25).config)
    for layer in model.modules():
        if isinstance(layer, InternImageConv):
            new = (layer.offsets.weight, layer.offsets.bias, layer.weights.weight, layer.weights.bias)
            assert not any(parameter.any() for parameter in new)
            assert layer.input_proj.weight.abs().max() <= (3 / len(layer.input_proj.bias)) ** 0.5
        if isinstance(layer, InternImageLayer):
            assert torch.equal(layer.conv_scale, torch.full_like(layer.conv_scale, 0.25))
            assert 0.015 < layer.mlp.fc1.weight.std() < 0.025


def test_a_new_detector_takes_the_weights_of_a_saved_backbone(tmp_path):
    model = tiny(post_norm=True, offset_scale=2.0)
    model.save_pretrained(tmp_path)
    detector = DinoDetrForObjectDetection.from_backbone(tmp_path, id2label={0: "cat", 1: "dog"})
    assert detector.config.backbone_config.offset_scale == 2
    found = detector.model.backbone.model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


def test_the_detector_chooses_the_implementation():
    """By its `ms_deform_attn_backend`, which holds for the backbone as for the transformer."""
    model = DinoDetrForObjectDetection(tiny_config(backbone_config=INTERNIMAGE, ms_deform_attn_backend="reference"))
    layers = [module for module in model.modules() if isinstance(module, InternImageConv)]
    assert [layer.attention_backend for layer in layers] == ["reference"] * 5


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_convolution_is_exported_for_all_sizes(scale):
    conv = make_conv(6, 3, scale).eval()
    layer = AsModule(conv)
    axes = dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC)
    with torch.no_grad(), use_backend("gather"):
        program = torch.export.export(layer, (torch.randn(2, 7, 11, 6),), dynamic_shapes=(axes,))
    for shape in ((3, 4, 9, 6), (2, 12, 5, 6)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), run_conv(conv, x), rtol=0, atol=1e-5)


class AsModule(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return run_conv(self.conv, x)


def test_a_detector_trains_and_is_saved(tmp_path):
    """Three steps of the Trainer, which move the learnt offsets. The saved detector computes the same."""
    train = make_scenes(tmp_path / "train", 6, seed=0)
    train = load_coco(train, train.parent)
    processor = DinoDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    model = DinoDetrForObjectDetection(tiny_config(backbone_config=INTERNIMAGE, id2label=train.id2label))
    trainer = small_trainer((train, train), tmp_path, model, processor, max_steps=3, learning_rate=1e-2)
    assert math.isfinite(trainer.train().training_loss)
    for layer in model.modules():
        if isinstance(layer, InternImageConv):
            assert layer.offsets.weight.any()
            assert layer.weights.weight.any()
    trainer.save_model(tmp_path / "saved")
    loaded, images = DinoDetrForObjectDetection.from_pretrained(tmp_path / "saved").eval(), tiny_images()
    with torch.no_grad():
        assert torch.equal(loaded(*images).logits, model.eval()(*images).logits)


def test_a_graph_of_torch_compile_gives_the_same():
    layer, x = AsModule(make_conv(6, 3, 2.0).eval()), torch.randn(2, 4, 7, 6)
    with torch.no_grad():
        found = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)(x)
        torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_compiled_backbone_gives_the_same():
    model, pixel_values = tiny(), torch.randn(2, 3, 45, 70)
    with torch.no_grad():
        expected = model(pixel_values).feature_maps
        maps = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)(pixel_values).feature_maps
    for level, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(level, wanted, rtol=1e-4, atol=1e-4)
