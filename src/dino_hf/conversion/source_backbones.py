"""Backbones for the second implementation of DINO in source_arithmetic.py."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .release_tensors import count_backbone_maps
from .source_focalnet import SourceFocalNet
from .source_internimage import SourceInternImage
from .source_vitdet import SourceVitDet


class SourceBackbones(SourceInternImage, SourceFocalNet, SourceVitDet):
    """Backbones: (B, 3, h, w) -> maps (B, C, h, w), finest first."""

    def backbone(self, pixels: Tensor) -> list[Tensor]:
        if "backbone.0.body.conv1.weight" in self:
            maps = self.resnet(pixels)
        elif "backbone.0.layers.0.blocks.0.modulation.f.weight" in self:
            maps = self.focalnet(pixels)
        elif "backbone.0.net.patch_embed.proj.weight" in self:
            maps = self.vitdet(pixels)
        elif "backbone.0.patch_embed.proj.weight" in self:
            maps = self.swin(pixels)
        elif "backbone.0.patch_embed.conv1.weight" in self:
            maps = self.internimage(pixels)
        else:
            maps = self.convnext(pixels)
        return maps[-count_backbone_maps(self.tensors) :]

    def resnet(self, x: Tensor) -> list[Tensor]:
        prefix = "backbone.0.body."

        def norm(x: Tensor, name: str) -> Tensor:
            mean, variance, weight, bias = (
                self[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
            )
            return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

        x = norm(self.conv(x, prefix + "conv1", stride=2, padding=3), prefix + "bn1").relu()
        x = F.max_pool2d(x, 3, 2, 1)
        maps = []
        for stage in range(1, 5):
            for block, name in enumerate(self.numbered(f"{prefix}layer{stage}", "conv1.weight")):
                stride = 2 if stage > 1 and block == 0 else 1
                strides = [1, stride, 1] if f"{name}.conv3.weight" in self else [stride, 1]
                y = x
                for part, step in enumerate(strides, 1):
                    padding = self[f"{name}.conv{part}.weight"].shape[-1] // 2
                    y = norm(self.conv(y, f"{name}.conv{part}", stride=step, padding=padding), f"{name}.bn{part}")
                    y = y.relu() if part < len(strides) else y
                if f"{name}.downsample.0.weight" in self:
                    x = norm(self.conv(x, f"{name}.downsample.0", stride=stride), f"{name}.downsample.1")
                x = (x + y).relu()
            maps.append(x)
        return maps

    def swin(self, x: Tensor) -> list[Tensor]:
        prefix = "backbone.0."
        x = F.pad(x, (0, -x.shape[-1] % 4, 0, -x.shape[-2] % 4))
        x = self.conv(x, prefix + "patch_embed.proj", stride=4).movedim(1, -1)  # (B, h, w, C)
        x = self.layer_norm(x, prefix + "patch_embed.norm")
        maps = []
        for stage in range(4):
            for block, name in enumerate(self.numbered(f"{prefix}layers.{stage}.blocks", "norm1.weight")):
                x = x + self.window_attention(self.layer_norm(x, f"{name}.norm1"), f"{name}.attn", shift=block % 2 == 1)
                y = F.gelu(self.linear(self.layer_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
                x = x + self.linear(y, f"{name}.mlp.fc2")
            if f"{prefix}norm{stage}.weight" in self:
                maps.append(self.layer_norm(x, f"{prefix}norm{stage}").movedim(-1, 1))
            if stage < 3:
                x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
                x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)
                x = self.layer_norm(x, f"{prefix}layers.{stage}.downsample.norm")
                x = self.linear(x, f"{prefix}layers.{stage}.downsample.reduction")
        return maps

    def window_attention(self, x: Tensor, name: str, shift: bool) -> Tensor:
        """Attention inside windows of a map (B, h, w, C). Every second block shifts the windows by half a window."""
        table = self[f"{name}.relative_position_bias_table"]
        window, heads = (math.isqrt(len(table)) + 1) // 2, table.shape[1]
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        rows, columns = x.shape[1], x.shape[2]
        step = window // 2 if shift else 0

        def region(length: int) -> Tensor:
            """Region of each cell, inside which it attends: 0 before the last window, 1 and 2 in its two parts."""
            places = torch.arange(length)
            return (places >= length - window).long() + (places >= length - step).long() if step else places * 0

        def windows(x: Tensor) -> Tensor:  # (B, h, w, C) -> (B, windows, window * window, C)
            x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)
            return x.flatten(3, 4).flatten(1, 2)

        x = windows(x.roll((-step, -step), (1, 2)))
        query, key, value = (
            part.unflatten(-1, (heads, -1)).transpose(2, 3) for part in self.linear(x, f"{name}.qkv").chunk(3, -1)
        )
        y, other = torch.arange(window * window), torch.arange(window * window)[:, None]
        row = (other // window - y // window + window - 1) * (2 * window - 1) + other % window - y % window + window - 1
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + table[row].permute(2, 0, 1)
        regions = windows((region(rows)[:, None] * 3 + region(columns))[None, ..., None])[0, ..., 0]  # (windows, cells)
        scores = scores.masked_fill((regions[:, None, :] != regions[:, :, None])[None, :, None], -100.0)
        x = self.linear((scores.softmax(-1) @ value).transpose(2, 3).flatten(3), f"{name}.proj")
        x = x.unflatten(2, (window, window)).unflatten(1, (rows // window, columns // window)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2).roll((step, step), (1, 2))[:, :height, :width]

    def convnext(self, x: Tensor) -> list[Tensor]:
        prefix, maps = "backbone.0.", []
        for stage in range(4):
            first, second = (f"{prefix}downsample_layers.{stage}.{part}" for part in (0, 1))
            if stage == 0:
                x = self.channel_norm(self.conv(x, first, stride=4), second, 1e-6)
            else:
                x = self.conv(self.channel_norm(x, first, 1e-6), second, stride=2)
            for name in self.numbered(f"{prefix}stages.{stage}", "gamma"):
                y = self.conv(x, f"{name}.dwconv", padding=3, groups=x.shape[1]).movedim(1, -1)
                y = F.gelu(self.linear(self.layer_norm(y, f"{name}.norm", 1e-6), f"{name}.pwconv1"))
                x = x + (self[f"{name}.gamma"] * self.linear(y, f"{name}.pwconv2")).movedim(-1, 1)
            known = f"{prefix}norm{stage}.weight" in self
            maps.append(self.channel_norm(x, f"{prefix}norm{stage}", 1e-6) if known else x)
        return maps
