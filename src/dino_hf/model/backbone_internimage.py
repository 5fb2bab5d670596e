"""InternImage (arXiv:2211.05778), a convolutional backbone whose 3 x 3 convolutions sample at learnt offsets."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import can_return_tuple

from .attention_backends import choose_backend
from .configuration_internimage import DinoDetrInternImageConfig
from .layers import build_layer, linear, xavier, zero
from .ms_deform_attn import ms_deform_attn_fused

_POINTS = 9  # of a 3 x 3 convolution


def _truncated_normal(layer: nn.Linear, std: float) -> None:
    """Truncated normal weight and zero bias."""
    nn.init.trunc_normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)


def _default_values(layer: nn.Module) -> None:
    """torch's initial values."""
    layer.reset_parameters()


def _conv(num_in: int, num_out: int, **settings) -> nn.Conv2d:
    return build_layer(_default_values, nn.Conv2d, num_in, num_out, kernel_size=3, padding=1, **settings)


def _conv_last(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of maps whose channels are the last axis: (B, h, w, C) -> (B, h', w', C')."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def cell_centers(x: Tensor) -> Tensor:
    """Centres of the cells of maps (B, h, w, C), in [0, 1]: (B, h * w, 1, 2) as (x, y), float32 at least."""
    batch, height, width, _ = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    columns = (torch.arange(width, dtype=dtype, device=x.device) + 0.5) / width
    rows = (torch.arange(height, dtype=dtype, device=x.device) + 0.5) / height
    centers = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)], dim=-1)  # (h, w, 2)
    return centers.flatten(0, 1)[None, :, None].repeat(batch, 1, 1, 1)


def kernel_grid(centers: Tensor) -> Tensor:
    """Cells of a 3 x 3 kernel relative to its centre: (9, 2) as (x, y), columns first. Dtype and device are of `centers`."""
    steps = torch.arange(-1, 2, dtype=centers.dtype, device=centers.device)
    return torch.stack([steps[:, None].expand(3, 3), steps.expand(3, 3)], dim=-1).flatten(0, 1)


class InternImageConv(nn.Module):
    """Deformable convolution version 3 (DCNv3) of 3 x 3 cells, stride 1.

    Each cell and group samples the map at 9 points and adds the samples with weights that sum to 1. This is multi-scale deformable
    attention with one level, with groups as heads, and with cell centres as references. So our kernels compute it.

    Attributes:
        attention_backend: preferred implementation of the sampling; None for an automatic choice. A detector sets it to its
            `ms_deform_attn_backend`.
    """

    attention_backend: str | None = None

    def __init__(self, width: int, num_groups: int, offset_scale: float, eps: float):
        super().__init__()
        self.num_groups, self.offset_scale = num_groups, offset_scale
        self.local_conv = _conv(width, width, groups=width)
        self.local_norm = nn.LayerNorm(width, eps=eps)
        self.offsets = linear(width, num_groups * _POINTS * 2, zero)
        self.weights = linear(width, num_groups * _POINTS, zero)
        self.input_proj = linear(width, width, xavier)
        self.output_proj = linear(width, width, xavier)

    def forward(self, x: Tensor, centers: Tensor, grid: Tensor) -> Tensor:
        """
        Args:
            x: (B, h, w, C)
            centers: see `cell_centers`.
            grid: see `kernel_grid`.
        Returns:
            (B, h, w, C)
        """
        groups, size = self.num_groups, tuple(x.shape[1:3])
        value = self.input_proj(x).flatten(1, 2).unflatten(-1, (groups, -1))  # (B, h * w, G, C / G)
        local = F.gelu(self.local_norm(_conv_last(self.local_conv, x))).flatten(1, 2)  # (B, h * w, C)
        offsets = self.offsets(local).unflatten(-1, (groups, 1, _POINTS, 2))  # (B, h * w, G, 1, 9, 2)
        logits = self.weights(local).unflatten(-1, (groups, 1, _POINTS))  # (B, h * w, G, 1, 9)
        # Half precision is too coarse for the sum: an offset of 1.01 cells would become 1.008.
        offsets = torch.add(grid * self.offset_scale, offsets.to(grid.dtype), alpha=self.offset_scale)
        backend = choose_backend(self.attention_backend, value.device.type, value.dtype, value.device.index)
        samples = ms_deform_attn_fused(value, [size], centers, offsets, logits, backend)  # (B, h * w, C)
        return self.output_proj(samples).unflatten(1, size)


