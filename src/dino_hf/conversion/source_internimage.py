"""InternImage for the second implementation of DINO in source_arithmetic.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .source_layers import SourceLayers

_EPS = 1e-6


class SourceInternImage(SourceLayers):
    """InternImage. `self.settings` has the configuration of the whole model."""

    def internimage(self, x: Tensor) -> list[Tensor]:
        """(B, 3, h, w) -> maps (B, C, h, w) of the four stages."""
        stem, maps = "backbone.0.patch_embed", []
        x = F.gelu(self.channel_norm(self.conv(x, f"{stem}.conv1", stride=2, padding=1), f"{stem}.norm1.1", _EPS))
        x = self.channel_norm(self.conv(x, f"{stem}.conv2", stride=2, padding=1), f"{stem}.norm2.1", _EPS)
        for stage in range(4):
            name = f"backbone.0.levels.{stage}"
            x = x.movedim(1, -1)  # (B, h, w, C)
            for block in self.numbered(f"{name}.blocks", "norm1.0.weight"):
                x = self.internimage_block(x, block)
            has_norm = f"{name}.norm.0.weight" in self
            x = (self.layer_norm(x, f"{name}.norm.0", _EPS) if has_norm else x).movedim(-1, 1)
            maps.append(x)
            if stage < 3:
                x = self.conv(x, f"{name}.downsample.conv", stride=2, padding=1)
                x = self.channel_norm(x, f"{name}.downsample.norm.1", _EPS)
        return maps

    def internimage_block(self, x: Tensor, name: str) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)"""
        for number, layer in ((1, self.deformable_conv), (2, self.gelu_mlp)):
            part, norm = ("dcn", "norm1.0") if number == 1 else ("mlp", "norm2.0")
            if self.settings.backbone_config.post_norm:
                y = self.layer_norm(layer(x, f"{name}.{part}"), f"{name}.{norm}", _EPS)
            else:
                y = layer(self.layer_norm(x, f"{name}.{norm}", _EPS), f"{name}.{part}")
            x = x + self.tensors.get(f"{name}.gamma{number}", 1) * y
        return x

    def gelu_mlp(self, x: Tensor, name: str) -> Tensor:
        return self.linear(F.gelu(self.linear(x, f"{name}.fc1")), f"{name}.fc2")

    def deformable_conv(self, x: Tensor, name: str) -> Tensor:
        """DCNv3 (arXiv:2211.05778, eq. 2), point after point: (B, h, w, C) -> (B, h, w, C)."""
        batch, height, width, channels = x.shape
        near = self.conv(x.movedim(-1, 1), f"{name}.dw_conv.0", padding=1, groups=channels).movedim(1, -1)
        near = F.gelu(self.layer_norm(near, f"{name}.dw_conv.1.1", _EPS)).flatten(1, 2)  # (B, h * w, C)
        offsets = self.linear(near, f"{name}.offset").unflatten(-1, (-1, 9, 2))  # (B, h * w, G, 9, 2)
        weights = self.linear(near, f"{name}.mask").unflatten(-1, (-1, 9)).softmax(-1)  # (B, h * w, G, 9)
        value = self.linear(x, f"{name}.input_proj").flatten(1, 2).unflatten(-1, (weights.shape[2], -1))
        row, column = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)  # (h * w)
        cell = torch.stack([column, row], -1)[:, None]  # (h * w, 1, 2) as (x, y)
        total = torch.zeros_like(value)
        for point in range(9):
            step = torch.tensor([point // 3 - 1, point % 3 - 1])  # columns first
            place = cell + (step + offsets[:, :, :, point]) * self.settings.backbone_config.offset_scale
            place = (place + 0.5) / torch.tensor([width, height])
            samples = self.sample(value, height, width, place[:, :, :, None])[:, :, :, 0]  # (B, h * w, G, C / G)
            total = total + weights[:, :, :, point, None] * samples
        return self.linear(total.flatten(2).view(batch, height, width, channels), f"{name}.output_proj")
