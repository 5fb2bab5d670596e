"""What makes the model faster on CPUs in eager mode. Without this file, it would compute the same, slower (docs/log.md)."""

import functools
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode

_MIN_ROWS = 256  # below, the detour of `_LinearByConvolution` costs more than it brings
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
    """Whether the module is exactly `kind`: not replaced, wrapped (LoRA) or hooked. Only then may its result be overwritten."""
    return type(module) is kind and not is_watched(module)


class _LinearByConvolution(TorchFunctionMode):
    """Computes float32 `F.linear` by oneDNN on a CPU where torch would use MKL: as a 1 x 1 convolution. On AMD processors it is
    twice as fast, forward and backward. The layers stay plain `nn.Linear`, which quantizers, adapters and counters know."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and 2 <= len(args) <= 3 and _prefers_convolution(*args[:2]):
            return _as_convolution(*args)
        return func(*args, **(kwargs or {}))


def _as_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., in), (out, in), (out) -> (..., out)."""
    num_out, num_in = weight.shape
    # Rows become pixels, features channels: a view, for which oneDNN has the layout "channels last".
    pixels = x.reshape(1, -1, 1, num_in).permute(0, 3, 1, 2)  # (1, in, rows, 1)
    out = F.conv2d(pixels, weight[:, :, None, None], bias, dilation=POINTWISE_DILATION)  # (1, out, rows, 1)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], num_out)


def _prefers_convolution(x: Tensor, weight: Tensor) -> bool:
    # Other tensors (quantised, sharded, fake, sparse) know how a linear layer goes; autocast has bfloat16 in mind.
    if type(x) not in _PLAIN or type(weight) not in _PLAIN or not x.dtype == weight.dtype == torch.float32:
        return False
    if x.device.type != "cpu" or not x.layout == weight.layout == torch.strided or weight.ndim != 2:
        return False
    num_out, num_in = weight.shape
    return (
        x.ndim > 0
        and x.shape[-1] == num_in
        and weight.numel() > 0
        and _MIN_ROWS * num_in <= x.numel()
        and x.numel() // num_in * max(num_in, num_out) < _MAX_NUMBERS
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


_within = threading.local()


def fast_linear(forward: Callable) -> Callable:
    """Decorates a method whose first argument is a tensor: its linear layers, and those of the modules that it calls, are computed
    by `_LinearByConvolution` on a CPU. A layer that is checkpointed needs a decorator of its own: it runs again by itself."""

    @functools.wraps(forward)
    def faster(self, x, *args, **kwargs):
        if is_traced() or x.device.type != "cpu" or x.dtype != torch.float32 or getattr(_within, "block", False):
            return forward(self, x, *args, **kwargs)
        _within.block = True
        try:
            with _LinearByConvolution():
                return forward(self, x, *args, **kwargs)
        finally:
            _within.block = False

    return faster


def map_rows(function: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> Tensor:
    """function(x) for a function that treats each row of x (..., C) by itself.

    On a CPU, it is called for groups of rows. Intermediate results then stay in the cache, and in memory that the allocator reuses
    instead of requesting it from the system.

    Args:
        module: the module whose parts the function calls. If a part has a hook, all rows are processed in one call.
    """
    if is_traced() or x.device.type != "cpu" or x.numel() <= _CACHED_ROWS * x.shape[-1]:
        return function(x)
    if any(is_watched(part) for part in module.modules()):
        return function(x)
    rows = torch.cat([function(part) for part in x.flatten(0, -2).split(_CACHED_ROWS)])
    return rows.unflatten(0, x.shape[:-1])
