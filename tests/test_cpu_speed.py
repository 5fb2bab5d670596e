"""The faster layers give the same results, and do nothing special where a tool watches or replaces a layer."""

import copy
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoBackbone

import dino_hf
from dino_hf import DinoDetrForObjectDetection
from dino_hf.model import backbone as plain_backbone
from dino_hf.model import layers as plain_layers
from dino_hf.model.frozen_batch_norm import freeze_batch_norm
from dino_hf.runtime.cpu_speed import ResNetConvLayer, _FoldsNorm, fast_linear, fold_norms, map_rows, speed_up
from helpers import RESNET, SWIN, randomize, tiny_config, tiny_labels

SCRIPT = Path(__file__).parent / "scripts/plain_model.py"
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL to avoid")


def fast(module: nn.Module) -> nn.Module:
    speed_up(module)
    return module


def fast_feed_forward() -> nn.Module:
    return fast(plain_layers.FeedForward(6, 10))


def fast_backbone(kind=RESNET, **changes) -> nn.Module:
    return fast(plain_backbone.DinoDetrBackbone(tiny_config(backbone_config=dict(kind), **changes)))


def test_the_package_computes_the_same_without_the_file(tmp_path):
    """The file is deleted from a copy of the package, which another process runs."""
    package = Path(dino_hf.__file__).parent
    shutil.copytree(package, tmp_path / "copy/dino_hf", ignore=shutil.ignore_patterns("__pycache__", "_kernels"))
    (tmp_path / "copy/dino_hf/runtime/cpu_speed.py").unlink()
    folders = [tmp_path / "resnet", tmp_path / "swin"]
    for folder, kind in zip(folders, (RESNET, SWIN), strict=True):
        config = tiny_config(backbone_config=dict(kind), ms_deform_attn_backend="torch", num_frozen_backbone_stages=0)
        model = randomize(DinoDetrForObjectDetection(config), 0.1)
        assert type(model.model.backbone) is not plain_backbone.DinoDetrBackbone
        model.save_pretrained(folder)
        mask = torch.ones(2, 160, 264, dtype=torch.long)  # 1,754 tokens: several groups of rows
        mask[1, 96:], mask[1, :, 200:] = 0, 0
        pixels = torch.randn(2, 3, 160, 264) * mask[:, None]
        inputs = {"pixel_values": pixels, "pixel_mask": mask, "labels": tiny_labels(3, 0)}
        torch.save(inputs, folder / "inputs.pt")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "copy"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT, *folders], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compute = runpy.run_path(str(SCRIPT))["results"]
    for folder in folders:
        ours, plain = compute(folder), torch.load(folder / "plain.pt")
        assert ours.keys() == plain.keys()
        for name, value in plain.items():
            # float32: sums in another order, through a whole model
            tolerance = 1e-4 * value.abs().max().item() + 1e-6
            torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance, msg=name)


def test_a_built_model_has_faster_layers_that_tools_find_by_the_usual_names():
    model = DinoDetrForObjectDetection(tiny_config())
    classes = {type(part) for part in model.modules()}
    changed = {cls for cls in classes if cls.__module__ == "dino_hf.runtime.cpu_speed"}
    assert {cls.__name__ for cls in changed} == {
        *("DinoDetrBackbone", "DinoDetrEncoderLayer", "DinoDetrDecoderLayer", "DinoDetrQuerySelection"),
        *("DetectionHead", "FeedForward", "MLP", "ResNetConvLayer", "ResNetShortCut", "ReLU"),
    }
    assert all(cls.__name__ in {base.__name__ for base in cls.__mro__[1:]} for cls in changed)
    names = {type(part).__name__ for part in model.modules()}
    assert names >= set(model._no_split_modules)
    speed_up(model)
    assert {type(part) for part in model.modules()} == classes


class Fast(nn.Module):
    """A linear layer in a module whose linear layers are fast ones."""

    def __init__(self, *args, **settings):
        super().__init__()
        self.layer = nn.Linear(*args, **settings)

    @fast_linear
    def forward(self, x):
        return self.layer(x)

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias


class Quantised(torch.Tensor):
    """Stands for tensor subclasses that implement `F.linear` themselves."""


def is_convolution(layer: nn.Linear, x: torch.Tensor, monkeypatch) -> bool:
    """Whether the layer computes x as a convolution."""
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(F, "conv2d", lambda *args, **settings: calls.append(args) or torch.conv2d(*args, **settings))
        layer(x)
    return bool(calls)


