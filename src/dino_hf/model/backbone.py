"""Pixels -> L feature maps of one width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone
from transformers.models.resnet.modeling_resnet import ResNetConvLayer, ResNetShortCut
from transformers.utils import ModelOutput

from .backbone_trials import unused_parameters
from .configuration_dino_detr import DinoDetrConfig
from .cpu_speed import POINTWISE_DILATION, fast_linear, is_plain, is_traced
from .layers import carries_gradient, starts_as, xavier
from .timm_backbones import prepare_timm_backbone, refuse_size, timm_side_multiple

# Types of backbones that are faster in the layout "channels last" (docs/log.md); Swin and ConvNeXt are not.
_FASTER_IN_CHANNELS_LAST = ("resnet",)


def _drop_keys(module: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """Before `load_state_dict`: a published backbone may hold what its counterpart here has no use for."""
    for name in ("weight", "bias") if isinstance(module, nn.Identity) else ("num_batches_tracked",):
        state_dict.pop(prefix + name, None)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and scale are constants: detectors train on too few images per step to estimate them."""

    def __init__(self, num_features: int, eps: float, activation: nn.Module | None = None):
        super().__init__()
        self.eps = eps
        self.activation = activation or nn.Identity()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(num_features))
        self.register_load_state_dict_pre_hook(_drop_keys)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        return self.activation(F.batch_norm(x, *statistics, self.weight, self.bias, training=False, eps=self.eps))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The norm as x * scale + shift, (width) each, in float32 at least."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        scale = self.weight.to(dtype) * (self.running_var.to(dtype) + self.eps).rsqrt()
        return scale, self.bias.to(dtype) - self.running_mean.to(dtype) * scale


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm2d below `module` by its frozen form, values kept."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            # timm has a batch norm that contains what follows it
            followed_by = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
            frozen = FrozenBatchNorm2d(
                child.num_features, child.eps, nn.Sequential(*followed_by) if followed_by else None
            )
            frozen.load_state_dict(child.state_dict(), assign=True)
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child)


class _FoldsNorm:
    """A convolution, its frozen batch norm and perhaps an activation. On a CPU the norm is folded into the convolution's weight
    before each use, which is little beside a pass over the map; what is trained and saved stays as it is."""

    def forward(self, x: Tensor) -> Tensor:
        convolution, norm, activation = self.convolution, self.normalization, getattr(self, "activation", None)
        if is_traced() or not self._is_known():
            return super().forward(x)
        x = self._fold(x) if x.device.type == "cpu" else norm(convolution(x))
        if is_plain(activation, nn.ReLU):
            return x.relu_()  # nothing else uses x
        return x if activation is None else activation(x)

    def _is_known(self) -> bool:
        convolution, norm = self.convolution, self.normalization
        norm_is_known = is_plain(norm, FrozenBatchNorm2d) and is_plain(norm.activation, nn.Identity)
        return norm_is_known and is_plain(convolution, nn.Conv2d) and convolution.bias is None

    def _fold(self, x: Tensor) -> Tensor:
        convolution, norm = self.convolution, self.normalization
        scale, shift = norm.scale_and_shift()
        weight = (convolution.weight * scale[:, None, None, None]).to(convolution.weight.dtype)
        if weight.requires_grad:
            weight.register_hook(_in_plain_layout)
        dilation = POINTWISE_DILATION if convolution.kernel_size == (1, 1) else convolution.dilation
        settings = convolution.stride, convolution.padding, dilation, convolution.groups
        return F.conv2d(x, weight, shift.to(weight.dtype), *settings)


def _in_plain_layout(gradient: Tensor) -> Tensor:
    """From channels last to the layout of the weight, which distributed training wants gradients to have, sides of 1 included."""
    return gradient.flatten(1).contiguous().unflatten(1, gradient.shape[1:])


class FoldingConvLayer(_FoldsNorm, ResNetConvLayer):
    pass


class FoldingShortCut(_FoldsNorm, ResNetShortCut):
    pass


