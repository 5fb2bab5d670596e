import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dino_hf.model.cpu_speed import fast_linear, map_rows
from dino_hf.model.layers import MLP, FeedForward, linear, starts_as, xavier, xavier_weight, zero

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL to avoid")


def assert_uniform(weight: torch.Tensor, bound: float):
    """Uniform in [-bound, bound]: nothing outside, and with hundreds of draws the ends are nearly reached."""
    weight = weight.detach()
    assert weight.numel() >= 300
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.95 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("start", [xavier, xavier_weight])
def test_linear_layers_start_xavier_uniform(start):
    layer = linear(20, 30, start)
    assert type(layer) is nn.Linear
    assert_uniform(layer.weight, math.sqrt(6 / (20 + 30)))


def test_convolutions_start_xavier_uniform():
    layer = starts_as(xavier, nn.Conv2d, 6, 10, kernel_size=3)
    assert_uniform(layer.weight, math.sqrt(6 / (9 * (6 + 10))))
    assert not layer.bias.any()


def test_the_xavier_layer_starts_with_zero_bias():
    assert not linear(20, 30, xavier).bias.any()


def test_the_transformer_layer_keeps_the_bias_of_torch():
    assert_uniform(linear(20, 400, xavier_weight).bias, 1 / math.sqrt(20))


def test_the_zero_layer_starts_as_zero():
    layer = linear(20, 30, zero)
    assert not layer.weight.any()
    assert not layer.bias.any()


@pytest.mark.parametrize(
    "layer",
    [
        *(linear(20, 30, start) for start in (xavier, zero, xavier_weight)),
        starts_as(xavier, nn.Conv2d, 6, 10, kernel_size=3),
    ],
)
def test_initial_values_are_drawn_again(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(100.0)
    layer.initial_values(layer)
    assert all(parameter.abs().max() < 1 for parameter in layer.parameters())


def test_the_feed_forward_block_is_two_layers_with_a_relu_between():
    block, x = FeedForward(6, 10), torch.randn(2, 3, 6)
    hidden = x @ block.fc1.weight.T + block.fc1.bias
    expected = hidden.clamp(min=0) @ block.fc2.weight.T + block.fc2.bias
    # two ways of summing in float32
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-6)


def test_the_mlp_has_a_relu_between_layers_but_not_behind_the_last():
    layers = [nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 40)]
    x = torch.randn(2, 3, 6)
    result = MLP(layers)(x)
    assert torch.equal(result, layers[2](layers[1](layers[0](x).relu()).relu()))
    assert (result < 0).any()


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
    """Stands for tensors that know how a linear layer goes with them."""


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
def test_what_is_no_convolution_is_computed_as_a_linear_layer():
    x = torch.randn(300, 24)
    for make, inputs in [
        (lambda: Fast(0, 5), x[:, :0]),
        (lambda: Fast(24, 0), x),
        (lambda: Fast(24, 5), x.to_mkldnn()),
    ]:
        layer = make()
        expected = F.linear(inputs, layer.weight, layer.bias)
        assert torch.equal(layer(inputs).to_dense(), expected.to_dense())


def test_a_linear_layer_is_none_but_where_it_pays(monkeypatch):
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
def test_linear_layers_are_fast_in_modules_of_others_too_and_plain_again_behind(monkeypatch):
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
def test_who_watches_the_feed_forward_block_sees_all_rows_in_one_call_and_may_keep_them(watch, wrapped, training):
    block, x, kept = FeedForward(6, 10), torch.randn(2, 900, 6), []
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
    block, x, names = FeedForward(6, 10), torch.randn(2, 900, 6), []
    hook = nn.modules.module.register_module_forward_hook(lambda layer, inputs, output: names.append(type(layer)))
    with hook:
        block(x)
    assert names == [nn.Linear, nn.Linear, FeedForward]


def test_the_feed_forward_block_gives_the_same_in_parts_with_and_without_gradients():
    block, x = FeedForward(6, 10), torch.randn(2, 900, 6, requires_grad=True)
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