class InternImageFeedForward(nn.Module):
    """The feed-forward block of a layer: (..., C) -> (..., C)."""

    def __init__(self, width: int, inner: int, std: float):
        super().__init__()
        self.fc1 = linear(width, inner, partial(_truncated_normal, std=std))
        self.fc2 = linear(inner, width, partial(_truncated_normal, std=std))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class InternImageLayer(GradientCheckpointingLayer):
    """Deformable convolution and feed-forward block, each with a norm, a learnt scale and a residual sum.

    Args:
        width: C
        drop_rate: probability that training skips a branch of an image (stochastic depth).
    """

    def __init__(self, config: DinoDetrInternImageConfig, width: int, num_groups: int, drop_rate: float):
        super().__init__()
        eps, scale = config.layer_norm_eps, config.layer_scale_init_value
        self.post_norm, self.drop_rate = config.post_norm, drop_rate
        self.conv_norm = nn.LayerNorm(width, eps=eps)
        self.conv = InternImageConv(width, num_groups, config.offset_scale, eps)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = InternImageFeedForward(width, int(width * config.mlp_ratio), config.initializer_range)
        self.conv_scale = None if scale is None else nn.Parameter(torch.full((width,), float(scale)))
        self.mlp_scale = None if scale is None else nn.Parameter(torch.full((width,), float(scale)))

    def forward(self, x: Tensor, centers: Tensor, grid: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C). Other arguments: see `InternImageConv`."""
        if self.post_norm:
            x = x + self._scaled(self.conv_norm(self.conv(x, centers, grid)), self.conv_scale)
            return x + self._scaled(self.mlp_norm(self.mlp(x)), self.mlp_scale)
        x = x + self._scaled(self.conv(self.conv_norm(x), centers, grid), self.conv_scale)
        return x + self._scaled(self.mlp(self.mlp_norm(x)), self.mlp_scale)

    def _scaled(self, branch: Tensor, scale: Tensor | None) -> Tensor:
        branch = branch if scale is None else scale * branch
        if not self.training or not self.drop_rate:
            return branch
        kept = branch.new_empty(len(branch), 1, 1, 1).bernoulli_(1 - self.drop_rate)
        return branch * (kept / (1 - self.drop_rate))


class InternImageDownsampling(nn.Module):
    """A 3 x 3 convolution of stride 2 and a norm: (B, h, w, C) -> (B, h / 2, w / 2, 2 * C), sizes rounded up."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.conv = _conv(width, 2 * width, stride=2, bias=False)
        self.norm = nn.LayerNorm(2 * width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(_conv_last(self.conv, x))


class InternImageStage(nn.Module):
    """Layers of one width. The downsampling to the next stage belongs to this stage."""

    def __init__(self, config: DinoDetrInternImageConfig, index: int, drop_rates: list[float]):
        super().__init__()
        width, groups = config.hidden_sizes[index], config.num_groups[index]
        self.layers = nn.ModuleList(InternImageLayer(config, width, groups, rate) for rate in drop_rates)
        self.norm = None if config.post_norm else nn.LayerNorm(width, eps=config.layer_norm_eps)
        is_last = index + 1 == len(config.depths)
        self.downsample = None if is_last else InternImageDownsampling(width, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C), before the downsampling."""
        centers = cell_centers(x)
        grid = kernel_grid(centers)
        for layer in self.layers:
            x = layer(x, centers, grid)
        return x if self.norm is None else self.norm(x)


class InternImageEmbeddings(nn.Module):
    """Two convolutions of stride 2, with a norm each: (B, 3, h, w) -> (B, h / 4, w / 4, C), sizes rounded up."""

    def __init__(self, config: DinoDetrInternImageConfig):
        super().__init__()
        width, eps = config.embed_dim, config.layer_norm_eps
        self.conv1 = _conv(config.num_channels, width // 2, stride=2)
        self.norm1 = nn.LayerNorm(width // 2, eps=eps)
        self.conv2 = _conv(width // 2, width, stride=2)
        self.norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(pixel_values).permute(0, 2, 3, 1)))  # (B, h / 2, w / 2, C / 2)
        return self.norm2(_conv_last(self.conv2, x))


class InternImageEncoder(nn.Module):
    """The stages."""

    def __init__(self, config: DinoDetrInternImageConfig):
        super().__init__()
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").split(config.depths)
        self.stages = nn.ModuleList(
            InternImageStage(config, index, stage_rates.tolist()) for index, stage_rates in enumerate(rates)
        )


class DinoDetrInternImageBackbone(BackboneMixin, PreTrainedModel):
    """InternImage as a backbone: feature maps of the stages named in `out_features`, before their downsampling."""

    config: DinoDetrInternImageConfig
    config_class = DinoDetrInternImageConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    has_attentions = False
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternImageLayer"]  # noqa: RUF012

    def __init__(self, config: DinoDetrInternImageConfig):
        super().__init__(config)
        self.embeddings = InternImageEmbeddings(config)
        self.encoder = InternImageEncoder(config)
        self.num_features = [config.embed_dim, *config.hidden_sizes]
        self.post_init()

    def _init_weights(self, module):
        if hasattr(module, "initial_values"):
            module.initial_values(module)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, InternImageLayer) and module.conv_scale is not None:
            for scale in (module.conv_scale, module.mlp_scale):
                nn.init.constant_(scale, self.config.layer_scale_init_value)

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, output_attentions: bool | None = None
    ) -> BackboneOutput:
        """
        Args:
            pixel_values: (B, 3, h, w) normalised images.
            output_hidden_states: also return the maps of the stem and of all stages up to the last one used.
            output_attentions: no effect; there is no attention.
        Returns:
            `feature_maps` (B, C, h, w), finest first.
        """
        x = self.embeddings(pixel_values)  # (B, h, w, C)
        maps = [x]
        for index, stage in enumerate(self.encoder.stages[: self.stage_names.index(self.out_features[-1])]):
            x = stage(self.encoder.stages[index - 1].downsample(x) if index else x)
            maps.append(x)
        maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
        used = tuple(x for name, x in zip(self.stage_names, maps, strict=False) if name in self.out_features)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BackboneOutput(feature_maps=used, hidden_states=tuple(maps) if output_hidden_states else None)
