"""Faster layers for eager mode, mainly on CPUs. Without this file, the model gives the same results, but slower.

`speed_up` gives the layers of a built model subclasses with a faster `forward`. Parameters, names and hooks stay as they are. The
subclasses keep the names of their bases, because tools look for layers by the name of their class. docs/log.md has measurements.
"""

import functools
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode
from transformers.models.resnet import modeling_resnet as resnet
from transformers.utils import ModelOutput

from ..model import backbone, decoder, encoder, heads, layers, query_selection
from ..model.frozen_batch_norm import FrozenBatchNorm2d
from ..model.modeling_dino_detr import DinoDetrPreTrainedModel
from ..model.run_mode import is_traced

_MIN_ROWS = 256  # with fewer rows, the overhead of `_LinearByConvolution` is larger than its gain
_MAX_NUMBERS = 2**31  # in one tensor of a convolution
_CACHED_ROWS = 1024  # of 2048 float32 numbers: 8 MiB
_PLAIN = (Tensor, nn.Parameter)

# Dilation has no effect on a 1 x 1 kernel, but without it torch on one thread falls back to MKL, which is half as fast.
_POINTWISE_DILATION = 2

# torch has no public way to ask for hooks of all modules.
_has_global_hook = getattr(nn_module, "_has_any_global_hook", lambda: False)


def _is_watched(module: nn.Module) -> bool:
    """Whether calling the module runs more than its own forward: hooks (Grad-CAM), or a replaced forward (offloading)."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in vars(module) or _has_global_hook()


def _is_plain(module: nn.Module | None, kind: type) -> bool:
    """Whether the module is exactly `kind`: not replaced, wrapped (LoRA) or hooked. Only then may its result be overwritten."""
    return type(module) is kind and not _is_watched(module)


# Linear layers


class _LinearByConvolution(TorchFunctionMode):
    """Computes float32 `F.linear` on a CPU as a 1 x 1 convolution.

    torch gives convolutions to oneDNN and linear layers to MKL. On AMD processors oneDNN is twice as fast, forward and backward.
    The layers stay plain `nn.Linear`, which quantizers, adapters and FLOP counters know.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and 2 <= len(args) <= 3 and _prefers_convolution(*args[:2]):
            return _as_convolution(*args)
        return func(*args, **(kwargs or {}))


