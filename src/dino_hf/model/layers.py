"""Plain linear layers and convolutions by their initial values, and the two small networks that are made of them.

Each layer carries its initial values as `initial_values`, a function that `_init_weights` of the model calls. So a fresh model,
a key that is missing from a checkpoint and a unit test all get the same ones. The library guards `torch.nn.init` while it loads:
parameters from a checkpoint stay as they are.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from .cpu_speed import fast_linear, is_plain, is_traced, map_rows


def carries_gradient(x: Tensor, layers: nn.Module) -> Tensor:
    """x, to which a gradient flows back where `layers` need that: re-entrant checkpointing computes gradients only if an input of a
    layer wants one, and behind frozen layers (LoRA, frozen stages) none does."""
    if x.requires_grad or not torch.is_grad_enabled() or not any(map(_is_reentrant, layers.modules())):
        return x
    return x.detach().requires_grad_()


def _is_reentrant(layer: nn.Module) -> bool:
    """Whether the layer is checkpointed by torch's re-entrant implementation, which is its default."""
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    return getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True)


def xavier(layer: nn.Module) -> None:
    """Xavier-uniform, with zero bias if there is one."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def attention_xavier(layer: nn.Module) -> None:
    """Like a third of one xavier-uniform (3C, C) matrix, as in `nn.MultiheadAttention`, with zero bias."""
    nn.init.xavier_uniform_(layer.weight, gain=0.5**0.5)  # bound sqrt(6 / (C + 3C)) instead of sqrt(6 / (C + C))
    nn.init.zeros_(layer.bias)


def zero(layer: nn.Module) -> None:
    """The constant zero: attention weights are uniform, a box refinement leaves boxes where they are."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def xavier_weight(layer: nn.Module) -> None:
    """Xavier-uniform with torch's own bias: the release draws the matrices of its transformer again, not the biases."""
    layer.reset_parameters()
    nn.init.xavier_uniform_(layer.weight)


def starts_as(initial_values: Callable[[nn.Module], None], kind: type[nn.Module], *args, **settings) -> nn.Module:
    """`kind(*args, **settings)` with its initial values, which are drawn once."""
    settings.setdefault("device", torch.get_default_device())
    layer = skip_init(kind, *args, **settings)
    layer.initial_values = initial_values
    initial_values(layer)
    return layer


def linear(num_in: int, num_out: int, initial_values: Callable[[nn.Module], None], **settings) -> nn.Linear:
    return starts_as(initial_values, nn.Linear, num_in, num_out, **settings)


class FeedForward(nn.Module):
    """The block of two layers at the end of every transformer layer: (..., C) -> (..., C)."""

    def __init__(self, d_model: int, ffn_dim: int):
        super().__init__()
        self.fc1 = linear(d_model, ffn_dim, xavier_weight)
        self.fc2 = linear(ffn_dim, d_model, xavier_weight)

    @fast_linear
    def forward(self, x: Tensor) -> Tensor:
        return map_rows(self._forward_rows, x, self)

    def _forward_rows(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)  # (..., F)
        # Where there is a backward pass, in place would cost it a copy: the result of a convolution is a view here.
        in_place = not (torch.is_grad_enabled() or is_traced()) and is_plain(self.fc1, nn.Linear)
        return self.fc2(F.relu(hidden, inplace=in_place))


class MLP(nn.Module):
    """Linear layers with ReLU between them: (..., in) -> (..., out)."""

    def __init__(self, layers: list[nn.Linear]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @fast_linear
    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.layers
        for layer in inner:
            x = layer(x).relu()
        return last(x)