class InPlaceReLU(nn.ReLU):
    """ReLU in place on the residual sum, which nothing else reads. With a hook attached it is not in place: autograd forbids
    overwriting what a backward hook has seen."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=not is_traced() and is_plain(self, InPlaceReLU))


def fold_norms(module: nn.Module) -> None:
    """Let the layers of a ResNet of transformers fold their norms, and its activations work in place. Nothing reads the overwritten
    tensors. Parameters and names stay."""
    folding = {ResNetConvLayer: FoldingConvLayer, ResNetShortCut: FoldingShortCut}
    for part in module.modules():
        if type(part) in folding:
            part.__class__ = folding[type(part)]  # its activation is its own matter
        elif type(getattr(part, "activation", None)) is nn.ReLU:
            part.activation.__class__ = InPlaceReLU


def pixels_of_cells(mask: Tensor, height: int, width: int) -> Tensor:
    """(B, h, w) -> (B, height, width): what `F.interpolate` takes for the nearest pixel of each cell, to the last bit. Written
    out, for in exported graphs it is an operator that runtimes round in their own ways, to the pixel before."""

    def nearest(size: int, num_cells: int) -> Tensor:
        cells = torch.arange(num_cells, device=mask.device, dtype=torch.float32)
        scale = cells.new_full((), size) / num_cells
        return (cells * scale).long().clamp(max=size - 1)

    return mask.index_select(1, nearest(mask.shape[1], height)).index_select(2, nearest(mask.shape[2], width))


def _takes_channels_last(backbone: nn.Module, model_type: str) -> bool:
    """Whether a backbone computes maps in the layout "channels last": only those that were measured in it, and only where torch is
    right in it. A group norm whose input needs no gradient (a frozen stem) crashes torch 2.11 in its backward pass; a strided
    1 x 1 convolution of few channels writes beyond its memory in that of torch 2.14."""
    if model_type not in _FASTER_IN_CHANNELS_LAST:
        return False
    return not any(isinstance(part, nn.GroupNorm) or _is_unsafe(part) for part in backbone.modules())


def _is_checkpointed(part: nn.Module) -> bool:
    """By transformers or by timm."""
    names = ("gradient_checkpointing", "grad_checkpointing")
    return part.training and any(getattr(part, name, False) is True for name in names)


def _is_unsafe(part: nn.Module) -> bool:
    if not isinstance(part, nn.Conv2d) or part.kernel_size != (1, 1):
        return False
    return max(part.stride) > 1 and part.in_channels // part.groups <= 8


class DinoDetrBackbone(nn.Module):
    """Any backbone of `AutoBackbone`, and a projection of its maps to L levels of width C (DINO sec. 4.1, app. D.1)."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        # "sdpa", asked of the whole model, is what a backbone takes by itself if it can; one without attention refuses the name.
        attention = config.backbone_config._attn_implementation
        self.model = AutoBackbone.from_config(
            config.backbone_config, attn_implementation=None if attention == "sdpa" else attention
        )
        if config.backbone_config.model_type == "timm_backbone":
            prepare_timm_backbone(self.model)
        freeze_batch_norm(self.model)
        if config.backbone_config.model_type == "resnet":
            fold_norms(self.model)
        self._takes_channels_last = _takes_channels_last(self.model, config.backbone_config.model_type)
        # Swin and BiT end with a norm for classification that no feature map passes: its parameters would never get a gradient.
        for body, unused in (("swin", "layernorm"), ("bit", "norm")):
            if hasattr(getattr(self.model, body, None), unused):
                identity = nn.Identity()
                identity.register_load_state_dict_pre_hook(_drop_keys)
                setattr(getattr(self.model, body), unused, identity)
        self.num_frozen_stages = config.num_frozen_backbone_stages
        # Of these types the stages are known.
        is_known = config.backbone_config.model_type in ("resnet", "swin", "convnext", "convnextv2", "bit")
        self._unused = frozenset() if is_known else unused_parameters(self.model, config.backbone_config)
        is_timm = config.backbone_config.model_type == "timm_backbone"
        self._side_multiple = timm_side_multiple(self.model) if is_timm else 1
        self.freeze_stages()

        channels = self.model.channels
        num_extra = config.num_feature_levels - len(channels)
        bias = config.projection_bias
        projections = [
            starts_as(xavier, nn.Conv2d, width, config.d_model, kernel_size=1, bias=bias) for width in channels
        ]
        # The first extra level looks at the backbone's last map as it is, further ones at the level before.
        for width in [channels[-1], *[config.d_model] * (num_extra - 1)][:num_extra]:
            projections.append(
                starts_as(xavier, nn.Conv2d, width, config.d_model, kernel_size=3, stride=2, padding=1, bias=bias)
            )
        self.projections = nn.ModuleList(projections)
        self.norms = nn.ModuleList(nn.GroupNorm(32, config.d_model) for _ in projections)

    def freeze_stages(self) -> None:
        """Leave out of training the first stages, and what no feature map depends on: no gradient reaches it, and distributed
        training would wait for one."""
        for name, parameter in self.model.named_parameters():
            if name in self._unused:
                parameter.requires_grad_(False)
        num_stages = self.num_frozen_stages
        body = getattr(self.model, "swin", getattr(self.model, "bit", self.model))
        stem = getattr(body, "embedder", getattr(body, "embeddings", None))
        encoder = getattr(body, "encoder", None)
        stages = getattr(encoder, "stages", getattr(encoder, "layers", None))
        if stem is None or stages is None:
            if num_stages:
                raise ValueError(
                    f"num_frozen_backbone_stages={num_stages}: the stages of {type(self.model).__name__} are not known here, only "
                    "those of ResNet, Swin, ConvNeXt and BiT. Use 0, and requires_grad_(False) on parameters of your choice."
                )
            return
        stages = [stem, *stages]
        if num_stages > len(stages):
            raise ValueError(
                f"num_frozen_backbone_stages={num_stages}, but {type(self.model).__name__} has {len(stages)} with its stem."
            )
        last = max(self.model.out_indices)
        for stage in stages[:num_stages] + stages[last + 1 :]:
            stage.requires_grad_(False)
        downsample = getattr(stages[last], "downsample", None)
        if downsample is not None:  # a Swin stage ends with the way to the next
            downsample.requires_grad_(False)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[list[Tensor], list[Tensor] | None]:
        """
        Args:
            pixel_values: (B, 3, h, w) normalised.
            pixel_mask: (B, h, w) True on the image, False on padding; None where nothing is padded.
        Returns:
            L maps (B, C, h_l, w_l) and their padding masks (B, h_l, w_l), True on padding, finest first; no masks where nothing
            is padded.
        Raises:
            ValueError: a timm backbone does not take images of this size.
        """
        pixel_values, pixel_mask = self._pad(pixel_values, pixel_mask)
        if self._takes_channels_last and pixel_values.device.type in ("cpu", "cuda"):  # GPUs: not measured
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            pixel_values = carries_gradient(pixel_values, self.model)
        try:
            outputs = self._run(pixel_values)
        except (RuntimeError, AssertionError, ValueError) as error:
            if self._side_multiple is None:
                refuse_size(self.model, pixel_values, error)
            raise
        maps = self.project(list(outputs.feature_maps))
        if pixel_mask is None:
            return maps, None
        padding = ~pixel_mask  # (B, h, w)
        padding[:, 0, 0] = False  # where images begin: one without any valid pixel would divide by a size of zero
        return maps, [pixels_of_cells(padding, *level.shape[-2:]) for level in maps]

    def _pad(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Pad images, right and below, to sides that the backbone takes. The mask makes them equal to images padded before."""
        height, width = pixel_values.shape[-2:]
        multiple = self._side_multiple or 1
        below, right = -height % multiple, -width % multiple
        if multiple == 1 or not (is_traced() or below or right):  # a traced graph must fit any size
            return pixel_values, pixel_mask
        if pixel_mask is None:
            pixel_mask = pixel_values.new_ones((), dtype=torch.bool).expand(len(pixel_values), height, width)
        return tuple(F.pad(tensor, (0, right, 0, below)) for tensor in (pixel_values, pixel_mask))

    def _run(self, pixel_values: Tensor) -> ModelOutput:
        """The backbone's output, by way of its fast linear layers if it has any."""
        has_linears = any(type(part) is nn.Linear for part in self.model.modules())
        # What is checkpointed runs again in the backward pass by itself, and has to do there what it did here.
        checkpoints = torch.is_grad_enabled() and any(map(_is_checkpointed, self.model.modules()))
        return self._run_fast(pixel_values) if has_linears and not checkpoints else self.model(pixel_values)

    @fast_linear
    def _run_fast(self, pixel_values: Tensor) -> ModelOutput:
        return self.model(pixel_values)

    def project(self, features: list[Tensor]) -> list[Tensor]:
        """Maps of the backbone -> L maps (B, C, h_l, w_l)."""
        maps = []
        for level, (projection, norm) in enumerate(zip(self.projections, self.norms, strict=True)):
            if level < len(features):
                source = features[level]
            else:
                source = features[-1] if level == len(features) else maps[-1]
            # Of channels-last maps, torch computes a group's variance as a difference of squares, which loses digits; and see
            # `_takes_channels_last`.
            maps.append(norm(projection(source).contiguous()))
        return maps