def _as_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., in), (out, in), (out) -> (..., out)."""
    num_out, num_in = weight.shape
    # Rows become pixels and features become channels: a view in oneDNN's layout "channels last".
    pixels = x.reshape(1, -1, 1, num_in).permute(0, 3, 1, 2)  # (1, in, rows, 1)
    out = F.conv2d(pixels, weight[:, :, None, None], bias, dilation=_POINTWISE_DILATION)  # (1, out, rows, 1)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], num_out)


def _prefers_convolution(x: Tensor, weight: Tensor) -> bool:
    # Tensor subclasses (quantised, sharded, fake) implement `F.linear` themselves. Autocast computes it in bfloat16.
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


_current = threading.local()


def fast_linear(forward: Callable) -> Callable:
    """Decorate a method whose first argument is a tensor: on a CPU, `_LinearByConvolution` computes the linear layers inside it.

    A checkpointed layer needs its own decorator, because the backward pass calls the layer alone.
    """

    @functools.wraps(forward)
    def faster(self, x, *args, **kwargs):
        if is_traced() or x.device.type != "cpu" or x.dtype != torch.float32 or getattr(_current, "is_fast", False):
            return forward(self, x, *args, **kwargs)
        _current.is_fast = True
        try:
            with _LinearByConvolution():
                return forward(self, x, *args, **kwargs)
        finally:
            _current.is_fast = False

    return faster


def map_rows(function: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> Tensor:
    """function(x) for a function that treats each row of x (..., C) by itself.

    On a CPU, the function is called for groups of rows. Intermediate results then stay in the cache, and in memory that the
    allocator reuses instead of requesting it from the system.

    Args:
        module: the module whose parts the function calls. If a part has a hook, the function gets all rows in one call.
    """
    if is_traced() or x.device.type != "cpu" or x.numel() <= _CACHED_ROWS * x.shape[-1]:
        return function(x)
    if any(_is_watched(part) for part in module.modules()):
        return function(x)
    rows = torch.cat([function(part) for part in x.flatten(0, -2).split(_CACHED_ROWS)])
    return rows.unflatten(0, x.shape[:-1])


class DinoDetrEncoderLayer(encoder.DinoDetrEncoderLayer):
    forward = fast_linear(encoder.DinoDetrEncoderLayer.forward)


class DinoDetrEncoderFusion(encoder.DinoDetrEncoderFusion):
    forward = fast_linear(encoder.DinoDetrEncoderFusion.forward)


class DinoDetrDecoderLayer(decoder.DinoDetrDecoderLayer):
    forward = fast_linear(decoder.DinoDetrDecoderLayer.forward)


class MLP(layers.MLP):
    forward = fast_linear(layers.MLP.forward)


class DetectionHead(heads.DetectionHead):
    classify = fast_linear(heads.DetectionHead.classify)


class FeedForward(layers.FeedForward):
    """Computes groups of rows, and ReLU in place where possible."""

    @fast_linear
    def forward(self, x: Tensor) -> Tensor:
        return map_rows(self._forward_rows, x, self)

    def _forward_rows(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)  # (..., F)
        # The result of a convolution is a view here: with gradients, autograd would copy it before ReLU overwrites it.
        in_place = not (torch.is_grad_enabled() or is_traced()) and _is_plain(self.fc1, nn.Linear)
        return self.fc2(F.relu(hidden, inplace=in_place))


class DinoDetrQuerySelection(query_selection.DinoDetrQuerySelection):
    forward = fast_linear(query_selection.DinoDetrQuerySelection.forward)

    def best_logits(self, memory: Tensor) -> Tensor:
        return map_rows(super().best_logits, memory, self)


# Backbones


class DinoDetrBackbone(backbone.DinoDetrBackbone):
    """Runs a ResNet in the layout "channels last", and the linear layers of any backbone fast."""

    def _run(self, pixel_values: Tensor) -> ModelOutput:
        if self._takes_channels_last and pixel_values.device.type in ("cpu", "cuda"):  # not measured on GPUs
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        has_linears = any(type(part) is nn.Linear for part in self.model.modules())
        # The backward pass calls a checkpointed layer alone, and the layer must compute the same there.
        checkpoints = torch.is_grad_enabled() and any(map(_is_checkpointed, self.model.modules()))
        return self._run_fast(pixel_values) if has_linears and not checkpoints else super()._run(pixel_values)

    @fast_linear
    def _run_fast(self, pixel_values: Tensor) -> ModelOutput:
        return super()._run(pixel_values)


def _takes_channels_last(model: nn.Module) -> bool:
    """Whether a backbone is faster in the layout "channels last", and torch computes it correctly there.

    We measured that ResNet is faster, and Swin and ConvNeXt are not (docs/log.md). With a group norm whose input needs no gradient
    (a frozen stem), the backward pass of torch 2.11 crashes. With a strided 1 x 1 convolution of few channels, the backward pass of
    torch 2.14 writes beyond its memory.
    """
    if model.config.model_type != "resnet":
        return False
    return not any(isinstance(part, nn.GroupNorm) or _is_unsafe(part) for part in model.modules())


def _is_unsafe(part: nn.Module) -> bool:
    if not isinstance(part, nn.Conv2d) or part.kernel_size != (1, 1):
        return False
    return max(part.stride) > 1 and part.in_channels // part.groups <= 8


def _is_checkpointed(part: nn.Module) -> bool:
    """Whether transformers or timm checkpoints the module."""
    names = ("gradient_checkpointing", "grad_checkpointing")
    return part.training and any(getattr(part, name, False) is True for name in names)


class _FoldsNorm:
    """A convolution, its frozen batch norm and possibly an activation.

    On a CPU, the norm is folded into the convolution's weight before each use, which costs little beside a pass over the map. The
    parameters that are trained and saved stay as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        convolution, norm, activation = self.convolution, self.normalization, getattr(self, "activation", None)
        if is_traced() or not self._is_known():
            return super().forward(x)
        x = self._fold(x) if x.device.type == "cpu" else norm(convolution(x))
        if _is_plain(activation, nn.ReLU):
            return x.relu_()  # nothing else uses x
        return x if activation is None else activation(x)

    def _is_known(self) -> bool:
        convolution, norm = self.convolution, self.normalization
        norm_is_known = _is_plain(norm, FrozenBatchNorm2d) and _is_plain(norm.activation, nn.Identity)
        return norm_is_known and _is_plain(convolution, nn.Conv2d) and convolution.bias is None

    def _fold(self, x: Tensor) -> Tensor:
        convolution = self.convolution
        scale, shift = _scale_and_shift(self.normalization)
        weight = (convolution.weight * scale[:, None, None, None]).to(convolution.weight.dtype)
        if weight.requires_grad:
            weight.register_hook(_in_plain_layout)
        dilation = _POINTWISE_DILATION if convolution.kernel_size == (1, 1) else convolution.dilation
        settings = convolution.stride, convolution.padding, dilation, convolution.groups
        return F.conv2d(x, weight, shift.to(weight.dtype), *settings)