@needs_mkl
@pytest.mark.parametrize("shape", [(2, 150, 24), (300, 24), (2, 3, 70, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_as_a_convolution_gives_the_same_and_the_same_gradients(shape, bias, monkeypatch):
    layer = Fast(24, 40, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    assert is_convolution(layer, x, monkeypatch)
    grad, leaves = torch.randn(*shape[:-1], 40), (x, *layer.parameters())
    expected = F.linear(x, layer.weight, layer.bias)
    out = layer(x)
    # sums of 24 numbers near 1 in another order; gradients of the weight sum 300
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    pairs = zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@needs_mkl
def test_a_linear_layer_takes_rows_that_are_not_contiguous(monkeypatch):
    layer, x = Fast(24, 40), torch.randn(2, 24, 150).transpose(1, 2)
    assert is_convolution(layer, x, monkeypatch)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_an_equal_convolution_stay_linear():
    x = torch.randn(300, 24)
    for make, inputs in [
        (lambda: Fast(0, 5), x[:, :0]),
        (lambda: Fast(24, 0), x),
        (lambda: Fast(24, 5), x.to_mkldnn()),
    ]:
        layer = make()
        expected = F.linear(inputs, layer.weight, layer.bias)
        assert torch.equal(layer(inputs).to_dense(), expected.to_dense())


def test_a_linear_layer_becomes_a_convolution_only_where_that_is_faster(monkeypatch):
    layer, x = Fast(24, 40), torch.randn(2, 150, 24)
    few, half, none = x[:, :5], x.bfloat16(), x[:, :0]
    assert not is_convolution(layer, few, monkeypatch)
    assert not is_convolution(layer, none, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_convolution(layer, x, monkeypatch)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert not is_convolution(layer, x, monkeypatch)
    assert not is_convolution(Fast(24, 40).bfloat16(), half, monkeypatch)
    assert not is_convolution(Fast(24, 40).double(), x.double(), monkeypatch)
    program = torch.export.export(layer, (x,))
    assert not any("conv" in str(node.target) for node in program.graph.nodes)
    assert not is_convolution(layer, x.as_subclass(Quantised), monkeypatch)
    layer.layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))
    assert type(layer.weight) is Quantised
    assert not is_convolution(layer, x, monkeypatch)


def test_a_compiler_gets_the_linear_layer_and_not_the_convolution():
    graphs = []
    torch.compiler.reset()
    torch.compile(Fast(24, 40), backend=lambda graph, inputs: graphs.append(graph.code) or graph.forward)(
        torch.randn(2, 150, 24)
    )
    torch.compiler.reset()
    assert "linear" in graphs[0]
    assert "conv" not in graphs[0]


def test_a_linear_layer_refuses_what_torch_refuses():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Fast(24, 40)(torch.randn(2, 480, 12))


@needs_mkl
def test_linear_layers_of_other_modules_are_fast_inside_and_plain_afterwards(monkeypatch):
    layer, x = nn.Linear(24, 40), torch.randn(2, 150, 24)
    assert is_convolution(Fast(24, 40), x, monkeypatch)
    assert not is_convolution(layer, x, monkeypatch)
    outer = Fast(24, 24)
    outer.layer = nn.Sequential(Fast(24, 24), nn.Linear(24, 24))
    assert is_convolution(outer, x, monkeypatch)
    broken = Fast(24, 40)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        broken(torch.randn(2, 480, 12))
    assert not is_convolution(layer, x, monkeypatch)


def test_rows_are_mapped_in_parts():
    x, sizes = torch.randn(3, 700, 5), []

    def double(part):
        sizes.append(part.shape[:-1].numel())
        return 2 * part[..., :2]

    assert torch.equal(map_rows(double, x, nn.Identity()), 2 * x[..., :2])
    assert sizes == [1024, 1024, 52]
    assert map_rows(double, x[:, :0], nn.Identity()).shape == (3, 0, 2)


def watch_by_hook(layer, kept):
    layer.register_forward_hook(lambda layer, inputs, output: kept.append(output))


def watch_by_forward(layer, kept):
    """As accelerate offloads."""
    forward = layer.forward

    def watched(x):
        kept.append(forward(x))
        return kept[-1]

    layer.forward = watched


@pytest.mark.parametrize("watch", [watch_by_hook, watch_by_forward])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_watched_feed_forward_block_gets_all_rows_in_one_call_and_its_result_is_not_overwritten(
    watch, wrapped, training
):
    block, x, kept = fast_feed_forward(), torch.randn(2, 900, 6), []
    watch(block.fc1, kept)
    expected = F.linear(x, block.fc1.weight, block.fc1.bias)
    if wrapped:  # as LoRA does
        block.fc1 = nn.Sequential(block.fc1)
    with torch.set_grad_enabled(training):
        block(x)
    assert len(kept) == 1
    # two ways of summing in float32
    torch.testing.assert_close(kept[0], expected, rtol=0, atol=1e-6)


def test_hooks_of_all_modules_see_all_rows_in_one_call_too():
    block, x, names = fast_feed_forward(), torch.randn(2, 900, 6), []
    hook = nn.modules.module.register_module_forward_hook(lambda layer, inputs, output: names.append(type(layer)))
    with hook:
        block(x)
    assert names == [nn.Linear, nn.Linear, type(block)]


def test_the_feed_forward_block_gives_the_same_in_parts_with_and_without_gradients():
    block, x = fast_feed_forward(), torch.randn(2, 900, 6, requires_grad=True)
    leaves, grad = (x, *block.parameters()), torch.randn(2, 900, 6)
    expected = F.linear(F.linear(x, block.fc1.weight, block.fc1.bias).relu(), block.fc2.weight, block.fc2.bias)
    ours = block(x)
    # two ways of summing 10 numbers below 1, and 1,800 gradients
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-6)
    pairs = zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True)
    for our, their in pairs:
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-4)


