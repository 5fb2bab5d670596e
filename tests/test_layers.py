import math

import pytest
import torch
from torch import nn

from dino_hf.model.layers import MLP, FeedForward, build_layer, linear, xavier, xavier_weight, zero


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
    layer = build_layer(xavier, nn.Conv2d, 6, 10, kernel_size=3)
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
        build_layer(xavier, nn.Conv2d, 6, 10, kernel_size=3),
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