def _scale_and_shift(norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """The norm as x * scale + shift, (width) each, at least in float32."""
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    scale = norm.weight.to(dtype) * (norm.running_var.to(dtype) + norm.eps).rsqrt()
    return scale, norm.bias.to(dtype) - norm.running_mean.to(dtype) * scale


def _in_plain_layout(gradient: Tensor) -> Tensor:
    """Give the gradient the layout of the weight, also in sides of 1. Distributed training copies other layouts."""
    return gradient.flatten(1).contiguous().unflatten(1, gradient.shape[1:])


class ResNetConvLayer(_FoldsNorm, resnet.ResNetConvLayer):
    pass


class ResNetShortCut(_FoldsNorm, resnet.ResNetShortCut):
    pass


class ReLU(nn.ReLU):
    """ReLU in place on the residual sum, which nothing else reads.

    With a hook attached it is not in place: autograd forbids overwriting what a backward hook has seen.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=not is_traced() and _is_plain(self, ReLU))


# Application to a model

_FASTER = {
    encoder.DinoDetrEncoderLayer: DinoDetrEncoderLayer,
    encoder.DinoDetrEncoderFusion: DinoDetrEncoderFusion,
    decoder.DinoDetrDecoderLayer: DinoDetrDecoderLayer,
    layers.MLP: MLP,
    heads.DetectionHead: DetectionHead,
    layers.FeedForward: FeedForward,
    query_selection.DinoDetrQuerySelection: DinoDetrQuerySelection,
    backbone.DinoDetrBackbone: DinoDetrBackbone,
}
_FASTER_IN_RESNET = {resnet.ResNetConvLayer: ResNetConvLayer, resnet.ResNetShortCut: ResNetShortCut}


def speed_up(model: nn.Module) -> None:
    """Make the layers of a model faster, in place. Only layers of exactly our own classes change, so a second call does nothing."""
    for part in model.modules():
        if type(part) is backbone.DinoDetrBackbone:
            part._takes_channels_last = _takes_channels_last(part.model)
            if part.model.config.model_type == "resnet":
                fold_norms(part.model)
        if type(part) in _FASTER:
            part.__class__ = _FASTER[type(part)]


def fold_norms(model: nn.Module) -> None:
    """Let the layers of a ResNet of transformers fold their norms and activate in place. Nothing reads the overwritten tensors."""
    for part in model.modules():
        if type(part) in _FASTER_IN_RESNET:
            part.__class__ = _FASTER_IN_RESNET[type(part)]  # its own forward handles its activation
        elif type(getattr(part, "activation", None)) is nn.ReLU:
            part.activation.__class__ = ReLU


DinoDetrPreTrainedModel.after_building.append(speed_up)
