"""Linear layers by their initial values, and the two small networks that are made of them.

Each layer owns its initial values (`reset_parameters`), so a fresh model, a key that is missing from a checkpoint and a unit
test all get the same ones. The library guards `torch.nn.init` while it loads: parameters from a checkpoint stay as they are.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

_MIN_ROWS = 256  # below, the detour of `Linear` costs more than it brings
_MAX_NUMBERS = 2**31  # in one tensor of a convolution
_CACHED_ROWS = 1024  # of 2048 float32 numbers: 8 MiB
_PLAIN = (Tensor, nn.Parameter)

# Of a 1 x 1 kernel, any dilation is none; but torch leaves it to MKL on one thread, half as fast, unless it is dilated.
POINTWISE_DILATION = 2


def is_traced() -> bool:
    """Whether a graph is made of what runs: a compiler does better with plain operators, and for any machine."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


# Of all modules' hooks. Torch says nothing of how to ask for them, and a shared model shall load with later versions too.
_watches_all = getattr(nn_module, "_has_any_global_hook", lambda: False)


def is_watched(module: nn.Module) -> bool:
    """Whether more than the module runs when it is called: hooks (Grad-CAM), or a forward in the place of its own (offloading)."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in vars(module) or _watches_all()


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether nobody has replaced, wrapped (LoRA) or hooked it: then what it computes is known, and nobody else has the result."""
    return type(module) is kind and not is_watched(module)


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


class Linear(nn.Linear):
    """`nn.Linear`, whose float32 is computed by oneDNN on a CPU where torch would use MKL: as a 1 x 1 convolution. On AMD
    processors it is twice as fast, forward and backward (docs/log.md)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._prefers_convolution(x):
            return super().forward(x)
        # Rows become pixels, features channels: a view, for which oneDNN has the layout "channels last".
        pixels = x.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)  # (1, in, rows, 1)
        kernel = self.weight[:, :, None, None]
        out = F.conv2d(pixels, kernel, self.bias, dilation=POINTWISE_DILATION)  # (1, out, rows, 1)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)

    def _prefers_convolution(self, x: Tensor) -> bool:
        if is_traced() or x.device.type != "cpu" or x.shape[-1] != self.in_features:
            return False
        # Other tensors (quantised, sharded, fake, sparse) know how a linear layer goes; autocast has bfloat16 in mind.
        plain = type(x) in _PLAIN and type(self.weight) in _PLAIN and x.dtype == self.weight.dtype == torch.float32
        return (
            plain
            and x.layout == self.weight.layout == torch.strided
            and self.weight.numel() > 0
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkl.is_available()
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
            and _MIN_ROWS * self.in_features <= x.numel()
            and x.numel() // self.in_features * max(self.in_features, self.out_features) < _MAX_NUMBERS
        )


def use_fast_linear(module: nn.Module) -> None:
    """Let every plain `nn.Linear` below `module` be computed as `Linear` does; parameters and names stay."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = Linear


def map_rows(function: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> Tensor:
    """function(x) of a function that treats each row of x (..., C) by itself; on a CPU so many rows at a time that what lies
    between stays in the cache, and in blocks that the allocator keeps and does not get anew from the system.

    Args:
        module: whose parts the function calls. Who watches one of them sees all rows in one call.
    """
    if is_traced() or x.device.type != "cpu" or x.numel() <= _CACHED_ROWS * x.shape[-1]:
        return function(x)
    if any(is_watched(part) for part in module.modules()):
        return function(x)
    rows = torch.cat([function(part) for part in x.flatten(0, -2).split(_CACHED_ROWS)])
    return rows.unflatten(0, x.shape[:-1])


class XavierLinear(Linear):
    """Starts xavier-uniform, with zero bias."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class ZeroLinear(Linear):
    """Starts as the constant zero: attention weights are uniform, a box refinement leaves boxes where they are."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class TransformerLinear(Linear):
    """Starts xavier-uniform with torch's own bias: the release draws the matrices of its transformer anew, not the biases."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.xavier_uniform_(self.weight)


class XavierConv2d(nn.Conv2d):
    """Starts xavier-uniform, with zero bias if it has one."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class FeedForward(nn.Module):
    """The block of two layers at the end of every transformer layer: (..., C) -> (..., C)."""

    def __init__(self, d_model: int, ffn_dim: int):
        super().__init__()
        self.fc1 = TransformerLinear(d_model, ffn_dim)
        self.fc2 = TransformerLinear(ffn_dim, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return map_rows(self._forward_rows, x, self)

    def _forward_rows(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)  # (..., F)
        # Where there is a backward pass, in place would cost it a copy: the result of a convolution is a view here.
        in_place = not (torch.is_grad_enabled() or is_traced()) and is_plain(self.fc1, TransformerLinear)
        return self.fc2(F.relu(hidden, inplace=in_place))


class MLP(nn.Module):
    """Linear layers with ReLU between them: (..., in) -> (..., out)."""

    def __init__(self, layers: list[Linear]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.layers
        for layer in inner:
            x = layer(x).relu()
        return last(x)