def resnet_and_plain_copy(dtype=torch.float64) -> tuple[nn.Module, nn.Module]:
    """Two ResNets with the same values, and norms like trained ones: the first folds its norms, the second does not."""
    plain = AutoBackbone.from_config(tiny_config(backbone_config=dict(RESNET)).backbone_config).to(dtype)
    with torch.no_grad():
        for part in plain.modules():
            if isinstance(part, nn.BatchNorm2d):
                for tensor in (part.weight, part.bias, part.running_mean):
                    tensor.normal_()
                part.running_var.uniform_(0.5, 2)
    freeze_batch_norm(plain)
    folding = copy.deepcopy(plain)
    fold_norms(folding)
    return folding, plain


def test_folded_norms_change_neither_maps_nor_gradients():
    folding, plain = resnet_and_plain_copy()
    pixels = torch.randn(2, 3, 48, 80, dtype=torch.float64)
    results = []
    for model in (folding, plain):
        maps = model(pixels).feature_maps
        torch.stack([level.square().mean() for level in maps]).sum().backward()
        results.append([*maps, *(parameter.grad for parameter in model.parameters())])
    assert any(isinstance(part, _FoldsNorm) for part in folding.modules())
    for ours, theirs in zip(*results, strict=True):
        # float64: products in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_in_bfloat16_folded_norms_are_no_further_from_float64():
    exact = resnet_and_plain_copy()[1]
    folding, plain = copy.deepcopy(exact).bfloat16(), copy.deepcopy(exact).bfloat16()
    fold_norms(folding)
    pixels = torch.randn(2, 3, 48, 80, dtype=torch.float64)
    with torch.no_grad():
        expected = exact(pixels).feature_maps[-1]
        errors = [(model(pixels.bfloat16()).feature_maps[-1] - expected).square().mean() for model in (folding, plain)]
    # the mean of two thousand errors; measured 0.9 to 1.1
    assert errors[0] < 1.5 * errors[1]


