"""Layers with the initial values of DINO, and the two small networks made of them.

The attribute `initial_values` of a layer is the function that sets its initial values. The model's `_init_weights` calls it, also
for the keys that a checkpoint lacks. The library guards `torch.nn.init` while it loads a checkpoint, so loaded values stay.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init


def xavier(layer: nn.Module) -> None:
    """Xavier-uniform weight and zero bias."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def attention_xavier(layer: nn.Module) -> None:
    """A third of one xavier-uniform (3C, C) matrix, as in `nn.MultiheadAttention`, and zero bias."""
    nn.init.xavier_uniform_(layer.weight, gain=0.5**0.5)  # bound sqrt(6 / (C + 3C)) instead of sqrt(6 / (C + C))
    nn.init.zeros_(layer.bias)


def zero(layer: nn.Module) -> None:
    """Zero weight and bias: attention weights start uniform, and box refinements leave boxes where they are."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def xavier_weight(layer: nn.Module) -> None:
    """Xavier-uniform weight and torch's default bias, as the original release initialises its transformer."""
    layer.reset_parameters()
    nn.init.xavier_uniform_(layer.weight)


def build_layer(initial_values: Callable[[nn.Module], None], kind: type[nn.Module], *args, **settings) -> nn.Module:
    """`kind(*args, **settings)` with the given initial values, without drawing the default values first."""
    settings.setdefault("device", torch.get_default_device())
    layer = skip_init(kind, *args, **settings)
    layer.initial_values = initial_values
    initial_values(layer)
    return layer


def linear(num_in: int, num_out: int, initial_values: Callable[[nn.Module], None], **settings) -> nn.Linear:
    """A plain `nn.Linear` with the given initial values."""
    return build_layer(initial_values, nn.Linear, num_in, num_out, **settings)


class FeedForward(nn.Module):
    """The feed-forward block at the end of every transformer layer: (..., C) -> (..., C)."""

    def __init__(self, d_model: int, ffn_dim: int):
        super().__init__()
        self.fc1 = linear(d_model, ffn_dim, xavier_weight)
        self.fc2 = linear(ffn_dim, d_model, xavier_weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class MLP(nn.Module):
    """Linear layers with ReLU between them: (..., in) -> (..., out)."""

    def __init__(self, layers: list[nn.Linear]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.layers
        for layer in inner:
            x = layer(x).relu()
        return last(x)