def test_folding_leaves_names_and_values_and_sees_new_statistics():
    folding, plain = resnet_and_plain_copy()
    assert list(folding.state_dict()) == list(plain.state_dict())
    other = resnet_and_plain_copy()[1]
    folding.load_state_dict(other.state_dict())
    pixels = torch.randn(2, 3, 48, 80, dtype=torch.float64)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(folding)))
    for ours, theirs in zip(copied(pixels).feature_maps, other(pixels).feature_maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_wrapped_or_hooked_layers_are_called_and_not_folded():
    layer = next(part for part in resnet_and_plain_copy()[0].modules() if isinstance(part, ResNetConvLayer))
    x = torch.randn(2, layer.convolution.in_channels, 7, 9, dtype=torch.float64)
    expected, seen = layer(x), []
    hook = layer.convolution.register_forward_hook(lambda *_: seen.append("hook"))
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    hook.remove()
    wrapped = nn.Sequential(layer.convolution, nn.Threshold(-1e9, 0))
    wrapped.register_forward_hook(lambda *_: seen.append("wrapper"))
    layer.convolution = wrapped
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    assert seen == ["hook", "wrapper"]


def test_a_convolution_that_has_got_a_bias_keeps_it():
    """For example, a tool has folded another norm into it."""
    layers = []
    for model in resnet_and_plain_copy():
        layers.append(model.encoder.stages[1].layers[0].layer[0])
        layers[-1].convolution.bias = nn.Parameter(torch.arange(layers[-1].convolution.out_channels).double())
    x = torch.randn(2, layers[0].convolution.in_channels, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(layers[0](x), layers[1](x), rtol=1e-9, atol=1e-9)


def test_a_compiler_gets_the_norm_unfolded():
    layer, graphs = resnet_and_plain_copy()[0].encoder.stages[1].layers[0].layer[0], []
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=lambda graph, inputs: graphs.append(graph.code) or graph.forward)
    compiled(torch.randn(2, layer.convolution.in_channels, 7, 9, dtype=torch.float64))
    torch.compiler.reset()
    assert "batch_norm" in graphs[0]
    assert "relu_" not in graphs[0]


def test_linear_layers_of_a_backbone_are_plain_and_computed_fast_but_where_they_are_checkpointed(monkeypatch):
    backbone, calls = fast_backbone(SWIN, num_frozen_backbone_stages=0), []
    layers = [part for part in backbone.modules() if isinstance(part, nn.Linear)]
    assert layers
    assert {type(layer) for layer in layers} == {nn.Linear}
    monkeypatch.setattr(
        "dino_hf.runtime.cpu_speed._as_convolution", lambda *args: calls.append(args) or F.linear(*args)
    )
    monkeypatch.setattr("dino_hf.runtime.cpu_speed._prefers_convolution", lambda *args: True)
    pixel_values = torch.randn(2, 3, 128, 200)
    backbone.train()(pixel_values, None)
    assert calls
    calls.clear()
    next(backbone.model.children()).grad_checkpointing = True  # timm's name
    backbone(pixel_values, None)
    assert not calls
    with torch.no_grad():
        backbone(pixel_values, None)
    assert calls


@pytest.mark.parametrize(
    "name",
    [
        *(f"layer.0.{part}" for part in ("convolution", "normalization", "normalization.activation", "activation")),
        "activation",
    ],
)
def test_hooks_within_a_resnet_see_what_they_would_see_unfolded(name):
    """As Grad-CAM sets them."""
    folding, plain = resnet_and_plain_copy()
    pixels, seen = torch.randn(2, 3, 48, 80, dtype=torch.float64), []
    for model in (folding, plain):
        part = model.encoder.stages[1].layers[0].get_submodule(name)
        kept = []
        part.register_forward_hook(lambda part, inputs, output, kept=kept: kept.append(output.detach()))
        part.register_full_backward_hook(lambda part, into, out, kept=kept: kept.extend((*into, *out)))
        sum(level.square().sum() for level in model(pixels).feature_maps).backward()
        seen.append(kept)
    assert len(seen[0]) == 3
    for ours, theirs in zip(*seen, strict=True):
        # float64: products in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_hooks_of_all_modules_see_those_of_a_resnet():
    folding, plain = resnet_and_plain_copy()
    pixels, seen = torch.randn(2, 3, 48, 80, dtype=torch.float64), []
    for model in (folding, plain):
        kept = []
        with nn.modules.module.register_module_forward_hook(lambda *args, kept=kept: kept.append(args)):
            model(pixels)
        seen.append(kept)
    for (ours, _, our_output), (theirs, _, their_output) in zip(*seen, strict=True):
        assert isinstance(ours, type(theirs))
        if isinstance(ours, nn.Conv2d | nn.ReLU):
            torch.testing.assert_close(our_output, their_output, rtol=1e-9, atol=1e-9)


def test_gradients_have_the_layout_of_their_weights():
    """Distributed training copies those that have not, and warns."""
    backbone = fast_backbone()
    maps, _ = backbone(torch.randn(2, 3, 64, 104), None)
    sum(level.square().mean() for level in maps).backward()
    for name, parameter in backbone.model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.stride() == parameter.stride(), name


@pytest.mark.parametrize(
    ("stem", "channels_last"),
    [
        (nn.Conv2d(3, 16, 1, stride=2), False),  # RepVGG, MobileOne: torch writes beyond its memory
        (nn.Conv2d(8, 16, 1, stride=2), False),
        (nn.Conv2d(32, 16, 1, stride=(1, 2), groups=4), False),
        (nn.Conv2d(9, 16, 1, stride=2), True),
        (nn.Conv2d(3, 16, 1), True),
        (nn.Conv2d(3, 16, 3, stride=2), True),
    ],
)
def test_channels_last_is_taken_only_where_torch_is_right_in_it(stem, channels_last, monkeypatch):
    build = plain_backbone.build_backbone

    def with_stem(*args, **kwargs):
        backbone = build(*args, **kwargs)
        backbone.stem_of_another_project = stem
        return backbone

    monkeypatch.setattr(plain_backbone, "build_backbone", with_stem)
    assert fast_backbone(RESNET)._takes_channels_last == channels_last


def test_backbones_that_were_not_measured_keep_their_layout():
    assert fast_backbone(RESNET)._takes_channels_last
    assert not fast_backbone(SWIN)._takes_channels_last
